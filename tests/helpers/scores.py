"""Arrays of a datamodel stage by name, such as `score_docs_N`."""

from pathlib import Path

import numpy as np

from dsdm_jax.attribution import score_arrays

KINDS = ('score', 'error', 'spread', 'groups', 'group', 'example_rows', 'example_score')


def save(folder: Path, **arrays: np.ndarray) -> None:
  for name, array in arrays.items():
    kind = max((kind for kind in KINDS if name.startswith(f'{kind}_')), key=len)
    task, _, axes = name.removeprefix(f'{kind}_').rpartition('_')
    score_arrays.write(folder, task, {f'{kind}_{axes}': array})


def load(folder: Path) -> dict[str, np.ndarray]:
  return dict(score_arrays.ScoreArrays(folder))

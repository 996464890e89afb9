"""The truth: what models trained on subsets really do on the targets. Finished chunks are kept, so a killed bank goes
on where it stopped.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from dsdm_jax.core import storage
from dsdm_jax.training.differentiable import ScannedTraining, TargetOutputs
from dsdm_jax.training.step import TrainState


def truth(
  folder: Path,
  training: ScannedTraining,
  outputs: TargetOutputs,
  weight_SN: np.ndarray,
  seeds: int,
  at_once: int,
  progress: Callable[[int], object],
) -> tuple[np.ndarray, np.ndarray]:
  """Outputs and log-likelihoods of target examples, float32 [seeds, subsets, T] each.

  Models of one seed share initialisation and order of batches. `folder` gets a file for each chunk of models.
  """
  found = []
  for seed in range(seeds):
    for start in range(0, len(weight_SN), at_once):
      weight_MN = weight_SN[start : start + at_once]
      file = folder / f'{seed}-{start}.npz'
      if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        padded = np.pad(weight_MN, ((0, at_once - len(weight_MN)), (0, 0)))  # one shape, one compilation
        output_MT, log_likelihood_MT = outputs(training.train(seed, padded)[0])
        storage.save_npz(file, output=output_MT[: len(weight_MN)], log_likelihood=log_likelihood_MT[: len(weight_MN)])
      with np.load(file, allow_pickle=False) as arrays:
        found.append((arrays['output'], arrays['log_likelihood']))
      progress(len(weight_MN))
  first, second = (np.concatenate(parts).reshape(seeds, len(weight_SN), -1) for parts in zip(*found, strict=True))
  return first, second


def one(states: TrainState, place: int = 0) -> TrainState:
  """Model `place` of several trained at once."""
  return jax.tree.map(lambda x: x[place], states)

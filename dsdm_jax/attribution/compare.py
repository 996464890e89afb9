"""How far two sets of scores agree: `python -m dsdm_jax.attribution.compare A B`.

A and B are workdirs, finished datamodel folders, or files of one score a row (.npy, .parquet, .pt). Prints, for each
target that both have, Spearman's correlation and the share of the top rows that they have in common.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats

from dsdm_jax.attribution import score_files, target_weights
from dsdm_jax.attribution.scores import Scores
from dsdm_jax.core import artifacts
from dsdm_jax.errors import UserError

MIX = 'mix'


def load(path: Path, target: str) -> dict[str, np.ndarray]:
  """Target → score_N of a workdir or a datamodel folder; a file is taken for the scores of `target`.

  Raises:
    UserError: nothing there, or it is damaged.
  """
  if path.is_file():
    return {target: score_files.read(path)}
  for folder in (path / 'datamodel', path):
    artifact = artifacts.open_folder(folder)
    if artifact is not None and 'scores.npz' in artifact.manifest['files']:
      artifact.verify()
      scores = Scores(artifact)
      return {name: scores.score_N(name) for name in (*scores.tasks, MIX)}
  raise UserError(f'{path} is no file of scores, no finished datamodel folder and no workdir that has one; name one')


def compare(a_N: np.ndarray, b_N: np.ndarray) -> dict[str, float]:
  """`spearman`, and for each share of the rows the overlap of the highest; by chance that is the share itself.

  Raises:
    UserError: the two are not of the same rows.
  """
  if len(a_N) != len(b_N):
    raise UserError(f'{len(a_N)} scores against {len(b_N)}; compare scores of one pool')
  found = {'spearman': float(scipy.stats.spearmanr(a_N, b_N).statistic)}
  for share in target_weights.SHARES:
    count = round(share * len(a_N))
    if count:
      found[f'{share:g}'] = target_weights.overlap(a_N, b_N, count)
  return found


def table(found: Mapping[str, Mapping[str, float]]) -> str:
  """Plain text: a line for each target."""
  shares = list(dict.fromkeys(key for row in found.values() for key in row if key != 'spearman'))
  head = ['target', 'Spearman', *(f'top {float(share):.0%}' for share in shares)]
  lines = [
    head,
    *([name, f'{row["spearman"]:+.3f}', *(f'{row[s]:.0%}' for s in shares)] for name, row in found.items()),
  ]
  widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
  return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.attribution.compare', description=__doc__)
  parser.add_argument('a', type=Path)
  parser.add_argument('b', type=Path)
  parser.add_argument('--target', default=MIX, help='what a file holds the scores of (default: mix)')
  given = parser.parse_args(argv)
  try:
    a, b = load(given.a, given.target), load(given.b, given.target)
    common = [name for name in a if name in b]
    if not common:
      raise UserError(f'{given.a} has scores for {", ".join(a)} and {given.b} for {", ".join(b)}; set --target')
    found = {name: compare(a[name], b[name]) for name in common}
  except UserError as error:
    sys.stderr.write(f'dsdm_jax: {error}\n')
    return 2
  sys.stdout.write(f'{table(found)}\nTop rows in common; by chance it would be the share itself.\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())

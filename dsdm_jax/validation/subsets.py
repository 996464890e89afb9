"""Families of subsets on which a datamodel is held to the truth.

Each subset is a 0/1 weight for every row. A family asks its own question: *halves*, whether scores say what a random
row does; *stratified*, whether they know good sources from bad ones; *deciles*, whether they order the data that
selection would choose between; *drops*, whether they name the few rows that matter.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dsdm_jax.core import prng

HALVES, STRATIFIED, DECILES, DROPS = FAMILIES = ('halves', 'stratified', 'deciles', 'drops')


@dataclasses.dataclass(frozen=True)
class Subsets:
  """Attributes: family and name of each subset; weight_SN, bool."""

  family: tuple[str, ...]
  name: tuple[str, ...]
  weight_SN: np.ndarray

  def __len__(self) -> int:
    return len(self.name)

  def of(self, family: str) -> np.ndarray:
    """Places of a family's subsets."""
    return np.array([i for i, found in enumerate(self.family) if found == family], int)


def make(
  seed: int,
  source_N: np.ndarray,
  score_KN: Mapping[str, np.ndarray],
  halves: int,
  stratified: int,
  drops: Sequence[float],
  deciles: bool = True,
) -> Subsets:
  """All subsets, the same for the same arguments; the first is of all rows.

  Args:
    seed: root of the streams.
    source_N: source of each row.
    score_KN: task → the scores that rows are sorted by, for deciles and drops.
    halves, stratified: how many of each.
    drops: shares of the rows that are left out: the highest, the lowest and random ones.
    deciles: whether there are tenths of the rows, sorted by each task's scores.
  """
  rows = len(source_N)
  found = [(DROPS, 'nothing dropped', np.ones(rows, bool))]
  found += [(HALVES, f'half {i}', _half(seed, i, rows)) for i in range(halves)]
  found += [(STRATIFIED, f'sources {i}', _by_source(seed, i, source_N)) for i in range(stratified)]
  for task, score_N in score_KN.items():
    rank_N = np.argsort(np.argsort(-score_N, kind='stable'), kind='stable')  # 0 is the highest
    if deciles:
      found += [(DECILES, f'{task}: decile {d + 1}', rank_N * 10 // rows == d) for d in range(10)]
    for share in drops:
      size = max(round(share * rows), 1)
      found.append((DROPS, f'{task}: highest {share:.3g} dropped', rank_N >= size))
      found.append((DROPS, f'{task}: lowest {share:.3g} dropped', rank_N < rows - size))
  for share in drops:
    keep = np.ones(rows, bool)
    keep[prng.numpy_stream(seed, 'validation', 'drop', repr(share)).permutation(rows)[: round(share * rows)]] = False
    found.append((DROPS, f'random {share:.3g} dropped', keep))
  family, name, weights = zip(*found, strict=True)
  return Subsets(family, name, np.stack(weights))


def _half(seed: int, index: int, rows: int) -> np.ndarray:
  chosen = np.zeros(rows, bool)
  chosen[prng.numpy_stream(seed, 'validation', 'half', index).permutation(rows)[: rows // 2]] = True
  return chosen


def _by_source(seed: int, index: int, source_N: np.ndarray) -> np.ndarray:
  """Half of the rows in all, of each source its own share: shares are drawn, then filled up in a random order."""
  generator = prng.numpy_stream(seed, 'validation', 'stratified', index)
  sources = np.unique(source_N)
  share = dict(zip(sources, generator.uniform(size=len(sources)), strict=True))
  # A row is the more likely to be in, the higher its source's share: its rank is a draw raised to that power.
  rank_N = generator.uniform(size=len(source_N)) * np.array([share[source] for source in source_N])
  chosen = np.zeros(len(source_N), bool)
  chosen[np.argsort(-rank_N, kind='stable')[: len(source_N) // 2]] = True
  return chosen

"""Subsets on which a datamodel is tested, and the outputs of models that are trained on them.

Each subset is a 0/1 weight for every row. Each family tests another property of scores: *halves*, the effect of random
rows; *stratified*, good sources against bad ones; *deciles*, the order of the data that selection chooses from;
*drops*, the few rows that matter most.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dsdm_jax.core import prng, storage
from dsdm_jax.core.storage import Location
from dsdm_jax.training.differentiable import ScannedTraining, TargetOutputs

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
    """Indices of a family's subsets."""
    return np.array([index for index, name in enumerate(self.family) if name == family], int)


def make(
  seed: int,
  source_N: np.ndarray,
  score_KN: Mapping[str, np.ndarray],
  halves: int,
  stratified: int,
  drops: Sequence[float],
  deciles: bool = True,
) -> Subsets:
  """All subsets, deterministic in the arguments; the first has all rows.

  Args:
    seed: of the random streams.
    source_N: source of each row.
    score_KN: task → scores that sort the rows for deciles and drops.
    halves, stratified: number of subsets.
    drops: shares of the rows that are left out: the highest, the lowest, and random ones.
    deciles: whether to add the deciles of each task's scores.
  """
  rows = len(source_N)
  result = [(DROPS, 'nothing dropped', np.ones(rows, bool))]
  result += [(HALVES, f'half {i}', _half(seed, i, rows)) for i in range(halves)]
  result += [(STRATIFIED, f'sources {i}', _by_source(seed, i, source_N)) for i in range(stratified)]
  for task, score_N in score_KN.items():
    rank_N = np.argsort(np.argsort(-score_N, kind='stable'), kind='stable')  # 0 is the highest
    if deciles:
      result += [(DECILES, f'{task}: decile {d + 1}', rank_N * 10 // rows == d) for d in range(10)]
    for share in drops:
      size = max(round(share * rows), 1)
      result.append((DROPS, f'{task}: highest {share:.3g} dropped', rank_N >= size))
      result.append((DROPS, f'{task}: lowest {share:.3g} dropped', rank_N < rows - size))
  for share in drops:
    keep = np.ones(rows, bool)
    keep[prng.numpy_stream(seed, 'validation', 'drop', repr(share)).permutation(rows)[: round(share * rows)]] = False
    result.append((DROPS, f'random {share:.3g} dropped', keep))
  family, name, weights = zip(*result, strict=True)
  return Subsets(family, name, np.stack(weights))


def _half(seed: int, index: int, rows: int) -> np.ndarray:
  selected = np.zeros(rows, bool)
  selected[prng.numpy_stream(seed, 'validation', 'half', index).permutation(rows)[: rows // 2]] = True
  return selected


def _by_source(seed: int, index: int, source_N: np.ndarray) -> np.ndarray:
  """Half of all rows, with a random share of each source."""
  generator = prng.numpy_stream(seed, 'validation', 'stratified', index)
  sources = np.unique(source_N)
  share = dict(zip(sources, generator.uniform(size=len(sources)), strict=True))
  # A row is more likely to be selected the larger the share of its source: rows are ranked by uniform draw · share.
  rank_N = generator.uniform(size=len(source_N)) * np.array([share[source] for source in source_N])
  selected = np.zeros(len(source_N), bool)
  selected[np.argsort(-rank_N, kind='stable')[: len(source_N) // 2]] = True
  return selected


def truth(
  folder: Location,
  training: ScannedTraining,
  outputs: TargetOutputs,
  weight_SN: np.ndarray,
  seeds: int,
  at_once: int,
  progress: Callable[[int], object],
) -> tuple[np.ndarray, np.ndarray]:
  """Trains a model on each subset and returns outputs and log-likelihoods of target examples.

  Both are float32 [seeds, subsets, T]. Models of one seed share initialisation and order of batches. Each chunk of
  models is saved to a file in `folder`, so that an interrupted run resumes.
  """
  chunks = []
  for seed in range(seeds):
    for start in range(0, len(weight_SN), at_once):
      weight_MN = weight_SN[start : start + at_once]
      file = folder / f'{seed}-{start}.npz'
      if not storage.is_marked(file):
        padded = np.pad(weight_MN, ((0, at_once - len(weight_MN)), (0, 0)))  # one shape, one compilation
        output_MT, log_likelihood_MT = outputs(training.train(seed, padded)[0])
        storage.save_npz(file, output=output_MT[: len(weight_MN)], log_likelihood=log_likelihood_MT[: len(weight_MN)])
        storage.mark(file)
      with storage.load(file) as arrays:
        chunks.append((arrays['output'], arrays['log_likelihood']))
      progress(len(weight_MN))
  output, log_likelihood = (np.concatenate(x).reshape(seeds, len(weight_SN), -1) for x in zip(*chunks, strict=True))
  return output, log_likelihood

"""Random rows, the baseline that counts, and controls: arms that must not win."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.targets import masked
from dsdm_jax.errors import UserError
from dsdm_jax.selection import ranking, whole
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def random(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """k random rows, trained on for as many epochs as a targeted selection."""
  del target
  return drawn(pool, 'random', budget.examples, seed)


def random_one_epoch(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """As many random rows as the budget has examples, each seen once: pretraining without selection.

  Raises:
    UserError: the pool has fewer rows than the budget.
  """
  del target
  return drawn(pool, 'random_one_epoch', budget.total, seed)


def random_again(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """A second arm of random rows: a difference from `random` would be a false alarm of the statistics."""
  del target
  return drawn(pool, 'random_again', budget.examples, seed)


def dsdm_shifted(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """DsDm with each score given to the next row, like an index error. Rows are shuffled, so the gain must vanish."""
  del seed
  return ranking.ranked(_moved(pool, target, lambda score_M: np.roll(score_M, 1)), pool, budget.examples)


def dsdm_permuted(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """DsDm with permuted scores: the same distribution of scores without information."""
  rng = prng.numpy_stream(seed, 'selection', 'permuted')
  return ranking.ranked(_moved(pool, target, rng.permutation), pool, budget.examples)


def _moved(pool: Candidates, target: Target, move: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """Scores of other rows, among those that have scores."""
  score_N = np.array(pool.scores.score_N(target.name))
  score_N[~pool.unscored_N] = move(score_N[~pool.unscored_N])
  return score_N


def drawn(
  pool: Candidates, name: str, count: int, seed: int, among: np.ndarray | None = None, **provenance: Any
) -> Selection:
  """A selection of `draw`, or of random documents of as many tokens."""
  if pool.options.unit == 'document':
    return whole.drawn(pool, name, count, seed, among, **provenance)
  return Selection.of(draw(pool, name, count, seed, among), **provenance)


def holds(pool: Candidates, count: int, among: np.ndarray) -> bool:
  """Whether `drawn` finds `count` rows, or documents of as many tokens, in the rows `among`."""
  if pool.options.unit == 'document':
    return whole.holds(pool, count, among)
  return int((~pool.masked_N[among]).sum()) >= count


def draw(pool: Candidates, name: str, count: int, seed: int, among: np.ndarray | None = None) -> np.ndarray:
  """`count` rows of the pool, or of the rows `among`, that are not masked, drawn without replacement, ascending.

  Raises:
    UserError: there are fewer rows.
  """
  available = int((~(pool.masked_N if among is None else pool.masked_N[among])).sum())
  if count > available:
    all_rows = available == pool.num_rows
    left = f'the pool has {available}' if all_rows else f'{available} are left of the {pool.num_rows} of the pool'
    raise UserError(
      f"'{name}' needs {count} rows and {left}; lower selection.examples or selection.epochs, or raise pool.max_bytes"
    )
  return masked.draw(pool.masked_N, count, prng.numpy_stream(seed, 'selection', name), among)

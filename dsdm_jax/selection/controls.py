"""Controls that tell the real thing from a toy: arms that must not win."""

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.random import draw
from dsdm_jax.selection.registry import Budget, selector


@selector('dsdm_shifted', targeted=True, seeded=False)
def dsdm_shifted(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """DsDm with each score given to the next row, as an index off by one would. Rows are shuffled, so the gain goes."""
  del seed
  return ranking.ranked(np.roll(pool.scores.score_N(target.name), 1), pool, budget.examples)


@selector('dsdm_permuted', targeted=True, seeded=False)
def dsdm_permuted(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """DsDm with its scores permuted: the same distribution of scores and no information."""
  rng = prng.numpy_stream(seed, 'selection', 'permuted')
  return ranking.ranked(rng.permutation(pool.scores.score_N(target.name)), pool, budget.examples)


@selector('random_again', targeted=False, seeded=True)
def random_again(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """A second arm of random rows: a difference to `random` would be a false alarm of the statistics."""
  del target
  return Selection.of(draw(pool.num_rows, 'random_again', budget.examples, seed))

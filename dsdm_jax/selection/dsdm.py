"""DsDm: the rows that the datamodel predicts to help the target most (Engstrom et al. 2024, section 3.2, eq. 5)."""

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.registry import Budget, selector


@selector('dsdm', targeted=True, seeded=False)
def dsdm(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows of highest score: the exact minimiser of a linear datamodel over subsets of size k."""
  del seed
  return ranking.ranked(pool.scores.score_N(target.name), pool, budget.examples)


@selector('bottom', targeted=True, seeded=False)
def bottom(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """Control: the k rows of lowest score. If scores mean anything, this is worse than random."""
  del seed
  return ranking.ranked(-pool.scores.score_N(target.name), pool, budget.examples)

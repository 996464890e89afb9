"""DsDm: the rows that the datamodel predicts to help the target most (Engstrom et al. 2024, section 3.2, eq. 5)."""

from dsdm_jax.attribution import score_files
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def dsdm(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest scores: the exact minimiser of a linear datamodel over subsets of size k."""
  del seed
  return ranking.ranked(pool.scores.score_N(target.name), pool, budget.examples)


def bottom(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """Control: the k rows with the lowest scores. If scores mean anything, this is worse than random."""
  del seed
  return ranking.ranked(-pool.scores.score_N(target.name), pool, budget.examples)


def imported(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest scores in the file `selection.imported` (.npy, .parquet or .pt; one score per row).

  Raises:
    UserError: the file cannot be read, or does not fit the pool; see `attribution.score_files.read`.
  """
  del target, seed
  score_N = score_files.read(pool.options.imported, pool.num_rows)
  return ranking.ranked(score_N, pool, budget.examples, file=pool.options.imported)

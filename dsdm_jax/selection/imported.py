"""Scores made elsewhere, as a selector like any other."""

from dsdm_jax.attribution import score_files as files
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.registry import Budget, selector


@selector('imported', targeted=False, seeded=False)
def imported(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows of highest score in the file `selection.imported` (.npy, .parquet or .pt; one score a row).

  Raises:
    UserError: the file cannot be read, or is not of this pool; see `attribution.imported.read`.
  """
  del target, seed
  score_N = files.read(pool.options.imported, pool.num_rows)
  return ranking.ranked(score_N, pool, budget.examples, file=pool.options.imported)

"""DsDm with a penalty on redundancy, since a linear datamodel gives a row the same score next to any number of copies.

The similarity of two rows is the cosine of their features φ at the first proxy: rows with parallel gradients teach the
same. Scores are in standard deviations; full redundancy costs `selection.diversity` of them. The penalty is that of
maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): argmax over the remaining rows of
z(n) − diversity · max over selected m of cos(φ(n), φ(m)).
"""

import numpy as np

from dsdm_jax.attribution.sources import unit_rows
from dsdm_jax.core import prng
from dsdm_jax.core.mesh import total
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking, semdedup
from dsdm_jax.selection.candidates import Budget, Candidates, Target

SHORTLIST = 4  # times the number of rows to select: the best rows, from which the selection is made


def dsdm_greedy(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """Selects row by row the highest z − diversity · (largest cosine to a selected row).

  Takes k · 4k · J operations, so it is for at most some ten thousand rows.
  """
  del seed
  score_N, rows, phi_MJ = _shortlist(pool, target, budget)
  by_row = np.argsort(rows)  # so that ties go to the lower row
  rows, phi_MJ = rows[by_row], phi_MJ[by_row]
  chosen = greedy(ranking.standardised(score_N)[rows], phi_MJ, budget.examples, pool.options.diversity)
  return _selection(score_N, rows[chosen], pool)


def dsdm_clusters(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k highest of z − diversity · ln(1 + number of better rows in the same k-means cluster).

  Each further row of a cluster costs more. For any number of rows.
  """
  del seed
  score_N, rows, phi_MJ = _shortlist(pool, target, budget)
  z_M = ranking.standardised(score_N)[rows]
  rng = prng.numpy_stream(0, 'selection', 'dsdm_clusters')
  cluster_M = semdedup.nearest_centre(phi_MJ, semdedup.kmeans(phi_MJ, pool.options.clusters, rng))
  # The shortlist is in order of score, so a rank within the cluster counts the better rows.
  better_M = ranking.rank_in_group(cluster_M)
  adjusted_M = z_M - np.float32(pool.options.diversity) * np.log1p(better_M).astype(np.float32)
  # `top` breaks ties by position. Sorting by row makes ties go to the lower row.
  by_row = np.argsort(rows)
  chosen = by_row[ranking.top(adjusted_M[by_row], budget.examples)]
  return _selection(score_N, rows[chosen], pool, clusters=int(cluster_M.max()) + 1)


def greedy(z_M: np.ndarray, phi_MJ: np.ndarray, count: int, diversity: float) -> np.ndarray:
  """Positions of the `count` selected rows, in order of selection; ties go to the earlier position.

  Args:
    z_M: scores.
    phi_MJ: features of length one, float32.
  """
  # Largest cosine to a selected row, at least 0: opposite rows are no less redundant than orthogonal ones.
  nearest_M = np.zeros(len(z_M), np.float32)
  free_M = np.ones(len(z_M), bool)
  chosen = np.empty(count, np.int64)
  for place in range(count):
    gain_M = np.where(free_M, z_M - np.float32(diversity) * nearest_M, -np.inf)
    chosen[place] = best = int(np.argmax(gain_M))
    free_M[best] = False
    np.maximum(nearest_M, phi_MJ @ phi_MJ[best], out=nearest_M)
  return chosen


def _shortlist(pool: Candidates, target: Target, budget: Budget) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(score_N, rows of the shortlist, their features of length one at the first proxy)."""
  score_N = pool.scores.score_N(target.name)
  rows = ranking.capped_order(score_N, budget.examples, pool, SHORTLIST * budget.examples)
  return score_N, rows, pool.once(('phi', rows.tobytes()), lambda: _features(pool, rows))


def _features(pool: Candidates, rows: np.ndarray) -> np.ndarray:
  phi_MJ, source = np.zeros((len(rows), pool.features.dimension), np.float32), pool.features.pool(0)
  for start, stop, phi_BJ in source:
    mine = np.flatnonzero((rows >= start) & (rows < stop))
    if len(mine) and source.team.leads:
      phi_MJ[mine] = unit_rows(np.asarray(phi_BJ)[rows[mine] - start])
  return total(phi_MJ) if source.team.count > 1 else phi_MJ


def _selection(score_N: np.ndarray, rows: np.ndarray, pool: Candidates, **provenance: int) -> Selection:
  return Selection.of(rows, score_N[rows].astype(np.float32), diversity=pool.options.diversity, **provenance)

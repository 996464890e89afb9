"""DsDm with a penalty on redundancy: a linear datamodel says the same of a row however many of its like are chosen.

Likeness is the cosine of two rows' features φ at the first proxy: rows with parallel gradients teach the same. Scores
are in standard deviations, and `selection.diversity` says how many of them full redundancy costs. The penalty is that
of maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): argmax over the rows that are left of
z(n) − diversity · max over chosen m of cos(φ(n), φ(m)).
"""

import numpy as np

from dsdm_jax.attribution.sources import unit_rows
from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection import clusters, ranking
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.registry import Budget, selector

# The best rows by score, this many for each that is wanted, are those that are chosen from.
SHORTLIST = 4


@selector('dsdm_greedy', targeted=True, seeded=False)
def dsdm_greedy(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """Row after row, the highest z − diversity · (largest cosine to a row already chosen). k · 4k · J operations: for
  some ten thousand rows at the most.
  """
  del seed
  score_N, rows, phi_MJ = _shortlist(pool, target, budget)
  by_row = np.argsort(rows)  # so that equals go to the lower row
  rows, phi_MJ = rows[by_row], phi_MJ[by_row]
  chosen = greedy(ranking.standardised(score_N)[rows], phi_MJ, budget.examples, pool.options.diversity)
  return _selection(score_N, rows[chosen], pool)


@selector('dsdm_clusters', targeted=True, seeded=False)
def dsdm_clusters(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k highest of z − diversity · ln(1 + better rows of the same k-means cluster): each further row of a cluster
  costs more. For any number of rows.
  """
  del seed
  score_N, rows, phi_MJ = _shortlist(pool, target, budget)
  z_M = ranking.standardised(score_N)[rows]
  rng = prng.numpy_stream(0, 'selection', 'dsdm_clusters')
  cluster_M = clusters.assign(phi_MJ, clusters.centres(phi_MJ, pool.options.clusters, rng))
  # The shortlist is in order of score, so a rank within the cluster counts the better ones.
  better_M = ranking.rank_in_group(cluster_M)
  adjusted_M = z_M - np.float32(pool.options.diversity) * np.log1p(better_M).astype(np.float32)
  # Ties of the adjusted scores go to the lower row: `top` breaks them by place, so places follow rows.
  by_row = np.argsort(rows)
  chosen = by_row[ranking.top(adjusted_M[by_row], budget.examples)]
  return _selection(score_N, rows[chosen], pool, clusters=int(cluster_M.max()) + 1)


def greedy(z_M: np.ndarray, phi_MJ: np.ndarray, count: int, diversity: float) -> np.ndarray:
  """Places of the `count` rows chosen, in order; equals go to the earlier place.

  Args:
    z_M: scores.
    phi_MJ: features of length one, float32.
  """
  nearest_M = np.zeros(
    len(z_M), np.float32
  )  # largest cosine to a chosen row; opposites are no more redundant than none
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
  if pool.features.semantics['mode'] == 'jvp':
    raise UserError(
      "features.mode = 'jvp' makes no features, and the redundancy penalty is about them; set "
      '--config.features.mode=store or stream, or leave dsdm_greedy and dsdm_clusters out of selection.methods'
    )
  score_N = pool.scores.score_N(target.name)
  rows = ranking.capped_order(score_N, budget.examples, pool, SHORTLIST * budget.examples)
  return score_N, rows, pool.once(('phi', rows.tobytes()), lambda: _features(pool, rows))


def _features(pool: Candidates, rows: np.ndarray) -> np.ndarray:
  phi_MJ = np.empty((len(rows), pool.features.dimension), np.float32)
  for start, stop, phi_BJ in pool.features.pool(0):
    mine = np.flatnonzero((rows >= start) & (rows < stop))
    if len(mine):
      phi_MJ[mine] = unit_rows(np.asarray(phi_BJ)[rows[mine] - start])
  return phi_MJ


def _selection(score_N: np.ndarray, rows: np.ndarray, pool: Candidates, **provenance: int) -> Selection:
  return Selection.of(rows, score_N[rows].astype(np.float32), diversity=pool.options.diversity, **provenance)

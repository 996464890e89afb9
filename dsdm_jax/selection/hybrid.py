"""DsDm and a similarity to the target, added: z(datamodel) + z(similarity), in standard deviations over scored rows.

The datamodel knows what a proxy learns from a row, the similarity what the row is about. The sum is meant to keep
DsDm's gain on the target and lose less on what is not targeted.
"""

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import embedding, lsa, ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def hybrid(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest sum of DsDm's score and the cosine to the nearest target example by LSA."""
  del seed
  return _sum(pool, target, budget, lsa.nearest(pool, target))


def hybrid_embedding(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The same with the first proxy's embedding in place of LSA."""
  del seed
  return _sum(pool, target, budget, embedding.nearest(pool, target))


def _sum(pool: Candidates, target: Target, budget: Budget, similarity_N: np.ndarray) -> Selection:
  score_N = pool.scores.score_N(target.name)
  parts = score_N, np.where(np.isnan(score_N), np.nan, similarity_N)  # both over the rows that a prefilter kept
  z_N, other_N = (ranking.standardised(np.array(part_N, np.float32)) for part_N in parts)
  return ranking.ranked(z_N + other_N, pool, budget.examples)

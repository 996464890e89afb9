"""Gradient dot product without curvature: TracIn at the end of training (arXiv 2002.08484, TracInCP of one checkpoint).

score(n) = mean over target examples t of ∇f(n) · ∇f(t), both projected.
"""

import numpy as np

from dsdm_jax.attribution import datamodel
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def gradient(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest φ(n) · mean target φ, averaged over proxies: DsDm with the identity as Gram matrix."""
  del seed
  features = pool.features

  def dot(task: str) -> np.ndarray:
    def compute() -> np.ndarray:
      total_N = np.zeros(pool.num_rows)
      for checkpoint in range(features.checkpoints):
        mean_J = features.target(task, checkpoint).astype(np.float64).mean(axis=0)
        total_N += datamodel.scores(features.pool(checkpoint), mean_J[:, None])[:, 0]
      return (total_N / features.checkpoints).astype(np.float32)

    return pool.once(('gradient', task), compute)

  return ranking.ranked(target.mixed(dot), pool, budget.examples)

"""Gradient match without curvature: TracIn at the end of training (arXiv 2002.08484, TracInCP of one checkpoint).

score(n) = mean over target examples t of ∇f(n) · ∇f(t), both projected. With norms it is a cosine, which does not
prefer short and odd rows, whose gradients are large. `less` also takes Adam's step in place of the row's gradient.
"""

import numpy as np

from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.sources import UnitNorm
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def gradient(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest φ(n) · mean target φ, averaged over proxies: DsDm with the identity as Gram matrix."""
  del seed
  return _match(pool, target, budget, norm=False)


def gradient_cosine(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest cosine of φ(n) to the mean target φ, averaged over proxies."""
  del seed
  return _match(pool, target, budget, norm=True)


def _match(pool: Candidates, target: Target, budget: Budget, norm: bool) -> Selection:
  features = pool.features

  def dot(task: str) -> np.ndarray:
    def compute() -> np.ndarray:
      total_N = np.zeros(pool.num_rows)
      for checkpoint in range(features.checkpoints):
        mean_J = features.target(task, checkpoint).astype(np.float64).mean(axis=0)
        rows = features.pool(checkpoint)
        if norm:
          rows, mean_J = UnitNorm(rows), mean_J / (np.linalg.norm(mean_J) or 1.0)
        total_N += datamodel.scores(rows, mean_J[:, None])[:, 0]
      return (total_N / features.checkpoints).astype(np.float32)

    return pool.once(('gradient', norm, task), compute)

  return ranking.ranked(target.mixed(dot), pool, budget.examples)

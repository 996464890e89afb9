"""DSIR: importance resampling with hashed n-grams (arXiv 2302.03169, section 3).

log w(n) = Σ_b count_b(n) · (log p_target(b) − log p_pool(b)) over hash buckets b of uni- and bigrams. The k rows with
the highest log w(n) + Gumbel noise are k draws without replacement with weights w.
"""

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ngrams, ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target

_BUCKETS = 10_000  # as published; with many more, the weight mostly counts n-grams that the target lacks
_FLOOR = 1e-8  # added to each probability, so that an n-gram that one side lacks has a logarithm


def dsir(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """k rows drawn without replacement by their importance weights; p_target is the mean over tasks."""
  weight_N = pool.once(('dsir', target.name), lambda: _log_weights(pool, target))
  return ranking.ranked(weight_N + ranking.gumbel(len(weight_N), seed, 'dsir'), pool, budget.examples)


def log_ratio(target_counts: np.ndarray, pool_counts: np.ndarray) -> np.ndarray:
  """log p_target − log p_pool of each bucket: float64."""
  p_target, p_pool = (counts / (counts.sum() or 1) for counts in (target_counts, pool_counts))
  return np.log(p_target + _FLOOR) - np.log(p_pool + _FLOOR)


def _log_weights(pool: Candidates, target: Target) -> np.ndarray:
  grams = ngrams.of_pool(pool, _BUCKETS)
  by_task = [grams.examples(target, task).counts() for task in target.tasks]
  weighted = zip(by_task, target.weight_T, strict=True)
  target_counts = np.sum([weight * counts / max(counts.sum(), 1) for counts, weight in weighted], axis=0)
  pool_counts = pool.once(('n-gram counts', grams.buckets), grams.counts)
  return grams.sums(log_ratio(target_counts, pool_counts), mean=False)

"""Perplexity pruning: rows that are easy, hard or neither for the proxies (arXiv 2309.04564, 2405.20541).

PPL(n) = exp(−1/L · Σ_l log p(token l | the tokens before it)). The mean log-probability gives the reverse order. A row
without a token that the loss counts has no perplexity, and comes last.
"""

from collections.abc import Callable

import numpy as np
import scipy.stats

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def perplexity_low(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the lowest perplexity, averaged over proxies that did not train on the row."""
  del target, seed
  return _ranked(pool, budget, lambda likelihood_N: likelihood_N)


def perplexity_high(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest perplexity."""
  del target, seed
  return _ranked(pool, budget, np.negative)


def perplexity_middle(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with perplexities around the median, which arXiv 2309.04564 prefers to either end."""
  del target, seed
  return _ranked(
    pool, budget, lambda likelihood_N: -np.abs(scipy.stats.rankdata(likelihood_N) - (len(likelihood_N) + 1) / 2)
  )


def _ranked(pool: Candidates, budget: Budget, score: Callable[[np.ndarray], np.ndarray]) -> Selection:
  """The k rows with the highest `score` of their likelihoods."""
  likelihood_N, counted_N = pool.once('likelihood', pool.proxies.log_likelihood_N), pool.pool.counted_N
  score_N = np.zeros(len(likelihood_N))
  score_N[counted_N] = score(likelihood_N[counted_N])
  return ranking.ranked(ranking.uncounted_last(score_N, pool), pool, budget.examples)

"""Perplexity pruning: rows that are easy, hard or neither for the proxies (arXiv 2309.04564, 2405.20541).

PPL(n) = exp(−1/L · Σ_l log p(token l | the tokens before it)). The mean log-probability gives the reverse order.
"""

import numpy as np
import scipy.stats

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def perplexity_low(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the lowest perplexity, averaged over proxies that did not train on the row."""
  del target, seed
  return ranking.ranked(pool.once('likelihood', pool.proxies.log_likelihood_N), pool, budget.examples)


def perplexity_high(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest perplexity."""
  del target, seed
  return ranking.ranked(-pool.once('likelihood', pool.proxies.log_likelihood_N), pool, budget.examples)


def perplexity_middle(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with perplexities around the median, which arXiv 2309.04564 prefers to either end."""
  del target, seed
  rank_N = scipy.stats.rankdata(pool.once('likelihood', pool.proxies.log_likelihood_N))
  return ranking.ranked(-np.abs(rank_N - (len(rank_N) + 1) / 2), pool, budget.examples)

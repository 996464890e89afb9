"""Perplexity pruning: the rows that are easiest or hardest for the proxies (arXiv 2309.04564, 2405.20541).

PPL(n) = exp(−1/L · Σ_l log p(token l | the tokens before it)). The mean log-probability gives the reverse order.
"""

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

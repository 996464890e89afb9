"""Rows by how hard the proxies find them: perplexity pruning (arXiv 2309.04564, 2405.20541).

PPL(n) = exp(−1/L · Σ_l log p(token l | those before it)): the mean log-probability orders rows the other way round.
"""

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.registry import Budget, selector


@selector('perplexity_low', targeted=False, seeded=False)
def perplexity_low(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows of lowest perplexity, averaged over proxies that did not train on the row."""
  del target, seed
  return ranking.ranked(pool.once('likelihood', pool.proxies.log_likelihood_N), pool, budget.examples)


@selector('perplexity_high', targeted=False, seeded=False)
def perplexity_high(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows of highest perplexity."""
  del target, seed
  return ranking.ranked(-pool.once('likelihood', pool.proxies.log_likelihood_N), pool, budget.examples)

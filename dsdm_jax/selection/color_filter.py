"""CoLoR-Filter: rows that become easier for a model that is tuned on the target (arXiv 2406.10670, eq. 8)."""

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def color_filter(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest log p_conditional − log p_prior, in nats per token.

  The prior is the first proxy. The conditional model is that proxy after `selection.conditional_steps` steps on the
  target's examples. A target of several tasks has one conditional model per task.
  """
  del seed
  options, proxies = pool.options, pool.proxies
  prior_N = pool.once('prior', lambda: proxies.log_likelihood_of(proxies.state(0)))

  def score(task: str) -> np.ndarray:
    def tune() -> np.ndarray:
      steps, rate = options.conditional_steps, options.conditional_learning_rate
      tuned = proxies.tuned(target.sequences(task), steps, rate, seed=0)
      return proxies.log_likelihood_of(tuned) - prior_N

    return pool.once(('color', task), tune)

  return ranking.ranked(target.mixed(score), pool, budget.examples, steps=options.conditional_steps)

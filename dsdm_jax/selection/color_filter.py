"""CoLoR-Filter: rows that become easier for a model that is tuned on the target (arXiv 2406.10670, eq. 8).

How long and at which rate it is tuned decides between a model that did not move and one that knows its examples by
heart. Both are chosen by the likelihood of target examples that it was not tuned on.
"""

import dataclasses

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target, choose

_RATES = (1 / 3, 0.1, 1.0)  # of the proxies' learning rate


def color_filter(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest log p_conditional − log p_prior, in nats per token.

  The prior is the first proxy. The conditional model is that proxy after some steps on the target's examples: a half, a
  quarter or all of `selection.conditional_steps`, at a third, a tenth or all of the proxies' learning rate. A target of
  several tasks has one conditional model per task.
  """
  del seed
  proxies, most = pool.proxies, pool.options.conditional_steps
  counts = dict.fromkeys(max(1, most // part) for part in (2, 4, 1))
  settings = [(steps, rate) for rate in _RATES for steps in counts]
  prior_N = pool.once('prior', lambda: proxies.log_likelihood_of(proxies.state(0)))

  def score(task: str) -> np.ndarray:
    def loss(setting: tuple[int, float], fitted: Target, held: Target) -> float:
      return -proxies.log_likelihood_of_texts(proxies.tuned(fitted.sequences(task), *setting), held.sequences(task))

    def tune() -> tuple[np.ndarray, tuple[int, float]]:
      steps, rate = choose(dataclasses.replace(target, tasks=(task,)), settings, loss)
      tuned = proxies.tuned(target.sequences(task), steps, rate)
      return proxies.log_likelihood_of(tuned) - prior_N, (steps, rate)

    score_N, tuned_with[task] = pool.once(('color', task), tune)
    return score_N

  tuned_with: dict[str, tuple[int, float]] = {}
  score_N = ranking.uncounted_last(target.mixed(score), pool)
  return ranking.ranked(score_N, pool, budget.examples, steps_and_rate=tuned_with)

"""Metagradients: the derivative of a target's output at the end of training with respect to the weight of each row.

It is computed through the training itself (MAGIC, arXiv 2504.16430; REPLAY, arXiv 2503.13751). Datamodels are measured
against it. It does not scale: each task costs about five trainings of a proxy on the whole pool, on one device.
"""

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def oracle(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest derivative of the target's mean output, for the model and training of the proxies.

  The derivative is taken where every row has weight one, for one initialisation and order.
  """
  del seed

  def score(task: str) -> np.ndarray:
    return pool.once(('oracle', task), lambda: pool.proxies.metagradient_N(target.examples(task)))

  return ranking.ranked(target.mixed(score), pool, budget.examples)

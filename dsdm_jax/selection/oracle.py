"""Metagradients: how the output of a target at the end of training changes with the weight of each row.

Differentiated through that training (MAGIC, arXiv 2504.16430; REPLAY, arXiv 2503.13751). What a datamodel is held to;
it does not scale, as each task costs about five trainings of a proxy on the whole pool, all on one device.
"""

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.registry import Budget, selector


@selector('oracle', targeted=True, seeded=False)
def oracle(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows of highest derivative of the mean output of the target's examples, for the proxies' model and training.

  It is the derivative where every row counts once, of one initialisation and order.
  """
  del seed

  def score(task: str) -> np.ndarray:
    return pool.once(('oracle', task), lambda: pool.proxies.metagradient_N(target.examples(task)))

  return ranking.ranked(target.mixed(score), pool, budget.examples)

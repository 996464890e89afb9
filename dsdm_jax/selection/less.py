"""LESS: the cosine of the step that Adam would take on a row to the gradient of the target (arXiv 2402.04333, eq. 5).

Γ(n) = m̂ / (√v̂ + ε), where m̂ and v̂ are Adam's moments at the end of a proxy's training after one more step on row n
alone. So a row is judged by the update that it makes, the target by its plain gradient. Both are projected by random
signs to 8,192 dimensions and normalized, as in the paper; score(n) = mean over a task's examples of the cosine,
averaged over proxies (the paper: over epochs of one, by their learning rates). Of several tasks the one with the
largest weight · cosine counts, whatever `datamodel.mix` is. The paper takes gradients of LoRA's parameters; here they
are of all.
"""

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target

DIMENSION = 8_192


def less(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest score."""
  del seed

  def scores() -> np.ndarray:
    cosine_TN = pool.proxies.adam_cosines([target.examples(task) for task in target.tasks], DIMENSION)
    return ranking.uncounted_last((target.weight_T.astype(np.float32)[:, None] * cosine_TN).max(axis=0), pool)

  return ranking.ranked(pool.once(('less', target.tasks), scores), pool, budget.examples)

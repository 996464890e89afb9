"""DsDm with chance: rows drawn by their scores, so that near-equals take turns and seeds differ.

Weights are exp(z/T), z the score in standard deviations and T = `selection.temperature`: T → 0 is the top k, T → ∞
random rows.
"""

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.core.errors import UserError
from dsdm_jax.data.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.registry import Budget, selector


@selector('dsdm_gumbel', targeted=True, seeded=True)
def dsdm_gumbel(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """k rows drawn without replacement: the highest of z/T + Gumbel noise (arXiv 1903.06059, section 2.3)."""
  key_N = _log_weights(pool, target)
  ranking.check_finite(key_N)
  key_N += ranking.gumbel(len(key_N), seed, 'dsdm_gumbel')
  return ranking.ranked(key_N, pool, budget.examples, temperature=pool.options.temperature)


@selector('dsdm_boltzmann', targeted=True, seeded=True)
def dsdm_boltzmann(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The whole budget drawn with replacement: a row is trained on as often as it was drawn, in one pass.

  Draws beyond `selection.repeat_cap` of a row are drawn anew among the rows that are below it.

  Raises:
    UserError: the pool cannot fill the budget under the cap.
  """
  if budget.total > budget.repeat_cap * pool.num_rows:
    raise UserError(
      f"'dsdm_boltzmann' cannot draw {budget.total} examples from {pool.num_rows} rows of at most "
      f'{budget.repeat_cap} visits; raise selection.repeat_cap or lower selection.examples'
    )
  log_weight_N = _log_weights(pool, target)
  ranking.check_finite(log_weight_N)
  count_N = draw(log_weight_N, budget.total, budget.repeat_cap, prng.numpy_stream(seed, 'selection', 'dsdm_boltzmann'))
  rows = np.flatnonzero(count_N)
  rows = rows[np.argsort(-log_weight_N[rows], kind='stable')]
  rows = np.repeat(rows, count_N[rows])
  return Selection.of(rows, log_weight_N[rows], temperature=pool.options.temperature, distinct=int((count_N > 0).sum()))


def draw(log_weight_N: np.ndarray, total: int, cap: int, rng: np.random.Generator) -> np.ndarray:
  """How often each row was drawn: int64 [N], adds up to `total`, none above `cap`."""
  count_N = np.zeros(len(log_weight_N), np.int64)
  weight_N = np.exp(log_weight_N.astype(np.float64) - float(log_weight_N.max()))
  while missing := total - int(count_N.sum()):
    weight_N[count_N >= cap] = 0
    cumulative_N = np.cumsum(weight_N)
    if not cumulative_N[-1] > 0:  # what is left has weights that vanish beside the best: any of them will do
      weight_N = (count_N < cap).astype(np.float64)
      continue
    drawn = np.searchsorted(cumulative_N, rng.random(missing) * cumulative_N[-1], side='right')
    count_N += np.bincount(np.minimum(drawn, len(weight_N) - 1), minlength=len(weight_N))
    np.minimum(count_N, cap, out=count_N)
  return count_N


def _log_weights(pool: Candidates, target: Target) -> np.ndarray:
  z_N = ranking.standardised(pool.scores.score_N(target.name))
  return np.divide(z_N, np.float32(pool.options.temperature), out=z_N)

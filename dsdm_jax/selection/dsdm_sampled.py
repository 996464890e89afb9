"""DsDm with chance: rows drawn by their scores, so that near-equals take turns and seeds differ.

Weights are exp(z/T), z the score in standard deviations and T = `selection.temperature`: T → 0 is the top k, T → ∞
random rows.

Draws with replacement under a cap, one after the other among the rows that are below it, are the arrivals of Poisson
processes, one a row with its weight for a rate, that stop at the cap: the first `total` arrivals over all rows. So rows
are gone through once, chunk by chunk, however cold it is: an estimate brackets the time of the last of these arrivals,
what comes before the bracket is counted, and of what falls inside it the earliest are taken.
"""

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.registry import Budget, selector

_CHUNK = 1 << 20  # rows that are drawn together, by a stream of their own
_BINS = 1 << 13  # of log-weights, by which times are estimated
_SPREAD = 6.0  # standard deviations from the bracket's middle to its ends
_FULL = 700.0  # the logarithm of a number of arrivals that fills any row; its exponential is finite


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
  count_N = draw(log_weight_N, budget.total, budget.repeat_cap, seed)
  rows = np.flatnonzero(count_N)
  rows = rows[np.argsort(-log_weight_N[rows], kind='stable')]
  drawn = np.repeat(rows, count_N[rows])
  return Selection.of(drawn, log_weight_N[drawn], temperature=pool.options.temperature, distinct=len(rows))


def draw(log_weight_N: np.ndarray, total: int, cap: int, seed: int) -> np.ndarray:
  """How often each row was drawn: int32 [N], adds up to `total`, at most N · cap; none above `cap`."""
  weighing = _Weighing(log_weight_N, cap)
  spread = _SPREAD
  while True:
    reach = spread * (1 + total**0.5)  # counts under a cap vary less than Poisson's
    early, late = weighing.log_time(total - reach, above=True), weighing.log_time(total + reach, above=False)
    count_N = np.empty(len(log_weight_N), np.int32)
    found = []
    for chunk, start in enumerate(range(0, len(log_weight_N), _CHUNK)):
      part = slice(start, start + _CHUNK)
      rng = prng.numpy_stream(seed, 'selection', 'dsdm_boltzmann', chunk)
      count_N[part], row_M, time_M = _arrivals(log_weight_N[part].astype(np.float64), cap, early, late, rng)
      found.append((row_M + start, time_M))
    row_M, time_M = (np.concatenate(parts) for parts in zip(*found, strict=True))
    missing = total - int(count_N.sum(dtype=np.int64))
    if 0 <= missing <= len(row_M):
      np.add.at(count_N, row_M[np.argsort(time_M, kind='stable')[:missing]], 1)
      return count_N
    spread *= 2  # chance went far astray


def _arrivals(
  log_weight_B: np.ndarray, cap: int, early: float, late: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(arrivals of each row before the log-time `early`, int32 [B]; places and log-times of those until `late`)."""
  # In a row's own time it has one arrival a unit, and these are the ends: a sum of waits needs no logarithm.
  early_B, late_B = (np.exp(np.minimum(log_weight_B + t, _FULL)) for t in (early, late))
  count_B = np.zeros(len(log_weight_B), np.int32)
  place_M, time_M = np.arange(len(log_weight_B)), np.zeros(len(log_weight_B))
  found = [(place_M[:0], time_M[:0])]
  for _ in range(cap):
    time_M = time_M + rng.standard_exponential(len(time_M))
    here_M = time_M < late_B[place_M]
    place_M, time_M = place_M[here_M], time_M[here_M]
    if not len(place_M):
      break
    before_M = time_M < early_B[place_M]
    count_B[place_M[before_M]] += 1
    inside = place_M[~before_M]
    found.append((inside, np.log(time_M[~before_M]) - log_weight_B[inside]))
  places, times = zip(*found, strict=True)
  return count_B, np.concatenate(places), np.concatenate(times)


class _Weighing:
  """How many arrivals there are to expect by some time, after a histogram of the log-weights."""

  def __init__(self, log_weight_N: np.ndarray, cap: int):
    self._cap = cap
    self._least, most = float(log_weight_N.min()), float(log_weight_N.max())
    self._width = (most - self._least) / _BINS or 1e-9
    rows_X = np.zeros(_BINS + 1, np.int64)
    for start in range(0, len(log_weight_N), _CHUNK):
      above_B = log_weight_N[start : start + _CHUNK].astype(np.float64) - self._least
      rows_X += np.bincount((above_B / self._width).astype(np.int64), minlength=_BINS + 1)[: _BINS + 1]
    self._bins = np.flatnonzero(rows_X)
    self._rows_X = rows_X[self._bins]

  def log_time(self, arrivals: float, above: bool) -> float:
    """The logarithm of a time by which to expect at most so many arrivals in all, or at least so many.

    Every row is taken for the heaviest of its bin (`above`), or for the lightest, so that the bins do not matter.
    """
    heaviest_X = self._least + (self._bins + above) * self._width
    early, late = -float(heaviest_X[-1]) - _FULL, -float(heaviest_X[0]) + _FULL
    if arrivals <= 0:
      return -np.inf
    if arrivals >= self._expected(heaviest_X, late):
      return np.inf
    for _ in range(60):
      middle = (early + late) / 2
      if self._expected(heaviest_X, middle) < arrivals:
        early = middle
      else:
        late = middle
    return early if above else late

  def _expected(self, log_weight_X: np.ndarray, log_time: float) -> float:
    """Sum over rows of E min(a, cap) = λ P(a ≤ cap − 2) + cap P(a ≥ cap), for a of Poisson's law of mean λ."""
    from scipy.special import gammainc, gammaincc

    mean_X = np.exp(np.minimum(log_weight_X + log_time, _FULL))
    below_X = mean_X * gammaincc(self._cap - 1, mean_X) if self._cap > 1 else 0.0
    return float(self._rows_X @ (below_X + self._cap * gammainc(self._cap, mean_X)))


def _log_weights(pool: Candidates, target: Target) -> np.ndarray:
  z_N = ranking.standardised(pool.scores.score_N(target.name))
  return np.divide(z_N, np.float32(pool.options.temperature), out=z_N)

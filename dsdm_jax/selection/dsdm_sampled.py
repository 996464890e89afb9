"""DsDm with random draws: rows are drawn by their scores, so that selections of different seeds differ.

Weights are exp(z/T), with z the score in standard deviations and T = `selection.temperature`: T → 0 gives the top k,
T → ∞ random rows.

Draw rows with replacement, one after the other, among those that are below a cap. This is the same as the first `total`
arrivals of Poisson processes, one per row with its weight as its rate, that stop at the cap. So at any temperature one
pass over the rows, chunk by chunk, is enough: an estimate brackets the time of the last of these arrivals, the arrivals
before the bracket are counted, and the earliest of those inside the bracket complete the draw.
"""

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target

_CHUNK = 1 << 20  # rows that are drawn together, with their own random stream
_BINS = 1 << 13  # of log-weights, for the estimate of times
_SPREAD = 6.0  # standard deviations from the middle of the bracket to its ends
_FULL = 700.0  # logarithm of a number of arrivals that fills any row; its exponential is finite


def dsdm_gumbel(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """k rows drawn without replacement: the highest z/T + Gumbel noise (arXiv 1903.06059, section 2.3)."""
  key_N = _log_weights(pool, target)
  ranking.check_finite(key_N[~pool.unscored_N])
  key_N += ranking.gumbel(len(key_N), seed, 'dsdm_gumbel')
  return ranking.ranked(key_N, pool, budget.examples, temperature=pool.options.temperature)


def dsdm_boltzmann(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The whole budget drawn with replacement: a single pass visits each row as often as it was drawn.

  Rows that reach `selection.repeat_cap` are not drawn again.

  Raises:
    UserError: the pool cannot fill the budget within the cap.
  """
  open_A = np.flatnonzero(~(pool.masked_N | pool.unscored_N))
  if budget.total > budget.repeat_cap * len(open_A):
    raise UserError(
      f"'dsdm_boltzmann' cannot draw {budget.total} examples from {len(open_A)} rows of at most "
      f'{budget.repeat_cap} visits; raise selection.repeat_cap or lower selection.examples'
    )
  log_weight_N = _log_weights(pool, target)
  ranking.check_finite(log_weight_N[open_A])
  count_N = np.zeros(pool.num_rows, np.int32)
  count_N[open_A] = draw(log_weight_N[open_A], budget.total, budget.repeat_cap, seed)
  rows = np.flatnonzero(count_N)
  rows = rows[np.argsort(-log_weight_N[rows], kind='stable')]
  drawn = np.repeat(rows, count_N[rows])
  return Selection.of(drawn, log_weight_N[drawn], temperature=pool.options.temperature, distinct=len(rows))


def draw(log_weight_N: np.ndarray, total: int, cap: int, seed: int) -> np.ndarray:
  """Number of draws of each row: int32 [N], at most `cap` each, with sum `total`, which is at most N · cap."""
  times = _ArrivalTimes(log_weight_N, cap)
  spread = _SPREAD
  while True:
    margin = spread * (1 + total**0.5)  # counts with a cap vary less than Poisson counts
    early, late = times.log_time(total - margin, above=True), times.log_time(total + margin, above=False)
    count_N = np.empty(len(log_weight_N), np.int32)
    inside = []
    for chunk, start in enumerate(range(0, len(log_weight_N), _CHUNK)):
      part = slice(start, start + _CHUNK)
      rng = prng.numpy_stream(seed, 'selection', 'dsdm_boltzmann', chunk)
      count_N[part], row_M, time_M = _arrivals(log_weight_N[part].astype(np.float64), cap, early, late, rng)
      inside.append((row_M + start, time_M))
    row_M, time_M = (np.concatenate(parts) for parts in zip(*inside, strict=True))
    missing = total - int(count_N.sum(dtype=np.int64))
    if 0 <= missing <= len(row_M):
      np.add.at(count_N, row_M[np.argsort(time_M, kind='stable')[:missing]], 1)
      return count_N
    spread *= 2  # the last arrival is outside the bracket


def _arrivals(
  log_weight_B: np.ndarray, cap: int, early: float, late: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(arrivals of each row before the log-time `early`, int32 [B]; rows and log-times of those until `late`)."""
  # Scale time by the rate of each row, so that waits have mean 1 and their sums need no logarithm.
  early_B, late_B = (np.exp(np.minimum(log_weight_B + t, _FULL)) for t in (early, late))
  count_B = np.zeros(len(log_weight_B), np.int32)
  place_M, time_M = np.arange(len(log_weight_B)), np.zeros(len(log_weight_B))
  arrivals = [(place_M[:0], time_M[:0])]
  for _ in range(cap):
    time_M = time_M + rng.standard_exponential(len(time_M))
    here_M = time_M < late_B[place_M]
    place_M, time_M = place_M[here_M], time_M[here_M]
    if not len(place_M):
      break
    before_M = time_M < early_B[place_M]
    count_B[place_M[before_M]] += 1
    inside = place_M[~before_M]
    arrivals.append((inside, np.log(time_M[~before_M]) - log_weight_B[inside]))
  places, times = zip(*arrivals, strict=True)
  return count_B, np.concatenate(places), np.concatenate(times)


class _ArrivalTimes:
  """The expected number of arrivals by a time, estimated from a histogram of the log-weights."""

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
    """The logarithm of a time by which at most (`above`), or at least, `arrivals` arrivals are expected.

    Every row has the largest weight of its bin (`above`), or the smallest, so that the bound holds for any bins.
    """
    log_weight_X = self._least + (self._bins + above) * self._width
    early, late = -float(log_weight_X[-1]) - _FULL, -float(log_weight_X[0]) + _FULL
    if arrivals <= 0:
      return -np.inf
    if arrivals >= self._expected(log_weight_X, late):
      return np.inf
    for _ in range(60):
      middle = (early + late) / 2
      if self._expected(log_weight_X, middle) < arrivals:
        early = middle
      else:
        late = middle
    return early if above else late

  def _expected(self, log_weight_X: np.ndarray, log_time: float) -> float:
    """Sum over rows of E min(a, cap) = λ P(a ≤ cap − 2) + cap P(a ≥ cap), for Poisson a with mean λ."""
    from scipy.special import gammainc, gammaincc

    mean_X = np.exp(np.minimum(log_weight_X + log_time, _FULL))
    below_X = mean_X * gammaincc(self._cap - 1, mean_X) if self._cap > 1 else 0.0
    return float(self._rows_X @ (below_X + self._cap * gammainc(self._cap, mean_X)))


def _log_weights(pool: Candidates, target: Target) -> np.ndarray:
  z_N = ranking.standardised(pool.scores.score_N(target.name))
  return np.divide(z_N, np.float32(pool.options.temperature), out=z_N)

"""The compute multiplier: what a method's result would have cost with random data. Pure functions.

A ladder of random runs gives log-probability against compute. Between two rungs the curve is a straight line in the
logarithm of compute, so a point on it is a weighted mean of two rungs, and whether a method differs from that point is
a contrast of three arms (`statistics.contrast`). The interval holds every compute at which it does not: the inversion
of a test, which covers what the test covers (Fieller's method for a single line). Where the ladder ends, so does what
can be said: '> 4' is an answer.

*Gross* multiplier (the paper's): C_equivalent / C_final. *Net*: C_equivalent / (C_final + C_selection / uses), where
C_selection is what choosing cost and `uses` the trainings that share the choice. Net is above 1 where
C_selection / uses < (gross − 1) · C_final.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.evaluation import statistics

_POINTS = 32  # of a line between two rungs, at which the interval is looked up: 2 % of compute between rungs 2 apart
# What an arm's choice is made of, by method: stages whose cost it bears. Others bear all.
_FREE = ('random', 'random_one_epoch', 'random_again')
_NEEDS: Mapping[str, tuple[str, ...]] = {
  **dict.fromkeys(_FREE, ()),
  **dict.fromkeys(('classifier', 'classifier_pareto', 'dsir', 'bm25', 'imported', 'oracle'), ('selection',)),
  **dict.fromkeys(
    ('semdedup', 'semdedup_one_epoch', 'embedding', 'perplexity_low', 'perplexity_high', 'color_filter'),
    ('proxies', 'selection'),
  ),
  'gradient': ('proxies', 'features', 'selection'),
}
STAGES = ('proxies', 'features', 'datamodel', 'selection')


@dataclasses.dataclass(frozen=True)
class Reading:
  """A place on the axis of compute with its interval, in the unit of the ladder.

  Attributes:
    estimate: None outside the ladder.
    low: lower end; None where the interval goes on below the ladder.
    high: upper end; None where it goes on above the ladder.
    bottom: lowest rung.
    top: highest rung.
    above: where there is no estimate, whether the method is better than the whole ladder.
  """

  estimate: float | None
  low: float | None
  high: float | None
  bottom: float
  top: float
  above: bool = False

  def per(self, compute: float) -> 'Reading':
    """In units of `compute`."""
    estimate, low, high = (None if x is None else x / compute for x in (self.estimate, self.low, self.high))
    return Reading(estimate, low, high, self.bottom / compute, self.top / compute, self.above)

  def as_json(self) -> dict[str, Any]:
    return {'estimate': self.estimate, 'low': self.low, 'high': self.high, 'text': self.text()}

  def text(self) -> str:
    """'1.8 [1.2, > 4]': what the ladder cannot say is told by its ends."""
    if self.estimate is not None:
      middle = _short(self.estimate)
    else:
      middle = f'> {_short(self.top)}' if self.above else f'< {_short(self.bottom)}'
    low = f'< {_short(self.bottom)}' if self.low is None else _short(self.low)
    high = f'> {_short(self.top)}' if self.high is None else _short(self.high)
    if middle == high and self.low == self.top:  # the whole interval lies above
      return middle
    return middle if middle == low and self.high == self.bottom else f'{middle} [{low}, {high}]'


def _short(x: float) -> str:
  return f'{x:.3g}'


def read_off(
  method_SI: np.ndarray,
  rungs: Sequence[np.ndarray],
  compute: Sequence[float],
  confidence: float = 0.95,
  documents_I: np.ndarray | None = None,
) -> Reading:
  """The compute at which random data give what the method gives.

  Args:
    method_SI: values of the method, higher is better.
    rungs: values [seeds, items] of the random runs at each rung, at the same items.
    compute: of one run at each rung, rising.
    confidence: of the interval.
    documents_I: see `statistics.crossed_difference`.

  Raises:
    ValueError: fewer than two rungs, compute that does not rise, or values that `statistics.contrast` refuses.
  """
  if len(rungs) < 2 or not all(a < b for a, b in itertools.pairwise(compute)):
    raise ValueError(f'a ladder needs at least two rungs of rising compute, got {list(compute)}')
  places, differences, accepted = [], [], []
  for index in range(len(rungs) - 1):
    last = index == len(rungs) - 2
    for share in np.linspace(0, 1, _POINTS + 1)[: None if last else -1]:
      found = statistics.contrast(
        [method_SI, rungs[index], rungs[index + 1]], [1.0, share - 1, -share], confidence, documents_I
      )
      places.append(math.exp((1 - share) * math.log(compute[index]) + share * math.log(compute[index + 1])))
      differences.append(found.difference)
      accepted.append(not found.excludes_zero())
  bottom, top = float(compute[0]), float(compute[-1])
  estimate = _crossing(places, differences)
  above = estimate is None and differences[0] > 0
  if not any(accepted):
    if estimate is None:
      return Reading(None, top if above else None, None if above else bottom, bottom, top, above)
    return Reading(estimate, estimate, estimate, bottom, top)
  first, final = accepted.index(True), len(accepted) - 1 - accepted[::-1].index(True)
  low = None if first == 0 else places[first]
  high = None if final == len(places) - 1 else places[final]
  # The estimate lies between two points that may both be refused where all is known well.
  if estimate is not None:
    low, high = (None if low is None else min(low, estimate)), (None if high is None else max(high, estimate))
  return Reading(estimate, low, high, bottom, top, above)


def _crossing(places: Sequence[float], differences: Sequence[float]) -> float | None:
  """Where the curve first reaches the method; None where it never does, or begins above it."""
  if differences[0] < 0:
    return None
  for index, (a, b) in enumerate(itertools.pairwise(differences)):
    if a >= 0 >= b:
      share = a / (a - b) if a > b else 0.0
      return float(math.exp((1 - share) * math.log(places[index]) + share * math.log(places[index + 1])))
  return None


def selection_cost(method: str, costs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """FLOP and seconds that went into the choice of an arm: {'flop', 'seconds'}.

  The stages that a method stands on are charged as they stand in `costs`, whole although other arms may use them too.

  Args:
    method: name of the arm.
    costs: stage → 'flop' and 'seconds', at least for `STAGES`.
  """
  stages = _NEEDS.get(method, STAGES)
  return {unit: sum(costs[stage][unit] for stage in stages) for unit in ('flop', 'seconds')}


def arm(
  reading: Reading, method: str, final: Mapping[str, float], costs: Mapping[str, Mapping[str, float]], uses: int
) -> dict[str, Any]:
  """Gross and net multiplier of one arm.

  Args:
    reading: its result on the ladder, in FLOP.
    method: name of the arm.
    final: 'flop' and 'seconds' of one of its trainings.
    costs: see `selection_cost`.
    uses: trainings that share the choice.
  """
  spent = selection_cost(method, costs)
  gross = reading.per(final['flop'])
  net = reading.per(final['flop'] + spent['flop'] / uses)
  # Of a method better than the whole ladder the least is known that it is worth.
  worth = gross.estimate if gross.estimate is not None else (gross.top if gross.above else gross.bottom)
  return {
    'flop_final': final['flop'], 'seconds_final': final['seconds'],
    'flop_selection': spent['flop'], 'seconds_selection': spent['seconds'], 'uses': uses,
    'equivalent': reading.as_json(), 'gross': gross.as_json(), 'net': net.as_json(),
    'needs_flop_selection_below': max(0.0, (worth - 1) * final['flop'] * uses),
  }  # fmt: skip

"""The compute multiplier: how much compute random data would need for a method's result. Pure functions.

A ladder of random runs gives log-probability as a function of compute, each rung by models of the size and rate that
are best at its compute (`training/ladder.py`). Between two rungs the curve is a straight line in the logarithm of
compute. So a point on it is a weighted mean of two rungs, and the test of a method against that point is a contrast of
three arms (`statistics.contrast`). The interval holds every compute at which the test does not reject. This inverts the
test and has its coverage (Fieller's method for a single line). A result beyond the ladder is reported by the ladder's
end, such as '> 4'; nothing is extrapolated.

A curve that falls somewhere is read where it first reaches the method, as is the envelope of all models with at most
that compute.

*Gross* multiplier (the paper's): C_equivalent / C_final. *Net*: C_equivalent / (C_final + C_selection / uses), where
C_selection is the cost of the selection and `uses` the number of trainings that share it. Net is above 1 where
C_selection / uses < (gross − 1) · C_final. Both are given in FLOP, and in seconds of the machine: the same places on
the ladder, by the seconds that its models took.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.config.methods import charged_shares
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.evaluation import results, scaling_law, statistics
from dsdm_jax.evaluation.comparisons import Runs, arms, guarded, rows
from dsdm_jax.evaluation.results import Items, Table

_POINTS = 32  # where each line between two rungs is tested: steps of 2 % of compute for rungs a factor of 2 apart


@dataclasses.dataclass(frozen=True)
class Reading:
  """A place on the axis of compute with its interval, in the unit of the ladder.

  Attributes:
    estimate: None outside the ladder.
    low: lower end; None where the interval continues below the ladder.
    high: upper end; None where it continues above the ladder.
    bottom: lowest rung.
    top: highest rung.
    above: without an estimate, whether the method is better than the whole ladder.
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

  def on(self, compute: Sequence[float], other: Sequence[float]) -> 'Reading':
    """The same place on another axis.

    Args:
      compute: of the rungs, in the unit of the reading, rising.
      other: the other measure of the same rungs. It may fall somewhere; an end is then the farthest on the way to it.
    """
    exact = dict(zip(compute, other, strict=True))  # `text` compares ends with those of the ladder

    def at(x: float) -> float:
      return float(exact[x] if x in exact else np.exp(np.interp(math.log(x), np.log(compute), np.log(other))))

    middle = self.estimate if self.estimate is not None else (self.top if self.above else self.bottom)
    low, high = (middle if x is None else x for x in (self.low, self.high))
    knots = [y for x, y in zip(compute, other, strict=True) if low <= x <= high]
    ends = [*knots, *map(at, (low, middle, high))]
    return Reading(
      None if self.estimate is None else at(self.estimate),
      None if self.low is None else min(ends),
      None if self.high is None else max(ends),
      *(float(other[0]), float(other[-1])),
      self.above,
    )

  def as_json(self) -> dict[str, Any]:
    return {'estimate': self.estimate, 'low': self.low, 'high': self.high, 'text': self.text()}

  def text(self) -> str:
    """For example '1.8 [1.2, > 4]'; values beyond the ladder are given by its ends."""
    below, beyond = f'< {self.bottom:.3g}', f'> {self.top:.3g}'
    if self.estimate is not None:
      middle = f'{self.estimate:.3g}'
    else:
      middle = beyond if self.above else below
    low = below if self.low is None else f'{self.low:.3g}'
    high = beyond if self.high is None else f'{self.high:.3g}'
    if middle == high and self.low == self.top:  # the whole interval lies above the ladder
      return middle
    return middle if middle == low and self.high == self.bottom else f'{middle} [{low}, {high}]'


def read_off(
  method_SI: np.ndarray,
  rungs: Sequence[np.ndarray],
  compute: Sequence[float],
  confidence: float = 0.95,
  documents_I: np.ndarray | None = None,
) -> Reading:
  """The compute at which random data reach the result of the method.

  Args:
    method_SI: values of the method, higher is better.
    rungs: values [seeds, items] of the random runs at each rung, on the same items.
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
      contrast = statistics.contrast(
        [method_SI, rungs[index], rungs[index + 1]], [1.0, share - 1, -share], confidence, documents_I
      )
      places.append(math.exp((1 - share) * math.log(compute[index]) + share * math.log(compute[index + 1])))
      differences.append(contrast.difference)
      accepted.append(not contrast.excludes_zero())
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
  # With little noise the estimate lies between two points that are both rejected.
  if estimate is not None:
    low, high = (None if low is None else min(low, estimate)), (None if high is None else max(high, estimate))
  elif above:  # a curve that falls again may accept no point at its end, and the interval has the estimate in it
    high = None
  else:
    low = None
  return Reading(estimate, low, high, bottom, top, above)


def _crossing(places: Sequence[float], differences: Sequence[float]) -> float | None:
  """Where the curve first reaches the method; None if it never does, or starts above it."""
  if differences[0] < 0:
    return None
  for index, (a, b) in enumerate(itertools.pairwise(differences)):
    if a >= 0 >= b:
      share = a / (a - b) if a > b else 0.0
      return float(math.exp((1 - share) * math.log(places[index]) + share * math.log(places[index + 1])))
  return None


@dataclasses.dataclass(frozen=True)
class Charge:
  """What an arm costs, each as {'flop', 'seconds'}.

  Attributes:
    final: one of its trainings.
    selection: choosing its rows.
  """

  final: Mapping[str, float]
  selection: Mapping[str, float]


def charge(
  method: str,
  selections: Sequence[str],
  final: Mapping[str, float],
  costs: Mapping[str, Mapping[str, float]],
  own_costs: Mapping[str, Mapping[str, float]],
  proxies: int,
) -> Charge:
  """What an arm is charged: the stages that its method needs, in full even where other arms use them too.

  A method that needs the first proxy alone is charged one of them. Of the selection stage an arm is charged the mean of
  its own selections; of a file from before these were recorded, the whole stage.

  Args:
    method: of the arm.
    selections: names of its selections.
    final: 'flop' and 'seconds' of one of its trainings.
    costs: stage → 'flop' and 'seconds'. A file from before `target_features` has the cost of both under `features`.
    own_costs: selection → its 'flop' and 'seconds'.
    proxies: their number.
  """
  names, units = sorted(set(selections)), ('flop', 'seconds')
  if own_costs:
    costs = {**costs, 'selection': {unit: float(np.mean([own_costs[name][unit] for name in names])) for unit in units}}
  shares = charged_shares(method, proxies)
  return Charge(final, {unit: sum(x * costs[s][unit] for s, x in shares.items() if s in costs) for unit in units})


def arm(readings: Mapping[str, Reading | None], charged: Charge, uses: int) -> dict[str, Any]:
  """Gross and net multiplier of one arm, in FLOP and in seconds.

  Args:
    readings: its result on the ladder, in 'flop' and in 'seconds'; None where these are not known.
    charged: what it costs.
    uses: number of trainings that share the selection.
  """
  row: dict[str, Any] = {'uses': uses}
  for unit, ending in (('flop', ''), ('seconds', '_seconds')):
    reading, final, selection = readings[unit], charged.final[unit], charged.selection[unit]
    row |= {f'{unit}_final': final, f'{unit}_selection': selection}
    kinds = [f'{kind}{ending}' for kind in ('equivalent', 'gross', 'net')]
    if reading is None:
      row |= dict.fromkeys((*kinds, f'needs_{unit}_selection_below'))
      continue
    gross = reading.per(final)
    shown = reading, gross, reading.per(final + selection / uses)
    # Beyond the ladder, its end is what is known for certain; below a lower end above 1 that is nothing.
    worth = gross.estimate if gross.estimate is not None else (gross.top if gross.above else gross.bottom)
    known = gross.estimate is not None or gross.above or gross.bottom <= 1
    row |= {kind: each.as_json() for kind, each in zip(kinds, shown, strict=True)}
    row[f'needs_{unit}_selection_below'] = max(0.0, (worth - 1) * final * uses) if known else None
  return row


def final_cost(pretraining: Artifact) -> dict[str, float]:
  """'flop' and 'seconds' of one training of the stage."""
  return {unit: pretraining.manifest['cost'][unit] / pretraining.semantics['runs'] for unit in ('flop', 'seconds')}


@dataclasses.dataclass(frozen=True)
class Ladder:
  """The ladder's models.

  Attributes:
    index: one entry per model, as in the `index.json` of the stage.
    tables: values of the chosen ones, one table for each table of the arms, on the same items.
  """

  index: Sequence[Mapping[str, Any]]
  tables: Sequence[Table]

  @property
  def chosen(self) -> list[Mapping[str, Any]]:
    """The models of the rungs, without those that were tried and not chosen."""
    return [entry for entry in self.index if entry['chosen']]

  def rungs(self) -> list[list[int]]:
    """Places among the chosen of the models of each rung, by rising compute."""
    numbers = [entry['rung'] for entry in self.chosen]
    places = [[i for i, number in enumerate(numbers) if number == rung] for rung in sorted(set(numbers))]
    return sorted(places, key=lambda of_rung: self.chosen[of_rung[0]]['flop'])

  def compute(self) -> list[float]:
    """FLOP of one run of each rung."""
    return [self.chosen[places[0]]['flop'] for places in self.rungs()]

  def seconds(self) -> list[float] | None:
    """Median seconds of a run of each rung, as the first one compiles; None where they are not known."""
    taken = [[self.chosen[place]['seconds'] for place in places] for places in self.rungs()]
    return None if any(None in of_rung for of_rung in taken) else [float(np.median(of_rung)) for of_rung in taken]

  def values(self, table: Table) -> list[np.ndarray]:
    """Log-probabilities [seeds, items] of each rung."""
    return [table.values['logprob'][places] for places in self.rungs()]


def multipliers(
  tables: Sequence[Table],
  runs: Runs,
  ladder: Ladder,
  charged: Callable[[str, Sequence[str]], Charge],
  confidence: float,
  uses: int,
) -> dict[str, Any]:
  """The content of `multiplier.json`; `docs/evaluation.md` has the schema.

  Args:
    tables: of the arms, see `tables_of`.
    runs: the arm of each row.
    ladder: the models that the arms are compared with.
    charged: (method, names of selections) → what that arm costs.
    confidence: of intervals.
    uses: number of trainings that share a selection.
  """
  rungs, law = _rungs(ladder), scaling_law.check(ladder.index)
  return {
    'confidence': confidence,
    'uses': uses,
    'unit': {'compute': 'FLOP', 'time': 'seconds'},
    'rungs': rungs,
    'law': law,
    'curves': [_curve(table, ladder, confidence) for table in ladder.tables],
    'arms': [
      row
      for table, ladder_table in zip(tables, ladder.tables, strict=True)
      for row in _arms(table, runs, ladder, ladder_table, charged, confidence, uses)
    ],
    'notes': _notes(runs, rungs, law),
  }


def tables_of(items: Items, runs: Runs, ladder_items: Items, models: int) -> tuple[list[Table], list[Table]]:
  """Held-out tasks and benchmarks, then the means of `results.means`: of the arms' runs, and of the ladder's models.

  Args:
    items: values of the arms' runs, which decide over which tasks there is a mean.
    runs: of the arms.
    ladder_items: values of the ladder's models.
    models: number of these.
  """
  of_arms, of_ladder = (
    [table for table in results.read_tables(each, count) if table.split in results.COMPARED_SPLITS]
    for each, count in ((items, len(runs)), (ladder_items, models))
  )
  of_arms = results.judged(of_arms, runs)
  below = results.below_lines(of_arms, runs)
  return of_arms + results.means(of_arms, runs, below), of_ladder + results.means(of_ladder, runs, below)


def _rungs(ladder: Ladder) -> list[dict[str, Any]]:
  """A row for each size and rate of each rung; those that were not chosen have one seed."""
  rungs: dict[tuple[float, ...], list[Mapping[str, Any]]] = {}
  for entry in ladder.index:
    rungs.setdefault((entry['factor'], entry['size'], entry['rate']), []).append(entry)
  rows_of_rungs = []
  for same in rungs.values():
    seconds = [entry['seconds'] for entry in same if entry['seconds'] is not None]
    losses = [entry['held_out_loss'] for entry in same if entry['held_out_loss'] is not None]
    keys = ('factor', 'size', 'rate', 'chosen', 'parameters', 'tokens', 'epochs', 'flop')
    facts = {key: same[0][key] for key in keys} | {key: same[0]['model'][key] for key in ('layers', 'width')}
    facts |= {'seeds': len(same), 'seconds': float(np.median(seconds)) if seconds else None}
    rows_of_rungs.append({**facts, 'held_out_loss': float(np.mean(losses)) if losses else None})
  return rows_of_rungs


def _curve(table: Table, ladder: Ladder, confidence: float) -> dict[str, Any]:
  points = []
  labels = {'task': table.task, 'split': table.split}
  seconds: Sequence[float | None] = ladder.seconds() or [None] * len(ladder.compute())
  for flop, spent, values_SI in zip(ladder.compute(), seconds, ladder.values(table), strict=True):
    interval = guarded(labels, statistics.mean_interval, values_SI, confidence, table.documents_I)
    ends = {'value': interval.difference, 'low': interval.low, 'high': interval.high}
    points.append({'flop': flop, 'seconds': spent, **ends})
  return {**labels, 'metric': 'logprob', 'points': points}


def _arms(
  table: Table,
  runs: Runs,
  ladder: Ladder,
  ladder_table: Table,
  charged: Callable[[str, Sequence[str]], Charge],
  confidence: float,
  uses: int,
) -> list[dict[str, Any]]:
  compute, seconds, rungs = ladder.compute(), ladder.seconds(), ladder.values(ladder_table)
  arm_rows = []
  for method, target in arms(runs):
    places = rows(runs, (method, target))
    if any(runs[place]['selection'] is None for place in places):
      continue  # a checkpoint from outside the run, whose cost is unknown
    values_SI = table.values['logprob'][places]
    reading = read_off(values_SI, rungs, compute, confidence, table.documents_I)
    readings = {'flop': reading, 'seconds': reading.on(compute, seconds) if seconds else None}
    charges = charged(method, [runs[place]['selection'] for place in places])
    names = {'method': method, 'target_mix': target, 'task': table.task, 'split': table.split, 'metric': 'logprob'}
    below = None if table.below is None else (method, target) in table.below['logprob']
    value = {'value': float(values_SI.mean()), 'below_ngrams': below}
    arm_rows.append({**names, **value, **arm(readings, charges, uses)})
  return arm_rows


def _notes(runs: Runs, rungs: Sequence[Mapping[str, Any]], law: Mapping[str, Any] | None) -> list[str]:
  chosen = [rung for rung in rungs if rung['chosen']]
  low, high = (f'{end(rung["tokens"] / rung["parameters"] for rung in chosen):.2g}' for end in (min, max))
  notes = [
    'Equivalent compute is interpolated between rungs, linearly in the logarithm of compute. Its interval contains '
    'every compute at which random data do not differ significantly from the method.'
  ]
  trained = f'Rungs train on {low if low == high else f"{low} to {high}"} tokens per parameter'
  if len(rungs) == len(chosen):
    notes.append(
      f'{trained} at the learning rate of the arms, and no other size or rate was tried (ladder.step = 1). A tuned '
      'ladder could be better, and multipliers then lower: read them as an upper range.'
    )
  else:
    notes.append(
      f'{trained}, at the size and learning rate of the least loss on rows of the pool that no model trains on, of '
      f'{len(rungs)} that were tried.'
    )
  if law is not None:
    shares = [rung['compute'] for rung in law['rungs'] if rung['compute'] is not None]
    reached = f'between {min(shares):.2f} and {max(shares):.2f} of the compute' if shares else 'more compute'
    notes.append(
      f'Check: by a scaling law fitted to these losses (rms {law["rms"]:.3f} nats), the best model of any size needs '
      f'{reached} of a rung for its held-out loss.'
    )
  notes.append(
    'C_selection is the cost of choosing for one arm alone: the proxies, features and datamodel that it needs, and its '
    'own selection, divided by the number of trainings that share it (evaluation.selection_uses).'
  )
  if all(rung['seeds'] == 1 for rung in chosen) and any(
    len(results.rows(runs, arm)) == 1 for arm in results.arms(runs)
  ):
    notes.append(
      'Intervals of arms with one model are over items alone, since rungs have one model too: the noise of training is '
      'not in them (pretraining.seeds, ladder.seeds).'
    )
  if any('dsdm' in run['method'] for run in runs):
    notes.append('Intervals are for one selection: proxies were trained, and scores computed, once.')
  return notes

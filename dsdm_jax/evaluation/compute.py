"""The ladder's models on the questions of the arms, and every arm's result read off as compute: `multiplier.json`."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.core import processes, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.evaluation import multiplier, results, statistics
from dsdm_jax.evaluation.comparisons import Runs, arms, guarded, rows
from dsdm_jax.evaluation.results import Table
from dsdm_jax.evaluation.scoring import Scorer
from dsdm_jax.evaluation.suite import Exam, gather
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import trainer


def examine(context: Context, asked: Exam) -> dict[str, np.ndarray] | None:
  """Values of the ladder's models, `<metric>__<task>__<split>` → [models, items]; None where there is no ladder.

  Leaves `runs/ladder--<name>.npz` and `ladder_items.npz`.
  """
  ladder = context.inputs['ladder'].path
  index = json.loads((ladder / 'index.json').read_text())
  if not index:
    return None
  config, pool = context.config, Pool(context.inputs['pool'])
  mesh = make_mesh(config.mesh)
  with context.log.bar(total=len(index), desc='ladder', unit='model') as bar:
    for number in sorted({entry['rung'] for entry in index}):
      chosen = [entry for entry in index if entry['rung'] == number]
      model = ConfigDict(chosen[0]['model'])
      compiled = trainer(model, config.pretraining.train, pool.vocab_size, pool.length, mesh)
      scorer = Scorer(compiled, config.evaluation.batch_size, pool.encoder.pad)
      for entry in chosen:
        file = context.out / 'runs' / f'ladder--{entry["name"]}.npz'
        if not processes.decide(file.is_file):
          before = scorer.flop
          arrays, _ = asked.sit(scorer, load_state(ladder / entry['name'], compiled))
          context.add_flop(scorer.flop - before)
          if context.first:
            storage.save_npz(file, **arrays)
        bar.update(1)
  if not context.first:
    return {}
  items = gather(context.out / 'runs', [f'ladder--{entry["name"]}' for entry in index])
  storage.save_npz(context.out / 'ladder_items.npz', **items)
  return items


@dataclasses.dataclass(frozen=True)
class Charge:
  """What an arm is charged for.

  Attributes:
    method: whose stages it bears, see `multiplier.selection_cost`.
    final: 'flop' and 'seconds' of one of its trainings.
    costs: stage → 'flop' and 'seconds', at least for `multiplier.STAGES`.
  """

  method: str
  final: Mapping[str, float]
  costs: Mapping[str, Mapping[str, float]]


def charge(
  method: str,
  names: Sequence[str],
  final: Mapping[str, float],
  costs: Mapping[str, Mapping[str, float]],
  choices: Mapping[str, Mapping[str, float]],
) -> Charge:
  """Of the selection stage an arm bears what one selection of its own took, the mean over those that it has.

  Args:
    names: of the arm's selections.
    choices: selection → its 'flop' and 'seconds'; where one is not there, the arm bears the whole stage.
  """
  distinct = set(names)
  if distinct and distinct <= choices.keys():
    own = {unit: float(np.mean([choices[name][unit] for name in sorted(distinct)])) for unit in ('flop', 'seconds')}
    costs = {**costs, 'selection': own}
  return Charge(method, final, costs)


def read(
  context: Context, asked: Exam, items: Mapping[str, np.ndarray], runs: Runs, ladder_items: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """The content of `multiplier.json`, see `docs/evaluation.md`."""
  index = json.loads((context.inputs['ladder'].path / 'index.json').read_text())
  pretraining = context.inputs['pretraining']
  final = final_cost(pretraining)
  costs = {stage: context.inputs[stage].manifest['cost'] for stage in multiplier.STAGES}
  choices = context.inputs['selection'].semantics.get('cost', {})
  names, config = (asked.documents(), asked.categories()), context.config.evaluation
  return content(
    tables_of(items, runs, *names), runs, tables_of(ladder_items, runs, *names, len(index)), index,
    lambda method, names: charge(method, names, final, costs, choices), config.confidence, config.selection_uses,
  )  # fmt: skip


def final_cost(pretraining: Artifact) -> dict[str, float]:
  """'flop' and 'seconds' of one training of the stage."""
  return {unit: pretraining.manifest['cost'][unit] / pretraining.semantics['runs'] for unit in ('flop', 'seconds')}


def content(
  tables: Sequence[Table],
  runs: Runs,
  ladder_tables: Sequence[Table],
  index: Sequence[Mapping[str, Any]],
  charged: Callable[[str, Sequence[str]], Charge],
  confidence: float,
  uses: int,
) -> dict[str, Any]:
  """`multiplier.json` from values alone.

  Args:
    tables: of the arms, and `ladder_tables` of the ladder's models, at the same items.
    runs: whose row is whose.
    index: of the ladder's models.
    charged: what an arm of this method and these selections is charged for.
    confidence: of intervals.
    uses: trainings that share a choice.
  """
  return {
    'confidence': confidence, 'uses': uses, 'unit': {'compute': 'FLOP', 'time': 'seconds'},
    'rungs': _rungs(index),
    'curves': [_curve(table, index, confidence) for table in ladder_tables],
    'arms': [
      row
      for table, ladder_table in zip(tables, ladder_tables, strict=True)
      for row in _arms(table, runs, ladder_table, index, charged, confidence, uses)
    ],
    'notes': _notes(runs),
  }  # fmt: skip


def tables_of(
  items: Mapping[str, np.ndarray],
  runs: Runs,
  documents: Mapping[tuple[str, str], Sequence[str]],
  categories: Mapping[tuple[str, str], Sequence[str]],
  models: int | None = None,
) -> list[Table]:
  """Held-out tasks and benchmarks, then the means of `results.means`; of so many `models`, else one for each run."""
  every = [
    table for table in results.read_tables(items, models or len(runs), documents, categories)
    if table.split in results.COMPARED_SPLITS
  ]  # fmt: skip
  return every + results.means(every, runs)


def _rungs(index: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  found = []
  for number in sorted({entry['rung'] for entry in index}):
    same = [entry for entry in index if entry['rung'] == number]
    seconds = [entry['seconds'] for entry in same if entry['seconds'] is not None]
    found.append({
      **{key: same[0][key] for key in ('factor', 'parameters', 'tokens', 'epochs', 'flop')},
      'layers': same[0]['model']['layers'], 'width': same[0]['model']['width'], 'seeds': len(same),
      'seconds': float(np.mean(seconds)) if seconds else None,
    })  # fmt: skip
  return found


def _steps(table: Table, index: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[np.ndarray]]:
  """(FLOP of one run, log-probabilities [seeds, items]) of each rung, by rising compute."""
  found = []
  for number in sorted({entry['rung'] for entry in index}):
    places = [i for i, entry in enumerate(index) if entry['rung'] == number]
    found.append((index[places[0]]['flop'], table.values['logprob'][places]))
  found.sort(key=lambda pair: pair[0])
  return [flop for flop, _ in found], [values_SI for _, values_SI in found]


def _curve(table: Table, index: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
  points = []
  labels = {'task': table.task, 'split': table.split}
  for flop, values_SI in zip(*_steps(table, index), strict=True):
    interval = guarded(labels, statistics.mean_interval, values_SI, confidence, table.documents_I)
    points.append({'flop': flop, 'value': interval.difference, 'low': interval.low, 'high': interval.high})
  return {**labels, 'metric': 'logprob', 'points': points}


def _arms(
  table: Table,
  runs: Runs,
  ladder_table: Table,
  index: Sequence[Mapping[str, Any]],
  charged: Callable[[str, Sequence[str]], Charge],
  confidence: float,
  uses: int,
) -> list[dict[str, Any]]:
  compute, steps = _steps(ladder_table, index)
  found = []
  for method, target in arms(runs):
    chosen = rows(runs, (method, target))
    if any(runs[r]['selection'] is None for r in chosen):
      continue  # a checkpoint from elsewhere: nobody knows what it cost
    values_SI = table.values['logprob'][chosen]
    reading = multiplier.read_off(values_SI, steps, compute, confidence, table.documents_I)
    borne = charged(method, [runs[r]['selection'] for r in chosen])
    found.append({
      'method': method, 'target_mix': target, 'task': table.task, 'split': table.split, 'metric': 'logprob',
      'value': float(values_SI.mean()),
      **multiplier.arm(reading, borne.method, borne.final, borne.costs, uses),
    })  # fmt: skip
  return found


def _notes(runs: Runs) -> list[str]:
  notes = [
    'Equivalent compute is read off straight lines between rungs in the logarithm of compute; its interval holds every '
    'compute at which random data are not told apart from the method.',
    'Rungs train at the learning rate of the arms, not tuned for their width: where a tuned one would make the larger '
    'rungs better, multipliers are flattered.',
    'C_selection is what choosing would cost an arm alone: proxies, features and datamodel whole where it stands on '
    'them, and one selection of its own; divided by the trainings that share it (evaluation.selection_uses).',
  ]
  if any('dsdm' in run['method'] for run in runs):
    notes.append('Intervals are conditional on one selection: proxies and scores were made once.')
  return notes

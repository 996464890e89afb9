"""Stage `evaluation`: every model on every task and split, then differences between arms with intervals."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config.methods import STAGES
from dsdm_jax.config.values import BREADTH, is_jsonl, task_name
from dsdm_jax.core import artifacts, processes, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.progress import counted
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.data import inputs
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.tasks import SPLITS
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import multiplier, ngrams, results, scoring
from dsdm_jax.evaluation.comparisons import Options, Runs
from dsdm_jax.evaluation.results import UNTARGETED, Items
from dsdm_jax.evaluation.suite import BENCHMARK, Suite, open_suite
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import trainer

# Settings that do not change the values of one model on one task.
_NOT_OF_MODELS = {
  *('evaluation.tasks', 'evaluation.checkpoints', 'evaluation.confidence', 'evaluation.bootstrap'),
  *('evaluation.paired_seeds', 'evaluation.selection_uses', 'pretraining.seeds'),
}


def run(context: Context) -> dict:
  """Writes the artifact of the stage.

  `runs/<name>/<task>.npz` has the values of one model on one task, `items.npz` those of all, `runs.json` what they are,
  `lines.npz` the values of their reference lines, and `answers/` the generated texts. `documents.json` and
  `categories.json` have those of each item, by task and split. `results.json` and `multiplier.json` are the summaries.
  """
  suite, entries = open_suite(context), models(context)
  _evaluate(context, suite, context.config.model, entries, 'evaluation')

  ladder = storage.read_json(context.inputs['ladder'].path / 'index.json')
  for rung in sorted({entry['rung'] for entry in ladder}):
    same = [entry for entry in ladder if entry['rung'] == rung and entry['chosen']]
    rung_entries = [
      {'name': f'ladder--{entry["name"]}', **_checkpoint(context.inputs['ladder'], entry['name'])} for entry in same
    ]
    # A file of a workdir must not name a function.
    model = ConfigDict(same[0]['model'] | {'factory': context.config.model.factory})
    _evaluate(context, suite, model, rung_entries, 'ladder')
  asked = sum(task['n_items'] for task in suite.tasks())
  context.log.describe(f'{counted(len(entries) + len(ladder), "model")} × {counted(asked, "question")}')
  if context.first:
    _summarize(context, suite, entries, ladder)
  return {**scoring.METRICS, 'intervals': 'see notes in results.json'}


def models(context: Context) -> list[dict[str, Any]]:
  """Every model to evaluate: `name`, `method`, `target_mix`, `seed`, `selection`, and its `folder` and `step`.

  Raises:
    UserError: a name in `evaluation.checkpoints` is that of an arm.
  """
  index = storage.read_json(context.inputs['selection'].path / 'index.json', list)
  entries = []
  for entry in index:
    facts = {key: entry[key] for key in ('name', 'method', 'seed', 'selection')}
    own = _checkpoint(context.inputs['pretraining'], entry['name'])
    entries.append({**facts, 'target_mix': entry['target'], **own})
  content = artifacts.settings_of(context.out).get('evaluation.checkpoints')
  for place, spec in enumerate(context.config.evaluation.checkpoints):
    name, _, folder = spec.partition('=')
    if name in {entry['method'] for entry in index}:
      raise UserError(f'evaluation.checkpoints calls {folder} {name!r}, as an arm is called; give it another name')
    checkpoint = {'name': f'checkpoint--{name}', 'method': name, 'target_mix': UNTARGETED, 'seed': 0}
    entries.append({**checkpoint, 'selection': None, 'folder': folder, 'step': None})
    entries[-1]['of'] = content[place] if content else spec
  return entries


def _checkpoint(artifact: Artifact, name: str) -> dict[str, Any]:
  of = [artifact.manifest['units'][name]['of'], artifact.checksum(f'{name}.jsonl')]
  return {'folder': str(artifact.path / name), 'step': artifact.last_step(name), 'of': of}


def _evaluate(
  context: Context, suite: Suite, model: ConfigDict, entries: Sequence[Mapping[str, Any]], title: str
) -> None:
  """Evaluates models of one shape and writes `runs/<name>/<task>.npz` and `answers/`; skips what is there.

  Each pair of a model and a task is a unit.
  """
  config, pool = context.config, Pool(context.inputs['pool'])
  settings = artifacts.settings_of(context.out, _NOT_OF_MODELS)
  pairs = {(entry['name'], task): f'{entry["name"]} on {task}' for entry in entries for task in suite.digests}
  named = {unit: pair for pair, unit in pairs.items()}
  context.units.take(
    {
      pairs[entry['name'], task]: [settings, model.to_dict(), entry['of'], digest]
      for entry in entries
      for task, digest in suite.digests.items()
    },
    lambda unit: _files(*named[unit]),
  )
  compiled = trainer(model, config.pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))
  scorer, spent = scoring.Scorer(compiled, config.evaluation.batch_size, pool.encoder.pad), context.cost.parts
  with context.log.bar(total=len(entries), desc='' if title == 'evaluation' else title, unit='model') as bar:
    for entry in entries:
      state = None
      for task in suite.digests:
        unit, file = pairs[entry['name'], task], context.out / _files(entry['name'], task)[0]
        if not processes.decide(lambda: storage.is_marked(file) and f'{unit} flop' in spent):  # noqa: B023  at once
          state = state or load_state(storage.locate(entry['folder']), compiled, entry['step'])
          began, scorer.flop = time.monotonic(), 0.0  # a difference would depend on what was evaluated before
          arrays, texts = scoring.evaluate(suite, scorer, state, task)
          if context.first:
            answers = _write_answers(context.out, entry['name'], suite, arrays, texts) if 'method' in entry else []
            storage.save_npz(file, **arrays)
            storage.mark(file, *answers)
          # Last: what a kill left without its cost is evaluated again, and nothing is charged twice.
          spent |= {unit: time.monotonic() - began, f'{unit} flop': scorer.flop}
          context.cost.save()
        context.add_flop(spent.get(f'{unit} flop', 0.0))
      bar.update(1)


def _files(name: str, task: str) -> list[str]:
  """The values of a model on a task, and its answers."""
  splits = ('', *(f'.{split}' for split in SPLITS))
  return [f'runs/{name}/{task}.npz', *(f'answers/{name}--{task}{split}.jsonl' for split in splits)]


def _write_answers(
  out: Location, name: str, suite: Suite, arrays: Mapping[str, np.ndarray], texts: Mapping[tuple[str, str], list[str]]
) -> list[Location]:
  files = []
  for request in suite.requests:
    task, split = request.key
    if request.key in texts:
      right_I = arrays[f'accuracy__{task}__{split}']
      lines = [
        json.dumps({'id': id, 'output': text, 'right': bool(right)}) + '\n'
        for id, text, right in zip(request.item_ids_I, texts[request.key], right_I, strict=True)
      ]
      of_split = '' if split == BENCHMARK else f'.{split}'
      files.append(out / 'answers' / f'{name}--{task}{of_split}.jsonl')
      storage.write_text(files[-1], ''.join(lines))
  return files


def _summarize(
  context: Context, suite: Suite, entries: Sequence[Mapping[str, Any]], ladder: Sequence[Mapping[str, Any]]
) -> None:
  out, config = context.out, context.config.evaluation
  documents, categories = suite.documents(), suite.categories()
  values = _stacked(out / 'runs', [entry['name'] for entry in entries], suite.digests)
  lines = ngrams.lines(context, suite, entries) if config.ngram_tokens else {}
  items = Items(values, documents, categories, suite.tasks(), lines)
  runs = [{key: entry[key] for key in ('method', 'target_mix', 'seed', 'selection')} for entry in entries]
  storage.save_npz(out / 'items.npz', **items.values)
  storage.save_npz(out / 'lines.npz', **lines)
  storage.write_json(out / 'runs.json', runs)
  for name, by_task in (('documents', documents), ('categories', categories)):
    storage.write_json(
      out / f'{name}.json', {f'{task}__{split}': of_items for (task, split), of_items in by_task.items()}
    )
  summary = results.results(items, runs, Options(config.confidence, config.paired_seeds, config.bootstrap))
  summary['multiplier'] = None
  leakage = context.inputs['leakage']
  guarded = leakage.semantics['guarded']
  if missing := unguarded(guarded, leakage.settings, {task for task, _ in documents}, config.tasks):
    summary['notes'].append(f'The pool was not checked for text of {", ".join(missing)} (docs/pools.md).')
  if ladder:
    chosen = [f'ladder--{entry["name"]}' for entry in ladder if entry['chosen']]
    values = _stacked(out / 'runs', chosen, suite.digests)
    storage.save_npz(out / 'ladder_items.npz', **values)
    summary['multiplier'] = _multipliers(context, items, runs, ladder, Items(values, documents, categories))
    storage.write_json(out / 'multiplier.json', summary['multiplier'])
  storage.write_json(out / 'results.json', summary)


def unguarded(
  guarded: Iterable[str], settings: Mapping[str, Any], names: Iterable[str], tasks: Iterable[str]
) -> list[str]:
  """Evaluated tasks whose text the leakage guard did not look for.

  Args:
    guarded: names of the tasks that it looked for.
    settings: of its stage, where files are digests: another file of the same name is another task.
    names: of what is evaluated.
    tasks: `evaluation.tasks`.
  """
  known = {text for key in ('leakage.benchmarks', 'targets.tasks') for text in settings.get(key, ())}
  others = {task_name(task) for task in tasks if is_jsonl(task) and inputs.of_task(task) not in known}
  return sorted((set(names) - set(guarded) | others) - {BREADTH})


def _multipliers(
  context: Context, items: Items, runs: Runs, index: Sequence[Mapping[str, Any]], ladder_items: Items
) -> dict[str, Any]:
  config, final = context.config.evaluation, multiplier.final_cost(context.inputs['pretraining'])
  costs = {stage: context.inputs[stage].manifest['cost'] for stage in STAGES if stage in context.inputs}
  own_costs = context.inputs['selection'].semantics['cost']
  models = sum(entry['chosen'] for entry in index)
  tables, ladder_tables = multiplier.tables_of(items, runs, ladder_items, models)
  return multiplier.multipliers(
    tables,
    runs,
    multiplier.Ladder(index, ladder_tables),
    lambda method, selections: multiplier.charge(
      method, selections, final, costs, own_costs, context.config.proxies.count
    ),
    config.confidence,
    config.selection_uses,
  )


def _stacked(folder: Location, names: Sequence[str], tasks: Iterable[str]) -> dict[str, np.ndarray]:
  """The arrays [items] of each `<name>/<task>.npz`, stacked into [runs, items]."""
  loaded: list[dict[str, np.ndarray]] = []
  for name in names:
    loaded.append({})
    for task in tasks:
      with storage.load(folder / name / f'{task}.npz') as arrays:
        loaded[-1] |= arrays
  return {key: np.stack([arrays[key] for arrays in loaded]) for key in loaded[0]}

"""Stage `evaluation`: every model on every task and split, then differences between arms with intervals."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config.methods import STAGES
from dsdm_jax.config.values import is_jsonl, task_name
from dsdm_jax.core import processes, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.stage import Context
from dsdm_jax.data import inputs
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import multiplier, ngrams, results, scoring
from dsdm_jax.evaluation.comparisons import Options, Runs
from dsdm_jax.evaluation.results import UNTARGETED, Items
from dsdm_jax.evaluation.suite import BENCHMARK, Suite, open_suite
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import trainer


def run(context: Context) -> dict:
  """Writes the artifact of the stage.

  `runs/<name>.npz` has the values of one model, `items.npz` those of all, `runs.json` what they are, `lines.npz` the
  values of their reference lines, and `answers/` the generated texts. `documents.json` and `categories.json` have those
  of each item, by task and split. `results.json` and `multiplier.json` are the summaries.
  """
  suite, entries = open_suite(context), models(context)
  for folder in ('runs', 'answers'):
    (context.out / folder).mkdir(exist_ok=True)
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
  context.log.describe(f'{len(entries) + len(ladder)} models × {asked:,} questions')
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
  for spec in context.config.evaluation.checkpoints:
    name, _, folder = spec.partition('=')
    if name in {entry['method'] for entry in index}:
      raise UserError(f'evaluation.checkpoints calls {folder} {name!r}, as an arm is called; give it another name')
    checkpoint = {'name': f'checkpoint--{name}', 'method': name, 'target_mix': UNTARGETED, 'seed': 0}
    entries.append({**checkpoint, 'selection': None, 'folder': folder, 'step': None})
  return entries


def _checkpoint(artifact: Artifact, name: str) -> dict[str, Any]:
  return {'folder': str(artifact.path / name), 'step': artifact.last_step(name)}


def _evaluate(
  context: Context, suite: Suite, model: ConfigDict, entries: Sequence[Mapping[str, Any]], title: str
) -> None:
  """Evaluates models of one shape and writes `runs/<name>.npz` and `answers/`; skips models that have such a file."""
  config, pool = context.config, Pool(context.inputs['pool'])
  compiled = trainer(model, config.pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))
  scorer = scoring.Scorer(compiled, config.evaluation.batch_size, pool.encoder.pad)
  with context.log.bar(total=len(entries), desc='' if title == 'evaluation' else title, unit='model') as bar:
    for entry in entries:
      file = context.out / 'runs' / f'{entry["name"]}.npz'
      flop_of = context.cost.parts
      if not processes.decide(lambda: storage.is_marked(file) and entry['name'] in flop_of):  # noqa: B023  called at once
        scorer.flop = 0.0  # a difference would depend on what this process evaluated before
        arrays, texts = scoring.evaluate(suite, scorer, load_state(Path(entry['folder']), compiled, entry['step']))
        if context.first:
          answers = _write_answers(context.out, entry['name'], suite, arrays, texts) if 'method' in entry else []
          storage.save_npz(file, **arrays)
          storage.mark(file, *answers)
        # Last: a model that a kill left without its cost is evaluated again, and none is charged twice.
        flop_of[entry['name']] = scorer.flop
        context.cost.save()
      context.add_flop(flop_of.get(entry['name'], 0.0))
      bar.update(1)


def _write_answers(
  out: Path, name: str, suite: Suite, arrays: Mapping[str, np.ndarray], texts: Mapping[tuple[str, str], list[str]]
) -> list[Path]:
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
  values = _stacked(out / 'runs', [entry['name'] for entry in entries])
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
  pool = context.inputs['pool']
  if missing := unguarded(Pool(pool).card['guarded'], pool.settings, {task for task, _ in documents}, config.tasks):
    summary['notes'].append(f'The pool was not checked for text of {", ".join(missing)} (docs/pools.md).')
  if ladder:
    values = _stacked(out / 'runs', [f'ladder--{entry["name"]}' for entry in ladder if entry['chosen']])
    storage.save_npz(out / 'ladder_items.npz', **values)
    summary['multiplier'] = _multipliers(context, items, runs, ladder, Items(values, documents, categories))
    storage.write_json(out / 'multiplier.json', summary['multiplier'])
  storage.write_json(out / 'results.json', summary)


def unguarded(guarded: Iterable[str], pool: Mapping[str, Any], names: Iterable[str], tasks: Iterable[str]) -> list[str]:
  """Evaluated tasks whose text the leakage guard did not look for, such as benchmarks that are newer than the pool.

  Args:
    guarded: names of tasks in the pool's card.
    pool: settings in the pool's identity, where files are digests: another file of the same name is another task.
    names: of what is evaluated.
    tasks: `evaluation.tasks`.
  """
  known = {text for key in ('pool.leakage_benchmarks', 'targets.tasks') for text in pool.get(key, ())}
  others = {task_name(task) for task in tasks if is_jsonl(task) and inputs.of_task(task) not in known}
  return sorted(set(names) - set(guarded) | others)


def _multipliers(
  context: Context, items: Items, runs: Runs, index: Sequence[Mapping[str, Any]], ladder_items: Items
) -> dict[str, Any]:
  config, final = context.config.evaluation, multiplier.final_cost(context.inputs['pretraining'])
  costs = {stage: context.inputs[stage].manifest['cost'] for stage in STAGES}
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


def _stacked(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
  """The arrays [items] of each `<name>.npz`, stacked into [runs, items]."""
  loaded = []
  for name in names:
    with storage.load(folder / f'{name}.npz') as arrays:
      loaded.append(dict(arrays))
  return {key: np.stack([arrays[key] for arrays in loaded]) for key in loaded[0]}

"""Stage `evaluation`: every model on every task and split, then differences between arms with intervals."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core import processes, storage
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import compute, results, rules
from dsdm_jax.evaluation.results import BENCHMARK, UNTARGETED
from dsdm_jax.evaluation.scoring import Scorer
from dsdm_jax.evaluation.suite import Exam, exam, gather
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import trainer


def models(context: Context) -> list[dict[str, Any]]:
  """Every model to evaluate: `name`, `method`, `target_mix`, `seed`, `selection`, and the `folder` it lies in.

  Raises:
    UserError: a folder that `evaluation.checkpoints` names is not there, or has the name of an arm.
  """
  index = json.loads((context.inputs['selection'].path / 'index.json').read_text())
  pretrained = context.inputs['pretraining'].path
  found = [
    {
      'name': e['name'], 'method': e['method'], 'target_mix': e['target'], 'seed': e['seed'],
      'selection': e['selection'], 'folder': str(pretrained / e['name']),
    } for e in index
  ]  # fmt: skip
  for spec in context.config.evaluation.checkpoints:
    name, _, folder = spec.partition('=')
    if name in {e['method'] for e in index}:
      raise UserError(f'evaluation.checkpoints calls {folder} {name!r}, as an arm is called; give it another name')
    if not Path(folder).is_dir():
      raise UserError(f'evaluation.checkpoints names {folder}, which is no folder; give one that holds a checkpoint')
    found.append({
      'name': f'checkpoint--{name}', 'method': name, 'target_mix': UNTARGETED, 'seed': 0, 'selection': None,
      'folder': folder,
    })  # fmt: skip
  return found


def run(context: Context) -> dict:
  """Leaves `runs/<name>.npz`, together `items.npz`, `runs.json`, `results.json`, `answers/` (generated texts).

  And `documents.json` and `categories.json`: those of each item, by task and split.
  """
  config = context.config
  pool = Pool(context.inputs['pool'])
  compiled = trainer(config.model, config.pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))
  scorer = Scorer(compiled, config.evaluation.batch_size, pool.encoder.pad)
  asked, entries = exam(context), models(context)
  for folder in ('runs', 'answers'):
    (context.out / folder).mkdir(exist_ok=True)

  with context.log.bar(total=len(entries), desc='evaluation', unit='model') as bar:
    for entry in entries:
      file = context.out / 'runs' / f'{entry["name"]}.npz'
      if not processes.decide(file.is_file):
        before = scorer.flop
        arrays, texts = asked.sit(scorer, load_state(Path(entry['folder']), compiled))
        context.add_flop(scorer.flop - before)
        if context.first:
          _save(context.out, entry['name'], arrays, texts, asked)
      bar.update(1)

  ladder_items = compute.examine(context, asked)
  if context.first:
    _summarize(context, entries, asked, ladder_items)
  return {**rules.METRICS, 'intervals': 'see notes in results.json'}


def _save(out: Path, name: str, arrays: Mapping[str, np.ndarray], texts: Mapping[str, list[str]], asked: Exam) -> None:
  for request in asked.requests:
    task = request.benchmark.name
    if task in texts:
      right_I = arrays[f'accuracy__{task}__{BENCHMARK}']
      lines = [
        {'id': id, 'output': text, 'right': bool(right)}
        for id, text, right in zip(request.item_ids_I, texts[task], right_I, strict=True)
      ]
      storage.write_text(out / 'answers' / f'{name}--{task}.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
  storage.save_npz(out / 'runs' / f'{name}.npz', **arrays)


def _summarize(
  context: Context, entries: list[dict[str, Any]], asked: Exam, ladder_items: Mapping[str, np.ndarray] | None
) -> None:
  config = context.config.evaluation
  items = gather(context.out / 'runs', [entry['name'] for entry in entries])
  runs = [{key: e[key] for key in ('method', 'target_mix', 'seed', 'selection')} for e in entries]
  storage.save_npz(context.out / 'items.npz', **items)
  storage.write_json(context.out / 'runs.json', runs)
  for name, told in (('documents', asked.documents()), ('categories', asked.categories())):
    storage.write_json(context.out / f'{name}.json', {f'{t}__{s}': of_each for (t, s), of_each in told.items()})
  found = results.results(
    items,
    runs,
    confidence=config.confidence,
    paired_seeds=config.paired_seeds,
    resamples=config.bootstrap,
    documents=asked.documents(),
    categories=asked.categories(),
    tasks=asked.tasks(),
    cost={},
    versions={},
    config={},
  )
  found['multiplier'] = None if ladder_items is None else compute.read(context, asked, items, runs, ladder_items)
  if found['multiplier'] is not None:
    storage.write_json(context.out / 'multiplier.json', found['multiplier'])
  storage.write_json(context.out / 'results.json', found)

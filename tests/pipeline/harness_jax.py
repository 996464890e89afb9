"""Both ways from lm-evaluation-harness to our models: `python harness_jax.py PEERS WORKDIR TASKS OUT`.

PEERS is the folder of packages that has lm_eval, which goes behind those of this environment. Writes what the harness
gets from the adapter, what our suite gives for the same test split, and what target tasks are made of it.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np


def main(peers: str, workdir: str, folder: str, out: str) -> None:
  sys.path.append(peers)
  from lm_eval import simple_evaluate
  from lm_eval.tasks import TaskManager

  from configs import base
  from dsdm_jax.config.values import task_name
  from dsdm_jax.data import inputs
  from dsdm_jax.data.targets import benchmarks, tasks
  from dsdm_jax.errors import UserError
  from dsdm_jax.evaluation import scoring, suite
  from dsdm_jax.evaluation.lm_eval import HarnessModel

  model = HarnessModel(workdir, arm='dsdm', batch_size=16)
  names = sorted(path.stem for path in Path(folder).glob('*.yaml'))
  manager = TaskManager(include_path=folder, include_defaults=False)
  found = simple_evaluate(
    model, tasks=[f'own_{n}' for n in names], task_manager=manager, log_samples=True, bootstrap_iters=0
  )
  samples = {
    task: [sample['resps'] for sample in sorted(of_task, key=lambda sample: sample['doc_id'])]
    for task, of_task in found['samples'].items()
  }

  c = base.get_config()
  c.targets.folder = folder
  ours = {}
  for name in ('choose', 'blank', 'continue'):
    benchmark = benchmarks.named(f'lm_eval:own_{name}:test', folder)
    items = benchmarks.read_items(benchmark, folder)
    request = suite.build(benchmark, items, model._sequences, 4, 0)
    answers = model._scorer.answers(model._state, request.ids_P, request.count_P, model._length)
    rules = (
      scoring.lowest_cross_entropy(answers, request.item_P, request.gold_I, request.characters_P)
      if request.is_choice
      else scoring.exact_argmax(answers)
    )
    ours[f'own_{name}'] = {
      'ids': [item.id for item in items],
      'totals': answers.total_P.tolist(),
      'item': request.item_P.tolist(),
      'rules': {key: np.asarray(value).tolist() for key, value in rules.items()},
    }

  # Prompts with shots, as a benchmark and as a target whose shots are of another split.
  prompts = {}
  for name in ('shots', 'first', 'blanks', 'choose'):
    benchmark = benchmarks.named(f'lm_eval:own_{name}:test', folder)
    items = benchmarks.read_items(benchmark, folder)
    asked = [benchmarks.prompt(benchmark, items, index) for index in range(len(items))]
    target = tasks.benchmark_task(benchmark, folder, name)
    shown = tasks.with_shots(target, target.items, 0)
    prompts[f'own_{name}'] = [
      {
        'id': item.id,
        'pairs': list(zip(p.contexts, p.answers, strict=True)),
        'target': [t.context, t.answer, list(t.context_options)],
        'starts': [p.starts, t.starts],
        'right': p.gold,
      }
      for item, p, t in zip(items, asked, shown, strict=True)
    ]

  c.targets.tasks = tuple(f'lm_eval:own_{name}' for name in ('choose', 'shots', 'whole', 'blank', 'tested'))
  raw = {task.name: task for task in tasks.read_tasks(c.targets)}
  side = tasks.split_documents(list(raw.values()), 0.5, 0)
  shown = []
  for task in (raw['lm_eval.own_shots'], raw['lm_eval.own_tested']):
    shown += tasks.with_shots(task, [item for item in task.items if side[item.document] == 'target'], 0)
  refused = {}
  for text in ('own_write', 'own_none', 'own_choose:test', 'mmlu'):
    try:
      refused[text] = benchmarks.named(f'lm_eval:{text}', folder).name
    except UserError as error:
      refused[text] = str(error)
  try:
    c.evaluation.tasks = ('lm_eval:own_whole',)
    suite.selected_benchmarks(c.evaluation, folder)
  except UserError as error:
    refused['own_whole'] = str(error)
  digests = [inputs.of_task('lm_eval:own_choose', folder), inputs.of_task('lm_eval:own_choose:test', folder)]
  Path(out).write_text(
    json.dumps(
      {
        'samples': samples,
        'ours': ours,
        'raw': {task_name(name): [dataclasses.asdict(i) for i in task.items] for name, task in raw.items()},
        'modelling': [name for name, task in raw.items() if task.language_modelling],
        'prompts': prompts,
        'shown': [[i.context, list(i.starts), i.answer, i.id] for i in shown],
        'refused': refused,
        'digests': digests,
        'guarded': [text.text for text in tasks.benchmark_texts(['lm_eval:own_choose'], folder)],
      }
    )
  )


if __name__ == '__main__':
  main(*sys.argv[1:])

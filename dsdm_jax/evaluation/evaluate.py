"""Stage `evaluation`: every model on every task and split, then differences between arms with intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core import atomic, distributed, flops
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool import Pool
from dsdm_jax.data.targets import Examples, Targets
from dsdm_jax.evaluation import results
from dsdm_jax.evaluation.scoring import Scorer
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import TrainState, trainer

SPLITS = ('target', 'holdout')


def run(context: Context) -> dict:
  """Leaves `runs/<name>.npz`, their union `items.npz`, `runs.json` and `results.json`."""
  config = context.config
  pool, targets = Pool(context.inputs['pool']), Targets(context.inputs['targets'])
  index = json.loads((context.inputs['selection'].path / 'index.json').read_text())
  pretrained = context.inputs['pretraining'].path
  compiled = trainer(config.model, config.pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))
  scorer = Scorer(compiled, config.evaluation.batch_size)
  examples = {(t, s): targets.examples(t, s) for t in targets.tasks for s in SPLITS}
  (context.out / 'runs').mkdir(exist_ok=True)

  with context.log.bar(total=len(index), desc='evaluation', unit='model') as bar:
    for entry in index:
      file = context.out / 'runs' / f'{entry["name"]}.npz'
      if not distributed.decide(file.is_file):
        state = load_state(pretrained / entry['name'], compiled)
        arrays = {}
        for (task, split), e in examples.items():
          logprob_I, accuracy_I = scorer.score(state, e.tokens_TL, e.weights_TL)
          arrays[f'logprob__{task}__{split}'], arrays[f'accuracy__{task}__{split}'] = logprob_I, accuracy_I
        context.add_flop(_flop(scorer, state, examples))
        if context.first:
          atomic.save_npz(file, **arrays)
      bar.update(1)

  if context.first:
    _summarize(context, index, examples)
  return {
    'logprob': 'mean over the answer tokens of log p, nats; higher is better',
    'accuracy': 'share of items whose every answer token is the argmax, teacher-forced',
    'intervals': 'conditional on one selection: proxies and scores were made once',
  }


def _summarize(context: Context, index: list[dict[str, Any]], examples: dict[tuple[str, str], Examples]) -> None:
  config = context.config
  items = _gather(context.out / 'runs', [entry['name'] for entry in index])
  runs = [
    {'method': e['method'], 'target_mix': e['target'], 'seed': e['seed'], 'selection': e['selection']} for e in index
  ]
  atomic.save_npz(context.out / 'items.npz', **items)
  atomic.write_json(context.out / 'runs.json', runs)
  documents = {key: [record['document'] for record in e.records] for key, e in examples.items()}
  found = results.results(
    items,
    runs,
    confidence=config.evaluation.confidence,
    paired_seeds=config.evaluation.paired_seeds,
    documents=documents,
    cost={},
    versions={},
    config={},
  )
  atomic.write_json(context.out / 'results.json', found)


def _flop(scorer: Scorer, state: TrainState, examples: dict[tuple[str, str], Examples]) -> float:
  tokens = sum(len(e.tokens_TL) for e in examples.values())
  e = next(iter(examples.values()))
  return flops.count(scorer.apply, state.params, state.rest, e.tokens_TL, e.weights_TL) * tokens / len(e.tokens_TL)


def _gather(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
  """Per-run arrays [items] stacked into [runs, items]."""
  loaded = []
  for name in names:
    with np.load(folder / f'{name}.npz', allow_pickle=False) as arrays:
      loaded.append(dict(arrays))
  return {key: np.stack([arrays[key] for arrays in loaded]) for key in loaded[0]}

"""Stage `pretraining`: trains one model per arm and seed on the arm's mixture, all with the same number of tokens."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from dsdm_jax.core import artifacts, prng, storage
from dsdm_jax.core.mesh import make_mesh, share
from dsdm_jax.core.progress import counted
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.order.batches import training_batches
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.training import loop, vmapped
from dsdm_jax.training.metrics import held_out
from dsdm_jax.training.step import trainer


def run(context: Context) -> dict:
  """Trains every entry of the selection stage's index; writes `<name>/` and `<name>.jsonl` for each.

  Models of one seed share their initialisation across arms, so that arms are compared seed by seed. A model is a unit:
  another seed or arm leaves it as it is.
  """
  config, pretraining = context.config, context.config.pretraining
  pool = Pool(context.inputs['pool'])
  selections = context.inputs['selection']
  index = storage.read_json(selections.path / 'index.json', list)
  budget = selections.semantics['budget_examples']
  steps = budget // pretraining.train.batch_size
  compiled = trainer(config.model, pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))
  local_rows = share(compiled.batch_sharding, pretraining.train.batch_size)

  def schedule(entry: dict) -> Schedule:
    order, length = prng.derive(config.seed, 'order', entry['seed']), steps * pretraining.train.batch_size
    return selection_lib.schedule(selections.path, entry, length, order, pretraining.max_epochs)

  for entry in index:  # before the first model is trained: an arm may have too few rows for the budget
    schedule(entry)
  settings = artifacts.settings_of(context.out, {'pretraining.seeds'})
  shared = [settings, context.inputs['pool'].digest, budget]
  taken = context.units.take(
    {entry['name']: [*shared, entry, _rows_of(selections.path, entry)] for entry in index},
    lambda name: (f'{name}/', f'{name}.jsonl'),
  )
  # Models that are trained together stay together when a run resumes, so finished ones of this attempt are among them.
  own = [entry for entry in index if entry['name'] not in taken]
  at_once = pretraining.models_at_once
  groups = [[entry] for entry in index if entry['name'] in taken]
  groups += [own[start : start + at_once] for start in range(0, len(own), at_once)]
  context.log.describe(f'{counted(len(index), "model")} × {counted(steps, "step")}')
  with context.log.bar(total=steps * len(index), unit='step') as bar:
    for group in groups:
      names = [entry['name'] for entry in group]
      keys = [prng.stream(config.seed, 'init', 'final', entry['seed']) for entry in group]
      batches: list[loop.Batches] = [
        functools.partial(training_batches, pool, schedule(entry), pretraining.train.batch_size, share=local_rows)
        for entry in group
      ]
      if len(names) == 1:
        rows = Selection.load(selections.path, group[0]['selection']).rows
        evaluate = held_out(compiled, pool, rows, pretraining.train, config.seed)
        run = loop.Run(names[0], keys[0], batches[0], steps, evaluate)
        loop.train(context, compiled, run, pretraining.train, bar)
      else:
        vmapped.train(context, compiled, names, keys, batches, steps, pretraining.train, bar)
  return {'runs': len(index), 'steps': steps, 'tokens_per_run': steps * pretraining.train.batch_size * pool.length}


def _rows_of(folder: Location, entry: Mapping[str, Any]) -> list[str]:
  """Digests of the rows and weights that an entry trains on, in their order."""
  names = [part['selection'] for part in entry['parts']] if 'parts' in entry else [entry['selection']]
  chosen = [Selection.load(folder, name) for name in names]
  return [hashlib.sha256(part.rows.tobytes() + part.weights.tobytes()).hexdigest() for part in chosen]

"""Stage `pretraining`: one model per arm and seed, on the arm's mixture, at one token budget for all."""

import functools
import json

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.core.mesh import make_mesh, share
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.order.batches import training_batches
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.training import loop, vmapped
from dsdm_jax.training.held_out import held_out
from dsdm_jax.training.step import trainer


def run(context: Context) -> dict:
  """Trains every entry of the selection stage's index; leaves `<name>/` and `<name>.jsonl` for each.

  Models of one seed share their initialisation over arms, so that arms are compared seed by seed.
  """
  config, pretraining = context.config, context.config.pretraining
  pool = Pool(context.inputs['pool'])
  selections = context.inputs['selection']
  index = json.loads((selections.path / 'index.json').read_text())
  budget = selections.semantics['budget_examples']
  steps = budget // pretraining.train.batch_size
  compiled = trainer(config.model, pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))
  mine = share(compiled.batch_sharding, pretraining.train.batch_size)
  for entry in index:  # all of them before the first is trained: an arm may have too few rows for the budget
    _schedule(context, entry, steps)
  at_once = pretraining.models_at_once
  with context.log.bar(total=steps * len(index), desc='pretraining', unit='step') as bar:
    for group in (index[start : start + at_once] for start in range(0, len(index), at_once)):
      names = [entry['name'] for entry in group]
      keys = [prng.stream(config.seed, 'init', 'final', entry['seed']) for entry in group]
      chosen = [Selection.load(selections.path, entry['selection']) for entry in group]
      batches = [_batches(context, pool, entry, steps, mine) for entry in group]
      if len(group) == 1:
        beside = held_out(compiled, pool, chosen[0].rows, pretraining.train, config.seed)
        loop.train(context, compiled, names[0], keys[0], batches[0], steps, pretraining.train, bar, beside)
      else:
        vmapped.train(context, compiled, names, keys, batches, steps, pretraining.train, bar)
  return {'runs': len(index), 'steps': steps, 'tokens_per_run': steps * pretraining.train.batch_size * pool.length}


def _batches(context: Context, pool: Pool, entry: dict, steps: int, mine: np.ndarray) -> loop.Batches:
  schedule = _schedule(context, entry, steps)
  return functools.partial(training_batches, pool, schedule, context.config.pretraining.train.batch_size, share=mine)


def _schedule(context: Context, entry: dict, steps: int) -> Schedule:
  config, pretraining = context.config, context.config.pretraining
  order, length = prng.derive(config.seed, 'order', entry['seed']), steps * pretraining.train.batch_size
  return selection_lib.schedule(context.inputs['selection'].path, entry, length, order, pretraining.max_epochs)

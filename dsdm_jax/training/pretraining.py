"""Stage `pretraining`: one model per arm and seed, on the arm's mixture, at one token budget for all."""

import functools
import json

from dsdm_jax.core import prng
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.stage import Context
from dsdm_jax.data.batches import training_batches
from dsdm_jax.data.pool import Pool
from dsdm_jax.data.schedule import Schedule
from dsdm_jax.data.selection import Selection
from dsdm_jax.training import loop
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
  with context.log.bar(total=steps * len(index), desc='pretraining', unit='step') as bar:
    for entry in index:
      selection = Selection.load(selections.path, entry['selection'])
      schedule = Schedule.single(
        entry['name'],
        selection.rows,
        steps * pretraining.train.batch_size,
        prng.derive(config.seed, 'order', entry['seed']),
        selection.weights,
      )
      loop.train(
        context, compiled, entry['name'], prng.stream(config.seed, 'init', 'final', entry['seed']),
        functools.partial(training_batches, pool, schedule, pretraining.train.batch_size), steps,
        pretraining.train, bar, held_out(compiled, pool, selection.rows, pretraining.train, config.seed),
      )  # fmt: skip
  return {'runs': len(index), 'steps': steps, 'tokens_per_run': steps * pretraining.train.batch_size * pool.length}

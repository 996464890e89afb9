"""Stage `ladder`: trains models on random data at several sizes, where parameters and tokens grow together.

Their results as a function of compute are the scale on which a method's result is read as compute
(`dsdm_jax/evaluation/multiplier.py`). The learning-rate schedule of each rung has the rung's length.
"""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.core import prng, storage
from dsdm_jax.core.mesh import make_mesh, share
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.batches import training_batches
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.training import loop
from dsdm_jax.training.step import abstract_model, trainer


@dataclasses.dataclass(frozen=True)
class Rung:
  """One size of the ladder.

  Attributes:
    factor: requested compute, relative to the training of one arm.
    model: config of the model.
    parameters: number of parameters.
    examples: number of examples that each model of the rung trains on.
  """

  factor: float
  model: ConfigDict
  parameters: int
  examples: int


def rung(model: ConfigDict, factor: float, examples: int, vocab_size: int, length: int) -> Rung:
  """The rung with about `factor` times the compute of `model` on `examples` examples.

  Parameters grow with the square root of the factor, through the widths of model and MLP (the number of layers would
  change them in jumps). The number of examples makes up for the distance to the nearest possible width.

  Raises:
    UserError: no width gives a model of about this size.
  """
  base = parameters(model, vocab_size, length)
  wanted = base * math.sqrt(factor)
  unit = 2 * model.heads  # rotary positions need heads of an even size
  low, high = 1, 2
  while parameters(scaled(model, high * unit), vocab_size, length) < wanted:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    if parameters(scaled(model, middle * unit), vocab_size, length) < wanted:
      low = middle
    else:
      high = middle
  sizes = {n * unit: parameters(scaled(model, n * unit), vocab_size, length) for n in (low, high)}
  if model.width % unit == 0:
    sizes[model.width] = base
  width = min(sizes, key=lambda w: abs(math.log(sizes[w] / wanted)))
  if not 0.5 < sizes[width] / wanted < 2:
    raise UserError(
      f'ladder.rungs holds {factor:g}, for which no width of model is close enough; use a number closer to 1'
    )
  return Rung(factor, scaled(model, width), sizes[width], round(examples * factor * base / sizes[width]))


def scaled(model: ConfigDict, width: int) -> ConfigDict:
  """`model` at another width, with its MLP in proportion; unchanged at its own width."""
  copied = ConfigDict(model.to_dict())
  if width != model.width:
    copied.width, copied.mlp_width = width, max(2, 2 * round(model.mlp_width * width / model.width / 2))
  return copied


def parameters(model: ConfigDict, vocab_size: int, length: int) -> int:
  """Number of parameters of the model."""
  params = nnx.state(abstract_model(model, vocab_size, length), nnx.Param)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def plan(config: ConfigDict, vocab_size: int, length: int) -> list[Rung]:
  """The rungs of `config.ladder`, lowest first.

  Raises:
    UserError: a rung has less than one step of training, or no width gives its size.
  """
  examples = config.selection.examples * config.selection.epochs
  batch = config.pretraining.train.batch_size
  rungs = [rung(config.model, f, examples, vocab_size, length) for f in sorted(map(float, config.ladder.rungs))]
  for r in rungs:
    if r.examples < batch:
      raise UserError(
        f'ladder.rungs holds {r.factor:g}, which leaves {r.examples} examples, less than one batch of {batch}; '
        'remove it'
      )
  return rungs


def run(context: Context) -> dict:
  """Trains `ladder.seeds` models per rung; writes `rung_<r>--<seed>/`, `.jsonl`, and `index.json` with all models."""
  config = context.config
  pool = Pool(context.inputs['pool'])
  rungs = plan(config, pool.vocab_size, pool.length)
  train, mesh = config.pretraining.train, make_mesh(config.mesh)
  steps = [r.examples // train.batch_size for r in rungs]
  index: list[dict[str, Any]] = []
  with context.log.bar(total=sum(steps) * config.ladder.seeds, desc='ladder', unit='step') as bar:
    for number, r in enumerate(rungs):
      compiled = trainer(r.model, train, pool.vocab_size, pool.length, mesh)
      local_rows = share(compiled.batch_sharding, train.batch_size)
      flop = steps[number] * compiled.flop_per_step
      for seed in range(config.ladder.seeds):
        name = f'rung_{number}--{seed}'
        count = steps[number] * train.batch_size
        rng = prng.numpy_stream(config.seed, 'ladder', number, seed)
        rows = np.sort(rng.choice(pool.num_rows, min(count, pool.num_rows), replace=False)).astype(np.int64)
        schedule = Schedule.single(name, rows, count, prng.derive(config.seed, 'ladder_order', number, seed))
        batches = functools.partial(training_batches, pool, schedule, train.batch_size, share=local_rows)
        key = prng.stream(config.seed, 'init', 'ladder', number, seed)
        loop.train(context, compiled, loop.Run(name, key, batches, steps[number]), train, bar)
        entry = {'name': name, 'rung': number, 'seed': seed, 'factor': r.factor, 'model': r.model.to_dict()}
        entry |= {'parameters': r.parameters, 'examples': count, 'tokens': count * pool.length}
        entry |= {'epochs': count / len(rows), 'flop': flop}
        seconds = context.cost.parts.get(name)
        index.append(entry | {'seconds': None if seconds is None else round(seconds, 3)})
  if context.first:
    storage.write_text(context.out / 'index.json', json.dumps(index, indent=1))
  return {'rungs': [{'parameters': r.parameters, 'examples': r.examples, 'factor': r.factor} for r in rungs]}

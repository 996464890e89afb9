"""Stage `ladder`: models on random data at several sizes, parameters and tokens growing together.

What they reach against what they cost is the scale on which a method's result is read as compute
(`dsdm_jax/evaluation/multiplier.py`). Each rung has a learning-rate schedule of its own length.
"""

import dataclasses
import functools
import json
import math
import time
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
    factor: compute wished for, in that of one of the arms' trainings.
    model: its config.
    parameters: of the model.
    examples: that each of its models trains on.
  """

  factor: float
  model: ConfigDict
  parameters: int
  examples: int


def rung(model: ConfigDict, factor: float, examples: int, vocab_size: int, length: int) -> Rung:
  """The rung of about `factor` times the compute of `model` on `examples` examples.

  Parameters grow with the root of the factor, by the widths of model and MLP (rounded layers would make them jump);
  tokens grow as much as the parameters of the nearest such model leave to do.

  Raises:
    UserError: there is no such model small enough.
  """
  base = parameters(model, vocab_size, length)
  wanted = base * math.sqrt(factor)
  unit = 2 * model.heads  # heads of an even size, as rotary positions need
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
    raise UserError(f'ladder.rungs holds {factor:g}, for which model has no width near; give a number nearer to 1')
  return Rung(factor, scaled(model, width), sizes[width], round(examples * factor * base / sizes[width]))


def scaled(model: ConfigDict, width: int) -> ConfigDict:
  """`model` at another width, its MLP in proportion; the same config at its own width."""
  copied = ConfigDict(model.to_dict())
  if width != model.width:
    copied.width, copied.mlp_width = width, max(2, 2 * round(model.mlp_width * width / model.width / 2))
  return copied


def parameters(model: ConfigDict, vocab_size: int, length: int) -> int:
  """How many numbers the model learns."""
  params = nnx.state(abstract_model(model, vocab_size, length), nnx.Param)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def plan(config: ConfigDict, vocab_size: int, length: int) -> list[Rung]:
  """The rungs that `config.ladder` asks for, lowest first.

  Raises:
    UserError: a rung has less than one step of training, or two rungs come out the same.
  """
  examples = config.selection.examples * config.selection.epochs
  batch = config.pretraining.train.batch_size
  rungs = [rung(config.model, f, examples, vocab_size, length) for f in sorted(map(float, config.ladder.rungs))]
  for r in rungs:
    if r.examples < batch:
      raise UserError(
        f'ladder.rungs holds {r.factor:g}, which leaves {r.examples} examples and not one batch of {batch}; '
        'leave it out'
      )
  return rungs


def run(context: Context) -> dict:
  """Trains `ladder.seeds` models per rung; leaves `rung_<r>--<seed>/`, `.jsonl`, and `index.json`, an entry a model."""
  config = context.config
  pool = Pool(context.inputs['pool'])
  rungs = plan(config, pool.vocab_size, pool.length)
  train, mesh = config.pretraining.train, make_mesh(config.mesh)
  steps = [r.examples // train.batch_size for r in rungs]
  index: list[dict[str, Any]] = []
  with context.log.bar(total=sum(steps) * config.ladder.seeds, desc='ladder', unit='step') as bar:
    for number, r in enumerate(rungs):
      compiled = trainer(r.model, train, pool.vocab_size, pool.length, mesh)
      mine = share(compiled.batch_sharding, train.batch_size)
      flop = steps[number] * compiled.flop_per_step
      for seed in range(config.ladder.seeds):
        name = f'rung_{number}--{seed}'
        count = steps[number] * train.batch_size
        rng = prng.numpy_stream(config.seed, 'ladder', number, seed)
        rows = np.sort(rng.choice(pool.num_rows, min(count, pool.num_rows), replace=False)).astype(np.int64)
        schedule = Schedule.single(name, rows, count, prng.derive(config.seed, 'ladder_order', number, seed))
        fresh = not (context.out / name).exists()
        began = time.monotonic()
        loop.train(
          context, compiled, name, prng.stream(config.seed, 'init', 'ladder', number, seed),
          functools.partial(training_batches, pool, schedule, train.batch_size, share=mine), steps[number], train, bar,
        )  # fmt: skip
        clock = context.out / f'{name}.seconds'
        if fresh and context.first:  # of a run that was interrupted nobody knows
          storage.write_text(clock, f'{time.monotonic() - began:.3f}')
        index.append({
          'name': name, 'rung': number, 'seed': seed, 'factor': r.factor, 'model': r.model.to_dict(),
          'parameters': r.parameters, 'examples': count, 'tokens': count * pool.length, 'epochs': count / len(rows),
          'flop': flop, 'seconds': float(clock.read_text()) if clock.is_file() else None,
        })  # fmt: skip
  if context.first:
    storage.write_text(context.out / 'index.json', json.dumps(index, indent=1))
  return {'rungs': [{'parameters': r.parameters, 'examples': r.examples, 'factor': r.factor} for r in rungs]}

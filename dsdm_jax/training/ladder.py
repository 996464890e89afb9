"""Stage `ladder`: trains models on random data at several amounts of compute, each at the best size and rate found.

Their results as a function of compute are the scale on which a method's result is read as compute
(`dsdm_jax/evaluation/multiplier.py`). A scale of badly sized models, or of one rate for all, is too low, and every
multiplier read off it too high. So at each rung models of the same compute are tried: wide ones on few tokens and
narrow ones on many, at lower and higher rates (`Search`). The loss on rows of the pool that no model trains on decides,
which no target and no method has a part in. Models of other seeds are trained at the choice alone.

The learning-rate schedule of each model has the model's own length.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.core import artifacts, prng, storage
from dsdm_jax.core.mesh import make_mesh, share
from dsdm_jax.core.progress import counted
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.batches import training_batches
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets import masked
from dsdm_jax.errors import Diverged, UserError
from dsdm_jax.training import loop
from dsdm_jax.training.metrics import HeldOut
from dsdm_jax.training.step import Trainer, abstract_model, trainer

Place = tuple[int, int]  # exponents of `ladder.step`: of the size, and of the learning rate
_HELD_OUT = 1_024  # rows by whose loss sizes and rates are compared, at most
_HELD_OUT_SHARE = 1 / 16  # of the pool, at most, but a batch
_FARTHEST = 6  # steps from the first place, in size and in rate


@dataclasses.dataclass(frozen=True)
class Rung:
  """One size at one amount of compute.

  Attributes:
    factor: requested compute, relative to the training of one arm.
    model: config of the model.
    parameters: number of parameters.
    steps: of training, so that it takes `factor` times the FLOP of an arm's.
  """

  factor: float
  model: ConfigDict
  parameters: int
  steps: int


def rung(
  model: ConfigDict,
  factor: float,
  steps: int,
  vocab_size: int,
  length: int,
  flop: Callable[[ConfigDict], float],
  size: float = 1.0,
) -> Rung | None:
  """The rung with `factor` times the compute of `model` in `steps` steps, and `size` · √factor times its parameters.

  Parameters change through the widths of model and MLP (the number of layers would change them in jumps). The number of
  steps is what the compute allows at the nearest possible width. None if no width gives a model of about this size, or
  the compute is less than one step of it.

  Args:
    model: of the arms.
    factor: compute relative to an arm's training.
    steps: of an arm's training.
    vocab_size: V.
    length: L.
    flop: model → FLOP of one of its steps.
    size: see above.
  """
  base = parameters(model, vocab_size, length)
  wanted = base * math.sqrt(factor) * size
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
    return None
  chosen = scaled(model, width)
  own_steps = round(factor * steps * flop(model) / flop(chosen))
  return Rung(factor, chosen, sizes[width], own_steps) if own_steps else None


def scaled(model: ConfigDict, width: int) -> ConfigDict:
  """`model` at another width, with its MLP in proportion; unchanged at its own width."""
  copied = ConfigDict(model.to_dict())
  if width != model.width:
    copied.width, copied.mlp_width = width, max(2, 2 * round(model.mlp_width * width / model.width / 2))
  return copied


@functools.lru_cache(maxsize=64)
def _parameters(model_json: str, vocab_size: int, length: int) -> int:
  params = nnx.state(abstract_model(ConfigDict(json.loads(model_json)), vocab_size, length), nnx.Param)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def parameters(model: ConfigDict, vocab_size: int, length: int) -> int:
  """Number of parameters of the model."""
  return _parameters(model.to_json(sort_keys=True), vocab_size, length)


def plan(config: ConfigDict, vocab_size: int, length: int, flop: Callable[[ConfigDict], float]) -> list[Rung]:
  """The rungs of `config.ladder`, lowest first, at the place where the search begins.

  Args:
    config: whole config.
    vocab_size: V.
    length: L.
    flop: model → FLOP of one of its steps.

  Raises:
    UserError: no width gives a rung's size, or its compute is less than one step.
  """
  steps = config.selection.examples * config.selection.epochs // config.pretraining.train.batch_size
  rungs = []
  for factor in sorted(map(float, config.ladder.rungs)):
    planned = rung(config.model, factor, steps, vocab_size, length, flop)
    if planned is None:
      raise UserError(
        f'ladder.rungs holds {factor:g}, at which no width of model is close enough to √{factor:g} times the '
        'parameters, or has the compute for one step; use a number closer to 1, or remove it'
      )
    rungs.append(planned)
  return rungs


class Search:
  """Looks for the place with the least loss: from a place to the best of its neighbors, until none is better.

  Neighbors are one step away, in size or in rate. Losses are computed once. The order is fixed, so the same losses give
  the same places.

  Args:
    loss: place → loss; infinite where there is no model or it diverges.
    steps: False tries the first place alone.
  """

  def __init__(self, loss: Callable[[Place], float], steps: bool = True):
    self._loss, self._steps = loss, steps
    self.losses: dict[Place, float] = {}

  def best(self, first: Place) -> Place:
    """The place where the search ends."""
    at = self._tried(first)
    while self._steps:
      size, rate = at
      around = [(size - 1, rate), (size + 1, rate), (size, rate - 1), (size, rate + 1)]
      near = [p for p in around if max(abs(p[0] - first[0]), abs(p[1] - first[1])) <= _FARTHEST]
      after = min([at, *map(self._tried, near)], key=self.losses.__getitem__)
      if after == at:
        break
      at = after
    return at

  def _tried(self, place: Place) -> Place:
    if place not in self.losses:
      self.losses[place] = self._loss(place)
    return place


def run(context: Context) -> dict:
  """Trains the models; writes `<name>/` and `<name>.jsonl` of each and `index.json`, which marks the chosen ones.

  A model is a unit. The search of a rung begins at the place that was best at the rung below. `ladder.step` = 1 leaves
  all at the first.
  """
  config, step = context.config, context.config.ladder.step
  pool = Pool(context.inputs['pool'])
  train, mesh = config.pretraining.train, make_mesh(config.mesh)
  held, free = held_out_rows(config.seed, pool.num_rows, train.batch_size)
  held_out = pool.tokens(held), train.batch_size, pool.weights(held)
  masked_N = masked.masked_rows(context.inputs['leakage'])
  allowed = int((~masked_N[free]).sum())
  settings = artifacts.settings_of(context.out, {'ladder.seeds', 'ladder.rungs', 'ladder.step', 'pretraining.seeds'})

  def compiled(model: ConfigDict, rate: float) -> Trainer:
    own = ConfigDict(train.to_dict())
    own.learning_rate *= rate
    return trainer(model, own, pool.vocab_size, pool.length, mesh)

  flop_of: dict[int, float] = {}  # of one step, by width; tracing takes a second

  def flop(model: ConfigDict) -> float:
    if model.width not in flop_of:
      flop_of[model.width] = compiled(model, 1.0).flop_per_step
    return flop_of[model.width]

  base_steps = config.selection.examples * config.selection.epochs // train.batch_size
  planned = plan(config, pool.vocab_size, pool.length, flop)
  index: list[dict[str, Any]] = []
  first = (0, 0)
  with context.log.bar(total=sum(r.steps for r in planned) * config.ladder.seeds, unit='step') as bar:

    def trained(number: int, place: Place, seed: int) -> dict[str, Any] | None:
      """The entry of one model in the index; None if there is no model of this size."""
      size, rate = (step**exponent for exponent in place)
      r = rung(config.model, planned[number].factor, base_steps, pool.vocab_size, pool.length, flop, size)
      if r is None:
        return None
      bar.total = max(bar.total or 0, bar.n + r.steps)
      name = f'rung_{number}--size_{place[0]}--rate_{place[1]}--{seed}'
      of_model, count = compiled(r.model, rate), r.steps * train.batch_size
      rng = prng.numpy_stream(config.seed, 'ladder', number, seed)
      rows = masked.draw(masked_N, min(count, allowed), rng, free)
      unit = {
        name: [
          settings,
          context.inputs['pool'].digest,
          r.model.to_dict(),
          rate,
          r.steps,
          hashlib.sha256(rows.tobytes()).hexdigest(),
        ]
      }
      context.units.take(unit, lambda name: (f'{name}/', f'{name}.jsonl'))
      schedule = Schedule.single(name, rows, count, prng.derive(config.seed, 'ladder_order', number, seed))
      local_rows = share(of_model.batch_sharding, train.batch_size)
      batches = functools.partial(training_batches, pool, schedule, train.batch_size, share=local_rows)
      key = prng.stream(config.seed, 'init', 'ladder', number, seed)
      evaluated = ConfigDict(train.to_dict())
      evaluated.evaluate_every_steps = r.steps  # at the end alone
      one = loop.Run(name, key, batches, r.steps, HeldOut(of_model, *held_out))
      try:
        loss = loop.train(context, of_model, one, evaluated, bar)[-1]['held_out_loss']
      except Diverged:
        loss = None
      seconds = context.cost.parts.get(name)
      entry = {'name': name, 'rung': number, 'seed': seed, 'chosen': False, 'factor': r.factor, 'size': size}
      entry |= {'rate': rate, 'model': r.model.to_dict(), 'parameters': r.parameters, 'examples': count}
      entry |= {'tokens': count * pool.length, 'epochs': count / len(rows)}
      entry |= {'flop': r.steps * of_model.flop_per_step, 'seconds': None if seconds is None else round(seconds, 3)}
      return entry | {'held_out_loss': loss}

    for number, r in enumerate(planned):
      tried: dict[Place, dict[str, Any] | None] = {}

      def loss(place: Place, number: int = number, tried: dict = tried) -> float:
        tried[place] = entry = trained(number, place, 0)
        return math.inf if entry is None or entry['held_out_loss'] is None else entry['held_out_loss']

      search = Search(loss, step > 1)
      first = search.best(first)
      if not math.isfinite(search.losses[first]):
        raise UserError(
          f'ladder: every model of rung {r.factor:g} diverges; lower pretraining.train.learning_rate, then start again'
        )
      others = [trained(number, first, seed) for seed in range(1, config.ladder.seeds)]
      if any(entry is None or entry['held_out_loss'] is None for entry in others):
        raise UserError(
          f'ladder: a model of rung {r.factor:g} diverges at the size and rate of another seed; lower '
          'pretraining.train.learning_rate, then start again'
        )
      for entry in (tried[first], *others):
        if entry is not None:
          entry['chosen'] = True
      index += [entry for entry in (*tried.values(), *others) if entry is not None]
      best = tried[first] or {}
      context.log.say(
        f'  rung {r.factor:g}: {best["parameters"]:,} parameters, {best["tokens"]:,} tokens, rate × {best["rate"]:g}; '
        f'held-out loss {best["held_out_loss"]:.4f}, the best of {len(tried)} sizes and rates'
      )
  if planned:
    context.log.describe(f'{counted(len(index), "model")} on {counted(len(planned), "rung")}')
  if context.first:
    storage.write_text(context.out / 'index.json', json.dumps(index, indent=1))
  keys = ('factor', 'size', 'rate', 'parameters', 'tokens', 'held_out_loss')
  return {'rungs': [{key: e[key] for key in keys} for e in index if e['chosen'] and not e['seed']]}


def held_out_rows(seed: int, num_rows: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
  """(rows that no model of the ladder trains on, whole batches; all other rows), ascending, int64.

  Raises:
    UserError: the pool has less than two batches.
  """
  count = max(batch, min(_HELD_OUT, int(num_rows * _HELD_OUT_SHARE)) // batch * batch)
  if num_rows < 2 * batch:
    raise UserError(
      f'ladder.rungs needs {2 * batch} rows, a batch to train on and one to compare models by, and the pool has '
      f'{num_rows}; set --config.ladder.rungs=() or raise pool.max_bytes'
    )
  held = prng.numpy_stream(seed, 'ladder', 'held_out').choice(num_rows, count, replace=False)
  return np.sort(held).astype(np.int64), np.setdiff1d(np.arange(num_rows), held)

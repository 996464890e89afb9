"""Trains several models of one shape at once with `vmap`, because one small model leaves a device partly idle.

Each model has its own initialisation and data. Results equal training them one by one, up to the rounding of matrix
products of another shape.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dsdm_jax.core import flops, processes, storage
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.core.progress import Bar
from dsdm_jax.core.stage import Context
from dsdm_jax.training import loop
from dsdm_jax.training.step import Trainer


class VmappedTrainer:
  """A `Trainer` for `models` models: states, batches and metrics have an additional leading axis of models."""

  def __init__(self, trainer: Trainer, models: int):
    self.mesh, self.models = trainer.mesh, models

    def stacked(sharding: NamedSharding) -> NamedSharding:
      return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))

    self.shardings = jax.tree.map(stacked, trainer.shardings)
    self.batch_sharding = stacked(trainer.batch_sharding)

    def many(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((models, *x.shape), x.dtype, sharding=sharding)

    self.abstract = jax.tree.map(many, trainer.abstract, self.shardings)
    self.abstract_batch = tuple(many(x, self.batch_sharding) for x in trainer.abstract_batch)
    self._stack = jax.jit(lambda *states: jax.tree.map(lambda *x: jnp.stack(x), *states), out_shardings=self.shardings)
    self._init = trainer.init
    self.unstack = jax.jit(lambda states, i: jax.tree.map(lambda x: x[i], states), out_shardings=trainer.shardings)
    self.step = jax.jit(
      jax.vmap(trainer.apply, in_axes=(0, 0, 0, None)),
      in_shardings=(self.shardings, self.batch_sharding, self.batch_sharding, None),
      donate_argnums=0,
    )

  @functools.cached_property
  def flop_per_step(self) -> float:
    """FLOP of one step of all models."""
    return flops.count(self.step, self.abstract, *self.abstract_batch, jax.ShapeDtypeStruct((), jnp.int32))

  def init(self, keys: Sequence[jax.Array]) -> Any:
    return self._stack(*(self._init(key) for key in keys))


@functools.lru_cache(maxsize=4)
def _vmapped(trainer: Trainer, models: int) -> VmappedTrainer:
  return VmappedTrainer(trainer, models)


def train(
  context: Context,
  trainer: Trainer,
  names: Sequence[str],
  keys: Sequence[jax.Array],
  batches: Sequence[loop.Batches],
  steps: int,
  config: ConfigDict,
  bar: Bar,
) -> None:
  """`loop.train` for several models: writes `<name>/` and `<name>.jsonl` for each of `names`.

  While they train, `<first name>.together/` holds the states of all of them.
  """
  files = [context.out / f'{name}.jsonl' for name in names]
  group = f'{names[0]}.together'
  vmapped = _vmapped(trainer, len(names))
  if processes.decide(lambda: all(storage.is_marked(file) for file in files)):
    bar.skip(steps * len(names))
    context.add_flop(vmapped.flop_per_step * steps if steps else 0.0)
    _delete(context, group)
    return

  def stacked(start: int) -> Iterator[dict[str, np.ndarray]]:
    for parts in zip(*(batch(start) for batch in batches), strict=True):
      yield {key: np.stack([part[key] for part in parts]) for key in parts[0] if key != 'row_B'}

  run = loop.Run(group, keys, stacked, steps, models=names)
  history = loop.train(context, vmapped, run, config, bar)
  states = loop.load_state(context.out / group, vmapped)
  records = [
    [{key: v[index] if isinstance(v, list) else v for key, v in line.items()} for line in history]
    for index in range(len(names))
  ]
  for index, name in enumerate(names):
    with Checkpoints(context.out / name) as checkpoints:
      checkpoints.drop_after(-1)  # an earlier attempt may have left a torn one
      checkpoints.save(steps, vmapped.unstack(states, index), {'history': records[index]})
  seconds = context.cost.parts.pop(group, 0.0)
  context.cost.parts |= {name: context.cost.parts.get(name, 0.0) or seconds / len(names) for name in names}
  context.cost.save()
  if context.first:
    for file, record in zip(files, records, strict=True):
      storage.write_text(file, ''.join(json.dumps(line) + '\n' for line in record))
      storage.mark(file)
  _delete(context, group)


def _delete(context: Context, group: str) -> None:
  """Deletes the states of models that are saved one by one, also where a kill came before that."""
  if context.first:
    storage.unmark(context.out / f'{group}.jsonl')
    storage.delete(context.out / group)
  processes.wait()

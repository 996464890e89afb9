"""Several models of one shape trained at once, by `vmap`: small ones leave a device idle that a few of them fill.

Each model has its own initialisation and its own data; what comes out is what training them one by one gives, up to the
rounding of matrix products that are computed in another shape.
"""

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dsdm_jax.core import flops, processes, storage
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.core.stage import Context
from dsdm_jax.training import loop
from dsdm_jax.training.step import Trainer


class Together:
  """`Trainer` for `models` models: its states, batches and metrics have one more leading axis, of models."""

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
    """FLOP of a step of all models."""
    return flops.count(self.step, self.abstract, *self.abstract_batch, jax.ShapeDtypeStruct((), jnp.int32))

  def init(self, keys: Sequence[jax.Array]) -> Any:
    return self._stack(*(self._init(key) for key in keys))


@functools.lru_cache(maxsize=4)
def _together(trainer: Trainer, models: int) -> Together:
  return Together(trainer, models)


def train(
  context: Context,
  trainer: Trainer,
  names: Sequence[str],
  keys: Sequence[jax.Array],
  batches: Sequence[loop.Batches],
  steps: int,
  config: ConfigDict,
  bar: tqdm.tqdm,
) -> None:
  """`loop.train` of several models: leaves `<name>/` and `<name>.jsonl` of each, and the same for one name.

  While they train, their states lie together in `<first name>.together/`.
  """
  files = [context.out / f'{name}.jsonl' for name in names]
  if processes.decide(lambda: all(file.is_file() for file in files)):
    bar.update(steps * len(names))
    return
  group = f'{names[0]}.together'
  many = _together(trainer, len(names))

  def side_by_side(start: int) -> Iterator[dict[str, np.ndarray]]:
    for parts in zip(*(batch(start) for batch in batches), strict=True):
      yield {key: np.stack([part[key] for part in parts]) for key in ('tokens_BL', 'weight_B')}

  history = loop.train(context, many, group, keys, side_by_side, steps, config, bar, names=names)
  states = loop.load_state(context.out / group, many)
  for index, name in enumerate(names):
    with Checkpoints(context.out / name) as checkpoints:
      checkpoints.drop_after(-1)  # what a kill left here may be torn, and all of it is at hand
      checkpoints.save(steps, many.unstack(states, index), {'history': _of_one(history, index)})
  if context.first:
    for index, file in enumerate(files):
      storage.write_text(file, ''.join(json.dumps(line) + '\n' for line in _of_one(history, index)))
    (context.out / f'{group}.jsonl').unlink()
    shutil.rmtree(context.out / group)
  processes.wait()


def _of_one(history: loop.History, index: int) -> loop.History:
  return [{key: v[index] if isinstance(v, list) else v for key, v in line.items()} for line in history]

"""Stage `proxies`: trains small models, each on a random subset of the pool."""

import functools

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.core import prng, storage
from dsdm_jax.core.mesh import make_mesh, share
from dsdm_jax.core.progress import counted
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.batches import training_batches
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.training import loop
from dsdm_jax.training.metrics import held_out
from dsdm_jax.training.step import Trainer, trainer


def run(context: Context) -> dict:
  """Trains `proxies.count` models; writes `proxy_<p>/`, `proxy_<p>.jsonl` and `subset_<p>.npy` (sorted rows).

  Each folder has `proxies.checkpoints` checkpoints of the training (see `checkpoint_steps`).
  """
  config, proxies = context.config, context.config.proxies
  pool = Pool(context.inputs['pool'])
  size, steps = steps_of(proxies, pool.num_rows)
  seed = prng.derive(config.seed, 'proxies', proxies.seed) if proxies.seed else config.seed
  compiled = trainer_of(proxies, pool, make_mesh(config.mesh))
  local_rows = share(compiled.batch_sharding, proxies.train.batch_size)
  losses = []
  context.log.describe(f'{counted(proxies.count, "model")} × {counted(steps, "step")}')
  with context.log.bar(total=steps * proxies.count, unit='step') as bar:
    for proxy in range(proxies.count):
      rows = subset(seed, proxy, pool.num_rows, size)
      if context.first:
        storage.save_npy(context.out / f'subset_{proxy}.npy', rows)
      schedule = Schedule.single(f'proxy_{proxy}', rows, steps * proxies.train.batch_size, seed)
      batches = functools.partial(training_batches, pool, schedule, proxies.train.batch_size, share=local_rows)
      evaluate = held_out(compiled, pool, rows, proxies.train, config.seed)
      keep_steps = checkpoint_steps(steps, proxies.checkpoints)[:-1]
      key = prng.stream(seed, 'init', 'proxy', proxy)
      run = loop.Run(f'proxy_{proxy}', key, batches, steps, evaluate, keep_steps)
      history = loop.train(context, compiled, run, proxies.train, bar)
      losses.append(history[-1]['loss'] if history else None)
  return {'count': proxies.count, 'subset_rows': size, 'steps': steps, 'final_loss_nats': losses}


def trainer_of(proxies: ConfigDict, pool: Pool, mesh: Mesh) -> Trainer:
  """What trains the proxies of the config's section, or reads them; frozen if they are not trained."""
  return trainer(proxies.model, proxies.train, pool.vocab_size, pool.length, mesh, frozen=not proxies.epochs)


def steps_of(proxies: ConfigDict, rows: int) -> tuple[int, int]:
  """(rows of a proxy's subset, its steps), of the config's section and the rows of the pool.

  Raises:
    UserError: there are fewer steps than checkpoints, or none where there should be some.
  """
  size = round(proxies.subset_share * rows)
  steps = round(proxies.epochs * size) // proxies.train.batch_size
  if steps < 1 and proxies.epochs > 0:
    raise UserError(
      f'config.proxies: {proxies.epochs} epochs of {size} rows are less than one batch of '
      f'{proxies.train.batch_size}; raise proxies.epochs or the pool'
    )
  if 0 < steps < proxies.checkpoints:
    raise UserError(
      f'config.proxies: {steps} steps are fewer than proxies.checkpoints = {proxies.checkpoints}; lower that, or raise '
      'proxies.epochs or the pool'
    )
  return size, steps


def checkpoint_steps(steps: int, count: int) -> tuple[int, ...]:
  """The steps of the `count` checkpoints of a proxy, evenly spaced, the last one included."""
  return tuple(round(steps * (i + 1) / count) for i in range(count))


def checkpoints(config: ConfigDict) -> int:
  """C, over all proxies. Checkpoint c belongs to proxy c // `proxies.checkpoints`, earliest first."""
  return config.proxies.count * config.proxies.checkpoints


def subset(seed: int, proxy: int, num_rows: int, size: int) -> np.ndarray:
  """Sorted int64 rows of proxy number `proxy`, drawn without replacement."""
  rows = prng.numpy_stream(seed, 'proxy_subset', proxy).choice(num_rows, size, replace=False)
  return np.sort(rows).astype(np.int64)

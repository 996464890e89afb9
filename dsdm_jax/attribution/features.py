"""Stage `features`: φ of every row of the pool and of every target example, for each proxy."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.attribution.gradients import DenseFeatures, FeatureStep, TwoSidedFeatures
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core import atomic, flops
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.config import load_callable
from dsdm_jax.core.errors import UserError
from dsdm_jax.core.mesh import batch_sharding, make_mesh
from dsdm_jax.core.stage import Context
from dsdm_jax.data.batches import row_range_batches
from dsdm_jax.data.pool import Pool
from dsdm_jax.data.targets import Targets
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import abstract_model, trainer


def run(context: Context) -> dict:
  """Leaves `features_<c>.zarr` [N, J] and `<task>_<c>.npy` [T, J] (float32) for each proxy c."""
  config = context.config
  pool, targets = Pool(context.inputs['pool']), Targets(context.inputs['targets'])
  mesh = make_mesh(config.mesh)
  step = feature_step(config, pool.vocab_size, pool.length, mesh)
  context.log.event('features', **step.describe(), dimension=step.dimension)
  context.log.say(f'  {_picked(step, config.features.dimension)}')
  compiled = trainer(config.proxies.model, config.proxies.train, pool.vocab_size, pool.length, mesh)

  total = config.proxies.count * pool.num_rows
  with context.log.bar(total=total, desc='features', unit='row') as bar:
    for checkpoint in range(config.proxies.count):
      params = load_state(context.inputs['proxies'].path / f'proxy_{checkpoint}', compiled).params
      prepared = step.prepare(params, checkpoint)
      _target_features(context, step, prepared, checkpoint, targets, mesh)
      _pool_features(context, step, prepared, checkpoint, pool, mesh, bar)
  store = {k: config.features[k] for k in ('shard_rows', 'store_dtype')}
  return {
    **step.describe(),
    'dimension': step.dimension,
    'rows': pool.num_rows,
    'checkpoints': config.proxies.count,
    **store,
  }


def feature_step(config: ConfigDict, vocab_size: int, length: int, mesh: Mesh) -> FeatureStep:
  """The step that `features.projection` names, for the proxies' model."""
  model = abstract_model(config.proxies.model, vocab_size, length)
  output_fn = load_callable(config.features.output_fn)
  if config.features.projection == 'dense':
    return DenseFeatures(model, output_fn, config.features.dimension, config.seed, mesh)
  return TwoSidedFeatures(model, output_fn, config.features.layers, config.features.dimension, config.seed, mesh)


def _picked(step: FeatureStep, wished: int) -> str:
  described = step.describe()
  if described['projection'] == 'dense':
    return f'dense projection of all parameters to J = {step.dimension}'
  sizes = sorted({(layer['a'], layer['b']) for layer in described['layers']})
  shapes = ', '.join(f'{a}×{b}' for a, b in sizes)
  return f'two-sided projection: {shapes} for each linear layer, J = {step.dimension} (wished for {wished})'


def _pool_features(
  context: Context, step: FeatureStep, prepared: Any, checkpoint: int, pool: Pool, mesh: Mesh, bar: tqdm.tqdm
) -> None:
  """Computes the shards that are not there yet; a shard is written while the next one is computed."""
  features = context.config.features
  store = open_store(context.out, checkpoint, pool.num_rows, step.dimension, features)
  missing = store.missing()
  bar.update(pool.num_rows - sum(stop - start for start, stop in map(store.bounds, missing)))
  weights_BL = np.ones((features.batch_size, pool.length), np.float32)
  weights_BL[:, 0] = 0.0
  weights_BL = jax.device_put(weights_BL, batch_sharding(mesh))
  flop = None
  with ThreadPoolExecutor(1) as writer:
    written: Future | None = None
    for shard in missing:
      start, stop = store.bounds(shard)
      parts = []
      for tokens_BL, _, valid_B in row_range_batches(pool, start, stop, features.batch_size):
        tokens_BL = jax.device_put(tokens_BL, batch_sharding(mesh))
        if flop is None:
          flop = flops.count(step.apply, prepared, tokens_BL, weights_BL)
        parts.append((step(prepared, tokens_BL, weights_BL), int(valid_B.sum())))
        bar.update(parts[-1][1])
      phi_BJ = np.concatenate([np.asarray(phi)[:valid] for phi, valid in parts])
      check_finite(step, phi_BJ, start, checkpoint)
      if written is not None:
        written.result()
      context.add_flop((flop or 0.0) * len(parts))
      written = writer.submit(store.write, shard, phi_BJ)
    if written is not None:
      written.result()


def _target_features(
  context: Context, step: FeatureStep, prepared: Any, checkpoint: int, targets: Targets, mesh: Mesh
) -> None:
  batch = context.config.features.batch_size
  for task in targets.tasks:
    file = context.out / f'{task}_{checkpoint}.npy'
    if file.is_file():
      continue
    examples = targets.examples(task, 'target')
    parts = []
    for start in range(0, len(examples.tokens_TL), batch):
      tokens_BL, weights_BL = (
        _padded(x[start : start + batch], batch) for x in (examples.tokens_TL, examples.weights_TL)
      )
      tokens_BL, weights_BL = jax.device_put((tokens_BL, weights_BL), batch_sharding(mesh))
      parts.append(np.asarray(step(prepared, tokens_BL, weights_BL)))
    context.add_flop(flops.count(step.apply, prepared, tokens_BL, weights_BL) * len(parts))
    phi_TJ = np.concatenate(parts)[: len(examples.tokens_TL)]
    check_finite(step, phi_TJ, 0, checkpoint, f'example of target {task}')
    atomic.save_npy(file, phi_TJ)


def _padded(array: np.ndarray, batch: int) -> np.ndarray:
  return np.pad(array, [(0, batch - len(array))] + [(0, 0)] * (array.ndim - 1))


def check_finite(step: FeatureStep, phi_BJ: np.ndarray, first: int, checkpoint: int, what: str = 'row') -> None:
  """Raises UserError naming the first row, its layer and the checkpoint if anything is NaN or infinite."""
  bad = np.argwhere(~np.isfinite(phi_BJ))
  if len(bad):
    row, column = bad[0]
    raise UserError(
      f'feature of {what} {first + row} is {phi_BJ[row, column]} in {step.column_owner(int(column))} of proxy '
      f'{checkpoint}; nothing of its shard was kept: look at that text, or lower proxies.train.learning_rate and train '
      'the proxies anew'
    )


def open_store(folder: Path, checkpoint: int, rows: int, dimension: int, features: ConfigDict) -> FeatureStore:
  path = folder / f'features_{checkpoint}.zarr'
  return FeatureStore(path, rows, dimension, features.shard_rows, features.store_dtype)


class Features:
  """A finished features stage, opened for reading."""

  def __init__(self, artifact: Artifact):
    self._path = artifact.path
    semantics = artifact.semantics
    self.rows, self.dimension = semantics['rows'], semantics['dimension']
    self.checkpoints = semantics['checkpoints']
    self.semantics = semantics

  def pool(self, checkpoint: int) -> FeatureStore:
    path = self._path / f'features_{checkpoint}.zarr'
    return FeatureStore(path, self.rows, self.dimension, self.semantics['shard_rows'], self.semantics['store_dtype'])

  def target(self, task: str, checkpoint: int) -> np.ndarray:
    """phi_TJ of the target split of `task`, float32."""
    return np.load(self._path / f'{task}_{checkpoint}.npy', allow_pickle=False)

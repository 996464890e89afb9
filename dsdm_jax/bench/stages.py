"""Whole passes over a pool as cases of the features bench: reading, computing, rounding and writing at once.

What a pass is held to are its compiled steps alone, on one batch that lies on the device: features of each batch once
for `stage_store`, twice for `stage_stream`, which also makes a Gram matrix.
"""

import atexit
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.features import blocks
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.attribution.passes import PoolPass, Recomputed
from dsdm_jax.attribution.rounding import Rounding
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core import atomic, prng
from dsdm_jax.data import dataset, encoders
from dsdm_jax.data import pool as pool_lib

SHARD_ROWS = 1_024
_COLUMNS = 219  # of three targets with groups and resamples, as the default config has them


def make_pool(rows: int, length: int, vocab_size: int) -> pool_lib.Pool:
  """A real dataset of random tokens, in a folder that goes with the process."""
  folder = tempfile.TemporaryDirectory(prefix='dsdm_bench_')
  atexit.register(folder.cleanup)
  path = Path(folder.name)
  dtype = encoders.dtype_of(vocab_size)
  tokens_NL = prng.numpy_stream(0, 'bench', 'pool').integers(0, vocab_size, (rows, length), dtype=dtype)
  dataset.write_array(path / 'dataset', tokens_NL)
  atomic.write_json(path / 'card.json', {'rows': rows, 'length': length, 'vocab_size': vocab_size})
  return pool_lib.Pool(path)


def make_pass(
  kind: str, step: TwoSidedFeatures, params: nnx.State, rows: int, batch: int, length: int, vocab_size: int, mesh: Mesh
) -> Callable[[], None]:
  """One whole pass of `stage_store` or `stage_stream` over `rows` rows; called again it does it all again."""
  pool = make_pool(rows, length, vocab_size)
  columns = blocks(step.describe(), step.dimension)
  features = PoolPass(step, step.prepare(params, 0), pool, batch, mesh, lambda _: None, _check)
  source = Recomputed(features, rows, step.dimension, SHARD_ROWS, Rounding('bfloat16', columns))
  u_JK = prng.numpy_stream(0, 'bench', 'u').standard_normal((step.dimension, _COLUMNS))

  def store() -> None:
    with tempfile.TemporaryDirectory(dir=pool.path) as made:
      written = FeatureStore(Path(made) / 'f.zarr', rows, step.dimension, SHARD_ROWS, 'bfloat16', columns)
      missing = written.missing()
      for _ in written.fill(missing, source.ranges(map(written.bounds, missing))):
        pass

  def stream() -> None:
    datamodel.gram(source, mesh=mesh)
    for _ in datamodel.score_shards(source, u_JK):
      pass

  return store if kind == 'stage_store' else stream


def _check(phi_BJ: np.ndarray, first: int) -> None:
  if not np.isfinite(phi_BJ).all():  # as the stage looks at every feature
    raise ValueError(f'a feature of rows from {first} on is not finite')


def gram_step(j: int) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
  """φᵀφ of one shard, as the datamodel computes it."""
  phi_BJ = jnp.ones((SHARD_ROWS, j), jnp.float32)
  return lambda phi: jnp.matmul(phi.T, phi, precision=jax.lax.Precision.HIGHEST), phi_BJ

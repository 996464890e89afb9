"""Whole passes over a pool as cases of `bench features`: reading, computing, quantizing and writing concurrently.

A pass is compared with its compiled steps alone, dispatched one after the other on a batch on the device: the features
of each batch once for `stage_store`, and twice for `stage_stream`, which also computes a Gram matrix. The steps are
timed in pauses of the pass, every few shards, because a pass takes minutes in which the machine may change.
"""

import atexit
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.attribution.quantization import Quantizer, column_blocks
from dsdm_jax.attribution.sources import PoolPass, Recomputed
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core import prng, storage
from dsdm_jax.core.mesh import batch_sharding
from dsdm_jax.data.pool import pool as pool_lib
from dsdm_jax.data.pool import vocabulary

SHARD_ROWS = 1_024
_EVERY = 4  # shards between two pauses
_WINDOW = 0.05  # seconds without CPU time after which this process is idle
_COLUMNS = 219  # three targets with groups and resamples, as in the default config


@dataclasses.dataclass(frozen=True)
class Spent:
  """Wall-clock and processor seconds; the latter hardly change when others use the machine too."""

  clock: float
  processors: float

  @classmethod
  def now(cls) -> 'Spent':
    return cls(time.perf_counter(), time.process_time())

  def __add__(self, other: 'Spent') -> 'Spent':
    return Spent(self.clock + other.clock, self.processors + other.processors)

  def __sub__(self, other: 'Spent') -> 'Spent':
    return self + other * -1

  def __mul__(self, factor: float) -> 'Spent':
    return Spent(self.clock * factor, self.processors * factor)


class Stopwatch:
  """Time of a pass without its pauses, in which the bare work of one shard is timed."""

  def __init__(self) -> None:
    self.spent, self._began, self._shards = Spent(0, 0), Spent(0, 0), 0
    self._bare: list[Spent] = []

  def start(self) -> None:
    self._began = Spent.now()

  def shard(self, bare: Callable[[], None], *, last: bool) -> None:
    """Counts a finished shard; every few shards, waits until the pass is idle and times `bare`."""
    self._shards += 1
    if last or self._shards % _EVERY == 1:
      self.spent += _wait_until_idle() - self._began
      began = Spent.now()
      bare()
      self.start()
      self._bare.append(self._began - began)

  @property
  def bare(self) -> Spent:
    """Time of one shard, the mean over the pauses."""
    return sum(self._bare, Spent(0, 0)) * (1 / len(self._bare))


def _wait_until_idle() -> Spent:
  """Waits until background threads that read, compute or write are idle; returns the time at which they were."""
  while True:
    began = Spent.now()
    time.sleep(_WINDOW)
    if time.process_time() - began.processors < 0.05 * _WINDOW:
      return began


def make_pool(rows: int, length: int, vocab_size: int) -> pool_lib.Pool:
  """A dataset of random tokens, in a folder that is deleted when the process ends."""
  folder = tempfile.TemporaryDirectory(prefix='dsdm_bench_')
  atexit.register(folder.cleanup)
  path = Path(folder.name)
  dtype = vocabulary.dtype_of(vocab_size)
  tokens_NL = prng.numpy_stream(0, 'bench', 'pool').integers(0, vocab_size, (rows, length), dtype=dtype)
  pool_lib.write_array(path / 'dataset', tokens_NL)
  storage.write_json(path / 'card.json', {'rows': rows, 'length': length, 'vocab_size': vocab_size})
  return pool_lib.Pool(path)


def make_pass(
  kind: str, step: TwoSidedFeatures, params: nnx.State, rows: int, batch: int, length: int, vocab_size: int, mesh: Mesh
) -> Callable[[], tuple[Spent, Spent]]:
  """Returns a function that makes one pass of `stage_store` or `stage_stream` over `rows` rows.

  The function returns (time of the pass, time of its compiled steps alone).
  """
  pool = make_pool(rows, length, vocab_size)
  columns = column_blocks(step.describe(), step.dimension)
  prepared = step.prepare(params, 0)
  features = PoolPass(step, prepared, pool, batch, mesh, lambda _: None)
  source = Recomputed(features, rows, step.dimension, SHARD_ROWS, Quantizer('bfloat16', columns))
  u_JK = prng.numpy_stream(0, 'bench', 'u').standard_normal((step.dimension, _COLUMNS))

  tokens_BL = jnp.asarray(pool.tokens(np.arange(batch) % rows))
  inputs = jax.device_put((tokens_BL, jnp.ones(tokens_BL.shape).at[:, 0].set(0)), batch_sharding(mesh))
  function, phi_BJ = gram_step(step.dimension)
  gram, shards, whole = jax.jit(function), -(-rows // SHARD_ROWS), min(SHARD_ROWS, rows)

  def steps() -> None:
    jax.block_until_ready([step(prepared, *inputs) for _ in range(-(-whole // batch))])

  def steps_and_gram() -> None:
    steps()
    jax.block_until_ready(gram(phi_BJ))

  steps_and_gram()  # compiles
  next(iter(source))
  _wait_until_idle()

  def store() -> tuple[Spent, Spent]:
    with tempfile.TemporaryDirectory(dir=storage.local(pool.path)) as folder:
      watch = Stopwatch()
      watch.start()
      written = FeatureStore(Path(folder) / 'f.zarr', rows, step.dimension, SHARD_ROWS, 'bfloat16', columns)
      for _, stop in written.fill(source.ranges(map(written.bounds, written.missing()))):
        if stop < rows:
          watch.shard(steps, last=False)
      watch.shard(steps, last=True)  # after it is written, too
      return watch.spent, watch.bare * (rows / whole)

  def stream() -> tuple[Spent, Spent]:
    first, second = Stopwatch(), Stopwatch()
    numbers = iter(range(-1, shards))  # progress is called once before the first shard, then after each

    def progress(_: int) -> None:
      if (number := next(numbers)) >= 0:
        first.shard(steps_and_gram, last=number == shards - 1)

    first.start()
    datamodel.gram(source, mesh=mesh, progress=progress)
    second.start()
    for number, _ in enumerate(datamodel.score_shards(source, u_JK)):
      second.shard(steps, last=number == shards - 1)
    return first.spent + second.spent, (first.bare + second.bare) * (rows / whole)

  return store if kind == 'stage_store' else stream


def gram_step(j: int) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
  """φᵀφ of one shard, computed as in the datamodel."""
  phi_BJ = jnp.ones((SHARD_ROWS, j), jnp.float32)
  return lambda phi: jnp.matmul(phi.T, phi, precision=jax.lax.Precision.HIGHEST), phi_BJ

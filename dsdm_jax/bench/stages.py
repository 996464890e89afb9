"""Whole passes over a pool as cases of the features bench: reading, computing, rounding and writing at once.

What a pass is held to are its compiled steps alone, on one batch that lies on the device, dispatched one after the
other: features of each batch once for `stage_store`, twice for `stage_stream`, which also makes a Gram matrix. They are
timed in pauses of the pass, every few shards: a pass takes minutes, and steps before or after it would see another
machine.
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
from dsdm_jax.data.pool import dataset, encoders
from dsdm_jax.data.pool import pool as pool_lib

SHARD_ROWS = 1_024
_EVERY = 4  # shards between two pauses
_WINDOW = 0.05  # seconds without work of this process after which it is at rest
_COLUMNS = 219  # of three targets with groups and resamples, as the default config has them


@dataclasses.dataclass(frozen=True)
class Spent:
  """Seconds by the clock, and of processors; the latter hardly change where others have the machine too."""

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
  """What a pass has spent, without its pauses, in which the bare work of one shard is timed."""

  def __init__(self) -> None:
    self.spent, self._began, self._shards = Spent(0, 0), Spent(0, 0), 0
    self._bare: list[Spent] = []

  def start(self) -> None:
    self._began = Spent.now()

  def shard(self, bare: Callable[[], None], *, last: bool) -> None:
    """One more shard is done; after every few `bare` is timed, once nothing of the pass runs any more."""
    self._shards += 1
    if last or self._shards % _EVERY == 1:
      self.spent += _at_rest() - self._began
      began = Spent.now()
      bare()
      self.start()
      self._bare.append(self._began - began)

  @property
  def bare(self) -> Spent:
    """Of one shard, the mean over the pauses."""
    return sum(self._bare, Spent(0, 0)) * (1 / len(self._bare))


def _at_rest() -> Spent:
  """Waits until threads that read, compute or write ahead have come to rest; what was spent when they had."""
  while True:
    began = Spent.now()
    time.sleep(_WINDOW)
    if time.process_time() - began.processors < 0.05 * _WINDOW:
      return began


def make_pool(rows: int, length: int, vocab_size: int) -> pool_lib.Pool:
  """A real dataset of random tokens, in a folder that goes with the process."""
  folder = tempfile.TemporaryDirectory(prefix='dsdm_bench_')
  atexit.register(folder.cleanup)
  path = Path(folder.name)
  dtype = encoders.dtype_of(vocab_size)
  tokens_NL = prng.numpy_stream(0, 'bench', 'pool').integers(0, vocab_size, (rows, length), dtype=dtype)
  dataset.write_array(path / 'dataset', tokens_NL)
  storage.write_json(path / 'card.json', {'rows': rows, 'length': length, 'vocab_size': vocab_size})
  return pool_lib.Pool(path)


def make_pass(
  kind: str, step: TwoSidedFeatures, params: nnx.State, rows: int, batch: int, length: int, vocab_size: int, mesh: Mesh
) -> Callable[[], tuple[Spent, Spent]]:
  """One whole pass of `stage_store` or `stage_stream` over `rows` rows; called again it does it all again.

  Returns:
    What gives (what the pass spent, what its compiled steps alone spend).
  """
  pool = make_pool(rows, length, vocab_size)
  columns = column_blocks(step.describe(), step.dimension)
  prepared = step.prepare(params, 0)
  features = PoolPass(step, prepared, pool, batch, mesh, lambda _: None, _check)
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

  steps_and_gram()  # compiled beforehand
  next(iter(source))
  _at_rest()

  def store() -> tuple[Spent, Spent]:
    with tempfile.TemporaryDirectory(dir=pool.path) as made:
      watch = Stopwatch()
      watch.start()
      written = FeatureStore(Path(made) / 'f.zarr', rows, step.dimension, SHARD_ROWS, 'bfloat16', columns)
      missing = written.missing()
      for shard, _ in written.fill(missing, source.ranges(map(written.bounds, missing))):
        if shard < shards - 1:
          watch.shard(steps, last=False)
      watch.shard(steps, last=True)  # now that it is written, too
      return watch.spent, watch.bare * (rows / whole)

  def stream() -> tuple[Spent, Spent]:
    first, second = Stopwatch(), Stopwatch()
    numbers = iter(range(-1, shards))  # it is told of progress once before the first shard, and then after each

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


def _check(phi_BJ: np.ndarray, first: int) -> None:
  if not np.isfinite(phi_BJ).all():  # as the stage looks at every feature
    raise ValueError(f'a feature of rows from {first} on is not finite')


def gram_step(j: int) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
  """φᵀφ of one shard, as the datamodel computes it."""
  phi_BJ = jnp.ones((SHARD_ROWS, j), jnp.float32)
  return lambda phi: jnp.matmul(phi.T, phi, precision=jax.lax.Precision.HIGHEST), phi_BJ

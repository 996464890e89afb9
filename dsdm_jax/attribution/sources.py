"""Sources of feature rows, read shard by shard, and passes over the pool that compute them.

Reading tokens, computing on the device and using the result overlap.
"""

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsdm_jax.attribution.quantization import Quantizer
from dsdm_jax.core import flops, processes
from dsdm_jax.core.mesh import assemble, batch_sharding, fetch, place, share
from dsdm_jax.data.order.batches import row_range_batches
from dsdm_jax.data.pool.pool import Pool

Shard = tuple[int, int, np.ndarray]  # first row, the row after the last, an array with one entry for each row


class RowSource(abc.ABC):
  """Features Φ [N, J] of the pool, read by shards of rows in order. Each pass gives the same bits.

  A subclass sets `rows` (N) and `dimension` (J) and implements `from_row`.
  """

  rows: int
  dimension: int

  @abc.abstractmethod
  def from_row(self, row: int) -> Iterator[Shard]:
    """(start, stop, phi_BJ) of each shard from `row` on, where a shard starts. Earlier shards cost nothing."""

  def __iter__(self) -> Iterator[Shard]:
    return self.from_row(0)

  def prefetched(self, row: int = 0) -> Iterator[Shard]:
    """As `from_row`, with the next shard read while the caller works on this one."""
    # Steps that several processes run together must start in the same order on each, hence in one thread.
    return self.from_row(row) if processes.count() > 1 else ahead(self.from_row(row))

  def gram_rows(self) -> 'RowSource':
    """The rows that the Gram matrix is made of."""
    return self

  def scores(self, u_JK: np.ndarray, row: int = 0, groups: Sequence[int] = ()) -> Iterator[Shard]:
    """(start, stop, φ u in float32 [B, K]) of each shard from `row` on, for u in float32; see `column_groups`."""
    parts = [jnp.asarray(np.ascontiguousarray(u_JK[:, k])) for k in column_groups(groups, u_JK.shape[1])]
    for start, stop, phi_BJ in self.prefetched(row):
      yield start, stop, np.concatenate([np.asarray(dot(phi_BJ, u)) for u in parts], axis=1)


def column_groups(groups: Sequence[int], count: int) -> list[slice]:
  """Slices of `count` columns by the sizes of groups of neighbours, which are treated apart; one if there are none."""
  ends = np.cumsum([0, *(groups or [count])]).tolist()
  return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


@jax.jit
def dot(left: jax.Array, right: jax.Array) -> jax.Array:
  """Matrix product in float32 at the highest precision."""
  return jnp.matmul(left.astype(jnp.float32), right.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def ahead(items: Iterator[Any]) -> Iterator[Any]:
  """The same items, the next one read while the caller works on this one."""
  with ThreadPoolExecutor(1) as reader:
    end = object()
    coming = reader.submit(next, items, end)
    while (item := coming.result()) is not end:
      coming = reader.submit(next, items, end)
      yield item


def unit_rows(phi_BJ: np.ndarray) -> np.ndarray:
  """Each row divided by its norm, float32; a row of zeros stays zero."""
  phi_BJ = np.asarray(phi_BJ, np.float32)
  largest_B = np.abs(phi_BJ).max(axis=1, keepdims=True)  # first, so that no square leaves float32
  phi_BJ = phi_BJ / np.where(largest_B > 0, largest_B, 1)
  norm_B = np.linalg.norm(phi_BJ, axis=1, keepdims=True)
  return phi_BJ / np.where(norm_B > 0, norm_B, 1)


class UnitNorm(RowSource):
  """The rows of another source, each scaled to norm one."""

  def __init__(self, source: RowSource):
    self._source = source
    self.rows, self.dimension = source.rows, source.dimension

  def from_row(self, row: int) -> Iterator[Shard]:
    for start, stop, phi_BJ in self._source.from_row(row):
      yield start, stop, unit_rows(phi_BJ)


class Concatenated(RowSource):
  """Columns of several sources side by side. The sources have the same rows and shards."""

  def __init__(self, sources: Sequence[RowSource]):
    self._sources = sources
    self.rows, self.dimension = sources[0].rows, sum(source.dimension for source in sources)

  def from_row(self, row: int) -> Iterator[Shard]:
    for shards in zip(*(source.from_row(row) for source in self._sources), strict=True):
      start, stop, _ = shards[0]
      if any(shard[:2] != (start, stop) for shard in shards):
        raise ValueError(f'sources have other shards than the first, which has rows {start} to {stop - 1}')
      yield start, stop, np.concatenate([phi_BJ for _, _, phi_BJ in shards], axis=1)


class _Step(Protocol):
  def apply(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array: ...

  def __call__(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array: ...


class PoolPass:
  """Runs a compiled step over ranges of the pool's rows.

  Args:
    step: (prepared, tokens_BL, weights_BL) → one entry per row; compiled once, as all batches have one shape.
    prepared: its first argument.
    pool, batch_size, mesh: rows, global batch size and devices.
    add_flop: called by `charge`.
    check: called with the results of a range and its first row; raises if they are invalid.
  """

  def __init__(
    self,
    step: _Step,
    prepared: Any,
    pool: Pool,
    batch_size: int,
    mesh: Mesh,
    add_flop: Callable[[float], None],
    check: Callable[[np.ndarray, int], None] | None = None,
  ):
    self._step, self._prepared, self._pool, self._batch_size = step, prepared, pool, batch_size
    self._sharding, self._add_flop, self._check = batch_sharding(mesh), add_flop, check
    self._share = share(self._sharding, batch_size)
    # The same for all batches, unless the loss is on some tokens alone.
    self._weights_BL = place(pool.weights(np.zeros(batch_size, np.int64)), self._sharding)

  def charge(self, rows: int) -> None:
    """Adds the floating-point operations of `rows`, without what pads their batches."""
    tokens_BL = jax.ShapeDtypeStruct(self._weights_BL.shape, jnp.int32)
    flop = flops.count(self._step.apply, self._prepared, tokens_BL, self._weights_BL)
    self._add_flop(flop / self._batch_size * rows)

  def ranges(self, bounds: Iterable[tuple[int, int]]) -> Iterator[Shard]:
    """Results of each range of rows, in order. The device computes the next range while the caller uses this one."""
    pending: list[tuple[int, int, list[tuple[jax.Array, int]]]] = []
    for start, stop in bounds:
      pending.append((start, stop, self._dispatch(start, stop)))
      if len(pending) > 1:
        yield self._finish(*pending.pop(0))
    if pending:
      yield self._finish(*pending.pop())

  def _dispatch(self, start: int, stop: int) -> list[tuple[jax.Array, int]]:
    parts = []
    for tokens, rows_B, valid_B in ahead(row_range_batches(self._pool, start, stop, self._batch_size, self._share)):
      tokens_BL, weights_BL = assemble(tokens, self._sharding, self._batch_size), self._weights_BL
      if self._pool.counts_some:
        weights = self._pool.weights(rows_B[self._share])
        weights_BL = assemble(weights, self._sharding, self._batch_size)
      parts.append((self._step(self._prepared, tokens_BL, weights_BL), int(valid_B.sum())))
    return parts

  def _finish(self, start: int, stop: int, parts: list[tuple[jax.Array, int]]) -> Shard:
    if processes.count() == 1:
      arrays: Iterable[np.ndarray] = (np.asarray(part) for part, _ in parts)
    else:  # processes exchange once per range, not once per batch
      arrays = fetch(jnp.stack([part for part, _ in parts]))
    result = np.concatenate([array[:valid] for array, (_, valid) in zip(arrays, parts, strict=True)])
    if self._check is not None:
      self._check(result, start)
    return start, stop, result


class Recomputed(RowSource):
  """Features that are computed on each read and quantized as a store would, so that both give the same bits.

  Args:
    features: the step over rows.
    rows, dimension: N and J.
    shard_rows: rows of a shard; the last may be short.
    quantizer: of the store that these rows stand in for.
  """

  def __init__(self, features: PoolPass, rows: int, dimension: int, shard_rows: int, quantizer: Quantizer):
    self.rows, self.dimension = rows, dimension
    self._features, self._shard_rows, self._quantizer = features, shard_rows, quantizer

  def first(self, rows: int) -> 'Recomputed':
    """The first rows alone."""
    return Recomputed(self._features, min(rows, self.rows), self.dimension, self._shard_rows, self._quantizer)

  def charge(self) -> None:
    """Adds the floating-point operations of one pass over all rows, however many an earlier attempt did."""
    self._features.charge(self.rows)

  def ranges(self, bounds: Iterable[tuple[int, int]]) -> Iterator[Shard]:
    """Features of some ranges, not quantized: the input of a store."""
    return self._features.ranges(bounds)

  def bounds(self, row: int = 0) -> Iterator[tuple[int, int]]:
    """First row and the row after the last of each shard from `row` on, where a shard starts."""
    return ((start, min(start + self._shard_rows, self.rows)) for start in range(row, self.rows, self._shard_rows))

  def from_row(self, row: int) -> Iterator[Shard]:
    self.charge()
    for start, stop, phi_BJ in self.ranges(self.bounds(row)):
      yield start, stop, self._quantizer.round_trip(phi_BJ)


class DirectionalSource(RowSource):
  """Rows that are scored by directional derivatives. Only the Gram matrix computes features.

  Args:
    features: of all rows; never computed where there is no Gram matrix.
    gram_rows: how many of the first rows make the Gram matrix.
    start: u_JT in float32 → the pass that gives score_BT.
  """

  def __init__(self, features: Recomputed, gram_rows: int, start: Callable[[np.ndarray], PoolPass]):
    self.rows, self.dimension = features.rows, features.dimension
    self._features, self._start = features, start
    self._sample = features.first(gram_rows)

  def from_row(self, row: int) -> Iterator[Shard]:
    return self._features.from_row(row)

  def gram_rows(self) -> RowSource:
    return self._sample

  def scores(self, u_JK: np.ndarray, row: int = 0, groups: Sequence[int] = ()) -> Iterator[Shard]:
    """As `RowSource.scores`, with φ neither computed nor quantized, and all columns together."""
    del groups
    features = self._start(u_JK)
    features.charge(self.rows)
    return features.ranges(self._features.bounds(row))

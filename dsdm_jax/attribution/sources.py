"""Sources of feature rows, read shard by shard, and passes over the pool that compute them.

Reading tokens, computing on the device, copying to the host and using the result overlap. Several processes take a
shard each at the same time, a *round*: a step computes as many rows of each of these shards, so that every process
copies, writes and reads its own shard and no rows of others.
"""

import abc
import collections
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsdm_jax.attribution.quantization import Encoded, Quantizer
from dsdm_jax.core import flops
from dsdm_jax.core.mesh import Team, assemble, batch_sharding, local, place, share, team
from dsdm_jax.data.order.batches import row_range_batches
from dsdm_jax.data.pool.pool import Pool, PoolRows
from dsdm_jax.errors import UserError

Shard = tuple[int, int, np.ndarray]  # first row, the row after the last, an array with one entry for each row
Bounds = tuple[int, int]  # first row, the row after the last
_OwnShard = TypeVar('_OwnShard', bound=tuple[int, int, Any])
_IN_FLIGHT = 32  # steps whose results may wait on the devices


class RowSource(abc.ABC):
  """Features Φ [N, J] of the pool, read by shards of rows in order. Each pass gives the same bits.

  A subclass sets `rows` (N) and `dimension` (J) and implements `from_row`. One that is read by several processes sets
  `team`, `shard_rows`, and `collective` if reading it launches steps that all processes run together.
  """

  rows: int
  dimension: int
  shard_rows: int = 0
  team: Team = Team()
  collective: bool = False

  @abc.abstractmethod
  def from_row(self, row: int) -> Iterator[Shard]:
    """(start, stop, phi_BJ) of each shard from `row` on, where a shard starts. Earlier shards cost nothing.

    Of several teams each gets its own shards, see `deal`, and the same number of them: the last may be empty.
    """

  def __iter__(self) -> Iterator[Shard]:
    return self.from_row(0)

  def prefetched(self, row: int = 0) -> Iterator[Shard]:
    """As `from_row`, with the next shard read while the caller works on this one."""
    # Steps that several processes run together must start in the same order on each, hence in one thread.
    return self.from_row(row) if self.collective and self.team.count > 1 else ahead(self.from_row(row))

  def rounds(self, row: int = 0) -> Iterator[tuple[Bounds, Shard]]:
    """The rows that all teams take together, and this team's shard of them, from `row` on."""
    return self.with_rounds(self.prefetched(row), row)

  def with_rounds(self, shards: Iterable[_OwnShard], row: int) -> Iterator[tuple[Bounds, _OwnShard]]:
    """`shards` of this team from `row` on, with the rows of their rounds."""
    for shard in shards:
      end = shard[1] if self.team.count == 1 else min(row + self.team.count * self.shard_rows, self.rows)
      yield (row, end), shard
      row = end

  def gram_rows(self) -> 'RowSource':
    """The rows that the Gram matrix is made of."""
    return self

  def scores(self, u_JK: Any, row: int = 0, groups: Sequence[int] = ()) -> Iterator[Shard]:
    """(start, stop, φ u in float32 [B, K]) of each shard from `row` on, for u in float32; see `column_groups`."""
    parts = [jnp.asarray(np.ascontiguousarray(u_JK[:, k])) for k in column_groups(groups, u_JK.shape[1])]
    for start, stop, phi_BJ in self.prefetched(row):
      yield start, stop, np.concatenate([np.asarray(dot(phi_BJ, u)) for u in parts], axis=1)


def deal(shards: Sequence[Bounds], team: Team) -> Iterator[tuple[Bounds, int]]:
  """This team's shard of each round, and the rows of the longest; an empty range where the last round has too few.

  Round r has the shards number r · count to r · count + count − 1, and team i takes the i-th of them.
  """
  for first in range(0, len(shards), team.count):
    together = shards[first : first + team.count]
    own = together[team.index] if team.index < len(together) else (together[-1][1], together[-1][1])
    yield own, max(stop - start for start, stop in together)


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
    self.rows, self.dimension, self.shard_rows = source.rows, source.dimension, source.shard_rows
    self.team, self.collective = source.team, source.collective

  def from_row(self, row: int) -> Iterator[Shard]:
    for start, stop, phi_BJ in self._source.from_row(row):
      yield start, stop, unit_rows(phi_BJ)


class Concatenated(RowSource):
  """Columns of several sources side by side. The sources have the same rows and shards."""

  def __init__(self, sources: Sequence[RowSource]):
    self._sources = sources
    self.rows, self.dimension = sources[0].rows, sum(source.dimension for source in sources)
    self.shard_rows, self.team, self.collective = sources[0].shard_rows, sources[0].team, sources[0].collective

  def from_row(self, row: int) -> Iterator[Shard]:
    for shards in zip(*(source.from_row(row) for source in self._sources), strict=True):
      start, stop, _ = shards[0]
      if any(shard[:2] != (start, stop) for shard in shards):
        raise ValueError(f'sources have other shards than the first, which has rows {start} to {stop - 1}')
      yield start, stop, np.concatenate([phi_BJ for _, _, phi_BJ in shards], axis=1)


class _Step(Protocol):
  def apply(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array: ...

  def __call__(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array: ...


@functools.lru_cache(maxsize=8)  # each is compiled once
def _finisher(quantizer: Quantizer | None, sharding: NamedSharding) -> Any:
  return jax.jit((lambda result: result) if quantizer is None else quantizer.encode, out_shardings=sharding)


def _refuse(row: int, column: int, value: float) -> UserError:
  return UserError(f'feature {column} of row {row} is {value}; look at that row and at the weights of the model')


class PoolPass:
  """Runs a compiled step over ranges of the pool's rows.

  Args:
    step: (prepared, tokens_BL, weights_BL) → one entry per row; compiled once, as all batches have one shape.
    prepared: its first argument.
    pool, batch_size, mesh: rows, global batch size and devices.
    add_flop: called by `charge`.

  Attributes:
    team: of this process.
  """

  def __init__(
    self,
    step: _Step,
    prepared: Any,
    pool: Pool | PoolRows,
    batch_size: int,
    mesh: Mesh,
    add_flop: Callable[[float], None],
  ):
    self.team = team(mesh)
    self._step, self._prepared, self._pool, self._batch_size = step, prepared, pool, batch_size
    self._sharding, self._add_flop = batch_sharding(mesh), add_flop
    self._finish = _finisher(None, self._sharding)
    self._watch: Callable[[int, jax.Array], object] = lambda row, result: None
    self._own_rows = len(share(self._sharding, batch_size))  # of a batch
    # The same for all batches, unless the loss is on some tokens alone.
    self._weights_BL = place(pool.weights(np.zeros(batch_size, np.int64)), self._sharding)

  def encoded(self, quantizer: Quantizer, watch: Callable[[int, jax.Array], object] | None = None) -> 'PoolPass':
    """The same pass with results as a store holds them (`Encoded`), made on the devices.

    Args:
      watch: called with the first row of this team's range and the float32 result of each step, on the devices.
    """
    encoded = copy.copy(self)
    encoded._finish = _finisher(quantizer, self._sharding)
    if watch is not None:
      rows = _finisher(None, self._sharding)
      encoded._watch = lambda row, result: watch(row, rows(result))
    return encoded

  def charge(self, rows: int) -> None:
    """Adds the floating-point operations of `rows`, without what pads their batches."""
    tokens_BL = jax.ShapeDtypeStruct(self._weights_BL.shape, jnp.int32)
    flop = flops.count(self._step.apply, self._prepared, tokens_BL, self._weights_BL)
    self._add_flop(flop / self._batch_size * rows)

  def ranges(self, bounds: Iterable[Bounds]) -> Iterator[tuple[int, int, Any]]:
    """(start, stop, result) of this team's ranges, in order, see `deal`; all processes call it with the same ranges.

    The devices compute while the caller uses the last range.
    """
    waiting: collections.deque[tuple[Bounds, int, bool, Any]] = collections.deque()
    begun: list[Any] = []  # arrays of the range that is being copied, and the rows that they have

    def copied(own: Bounds, valid: int, is_last: bool, result: Any) -> Iterator[tuple[int, int, Any]]:
      leaves, structure = jax.tree.flatten(result)
      if not begun:
        begun.extend([0, [np.empty((own[1] - own[0], *leaf.shape[1:]), leaf.dtype) for leaf in leaves]])
      for whole, leaf in zip(begun[1], leaves, strict=True):
        whole[begun[0] : begun[0] + valid] = local(leaf, valid)
      begun[0] += valid
      if is_last:
        result = jax.tree.unflatten(structure, begun[1])
        begun.clear()
        yield *own, result

    for step in self._steps(list(bounds)):
      waiting.append(step)
      if len(waiting) > _IN_FLIGHT:
        yield from copied(*waiting.popleft())
    while waiting:
      yield from copied(*waiting.popleft())

  def _steps(self, bounds: Sequence[Bounds]) -> Iterator[tuple[Bounds, int, bool, Any]]:
    """This team's range, how many of its rows a step computes, whether it is the last of the range, and its result."""
    size = self._own_rows
    nothing = np.zeros((size, self._pool.length), np.int32), np.zeros(size, np.int64), np.zeros(size, np.bool_)
    for own, longest in deal(bounds, self.team):
      batches, count = ahead(row_range_batches(self._pool, *own, size)), -(-longest // size)
      for number in range(count):
        tokens, rows_B, valid_B = next(batches, nothing)
        tokens_BL, weights_BL = assemble(tokens, self._sharding, self._batch_size), self._weights_BL
        if self._pool.counts_some:
          weights_BL = assemble(self._pool.weights(rows_B), self._sharding, self._batch_size)
        result = self._step(self._prepared, tokens_BL, weights_BL)
        self._watch(own[0], result)
        result = self._finish(result)
        valid = int(valid_B.sum())
        for leaf in jax.tree.leaves(result) if valid == size else ():
          leaf.copy_to_host_async()
        yield own, valid, number == count - 1, result


class Recomputed(RowSource):
  """Features that are computed on each read and quantized as a store would, so that both give the same bits.

  Args:
    features: the step over rows.
    rows, dimension: N and J.
    shard_rows: rows of a shard; the last may be short.
    quantizer: of the store that these rows stand in for.
    refuse: (row, column, value) → the error of a feature that is not finite.
  """

  collective = True

  def __init__(
    self,
    features: PoolPass,
    rows: int,
    dimension: int,
    shard_rows: int,
    quantizer: Quantizer,
    refuse: Callable[[int, int, float], Exception] = _refuse,
  ):
    self.rows, self.dimension, self.shard_rows, self.team = rows, dimension, shard_rows, features.team
    self._features, self.quantizer, self._refuse = features, quantizer, refuse

  def first(self, rows: int) -> 'Recomputed':
    """The first rows alone."""
    rows = min(rows, self.rows)
    return Recomputed(self._features, rows, self.dimension, self.shard_rows, self.quantizer, self._refuse)

  def charge(self) -> None:
    """Adds the floating-point operations of one pass over all rows, however many an earlier attempt did."""
    self._features.charge(self.rows)

  def ranges(
    self, bounds: Iterable[Bounds], watch: Callable[[int, jax.Array], object] | None = None
  ) -> Iterator[tuple[int, int, Encoded]]:
    """This team's ranges as a store holds them; `watch` as for `PoolPass.encoded`.

    Raises:
      UserError: a feature is not finite.
    """
    for start, stop, encoded in self._features.encoded(self.quantizer, watch).ranges(bounds):
      wrong = np.flatnonzero(encoded.bad_B >= 0)
      if len(wrong):
        row = int(wrong[0])
        raise self._refuse(start + row, int(encoded.bad_B[row]), self.quantizer.value(encoded, row))
      yield start, stop, encoded

  def bounds(self, row: int = 0) -> Iterator[Bounds]:
    """First row and the row after the last of each shard from `row` on, where a shard starts."""
    return ((start, min(start + self.shard_rows, self.rows)) for start in range(row, self.rows, self.shard_rows))

  def from_row(self, row: int) -> Iterator[Shard]:
    self.charge()
    for start, stop, encoded in self.ranges(self.bounds(row)):
      yield start, stop, self.quantizer.decode(encoded)


class DirectionalSource(RowSource):
  """Rows that are scored by directional derivatives. Only the Gram matrix computes features.

  Args:
    features: of all rows; never computed where there is no Gram matrix.
    gram_rows: how many of the first rows make the Gram matrix.
    start: u_JT in float32, or directions by path → the pass that gives score_BT.
  """

  collective = True

  def __init__(self, features: Recomputed, gram_rows: int, start: Callable[[Any], PoolPass]):
    self.rows, self.dimension, self.shard_rows = features.rows, features.dimension, features.shard_rows
    self.team = features.team
    self._features, self._start = features, start
    self._sample = features.first(gram_rows)

  def from_row(self, row: int) -> Iterator[Shard]:
    return self._features.from_row(row)

  def gram_rows(self) -> RowSource:
    return self._sample

  def scores(self, u_JK: Any, row: int = 0, groups: Sequence[int] = ()) -> Iterator[Shard]:
    """As `RowSource.scores`, with φ neither computed nor quantized, and all columns together."""
    del groups
    features = self._start(u_JK)
    features.charge(self.rows)
    return features.ranges(self._features.bounds(row))

"""Passes over the pool's rows: reading, computing and what is done with the result go on at the same time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsdm_jax.attribution.quantization import Rounding
from dsdm_jax.core import flops, processes
from dsdm_jax.core.mesh import assemble, batch_sharding, fetch, place, share
from dsdm_jax.data.order.batches import row_range_batches
from dsdm_jax.data.pool.pool import Pool

Shard = tuple[int, int, np.ndarray]  # first row, the row after the last, an array with one entry for each


class _Step(Protocol):
  def apply(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array: ...

  def __call__(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array: ...


class PoolPass:
  """Runs a compiled step over ranges of the pool's rows.

  Args:
    step: (prepared, tokens_BL, weights_BL) → one entry per row; compiled once, as all batches have one shape.
    prepared: its first argument.
    pool, batch_size, mesh: what it runs on.
    add_flop: told the operations of each range.
    check: given the results of a range and its first row, raises where they are bad.
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
    weights_BL = np.ones((batch_size, pool.length), np.float32)
    weights_BL[:, 0] = 0.0
    self._weights_BL = place(weights_BL, self._sharding)
    self._flop: float | None = None

  def ranges(self, bounds: Iterable[tuple[int, int]]) -> Iterator[Shard]:
    """Results of each range of rows, in order; the next range is on the device while the caller has one in hand."""
    pending: list[tuple[int, int, list[tuple[jax.Array, int]]]] = []
    for start, stop in bounds:
      pending.append((start, stop, self._dispatch(start, stop)))
      if len(pending) > 1:
        yield self._finish(*pending.pop(0))
    if pending:
      yield self._finish(*pending.pop())

  def _dispatch(self, start: int, stop: int) -> list[tuple[jax.Array, int]]:
    parts = []
    for tokens, _, valid_B in ahead(row_range_batches(self._pool, start, stop, self._batch_size, self._share)):
      tokens_BL = assemble(tokens, self._sharding, self._batch_size)
      if self._flop is None:
        self._flop = flops.count(self._step.apply, self._prepared, tokens_BL, self._weights_BL)
      parts.append((self._step(self._prepared, tokens_BL, self._weights_BL), int(valid_B.sum())))
    return parts

  def _finish(self, start: int, stop: int, parts: list[tuple[jax.Array, int]]) -> Shard:
    result = np.concatenate([part_BJ[:valid] for part_BJ, (_, valid) in zip(self._fetched(parts), parts, strict=True)])
    if self._check is not None:
      self._check(result, start)
    self._add_flop((self._flop or 0.0) * len(parts))
    return start, stop, result

  def _fetched(self, parts: list[tuple[jax.Array, int]]) -> Iterable[np.ndarray]:
    if processes.count() == 1:
      return (np.asarray(part) for part, _ in parts)
    return fetch(jnp.stack([part for part, _ in parts]))  # processes exchange once for a range, not for each batch


def ahead(items: Iterator[Any]) -> Iterator[Any]:
  """The same items, the next one read while the caller works on this one."""
  with ThreadPoolExecutor(1) as reader:
    end = object()
    coming = reader.submit(next, items, end)
    while (item := coming.result()) is not end:
      coming = reader.submit(next, items, end)
      yield item


class Recomputed:
  """Features that are kept nowhere: each reading makes them, and rounds them as a store would.

  Args:
    features: step over rows.
    rows, dimension: N and J.
    shard_rows: rows of a shard; the last may be short.
    rounding: of the store which is not there.
  """

  def __init__(self, features: PoolPass, rows: int, dimension: int, shard_rows: int, rounding: Rounding):
    self.rows, self.dimension = rows, dimension
    self._features, self._shard_rows, self._rounding = features, shard_rows, rounding

  def first(self, rows: int) -> 'Recomputed':
    """The first rows alone."""
    return Recomputed(self._features, min(rows, self.rows), self.dimension, self._shard_rows, self._rounding)

  def ranges(self, bounds: Iterable[tuple[int, int]]) -> Iterator[Shard]:
    """Features of some ranges, not rounded: for a store, which rounds them."""
    return self._features.ranges(bounds)

  def bounds(self, row: int = 0) -> Iterator[tuple[int, int]]:
    """First row and the row after the last, of each shard from `row` on, which begins one."""
    return ((start, min(start + self._shard_rows, self.rows)) for start in range(row, self.rows, self._shard_rows))

  def __iter__(self) -> Iterator[Shard]:
    return self.starting(0)

  def starting(self, row: int) -> Iterator[Shard]:
    for start, stop, phi_BJ in self.ranges(self.bounds(row)):
      yield start, stop, self._rounding.rounded(phi_BJ)


class DirectionalSource:
  """Rows that are scored without features; read as a source of rows, it makes them.

  Args:
    features: of all rows.
    gram_rows: rows of `sample`.
    start: u_JT in float32 → the pass that gives score_BT.
  """

  def __init__(self, features: Recomputed, gram_rows: int, start: Callable[[np.ndarray], PoolPass]):
    self.rows, self.dimension = features.rows, features.dimension
    self._features, self._start = features, start
    self.sample = features.first(gram_rows)

  def __iter__(self) -> Iterator[Shard]:
    return iter(self._features)

  def starting(self, row: int) -> Iterator[Shard]:
    return self._features.starting(row)

  def score_shards(self, u_JT: np.ndarray, row: int = 0) -> Iterator[Shard]:
    """(start, stop, score_BT) of each shard from `row` on, in order: φ(n)·u with φ not rounded, for u in float32."""
    return self._start(u_JT).ranges(self._features.bounds(row))

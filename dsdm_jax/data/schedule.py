"""The order of training: position → (part, row), a pure function of the seed with random access.

A schedule mixes parts (selections, sources, ...) at fixed rates. Positions go in blocks of `BLOCK`; each block holds
every part in proportion to its rate, in an order shuffled anew. Within a part, rows go in epochs: each visits every
row once in an order of its own. Both orders are keyed permutations that are computed and not stored, so a resume at
any position costs the same.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.core.errors import UserError

BLOCK = 1_024  # positions; rates are rounded to multiples of 1/BLOCK
_ROUNDS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Rows that are visited at a common rate.

  Attributes:
    name: for people; unique in its schedule.
    rows: int64 [k], k ≥ 1.
    rate: relative to the other parts, > 0.
    weights: float32 [k], or None for ones.
  """

  name: str
  rows: np.ndarray
  rate: float = 1.0
  weights: np.ndarray | None = None


def permute(index_B: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
  """Image of `index_B` (int64, each in [0, size)) under the permutation of [0, size) that `key` names.

  An alternating Feistel network on pairs (a, b) with a·b just above `size`; what falls outside goes through again.

  Args:
    index_B: where to look.
    size: of the permutation, at least 1.
    key: uint64 [8].
  """
  high = np.uint64(int(np.ceil(np.sqrt(size))))
  low = np.uint64(-(-size // int(high)))
  image_B = np.asarray(index_B).astype(np.uint64)
  todo = np.arange(len(image_B))
  while len(todo):
    a, b = np.divmod(image_B[todo], low)
    for round in range(0, _ROUNDS, 2):
      a = (a + _mix(b, key[round])) % high
      b = (b + _mix(a, key[round + 1])) % low
    image_B[todo] = a * low + b
    todo = todo[image_B[todo] >= size]
  return image_B.astype(np.int64)


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
  """The finalizer of SplitMix64 over x + key; below 2⁶³, so that a sum does not wrap."""
  x = x + key
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """`length` examples from `parts`, in an order that `seed` names.

  A part that runs out of rows begins another epoch, and nothing else: the mixture keeps its rates and its length.
  `max_epochs` forbids more passes than meant.

  Raises:
    UserError: no parts, an empty part, two of one name, a rate that is not positive, or a part that would be visited
      more than `max_epochs` times.
  """

  parts: tuple[Part, ...]
  length: int
  seed: int
  max_epochs: float | None = None

  def __post_init__(self) -> None:
    if not self.parts or self.length < 0:
      raise UserError(f'a schedule needs parts and a length, got {len(self.parts)} parts and length {self.length}')
    names = [part.name for part in self.parts]
    for part in self.parts:
      if names.count(part.name) > 1:
        raise UserError(f'two parts of a schedule are called {part.name!r}; rename one')
      if not len(part.rows):
        raise UserError(f'part {part.name!r} of a schedule has no rows; leave it out')
      if not part.rate > 0 or not np.isfinite(part.rate):
        raise UserError(f'part {part.name!r} of a schedule has rate {part.rate}; rates are positive')
      if part.weights is not None and len(part.weights) != len(part.rows):
        raise UserError(f'part {part.name!r} has {len(part.rows)} rows and {len(part.weights)} weights')
    if self.max_epochs is not None:
      for part, visits in zip(self.parts, self.visits(self.length), strict=True):
        if visits > self.max_epochs * len(part.rows):
          raise UserError(
            f'part {part.name!r} has {len(part.rows)} rows but is to give {visits} examples, more than '
            f'{self.max_epochs} epochs; add rows, lower its rate or allow more epochs'
          )

  @staticmethod
  def single(
    name: str, rows: np.ndarray, length: int, seed: int, weights: np.ndarray | None = None,
    max_epochs: float | None = None,
  ) -> 'Schedule':  # fmt: skip
    """The schedule of one selection: pass after pass over `rows`, the last broken off at `length` examples."""
    return Schedule((Part(name, np.asarray(rows, np.int64), weights=weights),), length, seed, max_epochs)

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """Examples of each part in a whole block: int64 [parts], adds up to BLOCK. Every part has at least one."""
    if len(self.parts) > BLOCK:
      raise UserError(f'a schedule has {len(self.parts)} parts; {BLOCK} are the most')
    rate_S = np.array([part.rate for part in self.parts], np.float64)
    share_S = rate_S / rate_S.sum() * (BLOCK - len(self.parts))
    count_S = np.floor(share_S).astype(np.int64)
    # Largest remainders get what rounding left; the first of equals.
    order = np.argsort(-(share_S - count_S), kind='stable')
    count_S[order[: BLOCK - len(self.parts) - count_S.sum()]] += 1
    return count_S + 1

  def _key(self, *names: str | int) -> np.ndarray:
    return prng.numpy_stream(self.seed, 'schedule', *names).integers(0, 2**64, _ROUNDS, np.uint64)

  @functools.lru_cache(maxsize=64)  # noqa: B019 - schedules are few and live as long as the run
  def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(part, rank among the block's examples of that part) for each position of a block."""
    bound_S = np.cumsum(self.counts)
    slot = permute(np.arange(BLOCK), BLOCK, self._key('block', block))
    part = np.searchsorted(bound_S, slot, side='right')
    rank = np.empty(BLOCK, np.int64)
    for index in range(len(self.parts)):
      mine = part == index
      rank[mine] = np.arange(mine.sum())
    return part.astype(np.int64), rank

  def part_and_index(self, position_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(part, how many examples of that part come before) at each position: int64 [B] each."""
    position_B = np.asarray(position_B, np.int64)
    if len(self.parts) == 1:
      return np.zeros_like(position_B), position_B.copy()
    block_B, place_B = np.divmod(position_B, BLOCK)
    part_B, index_B = np.empty_like(position_B), np.empty_like(position_B)
    for block in np.unique(block_B):
      here = block_B == block
      part, rank = self._block(int(block))
      part_B[here] = part[place_B[here]]
      index_B[here] = rank[place_B[here]]
    return part_B, index_B + block_B * self.counts[part_B]

  def visits(self, stop: int) -> np.ndarray:
    """Examples of each part at positions below `stop`: int64 [parts]."""
    if len(self.parts) == 1:
      return np.array([stop], np.int64)
    blocks, rest = divmod(stop, BLOCK)
    in_last = self._block(blocks)[0][:rest]
    return blocks * self.counts + np.bincount(in_last, minlength=len(self.parts))

  def entries(self, part: int, index_B: np.ndarray) -> np.ndarray:
    """Index into the part's rows of its examples number `index_B`: int64 [B]."""
    size = len(self.parts[part].rows)
    epoch_B, place_B = np.divmod(np.asarray(index_B, np.int64), size)
    entry_B = np.empty_like(place_B)
    for epoch in np.unique(epoch_B):
      here = epoch_B == epoch
      entry_B[here] = permute(place_B[here], size, self._key('epoch', self.parts[part].name, int(epoch)))
    return entry_B

  def examples(self, part: int, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row int64 [B], weight float32 [B]) of a part's examples number `index_B`."""
    entry_B = self.entries(part, index_B)
    weights = self.parts[part].weights
    weight_B = np.ones(len(entry_B), np.float32) if weights is None else weights[entry_B].astype(np.float32)
    return np.asarray(self.parts[part].rows, np.int64)[entry_B], weight_B

  def at(self, position_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(part int64 [B], row int64 [B], weight float32 [B]) at positions in [0, length).

    Raises:
      IndexError: a position is outside.
    """
    position_B = np.asarray(position_B, np.int64)
    if len(position_B) and (position_B.min() < 0 or position_B.max() >= self.length):
      raise IndexError(f'positions {position_B.min()} to {position_B.max()} of a schedule of {self.length}')
    part_B, index_B = self.part_and_index(position_B)
    row_B, weight_B = np.empty_like(part_B), np.empty(len(part_B), np.float32)
    for part in np.unique(part_B):
      here = part_B == part
      row_B[here], weight_B[here] = self.examples(int(part), index_B[here])
    return part_B, row_B, weight_B

  @functools.cached_property
  def digest(self) -> str:
    """16 hexadecimal digits that name the whole stream."""
    h = hashlib.sha256(f'{self.length}\x1f{self.seed}\x1f{len(self.parts)}'.encode())
    for part in self.parts:
      h.update(f'\x1f{part.name!r}\x1f{part.rate!r}\x1f{len(part.rows)}\x1f'.encode())
      h.update(np.ascontiguousarray(part.rows, '<i8').tobytes())
      h.update(b'' if part.weights is None else np.ascontiguousarray(part.weights, '<f4').tobytes())
    return h.hexdigest()[:16]

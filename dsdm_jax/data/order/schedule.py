"""The order of training: position → (part, row), a pure function of the seed with random access.

A schedule mixes parts (selections, sources, …) at fixed rates. Positions come in blocks of `BLOCK`; each block holds
every part in proportion to its rate, in its own shuffled order. Within a part, rows come in epochs: each visits every
row once, in its own order. When a part is exhausted, a new *phase* begins: the other parts continue at their rates.
Orders are keyed permutations that are computed and not stored, so resuming at any position costs the same.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.pool.permutation import ROUNDS, permute
from dsdm_jax.errors import UserError

BLOCK = 1_024  # positions; rates are rounded to multiples of 1/BLOCK


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Rows that are visited at a common rate.

  Attributes:
    name: unique in its schedule.
    rows: int64 [k], k ≥ 1.
    rate: relative to the other parts, > 0.
    weights: float32 [k], or None for ones.
    most: maximum of examples, at least 1; None for no limit.
  """

  name: str
  rows: np.ndarray
  rate: float = 1.0
  weights: np.ndarray | None = None
  most: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Phase:
  """Positions with examples of the same parts.

  Attributes:
    start: first position.
    counts_S: examples of each part in a block, 0 for exhausted parts; the sum is BLOCK.
    before_S: examples of each part at earlier positions.
  """

  start: int
  counts_S: np.ndarray
  before_S: np.ndarray

  @property
  def counts(self) -> tuple[int, ...]:
    return tuple(self.counts_S.tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """`length` examples from `parts`, in an order that `seed` determines.

  A part that runs out of rows begins another epoch; rates and length do not change. `when_empty` determines what
  happens when a part has given its `most` examples: 'drop' leaves its place to the others at their relative rates, with
  the same length; 'repeat' continues anyway; 'refuse' is an error.

  Raises:
    UserError: no parts, an empty part, two parts with the same name, a rate that is not positive, a refused part, or
      parts that together may give fewer than `length` examples.
  """

  parts: tuple[Part, ...]
  length: int
  seed: int
  when_empty: str = 'repeat'

  def __post_init__(self) -> None:
    if not self.parts or self.length < 0:
      raise UserError(f'a schedule needs parts and a length, got {len(self.parts)} parts and length {self.length}')
    names = [part.name for part in self.parts]
    for part in self.parts:
      if names.count(part.name) > 1:
        raise UserError(f'two parts of a schedule are named {part.name!r}; rename one')
      if not len(part.rows):
        raise UserError(f'part {part.name!r} of a schedule has no rows; remove it')
      if not part.rate > 0 or not np.isfinite(part.rate):
        raise UserError(f'part {part.name!r} of a schedule has rate {part.rate}; rates must be positive')
      if part.weights is not None and len(part.weights) != len(part.rows):
        raise UserError(f'part {part.name!r} has {len(part.rows)} rows and {len(part.weights)} weights')
      if part.most is not None and part.most < 1:
        raise UserError(f'part {part.name!r} of a schedule may give {part.most} examples; remove it')
    if self.when_empty not in ('drop', 'repeat', 'refuse'):
      raise UserError(f'when_empty is {self.when_empty!r}; it is drop, repeat or refuse')
    alone = len(self.parts) == 1  # no other part can take its place
    for part, visits in zip(self.parts, self.visits(self.length), strict=True):
      if (self.when_empty == 'refuse' or (alone and self.when_empty == 'drop')) and visits > (part.most or visits):
        raise UserError(
          f'part {part.name!r} has {len(part.rows)} rows and is asked for {visits} examples, but at most {part.most} '
          'are allowed; add rows, lower its rate, or allow more passes over it'
        )

  @staticmethod
  def single(
    name: str,
    rows: np.ndarray,
    length: int,
    seed: int,
    weights: np.ndarray | None = None,
    max_epochs: float | None = None,
  ) -> 'Schedule':
    """The schedule of one selection: passes over `rows`, the last one cut at `length` examples.

    More than `max_epochs` passes are an error.
    """
    most = int(max_epochs * len(rows)) if max_epochs and len(rows) else None
    return Schedule((Part(name, np.asarray(rows, np.int64), weights=weights, most=most),), length, seed, 'refuse')

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """Examples of each part in a whole block of the first phase: int64 [parts], each at least 1, the sum is BLOCK."""
    return self._counts(np.ones(len(self.parts), bool))

  def _counts(self, gives_S: np.ndarray) -> np.ndarray:
    if gives_S.sum() > BLOCK:
      raise UserError(f'a schedule has {len(self.parts)} parts, more than {BLOCK}')
    rate_S = np.array([part.rate for part in self.parts], np.float64) * gives_S
    free = BLOCK - int(gives_S.sum())
    share_S = rate_S / rate_S.sum() * free
    count_S = np.floor(share_S).astype(np.int64)
    # The largest remainders get the rest, the first of equals; the remainder of exhausted parts is zero.
    order = np.argsort(-(share_S - count_S), kind='stable')
    count_S[order[: free - count_S.sum()]] += 1
    return count_S + gives_S

  @functools.cached_property
  def _phases(self) -> list[_Phase]:
    gives_S = np.ones(len(self.parts), bool)
    most_S = np.array([np.inf if p.most is None else p.most for p in self.parts])
    phases = [_Phase(0, self.counts, np.zeros(len(self.parts), np.int64))]
    while self.when_empty == 'drop' and len(self.parts) > 1:
      phase, number = phases[-1], len(phases) - 1
      # The first position at which a part would exceed its maximum.
      ends = [
        self._place(phase, number, int(part), int(most_S[part] - phase.before_S[part]))
        for part in np.flatnonzero(gives_S & np.isfinite(most_S))
      ]
      end = min(ends, default=self.length)
      if end >= self.length:
        break
      given_S = self._given(phase, number, end)
      gives_S = gives_S & (given_S < most_S)
      if not gives_S.any():
        raise UserError(
          f'the parts of a schedule may give {end} of {self.length} examples; add rows, allow more passes over them, '
          'or let one part repeat'
        )
      phases.append(_Phase(end, self._counts(gives_S), given_S))
    return phases

  def _place(self, phase: _Phase, number: int, part: int, index: int) -> int:
    """Position of a part's example number `index`, counted from 0 in `phase`."""
    block, rank = divmod(index, int(phase.counts_S[part]))
    places = np.flatnonzero(self._block(number, phase.counts, block)[0] == part)
    return phase.start + block * BLOCK + int(places[rank])

  def _given(self, phase: _Phase, number: int, stop: int) -> np.ndarray:
    """Examples of each part at positions below `stop`, a position of `phase`: int64 [parts]."""
    blocks, rest = divmod(stop - phase.start, BLOCK)
    in_last = self._block(number, phase.counts, blocks)[0][:rest]
    return phase.before_S + blocks * phase.counts_S + np.bincount(in_last, minlength=len(self.parts))

  def _key(self, *names: str | int) -> np.ndarray:
    return prng.numpy_stream(self.seed, 'schedule', *names).integers(0, 2**64, ROUNDS, np.uint64)

  @functools.cached_property
  def _block(self) -> Callable[[int, tuple[int, ...], int], tuple[np.ndarray, np.ndarray]]:
    return functools.lru_cache(maxsize=64)(self._make_block)  # freed with the schedule

  def _make_block(self, number: int, counts: tuple[int, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """(part, rank among the block's examples of that part) for each position of a block of phase `number`."""
    bound_S = np.cumsum(counts)
    slot = permute(np.arange(BLOCK), BLOCK, self._key('block', *([number] if number else []), block))
    part = np.searchsorted(bound_S, slot, side='right')
    rank = np.empty(BLOCK, np.int64)
    for index in range(len(self.parts)):
      mine = part == index
      rank[mine] = np.arange(mine.sum())
    return part.astype(np.int64), rank

  def part_and_index(self, position_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(part, number of earlier examples of that part) at each position: int64 [B] each."""
    position_B = np.asarray(position_B, np.int64)
    if len(self.parts) == 1:
      return np.zeros_like(position_B), position_B.copy()
    starts = np.array([phase.start for phase in self._phases])
    phase_B = np.searchsorted(starts, position_B, side='right') - 1
    block_B, place_B = np.divmod(position_B - starts[phase_B], BLOCK)
    part_B, index_B = np.empty_like(position_B), np.empty_like(position_B)
    for number, block in np.unique(np.stack([phase_B, block_B]), axis=1).T:
      here = (phase_B == number) & (block_B == block)
      phase = self._phases[number]
      part, rank = self._block(int(number), phase.counts, int(block))
      part_B[here] = part[place_B[here]]
      index_B[here] = rank[place_B[here]] + block * phase.counts_S[part_B[here]] + phase.before_S[part_B[here]]
    return part_B, index_B

  def visits(self, stop: int) -> np.ndarray:
    """Examples of each part at positions below `stop`: int64 [parts]."""
    if len(self.parts) == 1:
      return np.array([stop], np.int64)
    number = max(0, sum(phase.start <= stop for phase in self._phases) - 1)
    return self._given(self._phases[number], number, stop)

  def entries(self, part: int, index_B: np.ndarray) -> np.ndarray:
    """Indices into the part's rows of its examples `index_B`: int64 [B]."""
    size = len(self.parts[part].rows)
    epoch_B, place_B = np.divmod(np.asarray(index_B, np.int64), size)
    entry_B = np.empty_like(place_B)
    for epoch in np.unique(epoch_B):
      here = epoch_B == epoch
      entry_B[here] = permute(place_B[here], size, self._key('epoch', self.parts[part].name, int(epoch)))
    return entry_B

  def examples(self, part: int, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row int64 [B], weight float32 [B]) of a part's examples `index_B`."""
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
    """16 hexadecimal digits that identify the whole stream."""
    h = hashlib.sha256(f'{self.length}\x1f{self.seed}\x1f{len(self.parts)}'.encode())
    for part in self.parts:
      h.update(f'\x1f{part.name!r}\x1f{part.rate!r}\x1f{len(part.rows)}\x1f'.encode())
      h.update(np.ascontiguousarray(part.rows, '<i8').tobytes())
      h.update(f'{part.most}\x1f{self.when_empty}\x1f'.encode())
      h.update(b'' if part.weights is None else np.ascontiguousarray(part.weights, '<f4').tobytes())
    return h.hexdigest()[:16]

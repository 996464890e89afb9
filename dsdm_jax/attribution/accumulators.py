"""Partial results of a pass over the pool, on disk, so that a killed pass resumes at a shard and gives the same bits.

A pass goes through the shards in order. One row number therefore says how far it came: the result holds all rows before
it and none after it. Passes that take less than `SAVE_SECONDS` write nothing, except for sums that are to be kept and
for what processes share with each other.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.attribution.sources import Bounds
from dsdm_jax.core import processes, storage
from dsdm_jax.core.mesh import Team, fetch
from dsdm_jax.core.storage import Location

SAVE_SECONDS = 60.0  # between two writes, and at least ten times the duration of a write

CHUNK_ROWS = 2**20  # rows whose results are held in memory, over all processes

Arrays = Mapping[str, np.ndarray]
Progress = Callable[[int], object]  # called with the number of rows that are done


def silent(rows: int) -> None:
  del rows


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Arrays of some shards, one after the other along their first axis, in memory or in a file.

  Attributes:
    bounds: first row and the row after the last of each shard.
    place: the arrays, or their file.
  """

  bounds: tuple[Bounds, ...]
  place: Arrays | Location

  @classmethod
  def of(cls, shards: Sequence[tuple[Bounds, Arrays]]) -> 'Chunk':
    joined = {name: np.concatenate([arrays[name] for _, arrays in shards]) for name in shards[0][1]}
    bounds = tuple(own for own, _ in shards)
    return cls(bounds, {**joined, 'bounds_S2': np.array(bounds)})

  @classmethod
  def read(cls, file: Location) -> 'Chunk':
    with storage.load(file) as arrays:
      return cls(tuple(map(tuple, arrays['bounds_S2'].tolist())), file)

  @property
  def arrays(self) -> Arrays:
    if isinstance(self.place, Mapping):
      return self.place
    with storage.load(self.place) as arrays:
      return dict(arrays)

  def select(self, names: Sequence[str]) -> Arrays:
    """Some of the arrays."""
    if isinstance(self.place, Mapping):
      return {name: self.place[name] for name in names}
    with storage.load(self.place) as arrays:
      return {name: arrays[name] for name in names}

  def overlaps(self, start: int, stop: int) -> bool:
    return any(begin < stop and end > start for begin, end in self.bounds)


class Accumulator:
  """Partial results of one stage's passes.

  Args:
    folder: of the unfinished stage; None saves nothing.
    saved: called after each write.
    keep: whether the sums over all rows stay, as files `sum_<name>.<rows>.npz`.
  """

  def __init__(self, folder: Location | None = None, saved: Callable[[], object] = lambda: None, keep: bool = False):
    self._folder, self._saved, self._keep = folder, saved, keep
    self._due = time.monotonic() + SAVE_SECONDS

  def sum(
    self,
    name: str,
    shapes: Sequence[tuple[int, ...]],
    parts: Callable[[int], Iterator[tuple[int, int, Sequence[Any]]]],
    progress: Progress = silent,
  ) -> list[np.ndarray]:
    """Sums over all shards, added in float64 in their order.

    Args:
      name: of the pass, unique within the stage.
      shapes: of the sums.
      parts: row → (start, stop, one array per sum) of each shard from that row on. The arrays may still be under
        computation: the next shard is requested before they are read.
      progress: called with the rows that an earlier attempt summed, then with those of each shard.
    """
    totals = [np.zeros(shape, np.float64) for shape in shapes]
    begin, folder = 0, self._folder
    saved: str | None = None
    if folder is not None:
      whole = (file for file in _sums(folder, name) if storage.is_marked(folder / file))
      saved = processes.decide(lambda: next(whole, None))
    if folder is not None and saved is not None:
      with storage.load(folder / saved) as arrays:
        totals, begin = [arrays[f'total_{number}'] for number in range(len(totals))], int(arrays['row'])
    progress(begin)
    pending, stop = None, begin
    for start, stop, arrays in parts(begin):
      if pending is not None:
        _add(totals, pending)
        self._save_sums(name, totals, start)
      pending = arrays
      progress(stop - start)
    if pending is not None:
      _add(totals, pending)
      self._save_sums(name, totals, stop, last=True)
    return totals

  def columns(
    self,
    name: str,
    team: Team,
    parts: Callable[[int], Iterator[tuple[Bounds, Bounds, Arrays]]],
    progress: Progress = silent,
  ) -> list['Chunk']:
    """What a pass computes for each row, in chunks that wait on disk or, if it was short, in memory.

    Args:
      name: of the pass, unique within the stage.
      team: of this process; each saves its own chunks and sees those of all.
      parts: row → (rows of the round, rows of this team's shard, arrays) from that row on. The first axis of an array
        is of the shard's rows, or of length one.
      progress: called with the rows that an earlier attempt computed, then with those of each round.
    """
    folder = self._folder
    chunks, row = ([], 0) if folder is None else self._saved_chunks(folder, name)
    progress(row)
    first, unsaved = row, list[tuple[Bounds, Arrays]]()
    for (_, end), own, arrays in parts(row):
      unsaved.append((own, arrays))
      progress(end - row)
      row = end
      if folder is not None and (row - first >= CHUNK_ROWS or self._is_due()):
        began = time.monotonic()
        chunks.append(self._save_chunk(folder, f'partial_{name}.{first:012d}-{row:012d}', team, unsaved))
        self._due = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - began))
        first, unsaved = row, []
    if unsaved and team.count > 1:  # for the other processes
      if folder is None:
        raise ValueError('several processes share their results through a folder')
      self._save_chunk(folder, f'partial_{name}.{first:012d}-{row:012d}', team, unsaved)
    elif unsaved:
      chunks.append(Chunk.of(unsaved))
    if team.count > 1 and folder is not None:
      processes.wait()
      chunks, _ = self._saved_chunks(folder, name)
    return chunks

  def _save_chunk(self, folder: Location, name: str, team: Team, shards: list[tuple[Bounds, Arrays]]) -> 'Chunk':
    file = folder / f'{name}.{team.index}of{team.count}.npz'
    chunk = Chunk.of(shards)
    if team.leads:
      storage.save_npz(file, **chunk.arrays)
      storage.mark(file)
    self._saved()
    return Chunk(chunk.bounds, file)

  def _saved_chunks(self, folder: Location, name: str) -> tuple[list['Chunk'], int]:
    """The chunks of all processes that follow each other from row 0 on, and the row after them; deletes the others."""
    names = processes.decide(lambda: _names(folder, f'partial_{name}.'))
    whole = processes.divide(names, lambda part: [storage.is_marked(folder / file) for file in part])
    sets: dict[tuple[int, int, int], list[str]] = {}
    for file, is_whole in zip(names, whole, strict=True):
      rows, part, _ = file.removeprefix(f'partial_{name}.').split('.')
      begin, end = map(int, rows.split('-'))
      if is_whole:
        sets.setdefault((begin, end, int(part.partition('of')[2])), []).append(file)
    row, taken = 0, list[str]()
    for (begin, end, count), files in sorted(sets.items()):
      if begin == row and len(files) == count:
        taken += files
        row = end
    if processes.is_first():
      for file in set(names) - set(taken):
        storage.unmark(folder / file)
    processes.wait()
    return [Chunk.read(folder / file) for file in taken], row

  def clear(self) -> None:
    """Deletes all partial results, once the stage has its own; not the sums that are to be kept."""
    if self._folder is not None and processes.is_first():
      for prefix in ('partial_', *(() if self._keep else ('sum_',))):
        for name in _names(self._folder, prefix):
          storage.unmark(self._folder / name)

  def _save_sums(self, name: str, totals: list[np.ndarray], row: int, *, last: bool = False) -> None:
    """Saves the sums over all rows before `row` if it is time; the last ones only over earlier ones.

    A pass that ends before its first save is faster to repeat than to read. Earlier sums are deleted last, so that a
    kill leaves whole ones.
    """
    folder = self._folder
    if folder is None or not (
      self._is_due() or (last and (self._keep or processes.decide(lambda: bool(_sums(folder, name)))))
    ):
      return
    began = time.monotonic()
    if processes.is_first():
      file, earlier = folder / f'sum_{name}.{row:012d}.npz', _sums(folder, name)
      storage.save_npz(file, row=np.array(row), **{f'total_{number}': total for number, total in enumerate(totals)})
      storage.mark(file)
      self._saved()
      for other in earlier:
        if other != file.name:
          storage.unmark(folder / other)
    self._due = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - began))

  def _is_due(self) -> bool:
    return processes.decide(lambda: time.monotonic() >= self._due)


def _names(folder: Location, prefix: str) -> list[str]:
  """Names of the npz files in the folder that begin so."""
  names = (path.name for path in storage.children(folder))
  return sorted(name for name in names if name.startswith(prefix) and name.endswith('.npz'))


def _sums(folder: Location, name: str) -> list[str]:
  """Names of the saved sums of a pass, those of most rows first."""
  return _names(folder, f'sum_{name}.')[::-1]


def _add(totals: Sequence[np.ndarray], parts: Sequence[Any]) -> None:
  for total, part in zip(totals, parts, strict=True):
    np.add(total, fetch(part), out=total)

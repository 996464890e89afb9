"""Partial results of a pass over the pool, on disk, so that a killed pass resumes at a shard and gives the same bits.

A pass goes through the shards in order. One row number therefore says how far it came: the result holds all rows before
it and none after it. Passes that take less than `SAVE_SECONDS` write nothing, except for sums that are to be kept.
"""

import glob
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.attribution.sources import Shard
from dsdm_jax.core import processes, storage
from dsdm_jax.core.mesh import fetch

SAVE_SECONDS = 60.0  # between two writes, and at least ten times the duration of a write

Progress = Callable[[int], object]  # called with the number of rows that are done


def silent(rows: int) -> None:
  del rows


class Accumulator:
  """Partial results of one stage's passes.

  Args:
    folder: of the unfinished stage; None saves nothing.
    saved: called after each write.
    keep: whether the sums over all rows stay, as files `sum_<name>.<rows>.npz`.
  """

  def __init__(self, folder: Path | None = None, saved: Callable[[], object] = lambda: None, keep: bool = False):
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
    saved = None if folder is None else processes.decide(lambda: next(filter(_is_whole, _sums(folder, name)), None))
    if saved is not None:
      with storage.load(saved) as arrays:
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

  def shards(self, name: str, remaining: Callable[[int], Iterator[Shard]]) -> Iterator[Shard]:
    """All shards of a pass: those that an earlier attempt saved, then those of `remaining(row)` from that row on."""
    row, folder = 0, self._folder
    files: list[Path] = []
    if folder is not None:
      saved = processes.decide(lambda: _marked(folder, f'partial_{name}_*.npz'))
      files = [folder / file for file in saved]
    for file in files:
      with storage.load(file) as arrays:
        bounds = arrays['bounds_S2'].tolist()
        parts = np.split(arrays['result'], np.cumsum([stop - start for start, stop in bounds])[:-1])
      for (start, stop), part in zip(bounds, parts, strict=True):
        yield start, stop, part
        row = stop
    unsaved: list[Shard] = []
    for shard in remaining(row):
      unsaved.append(shard)
      yield shard
      if folder is not None and self._is_due():
        if processes.is_first():
          bounds_S2 = np.array([(start, stop) for start, stop, _ in unsaved])
          result = np.concatenate([result for _, _, result in unsaved])
          file = folder / f'partial_{name}_{unsaved[0][0]:012d}.npz'
          storage.save_npz(file, bounds_S2=bounds_S2, result=result)
          storage.mark(file)
          self._saved()
        self._due = time.monotonic() + SAVE_SECONDS
        unsaved = []

  def clear(self) -> None:
    """Deletes all partial results, once the stage has its own; not the sums that are to be kept."""
    if self._folder is not None and processes.is_first():
      for file in (*self._folder.glob('partial_*.npz'), *(() if self._keep else self._folder.glob('sum_*.npz'))):
        storage.unmark(file)

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
      for path in map(Path, earlier):
        if path != file:
          storage.unmark(path)
    self._due = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - began))

  def _is_due(self) -> bool:
    return processes.decide(lambda: time.monotonic() >= self._due)


def _sums(folder: Path, name: str) -> list[str]:
  """Paths of the saved sums of a pass, those of most rows first."""
  return sorted(map(str, folder.glob(f'sum_{glob.escape(name)}.*.npz')), reverse=True)


def _is_whole(path: str) -> bool:
  return storage.is_marked(Path(path))


def _marked(folder: Path, pattern: str) -> list[str]:
  """Names of the files before the first damaged one, which is deleted with those after it: they follow each other."""
  files = sorted(folder.glob(pattern))
  whole = list(itertools.takewhile(storage.is_marked, files))
  for file in files[len(whole) :]:
    storage.unmark(file)
  return [file.name for file in whole]


def _add(totals: Sequence[np.ndarray], parts: Sequence[Any]) -> None:
  for total, part in zip(totals, parts, strict=True):
    np.add(total, fetch(part), out=total)

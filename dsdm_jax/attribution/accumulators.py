"""What a pass over the pool has gathered so far, on disk: a kill costs a minute of it, or one shard.

A pass goes through the shards in order, so what is done is told by a row: all before it are in, none after it. Nothing
is written by passes that take less than `SAVE_SECONDS`.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dsdm_jax.core import processes, storage

SAVE_SECONDS = 60.0  # between two writes, and at least ten times what a write takes
Shard = tuple[int, int, np.ndarray]


class Partials:
  """Unfinished work of one stage.

  Args:
    folder: of the unfinished stage; None keeps nothing.
  """

  def __init__(self, folder: Path | None):
    self._folder = folder
    self._due = time.monotonic() + SAVE_SECONDS

  def sums(self, name: str, totals: list[np.ndarray]) -> int:
    """Fills `totals` with what was saved under `name`, and returns the row to go on from; 0 where nothing was."""
    file = self._file(f'{name}.npz')
    if file is None or not processes.decide(file.is_file):
      return 0
    with np.load(file, allow_pickle=False) as arrays:
      for number, total in enumerate(totals):
        total[...] = arrays[f'total_{number}']
      return int(arrays['row'])

  def save_sums(self, name: str, totals: list[np.ndarray], row: int, *, last: bool = False) -> None:
    """Saves the sums over all rows before `row`, if it is time; `last` where there is no more, which others go on from.

    A pass that ended before anything of it was saved is quicker done again than read.
    """
    file = self._file(f'{name}.npz')
    if file is None or not (self._is_due() or (last and processes.decide(file.is_file))):
      return
    began = time.monotonic()
    if processes.is_first():
      storage.save_npz(file, row=np.array(row), **{f'total_{number}': total for number, total in enumerate(totals)})
    self._due = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - began))

  def shards(self, name: str) -> list[Path]:
    """Files of finished shards under `name`, in order."""
    if self._folder is None:
      return []
    folder = self._folder
    names = processes.decide(lambda: sorted(file.name for file in folder.glob(f'partial_{name}_*.npz')))
    return [folder / name for name in names]

  def kept(self, name: str, coming: Callable[[int], Iterator[Shard]]) -> Iterator[Shard]:
    """All shards of a pass: those saved by an earlier attempt, then those that `coming(row)` makes from that row on."""
    row = 0
    for file in self.shards(name):
      with np.load(file, allow_pickle=False) as arrays:
        bounds = arrays['bounds_S2'].tolist()
        parts = np.split(arrays['result'], np.cumsum([stop - start for start, stop in bounds])[:-1])
      for (start, stop), part in zip(bounds, parts, strict=True):
        yield start, stop, part
        row = stop
    waiting: list[Shard] = []
    for shard in coming(row):
      waiting.append(shard)
      yield shard
      if self._is_due():
        self._save_shards(name, waiting)
        waiting = []

  def clear(self) -> None:
    """Deletes all: the stage has what it wants."""
    if self._folder is not None and processes.is_first():
      for file in self._folder.glob('partial_*.npz'):
        file.unlink()

  def _save_shards(self, name: str, shards: list[Shard]) -> None:
    file = self._file(f'{name}_{shards[0][0]:012d}.npz')
    if file is not None and processes.is_first():
      bounds = np.array([(start, stop) for start, stop, _ in shards])
      storage.save_npz(file, bounds_S2=bounds, result=np.concatenate([result for _, _, result in shards]))
    self._due = time.monotonic() + SAVE_SECONDS

  def _is_due(self) -> bool:
    return self._folder is not None and processes.decide(lambda: time.monotonic() >= self._due)

  def _file(self, name: str) -> Path | None:
    return None if self._folder is None else self._folder / f'partial_{name}'

"""Arrays of a datamodel stage on disk: `scores/<task>/<kind>_<axes>.<block>.npy`.

An array with an axis N has a file for each block of `BLOCK` rows, so that several processes write it and nobody needs
all of it in memory; others have one file. The array named `score_docs_N` is in the files `scores/docs/score_N.*`.

After a prefilter N counts the rows that have scores, and `scored.npy`, bool, says which rows of the pool these are.
"""

import collections
import functools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from dsdm_jax.core import storage
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import UserError

FOLDER, SCORED = 'scores', 'scored.npy'
BLOCK = 2**20  # rows


def blocks(rows: int) -> list[tuple[int, int]]:
  """First row and the row after the last of each block."""
  return [(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]


def write(folder: Location, task: str, arrays: Mapping[str, np.ndarray], first: int = 0) -> None:
  """Writes arrays of a task, by kind and axes (`score_N`); those with rows are of the block that begins at `first`."""
  for name, array in arrays.items():
    storage.save_npy(folder / FOLDER / task / f'{name}.{first // BLOCK:06d}.npy', array)


class ScoreArrays(Mapping[str, np.ndarray]):
  """Name → array of a datamodel stage; each is read when it is asked for, and only `scored_N` stays in memory.

  Args:
    folder: of the stage's files.
    files: relative paths of its files, as its manifest lists them; None takes all that are there.
  """

  def __init__(self, folder: Location, files: Iterable[str] | None = None):
    self._files: dict[str, list[Location]] = collections.defaultdict(list)
    names = list(storage.files(folder) if files is None else files)
    self._scored = folder / SCORED if SCORED in names else None
    for name in sorted(names):
      parts = name.split('/')
      if len(parts) == 3 and parts[0] == FOLDER and name.endswith('.npy'):
        kind, _, axes = parts[2].split('.')[0].rpartition('_')
        self._files[f'{kind}_{parts[1]}_{axes}'].append(folder / name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)

  def __contains__(self, name: object) -> bool:
    return name in self._files

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._files:
      raise KeyError(name)
    files, axis = self._files[name], _row_axis(name)
    if len(files) == 1:
      return storage.load(files[0])
    last = storage.load(files[-1])
    shape = list(last.shape)
    shape[axis] += (len(files) - 1) * BLOCK
    whole = np.moveaxis(np.empty(shape, last.dtype), axis, 0)
    for number, file in enumerate(files):
      part = np.moveaxis(last if number == len(files) - 1 else storage.load(file), axis, 0)
      try:
        whole[number * BLOCK : number * BLOCK + len(part)] = part
      except ValueError as error:
        raise UserError(f'{file} has {len(part)} rows; it is damaged: run the datamodel stage again') from error
    return np.moveaxis(whole, 0, axis)

  @functools.cached_property
  def scored_N(self) -> np.ndarray | None:
    """Which rows of the pool have scores, bool; None for all."""
    return None if self._scored is None else storage.load(self._scored)

  def of_pool(self, value_N: np.ndarray) -> np.ndarray:
    """Values of the rows that have scores, [N, …], at their places among all rows of the pool; NaN for the others."""
    if self.scored_N is None:
      return value_N
    whole_N = np.full((len(self.scored_N), *value_N.shape[1:]), np.nan, value_N.dtype)
    whole_N[self.scored_N] = value_N
    return whole_N

  def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array, ascending, without reading more than a block at a time."""
    axis, parts = _row_axis(name), []
    for number, file in enumerate(self._files[name]):
      inside = rows[(rows >= number * BLOCK) & (rows < (number + 1) * BLOCK)] - number * BLOCK
      if len(inside):
        parts.append(np.take(storage.load(file), inside, axis=axis))
    return np.concatenate(parts, axis=axis)


def _row_axis(name: str) -> int:
  return max(name.rpartition('_')[2].find('N'), 0)

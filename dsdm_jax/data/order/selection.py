"""A selection: which rows of the pool to train on, with what weight, and how they were chosen."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import inside
from dsdm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Selection:
  """Rows of a pool, best first where the method has an order.

  Attributes:
    name: names its files: '<method>--<target>--<seed>'.
    rows: int64 [k].
    weights: float32 [k], of each row's loss; 1 is usual.
    provenance: JSON values: method, target, seed, and what the method tells of how it chose.
    scores: float32 [k], what the method ranked each row by, higher first; None where it does not rank.

  Raises:
    ValueError: shapes or dtypes are others, a row is negative, or a weight is negative or not finite.
  """

  name: str
  rows: np.ndarray
  weights: np.ndarray
  provenance: dict[str, Any]
  scores: np.ndarray | None = None

  def __post_init__(self) -> None:
    if self.rows.ndim != 1 or self.rows.dtype != np.int64:
      raise ValueError(f'selection {self.name}: rows must be int64 [k], got {self.rows.dtype} {self.rows.shape}')
    if self.weights.shape != self.rows.shape or self.weights.dtype != np.float32:
      raise ValueError(
        f'selection {self.name}: weights must be float32 {self.rows.shape}, '
        f'got {self.weights.dtype} {self.weights.shape}'
      )
    if len(self.rows) and self.rows.min() < 0:
      raise ValueError(f'selection {self.name}: row {self.rows.min()} is negative')
    if not np.all(np.isfinite(self.weights)) or (len(self.weights) and self.weights.min() < 0):
      raise ValueError(f'selection {self.name}: weights must be finite and not negative')
    if self.scores is not None and (self.scores.shape != self.rows.shape or self.scores.dtype != np.float32):
      raise ValueError(
        f'selection {self.name}: scores must be float32 {self.rows.shape}, got {self.scores.dtype} {self.scores.shape}'
      )

  @classmethod
  def of(cls, rows: np.ndarray, scores: np.ndarray | None = None, **provenance: Any) -> 'Selection':
    """What a selector returns: `rows` with weights of one, and no name yet."""
    rows = np.asarray(rows, np.int64)
    return cls('', rows, np.ones(len(rows), np.float32), provenance, scores)

  @property
  def size(self) -> int:
    """k, counting repeats."""
    return len(self.rows)

  def check(self, num_rows: int, cap: int = 1) -> None:
    """Checks the selection against a pool.

    Args:
      num_rows: N of the pool.
      cap: how often a row may occur.

    Raises:
      ValueError: it is empty, a row is not in the pool, or occurs more than `cap` times.
    """
    if not self.size:
      raise ValueError(f'selection {self.name} is empty')
    if self.rows.max() >= num_rows:
      raise ValueError(f'selection {self.name}: row {self.rows.max()} of a pool of {num_rows} rows')
    row, count = np.unique(self.rows, return_counts=True)
    if count.max() > cap:
      raise ValueError(
        f'selection {self.name}: row {row[count.argmax()]} occurs {count.max()} times, allowed are {cap}'
      )

  def save(self, folder: str | os.PathLike) -> None:
    """Writes `<name>.npz` (rows, weights, scores if there are any) and `<name>.json` (provenance) into `folder`."""
    arrays = {'rows': self.rows, 'weights': self.weights}
    if self.scores is not None:
      arrays['scores'] = self.scores
    storage.save_npz(Path(folder) / f'{self.name}.npz', **arrays)
    storage.write_json(Path(folder) / f'{self.name}.json', self.provenance)

  @classmethod
  def load(cls, folder: str | os.PathLike, name: str) -> 'Selection':
    """Raises UserError where `folder` has no such selection, ValueError where it is malformed."""
    arrays_file, provenance_file = (inside(Path(folder), f'{name}.{kind}') for kind in ('npz', 'json'))
    try:
      # numpy leaves a file open that it opened itself and found to be no zip.
      with open(arrays_file, 'rb') as file, np.load(file) as arrays:
        rows, weights = arrays['rows'], arrays['weights']
        scores = arrays['scores'] if 'scores' in arrays.files else None
      provenance = json.loads(provenance_file.read_text())
    except FileNotFoundError as error:
      raise UserError(
        f'no selection {name!r} in {folder}: {error.filename} is missing; run the selection stage'
      ) from error
    except Exception as error:  # a zip, arrays and JSON: each is torn in its own ways
      raise UserError(
        f'{arrays_file} or its .json cannot be read ({" ".join(str(error).split())[:200]}); delete the selection '
        'folder and start again'
      ) from error
    return cls(name, rows, weights, provenance, scores)

"""A selection: rows of the pool to train on, their weights and how they were chosen; and the order of training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import inside
from dsdm_jax.core.storage import Location
from dsdm_jax.data.order.schedule import Part, Schedule
from dsdm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Selection:
  """Rows of a pool, best first if the method has an order.

  Attributes:
    name: of its files: '<method>--<target>--<seed>'.
    rows: int64 [k].
    weights: float32 [k], of each row's loss; usually 1.
    provenance: JSON values: method, target, seed, and details of the method.
    scores: float32 [k], what the method ranks rows by, highest first; None if it does not rank.
    documents: int64 [m], indices into the pool's documents, best first, where whole documents were selected; `rows` are
      then those that hold them. Otherwise None.
    document_scores: float32 [m], what the method ranks documents by.

  Raises:
    ValueError: wrong shapes or dtypes, a row is negative, or a weight is negative or not finite.
  """

  name: str
  rows: np.ndarray
  weights: np.ndarray
  provenance: dict[str, Any]
  scores: np.ndarray | None = None
  documents: np.ndarray | None = None
  document_scores: np.ndarray | None = None

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
    """`rows` with weights of one and without a name, as selectors return it."""
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
      cap: maximum of occurrences of a row.

    Raises:
      ValueError: the selection is empty, or a row is outside the pool or occurs more than `cap` times.
    """
    if not self.size:
      raise ValueError(f'selection {self.name} is empty')
    if self.rows.max() >= num_rows:
      raise ValueError(f'selection {self.name}: row {self.rows.max()} of a pool of {num_rows} rows')
    row, count = np.unique(self.rows, return_counts=True)
    if count.max() > cap:
      raise ValueError(f'selection {self.name}: row {row[count.argmax()]} occurs {count.max()} times, more than {cap}')

  def save(self, folder: Location) -> None:
    """Writes `<name>.npz` (its arrays) and `<name>.json` (provenance) to `folder`."""
    arrays = {'rows': self.rows, 'weights': self.weights}
    for name in ('scores', 'documents', 'document_scores'):
      if (array := getattr(self, name)) is not None:
        arrays[name] = array
    storage.save_npz(folder / f'{self.name}.npz', **arrays)
    storage.write_json(folder / f'{self.name}.json', self.provenance)

  @classmethod
  def load(cls, folder: Location, name: str) -> 'Selection':
    """Raises UserError if `folder` has no such selection, ValueError if it is malformed."""
    arrays_file, provenance_file = (inside(folder, f'{name}.{kind}') for kind in ('npz', 'json'))
    try:
      with storage.load(arrays_file) as arrays:
        rows, weights = arrays['rows'], arrays['weights']
        optional = [arrays[n] if n in arrays.files else None for n in ('scores', 'documents', 'document_scores')]
      provenance = storage.read_json(provenance_file, dict)
    except FileNotFoundError as error:
      raise UserError(
        f'no selection {name!r} in {folder}: {error.filename} is missing; run the selection stage'
      ) from error
    except Exception as error:  # truncated zip files, arrays and JSON raise errors of many types
      raise UserError(
        f'{arrays_file} or its .json cannot be read ({" ".join(str(error).split())[:200]}); delete the selection '
        'folder and start again'
      ) from error
    return cls(name, rows, weights, provenance, *optional)


def schedule(folder: Location, entry: Mapping[str, Any], length: int, seed: int, max_epochs: float = 0.0) -> Schedule:
  """The order of training for an entry of the selection stage's index: one selection, or a mixture of several.

  Args:
    folder: of the finished selection stage.
    entry: of its `index.json`.
    length: number of examples.
    seed: of the order.
    max_epochs: maximum of passes over an arm's rows, or over those of a part; 0 for no limit.

  Raises:
    UserError: a selection is missing, or the parts of a mixture cannot fill `length` (see `Schedule`).
  """
  if 'parts' not in entry:
    selection = Selection.load(folder, entry['selection'])
    return Schedule.single(entry['name'], selection.rows, length, seed, selection.weights, max_epochs or None)
  parts = []
  for part in entry['parts']:
    selection = Selection.load(folder, part['selection'])
    most = min(part['most'], int(max_epochs * selection.size)) if max_epochs else part['most']
    parts.append(Part(part['name'], selection.rows, part['rate'], selection.weights, most))
  return Schedule(tuple(parts), length, seed, entry['when_empty'])

"""The pool stage and the pool as others see it: N rows of exactly L tokens, addressed by row."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from dsdm_jax.core import artifacts
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool import encoders

if TYPE_CHECKING:
  import seqio

END_OF_DOCUMENT = '\n␄\n'  # stands for the end mark in the text of a row
_RESIDENT_BYTES = 16 * 2**20  # a pool of no more tokens than this is read once and kept in memory
_RESIDENT_DOCUMENTS = 2**20  # a table of no more documents likewise


def run(context: Context) -> dict[str, Any]:
  """The stage: writes the dataset, the vocabulary, where each row came from, and what was dropped.

  Raises:
    UserError: the pool is empty, or holds less than one row; bad sources, input, tasks or vocabulary.
  """
  from dsdm_jax.data.pool import build, pretokenized

  if pretokenized.wanted(context.config.pool):
    return pretokenized.run(context)
  return build.run(context)


class Documents(Sequence[dict[str, Any]]):
  """{"id", "source", "bytes", "tokens"} of every document, in the order in which they were joined.

  Lies in Parquet files in the order in which documents were read; `order` says which stands where. Small tables are
  read once; of large ones a lookup reads the few thousand documents around the one that is asked for.
  """

  def __init__(self, folder: Path):
    import pyarrow.parquet as pq

    self._files = [pq.ParquetFile(path) for path in sorted((folder / 'documents').glob('*.parquet'))]
    counts = [f.metadata.row_group(g).num_rows for f in self._files for g in range(f.metadata.num_row_groups)]
    self._groups = [(f, g) for f in self._files for g in range(f.metadata.num_row_groups)]
    self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    self._order = np.load(folder / 'rows' / 'order.npy', mmap_mode='r')
    kept = None if len(self) <= _RESIDENT_DOCUMENTS else 16
    self._group = functools.lru_cache(maxsize=kept)(self._read_group)

  def __len__(self) -> int:
    return len(self._order)

  def _read_group(self, group: int) -> list[dict[str, Any]]:
    file, index = self._groups[group]
    return file.read_row_group(index).to_pylist()

  @overload
  def __getitem__(self, index: int) -> dict[str, Any]: ...
  @overload
  def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
  def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    number = int(self._order[index])
    group = int(np.searchsorted(self._first, number, side='right')) - 1
    return self._group(group)[number - int(self._first[group])]

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return (self[index] for index in range(len(self)))


class Pool:
  """A finished pool, read by row.

  Args:
    artifact: the artifact of the pool stage, its folder in the workdir, or a folder of the same files.
  """

  def __init__(self, artifact: Artifact | str | os.PathLike):
    if not isinstance(artifact, Artifact):
      folder = Path(artifact)
      artifact = artifacts.open_folder(folder) or Artifact(folder, {})
    self.path = artifact.path
    self.card: dict[str, Any] = json.loads((self.path / 'card.json').read_text())
    self.num_rows: int = self.card['rows']
    self.length: int = self.card['length']
    self.vocab_size: int = self.card['vocab_size']
    self._files = artifact.manifest.get('files')

  @functools.cached_property
  def _reader(self) -> Any:
    import tensorflow_datasets as tfds  # which reads rows without TensorFlow, as a test holds

    return tfds.builder_from_directory(str(self.path / 'dataset')).as_data_source(split='train')

  def _read(self, row_B: np.ndarray) -> np.ndarray:
    return np.stack([record['tokens'] for record in self._reader.__getitems__(row_B.tolist())])

  @functools.cached_property
  def _resident_NL(self) -> np.ndarray | None:
    # Parsing costs 25 µs a row, and an arm reads each of its rows several times.
    itemsize = encoders.dtype_of(self.vocab_size).itemsize
    if self.num_rows * self.length * itemsize > _RESIDENT_BYTES:
      return None
    block = 1_024
    starts = range(0, self.num_rows, block)
    return np.concatenate([self._read(np.arange(i, min(i + block, self.num_rows))) for i in starts])

  def _origin(self, name: str) -> np.ndarray:
    return np.load(self.path / 'rows' / f'{name}.npy', mmap_mode='r')

  @functools.cached_property
  def sources(self) -> list[str]:
    """Names of the sources; `source_N` indexes them."""
    return json.loads((self.path / 'sources.json').read_text())

  @functools.cached_property
  def source_N(self) -> np.ndarray:
    """int8 or int16: the source that gave most of the row's tokens. Mapped from its file, as the next three."""
    return self._origin('source')

  @functools.cached_property
  def document_N(self) -> np.ndarray:
    """int32 or int64: index into `documents` of the one that holds the row's first token."""
    return self._origin('document')

  @functools.cached_property
  def offset_N(self) -> np.ndarray:
    """int32: place of the row's first token inside its document."""
    return self._origin('offset')

  @functools.cached_property
  def planted_N(self) -> np.ndarray:
    """int32: index into `planted` of the target example that fills the row, −1 elsewhere."""
    return self._origin('planted')

  @functools.cached_property
  def planted(self) -> list[dict[str, Any]]:
    """Planted target examples: {"task", "index", "id"}, the index into the task's target split."""
    return json.loads((self.path / 'planted.json').read_text())

  @functools.cached_property
  def documents(self) -> Documents:
    """{"id", "source", "bytes", "tokens"} of every document, in the order in which they were joined."""
    return Documents(self.path)

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of what was in the folder when it was opened; a folder without a manifest is read for it."""
    files = artifacts.checksums(self.path) if self._files is None else self._files
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

  @functools.cached_property
  def encoder(self) -> encoders.Encoder:
    return encoders.open_encoder(self.path)

  @functools.cached_property
  def vocabulary(self) -> 'seqio.Vocabulary':
    """The vocabulary for seqio; imports TensorFlow. `encoder` gives the same ids without."""
    return encoders.seqio_vocabulary(str(self.path))

  def tokens(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Tokens of `rows` in their order, repeats allowed: int32 [B, L].

    Raises:
      IndexError: a row is not in [0, num_rows).
    """
    row_B = np.asarray(rows, np.int64)
    if not len(row_B):
      return np.empty((0, self.length), np.int32)
    if row_B.min() < 0 or row_B.max() >= self.num_rows:
      raise IndexError(f'rows {row_B.min()} to {row_B.max()} of a pool of {self.num_rows}')
    if self._resident_NL is not None:
      return self._resident_NL[row_B].astype(np.int32)
    return self._read(row_B).astype(np.int32)

  def text(self, row: int) -> str:
    """Text of a row, `END_OF_DOCUMENT` where a document ends; a character cut at the edge shows as U+FFFD."""
    tokens_L = self.tokens([row])[0]
    parts = np.split(tokens_L, np.flatnonzero(tokens_L == self.encoder.eos))
    # All parts but the first begin with their end mark, which decodes to nothing.
    return END_OF_DOCUMENT.join(self.encoder.decode(part) for part in parts)

"""A finished pool on disk: N rows of exactly L tokens in a TFDS dataset, addressed by row, and its documents.

`tfds.builder_from_directory(folder).as_data_source('train')[row]['tokens']` reads a row without this package.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.data.pool import vocabulary as vocabulary_lib
from dsdm_jax.data.pool.spans import Spans
from dsdm_jax.errors import UserError, as_os_error, visible

if TYPE_CHECKING:
  import pyarrow
  import seqio

END_OF_DOCUMENT = '\n␄\n'  # replaces the end mark in the text of a row
SHARD_ROWS = 16_384
_RESIDENT_BYTES = 16 * 2**20  # the tokens of a pool up to this size are read once and stay in memory
_OPEN_SHARDS = 256  # at most; a pool of 217M rows has 13,000
_OPEN_AT_ONCE = 16  # shards that are read at the same time
_RESIDENT_DOCUMENTS = 2**20  # likewise a table of up to so many documents


class Documents(Sequence[dict[str, Any]]):
  """Records of the documents in the pool, in the order in which documents were joined.

  The Parquet files have the order in which documents were read, and also those that were lost, with the reason as their
  `status`; `rows/order.npy` maps a document to its record. Small tables are read once; a lookup in a large one reads a
  group of a few thousand documents.

  A record has id, source, status ('kept' or a key of `lost` in the card), file (label of its file; '' for none), number
  (line or row in the file, from 1), begin and end (its bytes in the decompressed file, or None), bytes, characters and
  tokens. The files also have the text of each document that is in the pool.
  """

  def __init__(self, folder: Location, files: Iterable[str] | None = None):
    names = storage.files(folder) if files is None else files  # a folder may hold more than its manifest lists
    tables = sorted(name for name in names if name.startswith('documents/') and name.endswith('.parquet'))
    self._files = [storage.open_parquet(folder / name) for name in tables]
    counts = [f.metadata.row_group(g).num_rows for f in self._files for g in range(f.metadata.num_row_groups)]
    self._groups = [(f, g) for f in self._files for g in range(f.metadata.num_row_groups)]
    self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    self._order = storage.mapped(folder / 'rows' / 'order.npy')
    cached = None if len(self) <= _RESIDENT_DOCUMENTS else 16
    self._group = functools.lru_cache(maxsize=cached)(self._read_group)

  def __len__(self) -> int:
    return len(self._order)

  def _read_group(self, group: int) -> list[dict[str, Any]]:
    file, index = self._groups[group]
    return file.read_row_group(index, _without_text(file)).to_pylist()

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

  @property
  def records(self) -> int:
    """Number of all records, also of documents that are not in the pool."""
    return int(self._first[-1])

  @property
  def tokens_D(self) -> np.ndarray:
    """Number of tokens of each document, with its begin mark and without its end mark: int64 [D]."""
    return self.column('tokens')

  def column(self, name: str) -> np.ndarray:
    """One field of all documents: [D]."""
    values = [file.read(columns=[name])[name].to_numpy() for file in self._files]
    return np.concatenate(values)[self._order]

  def read(self, columns: Sequence[str] | None = None) -> Iterator[tuple[np.ndarray, 'pyarrow.Table']]:
    """Groups of all records in the order in which they were read, with the index of each record's document.

    The index is -1 for a record that is not in the pool. Without `columns` all are read but the text.
    """
    document_R = np.full(int(self._first[-1]), -1, np.int64)
    document_R[self._order] = np.arange(len(self))
    for number, (file, group) in enumerate(self._groups):
      mine = document_R[self._first[number] : self._first[number + 1]]
      yield mine, file.read_row_group(group, columns or _without_text(file))


def _without_text(table: Any) -> list[str]:
  return [name for name in table.schema_arrow.names if name != 'text']


class Pool:
  """A finished pool, read by row.

  Args:
    artifact: the artifact of the pool stage, its folder in the workdir, or a folder of the same files.

  Raises:
    UserError: the folder is a finished pool and one of its files is damaged; or it has a vocabulary that its manifest
      does not list.
  """

  def __init__(self, artifact: Artifact | Location | str | os.PathLike):
    if not isinstance(artifact, Artifact):
      folder = storage.locate(artifact)
      artifact = artifacts.open_folder(folder) or Artifact(folder, {})
      if artifact.manifest:
        artifact.verify()
    self.path = artifact.path
    self.card: dict[str, Any] = storage.read_json(self.path / 'card.json', dict)
    self.num_rows, self.length, self.vocab_size = (self.card[key] for key in ('rows', 'length', 'vocab_size'))
    if not all(type(value) is int and 0 < value < 2**40 for value in (self.num_rows, self.length, self.vocab_size)):
      raise UserError(f'{self.path}/card.json has a size that is no size; rerun the pool stage')
    self.packed = self.card.get('packed', True)  # whether a row may hold several documents
    self._files = artifact.manifest.get('files')
    for name in vocabulary_lib.FILES:
      if self._files is not None and name not in self._files and storage.is_file(self.path / name):
        raise UserError(f'{self.path / name} is a vocabulary that the manifest of the pool does not list; delete it')

  @functools.cached_property
  def _shards(self) -> tuple[list[Location], np.ndarray]:
    """The files of the dataset, and the number of the first row of each, with N at the end."""
    # Not by TFDS, which imports the module of the class that `features.json` names.
    folder = self.path / 'dataset'
    try:
      [split] = json.loads(storage.read_bytes(folder / 'dataset_info.json') or b'')['splits']
      counts = [int(count) for count in split['shardLengths']]
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'{folder}/dataset_info.json is damaged ({error!r}); rerun the pool stage') from error
    names = [name for name in storage.files(folder) if name.startswith('pool-train.array_record-')]
    if len(names) != len(counts) or sum(counts) != self.num_rows:
      raise UserError(
        f'{folder} has {len(names)} files of {sum(counts)} rows and not {len(counts)} of {self.num_rows}; rerun the '
        'pool stage'
      )
    return [folder / name for name in names], np.cumsum([0, *counts])

  @functools.cached_property
  def _readers(self) -> Callable[[int], Any]:
    """Shard → its reader. The number of open files is bounded. From an object store, a file that is read is copied."""
    from array_record.python import array_record_module

    # Rows are read one by one, in any order: nothing is read ahead.
    options = {'options': 'readahead_buffer_size:0', 'file_reader_buffer_size': 32_768}
    paths, _ = self._shards

    @functools.lru_cache(maxsize=_OPEN_SHARDS)
    def reader(shard: int) -> Any:
      return array_record_module.ArrayRecordReader(str(storage.local(paths[shard])), **options)

    return reader

  @functools.cached_property
  def _threads(self) -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(_OPEN_AT_ONCE, 'pool')

  def _records(self, row_B: np.ndarray) -> list[bytes]:
    first_S = self._shards[1]
    shard_B = np.searchsorted(first_S, row_B, side='right') - 1
    shards, at_B = np.unique(shard_B, return_inverse=True)

    def read(shard: int) -> list[bytes]:
      return self._readers(shard).read((row_B[shard_B == shard] - first_S[shard]).tolist())

    parts = map(read, shards.tolist()) if len(shards) == 1 else self._threads.map(read, shards.tolist())
    by_shard = [iter(part) for part in parts]
    return [next(by_shard[at]) for at in at_B.tolist()]

  def _read(self, row_B: np.ndarray) -> np.ndarray:
    # A record is a head of the same length in all rows, and the row.
    dtype = vocabulary_lib.dtype_of(self.vocab_size)
    size = self.length * dtype.itemsize
    try:
      records = self._records(row_B)
    except RuntimeError as error:
      raise as_os_error(error, str(self.path)) or error from error
    if any(len(record) < size for record in records):
      raise UserError(f'{self.path}/dataset has rows of another length than card.json says; rerun the pool stage')
    return np.stack([np.frombuffer(record[-size:], dtype) for record in records])

  @functools.cached_property
  def _resident_NL(self) -> np.ndarray | None:
    # Parsing takes 25 µs a row, and an arm reads each of its rows several times.
    itemsize = vocabulary_lib.dtype_of(self.vocab_size).itemsize
    if self.num_rows * self.length * itemsize > _RESIDENT_BYTES:
      return None
    block = 1_024
    starts = range(0, self.num_rows, block)
    return np.concatenate([self._read(np.arange(i, min(i + block, self.num_rows))) for i in starts])

  def _origin(self, name: str) -> np.ndarray:
    return storage.mapped(self.path / 'rows' / f'{name}.npy')

  @functools.cached_property
  def sources(self) -> list[str]:
    """Names of the sources; `source_N` indexes them."""
    return storage.read_json(self.path / 'sources.json', list)

  @functools.cached_property
  def source_N(self) -> np.ndarray:
    """int8 or int16: the source of most of the row's tokens. Memory-mapped, as the next three."""
    return self._origin('source')

  @functools.cached_property
  def document_N(self) -> np.ndarray:
    """int32 or int64: index into `documents` of the document with the row's first token."""
    return self._origin('document')

  @functools.cached_property
  def offset_N(self) -> np.ndarray:
    """int32: position of the row's first token in its document."""
    return self._origin('offset')

  @functools.cached_property
  def planted_N(self) -> np.ndarray:
    """int32: index into `planted` of the target example that fills the row, −1 elsewhere."""
    return self._origin('planted')

  @property
  def counts_some(self) -> bool:
    """Whether the loss is on some tokens alone: completions, or all but padding."""
    return self._counted_NC is not None

  @functools.cached_property
  def counted_N(self) -> np.ndarray:
    """Whether the loss counts a token of the row, bool [N]: not where a long prompt fills it."""
    if self._counted_NC is None:
      return np.ones(self.num_rows, bool)
    return ((self._counted_NC[:, 0] & 0x7F) > 0) | self._counted_NC[:, 1:].any(axis=1)  # nothing predicts the first

  @functools.cached_property
  def _counted_NC(self) -> np.ndarray | None:
    return self._origin('counted') if storage.is_file(self.path / 'rows' / 'counted.npy') else None

  @functools.cached_property
  def planted(self) -> list[dict[str, Any]]:
    """Planted target examples: {"task", "index", "id"}, the index into the task's target split."""
    return storage.read_json(self.path / 'planted.json', list)

  @functools.cached_property
  def documents(self) -> Documents:
    """Records of the documents of the pool, in the order in which they were joined."""
    return Documents(self.path, self._files)

  @functools.cached_property
  def spans(self) -> Spans:
    """The tokens of each document among the rows."""
    size_D = self.documents.tokens_D + self.card['end_marks']
    return Spans(size_D, self, len(self.planted), packed=self.packed)

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of the folder's files: of its manifest when it was opened, or of the files if it has none."""
    files = artifacts.checksums(self.path) if self._files is None else self._files
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

  @functools.cached_property
  def encoder(self) -> vocabulary_lib.Encoder:
    return vocabulary_lib.open_encoder(self.path)

  @functools.cached_property
  def vocabulary(self) -> 'seqio.Vocabulary':
    """The vocabulary for seqio; imports TensorFlow. `encoder` gives the same ids without it."""
    return vocabulary_lib.seqio_vocabulary(self.path)

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

  def weights(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """1 for tokens that the loss counts, else 0: float32 [B, L]. Nothing predicts the first of a row: 0."""
    weights_BL = self._counted(rows)
    weights_BL[:, :1] = 0
    return weights_BL

  def _counted(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    row_B = np.asarray(rows, np.int64)
    weights_BL = np.ones((len(row_B), self.length), np.float32)
    if self._counted_NC is not None:  # a bit for each token
      weights_BL[:] = np.unpackbits(self._counted_NC[row_B], axis=1, count=self.length)
    return weights_BL

  def sizes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Tokens of each row before its padding, end marks included: int64 [B]."""
    row_B = np.asarray(rows, np.int64)
    if self.packed:
      return np.full(len(row_B), self.length)
    size_B = self._tokens_D[self.document_N[row_B]] + self.card['end_marks']
    return np.where(self.planted_N[row_B] < 0, np.minimum(size_B, self.length), self.length)

  @functools.cached_property
  def _tokens_D(self) -> np.ndarray:
    return self.documents.tokens_D

  def texts(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Tokens of each row without its padding."""
    return [tokens_L[:size] for tokens_L, size in zip(self.tokens(rows), self.sizes(rows), strict=True)]

  def document_tokens(self, documents: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Tokens of documents, as far as they are in rows, each with its end mark."""
    return self._by_document(documents, self.tokens)

  def document_weights(self, documents: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """`weights` of the tokens that `document_tokens` returns."""
    return self._by_document(documents, self.weights)

  def document_counted(self, documents: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """The same, where the first token of a row counts too: what precedes it in its document predicts it."""
    return self._by_document(documents, self._counted)

  def _by_document(
    self, documents: Sequence[int] | np.ndarray, read_rows: Callable[[np.ndarray], np.ndarray]
  ) -> list[np.ndarray]:
    spans, document_M = self.spans, np.asarray(documents, np.int64)
    place_R, row_R = spans.rows_of(document_M)
    read, at_R = np.unique(row_R, return_inverse=True)
    value_BL = read_rows(read)
    first_M = np.searchsorted(place_R, np.arange(len(document_M)))
    size_M = spans.own_D[document_M]
    result = []
    for first, begin, size in zip(first_M, spans.begin_D[document_M], size_M, strict=True):
      offset = begin % self.length
      rows = at_R[first : first - (-(offset + size) // self.length)] if size else at_R[:0]
      result.append(value_BL[rows].ravel()[offset : offset + size])
    return result

  def text(self, row: int) -> str:
    """Text of a row, `END_OF_DOCUMENT` where a document ends; a character cut at the edge becomes U+FFFD."""
    tokens_L = self.tokens([row])[0]
    if not self.packed and self.planted_N[row] < 0:  # the end of the row is padding
      tokens_L = tokens_L[: self.documents[int(self.document_N[row])]['tokens']]
    return self.text_of(tokens_L)

  def text_of(self, tokens_L: np.ndarray, one: bool = False) -> str:
    """Text of tokens, `END_OF_DOCUMENT` where a document ends; of `one` document, with marks inside as text."""
    encoder = self.encoder
    written = dict.fromkeys((encoder.begin, encoder.eos), END_OF_DOCUMENT)
    if one:  # marks inside are of a chat template
      written = {encoder.begin: getattr(encoder, 'begin_piece', ''), encoder.eos: getattr(encoder, 'end', '')}
    if encoder.begin != encoder.eos:  # the first begin mark, and one after an end mark, end no document
      first_L = tokens_L == encoder.begin
      first_L[1:] &= (tokens_L[:-1] == encoder.eos) & (not one)
      tokens_L = tokens_L[~first_L]
    first, *parts = np.split(tokens_L, np.flatnonzero(np.isin(tokens_L, [*written])))
    return encoder.decode(first) + ''.join(written[part[0]] + encoder.decode(part[1:]) for part in parts)


class PoolRows:
  """A part of a pool: `rows` in their order, with indices from 0. None takes all rows."""

  def __init__(self, pool: Pool, rows: np.ndarray | None = None):
    self._pool, self._rows = pool, rows
    self.num_rows = pool.num_rows if rows is None else len(rows)
    self.length, self.counts_some = pool.length, pool.counts_some

  def _at(self, rows: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
    return rows if self._rows is None else self._rows[np.asarray(rows, np.int64)]

  def tokens(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """As `Pool.tokens`."""
    return self._pool.tokens(self._at(rows))

  def weights(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """As `Pool.weights`."""
    return self._pool.weights(self._at(rows))


def prefiltered_rows(artifact: Artifact | None) -> np.ndarray | None:
  """The rows that the stage `prefilter` keeps, int64, ascending; None in a run without it: all."""
  return None if artifact is None else storage.load(artifact.path / 'rows.npy')


def _dataset_info(folder: Path, length: int, dtype: np.dtype) -> Any:
  """TFDS's description of the dataset in `folder`: one ordered split 'train'."""
  import tensorflow_datasets as tfds  # without TensorFlow, which takes seconds to start

  features = tfds.features.FeaturesDict(
    {'tokens': tfds.features.Tensor(shape=(length,), dtype=dtype.type, encoding='bytes')}
  )
  identity = tfds.core.dataset_info.DatasetIdentity(
    name='pool', version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name='dsdm_jax.data.pool.pool'
  )
  return tfds.core.DatasetInfo(
    builder=identity,
    description='Rows of tokens of a candidate pool; an id is a row.',
    features=features,
    # Otherwise TFDS shuffles by hashes of keys, and rows would not be ids.
    disable_shuffling=True,
  )


def _record_head(dataset_info: Any, length: int, dtype: np.dtype) -> bytes:
  """The bytes that TFDS writes before those of a row; the same for all rows, since they have one length.

  Raises:
    RuntimeError: this version of TFDS writes another format.
  """
  from tensorflow_datasets.core import example_serializer

  features = dataset_info.features
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  heads = set()
  for value in (0, np.iinfo(dtype).max):
    row = np.full(length, value, dtype)
    record = serializer.serialize_example(features.encode_example({'tokens': row}))
    if not record.endswith(row.tobytes()):
      raise RuntimeError('a record of TFDS does not end with the bytes of its row')
    heads.add(record[: -row.nbytes])
  if len(heads) != 1:
    raise RuntimeError('the beginning of a record of TFDS depends on the row')
  return heads.pop()


def write_dataset(
  folder: Path,
  rows: int,
  length: int,
  dtype: np.dtype,
  write_shards: Callable[[Sequence[tuple[str, int, int]], bytes], Sequence[int]],
) -> None:
  """Writes `rows` rows of `length` tokens as a TFDS dataset in ArrayRecord files, in order; replaces `folder`.

  Tokens are stored as raw little-endian bytes: parsing a list of integers would take longer than reading it.

  Args:
    folder: of the dataset.
    rows: N.
    length: L.
    dtype: of the tokens.
    write_shards: gets (file, first row, end row) of each shard and the bytes before a row in a record; writes the files
      and returns the size of the records of each.
  """
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  dataset_info = _dataset_info(folder, length, dtype)
  from tensorflow_datasets.core import naming, splits

  template = naming.ShardedFileTemplate(
    dataset_name='pool',
    data_dir=folder,
    split='train',
    filetype_suffix='array_record',
    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
  )
  bounds = [(first, min(first + SHARD_ROWS, rows)) for first in range(0, rows, SHARD_ROWS)]
  files = [
    (str(template.sharded_filepath(shard_index=index, num_shards=None)), first, stop)
    for index, (first, stop) in enumerate(bounds)
  ]
  sizes = write_shards(files, _record_head(dataset_info, length, dtype))
  dataset_info.set_file_format('array_record', override=True)
  lengths = [stop - first for first, stop in bounds]
  split = splits.SplitInfo(name='train', shard_lengths=lengths, num_bytes=sum(sizes), filename_template=template)
  dataset_info.set_splits(splits.SplitDict([split]))
  dataset_info.write_to_directory(str(folder))


def write_array(folder: Path, tokens_NL: np.ndarray) -> None:
  """`write_dataset` for rows in memory."""
  from array_record.python import array_record_module

  def write_shards(files: Sequence[tuple[str, int, int]], head: bytes) -> list[int]:
    for path, first, stop in files:
      writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
      for row_L in tokens_NL[first:stop]:
        writer.write(head + row_L.tobytes())
      writer.close()
    return [(stop - first) * (len(head) + tokens_NL[0].nbytes) for _, first, stop in files]

  write_dataset(folder, len(tokens_NL), tokens_NL.shape[1], tokens_NL.dtype, write_shards)


def log_card(context: Context, card: dict[str, Any], seconds: float) -> None:
  """Logs the card of a new pool as an event, and prints it."""
  rate = card['bytes'] / seconds / 1e6
  context.log.event('pool', **card, seconds=round(seconds, 3), megabytes_per_second=round(rate, 3))
  lost = [
    f'{of["documents"]:,} {name.replace("_", " ")} ({of["bytes"] / 1e6:,.2f} MB)'
    for name, of in card['lost'].items()
    if of['documents']
  ]
  context.log.say(
    f'  {card["rows"]:,} rows of {card["length"]} tokens from {card["documents"]:,} documents '
    f'({card["bytes"] / 1e6:,.1f} MB, {card["tokens"]:,} tokens, {card["bytes_per_token"]:.2f} bytes a token)\n'
    f'  of {card["read"]["documents"]:,} documents read ({card["read"]["bytes"] / 1e6:,.2f} MB); lost: '
    f'{", ".join([*lost, str(card["unfilled_row"]) + " tokens after the last full row"])}; '
    f'{seconds:.1f} s, {rate:.1f} MB/s'
  )
  if 'vocabulary' in card:
    v = card['vocabulary']
    context.log.say(
      f'  vocabulary: {v["unchanged"]:.1%} of {v["documents"]:,} sampled documents come back unchanged, '
      f'{v["unknown"]:.2%} of their pieces are unknown text'
      + (f'; it loses {", ".join(v["loses"])}' if v['loses'] else '')
    )
  for name, s in sorted(card['sources'].items(), key=lambda item: -item[1]['rows'])[:20]:
    context.log.say(
      f'  {visible(name):32} {s["documents"]:>12,} documents {s["bytes"] / 1e6:>12,.2f} MB {s["rows"]:>12,} rows'
    )

"""The pool stage and the pool as others see it: N rows of exactly L tokens, addressed by row.

Sources → leakage guard → vocabulary → tokens → rows → a TFDS dataset in ArrayRecord files. The same documents and
settings give the same bytes. The pool is built in memory: about five bytes of RAM for each byte of text.
"""

import collections
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdm_jax.core import atomic, prng
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.errors import UserError
from dsdm_jax.core.stage import Context
from dsdm_jax.data import leakage, sources, targets, tasks, vocabulary
from dsdm_jax.data import rows as rows_lib
from dsdm_jax.data.documents import Document, Duplicates

if TYPE_CHECKING:
  import seqio

PLANTED = 'planted'  # the source that planted target examples are counted under
END_OF_DOCUMENT = '\n␄\n'  # stands for the end mark in the text of a row
_SHARD_ROWS = 16_384
_RESIDENT_BYTES = 16 * 2**20  # a pool of no more tokens than this is read once and kept in memory


def run(context: Context) -> dict[str, Any]:
  """The stage: writes the dataset, the vocabulary, where each row came from, and what was dropped.

  Raises:
    UserError: the pool is empty, or holds less than one row; bad sources, tasks or vocabulary size.
  """
  config, out = context.config, context.out
  pool_config = config.pool
  duplicates = Duplicates()
  found = [d for d in sources.documents(pool_config, config.seed) if not duplicates(d.text)]
  documents, boilerplate = found, 0
  leaks: list[leakage.Leak] = []
  if pool_config.leakage_guard:
    documents, leaks, boilerplate = leakage.sift(found, tasks.raw_texts(config.targets), pool_config.leakage_ngram)
  if not documents:
    raise UserError(
      f'the pool is empty: pool.source {pool_config.source!r} with pool.kinds {tuple(pool_config.kinds)} gave '
      f'{len(found)} documents and the leakage guard dropped {len(leaks)}; take other kinds or raise pool.max_bytes'
    )
  order = prng.numpy_stream(config.seed, 'pool', 'documents').permutation(len(documents))
  documents = [documents[i] for i in order]

  model = vocabulary.train([d.text for d in documents], pool_config.vocab_size, config.seed)
  atomic.write_bytes(out / 'vocabulary.model', model)
  encoder = vocabulary.Encoder(model)
  ids = [encoder.encode(d.text) for d in context.log.bar(documents, desc='tokens', unit='documents')]

  names = sorted({d.source for d in documents})
  dtype = np.dtype(np.uint16 if encoder.size < 65_536 else np.int32)
  rows = rows_lib.cut(ids, [names.index(d.source) for d in documents], pool_config.length, dtype)
  if not len(rows.tokens_NL):
    raise UserError(
      f'the pool is empty: its {sum(map(len, ids))} tokens do not fill one row of pool.length {pool_config.length}; '
      'raise pool.max_bytes or lower pool.length'
    )
  rows = rows_lib.shuffle(rows, prng.numpy_stream(config.seed, 'pool', 'rows'))
  planted: list[dict[str, Any]] = []
  entries = [_entry(d, len(i)) for d, i in zip(documents, ids, strict=True)]
  if pool_config.plant_targets:
    names.append(PLANTED)
    rows, planted = _plant(config, encoder, rows, entries, names.index(PLANTED))

  write_dataset(out / 'dataset', rows.tokens_NL)
  atomic.save_npz(
    out / 'rows.npz',
    document_N=rows.document_N,
    offset_N=rows.offset_N,
    source_N=rows.source_N,
    planted_N=rows.planted_N,
    sources=np.array(names),
  )
  _write_jsonl(out / 'documents.jsonl', entries)
  _write_jsonl(out / 'dropped.jsonl', [{'id': k.id, 'task': k.task, 'words': k.words} for k in leaks])
  atomic.write_json(out / 'planted.json', planted)
  card = _card(rows, names, entries, encoder.size) | {
    'dropped_for_leakage': len(leaks),
    'dropped_by_task': dict(collections.Counter(leak.task for leak in leaks)),
    'boilerplate_runs': boilerplate,
    'exact_duplicates': duplicates.count,
  }
  atomic.write_json(out / 'card.json', card)
  context.log.event('pool', **card)
  return {
    'rows': card['rows'],
    'length': card['length'],
    'vocab_size': card['vocab_size'],
    'special_ids': {'pad': vocabulary.PAD, 'eos': vocabulary.EOS, 'unk': vocabulary.UNK},
    'row_order': 'an id is the row of the dataset; documents in a seeded order are joined, cut, and the rows shuffled',
  }


def _entry(document: Document, tokens: int) -> dict[str, Any]:
  return {
    'id': document.id,
    'source': document.source,
    'bytes': len(document.text.encode()),
    'tokens': tokens,
  }


def _plant(
  config: Any, encoder: vocabulary.Encoder, rows: rows_lib.Rows, entries: list[dict[str, Any]], source: int
) -> tuple[rows_lib.Rows, list[dict[str, Any]]]:
  """Appends the first target-split examples of each task as rows and as document entries."""
  count = config.pool.plant_targets
  examples, _ = targets.build(config.targets, encoder.encode, config.pool.length, most=count)
  planted, sequences = [], []
  first = len(entries)
  for (task, split), made in examples.items():
    if split != 'target':
      continue
    for index in range(len(made)):
      ids = made.tokens_TL[index][: int(np.flatnonzero(made.weights_TL[index])[-1]) + 1]
      record = made.records[index]
      planted.append({'task': task, 'index': index, 'id': record['id']})
      sequences.append(ids)
      document = Document(f'{PLANTED}/{task}/{record["id"]}', PLANTED, encoder.decode(ids))
      entries.append(_entry(document, len(ids)))
  return rows_lib.plant(rows, sequences, first, source), planted


def _card(rows: rows_lib.Rows, names: list[str], entries: list[dict[str, Any]], vocab_size: int) -> dict[str, Any]:
  total_bytes, total_tokens = (sum(entry[key] for entry in entries) for key in ('bytes', 'tokens'))
  per_source = {
    name: {
      'documents': sum(entry['source'] == name for entry in entries),
      'bytes': sum(entry['bytes'] for entry in entries if entry['source'] == name),
      'rows': int((rows.source_N == index).sum()),
    }
    for index, name in enumerate(names)
  }
  return {
    'rows': len(rows.tokens_NL),
    'length': rows.tokens_NL.shape[1],
    'vocab_size': vocab_size,
    'documents': len(entries),
    'bytes': total_bytes,
    'tokens': total_tokens,
    'bytes_per_token': round(total_bytes / total_tokens, 4),
    'sources': per_source,
    'planted': int((rows.planted_N >= 0).sum()),
  }


def _write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
  atomic.write_bytes(path, ''.join(json.dumps(r, sort_keys=True) + '\n' for r in records).encode())


def write_dataset(folder: Path, tokens_NL: np.ndarray) -> None:
  """A TFDS dataset of one split 'train' in row order, over what an earlier attempt left.

  `tfds.builder_from_directory(folder).as_data_source('train')[row]['tokens']` reads a row. Tokens are stored as raw
  little-endian bytes: parsing a list of integers would cost more than reading it.
  """
  import tensorflow_datasets as tfds

  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  dtype, length = tokens_NL.dtype, tokens_NL.shape[1]
  features = tfds.features.FeaturesDict(
    {'tokens': tfds.features.Tensor(shape=(length,), dtype=dtype.type, encoding='bytes')}
  )
  identity = tfds.core.dataset_info.DatasetIdentity(
    name='pool', version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name='dsdm_jax.data.pool'
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description='Rows of tokens of a candidate pool; an id is a row.',
    features=features,
    # Without it TFDS shuffles by hashes of keys, and rows would not be ids.
    disable_shuffling=True,
  )
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=_SHARD_ROWS, file_format='array_record')
  writer.initialize_splits(['train'])
  for start in range(0, len(tokens_NL), 1_024):
    writer.add_examples({'train': [{'tokens': row} for row in tokens_NL[start : start + 1_024]]})
  writer.close_all()


class Pool:
  """A finished pool, read by row.

  Args:
    artifact: the artifact of the pool stage, or its folder.
  """

  def __init__(self, artifact: Artifact | str | os.PathLike):
    self.path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    self.card: dict[str, Any] = json.loads((self.path / 'card.json').read_text())
    self.num_rows: int = self.card['rows']
    self.length: int = self.card['length']
    self.vocab_size: int = self.card['vocab_size']

  @functools.cached_property
  def _reader(self) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(self.path / 'dataset')).as_data_source(split='train')

  def _read(self, row_B: np.ndarray) -> np.ndarray:
    return np.stack([record['tokens'] for record in self._reader.__getitems__(row_B.tolist())])

  @functools.cached_property
  def _resident_NL(self) -> np.ndarray | None:
    # Parsing costs 25 µs a row, and an arm reads each of its rows several times.
    itemsize = 2 if self.vocab_size < 65_536 else 4
    if self.num_rows * self.length * itemsize > _RESIDENT_BYTES:
      return None
    block = 1_024
    starts = range(0, self.num_rows, block)
    return np.concatenate([self._read(np.arange(i, min(i + block, self.num_rows))) for i in starts])

  @functools.cached_property
  def _origin(self) -> dict[str, np.ndarray]:
    with np.load(self.path / 'rows.npz') as arrays:
      return dict(arrays)

  @property
  def sources(self) -> list[str]:
    """Names of the sources; `source_N` indexes them."""
    return [str(name) for name in self._origin['sources']]

  @property
  def source_N(self) -> np.ndarray:
    """int8: the source that gave most of the row's tokens."""
    return self._origin['source_N']

  @property
  def document_N(self) -> np.ndarray:
    """int32: index into `documents` of the one that holds the row's first token."""
    return self._origin['document_N']

  @property
  def offset_N(self) -> np.ndarray:
    """int32: place of the row's first token inside its document."""
    return self._origin['offset_N']

  @property
  def planted_N(self) -> np.ndarray:
    """int32: index into `planted` of the target example that fills the row, −1 elsewhere."""
    return self._origin['planted_N']

  @functools.cached_property
  def planted(self) -> list[dict[str, Any]]:
    """Planted target examples: {"task", "index", "id"}, the index into the task's target split."""
    return json.loads((self.path / 'planted.json').read_text())

  @functools.cached_property
  def documents(self) -> list[dict[str, Any]]:
    """{"id", "source", "bytes", "tokens"} of every document, in the order in which they were joined."""
    lines = (self.path / 'documents.jsonl').read_bytes().split(b'\n')
    return [json.loads(line) for line in lines if line]

  @functools.cached_property
  def encoder(self) -> vocabulary.Encoder:
    return vocabulary.Encoder(self.path / 'vocabulary.model')

  @property
  def vocabulary(self) -> 'seqio.SentencePieceVocabulary':
    """The vocabulary for seqio; imports TensorFlow. `encoder` gives the same ids without."""
    return vocabulary.load(str(self.path / 'vocabulary.model'))

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
    parts = np.split(tokens_L, np.flatnonzero(tokens_L == vocabulary.EOS))
    # All parts but the first begin with their end mark, which decodes to nothing.
    return END_OF_DOCUMENT.join(self.encoder.decode(part) for part in parts)

"""Reads units of sources: each record becomes a document, or a problem that names the file and line.

Lines end at newline characters only: text with Unicode line separators stays in one piece.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import tensorflow_start
from dsdm_jax.data import files
from dsdm_jax.data.pool.installed_packages import installed_packages
from dsdm_jax.data.pool.sources import Document, Entry, Unit, cut, no_split, tfds_builder
from dsdm_jax.data.targets import tfds_items
from dsdm_jax.errors import UserError

Source = Callable[[ConfigDict, int], Iterator[Document]]
LARGEST = 16 * 2**20  # bytes of UTF-8 in a document; encoding longer ones would take gigabytes
_BATCH = 1_024
_ROWS = 64  # Parquet rows decoded at once: each may hold a long text
_LONGEST_NAME = 1_000  # characters of an id or source


@dataclasses.dataclass(frozen=True)
class Problem:
  """Why a record gives no document: where (file and line) and what is wrong."""

  where: str
  what: str

  def __str__(self) -> str:
    return f'{self.where}: {self.what}'


Record = tuple[str, str, str, str]  # where, id, source, text
Records = Iterator[Record | Problem]


def read(unit: Unit, max_bytes: int = 0) -> Iterator[Document | Problem]:
  """Documents and problems of a unit, in order; documents are cut to `max_bytes` bytes of UTF-8 unless that is 0."""
  return (result for _, result in read_with_places(unit, max_bytes))


def read_with_places(unit: Unit, max_bytes: int = 0) -> Iterator[tuple[str, Document | Problem]]:
  """As `read`, each with its place: file and line."""
  for record in _READERS[unit.entry.kind](unit):
    yield (record.where, record) if isinstance(record, Problem) else (record[0], _document(*record, max_bytes))


def _document(where: str, id: str, source: str, text: str, max_bytes: int) -> Document | Problem:
  try:
    data = text.encode()
  except UnicodeEncodeError as error:
    return Problem(where, f'not valid Unicode (a lone surrogate at character {error.start})')
  try:
    f'{id}{source}'.encode()
  except UnicodeEncodeError:
    return Problem(where, 'not valid Unicode (a lone surrogate in its id or source)')
  for name, value in (('id', id), ('source', source)):
    if len(value) > _LONGEST_NAME:
      return Problem(where, f'{name} has {len(value):,} characters, more than {_LONGEST_NAME:,}')
  if max_bytes and len(data) > max_bytes:
    text = cut(data, max_bytes).decode()
  elif len(data) > LARGEST:
    return Problem(
      where, f'a document of {len(data):,} bytes, more than {LARGEST:,}; set --config.pool.max_document_bytes to cut it'
    )
  if not text.strip():
    return Problem(where, 'a document without text')
  return Document(id, source, text)


def _from_fields(entry: Entry, record: Mapping[str, Any], where: str, place: str) -> Record | Problem:
  text = record.get(entry.text)
  if not isinstance(text, str):
    if entry.text in record:
      return Problem(where, f'field {entry.text!r} is {type(text).__name__}, not text')
    has = ', '.join(sorted(record)) or 'none'
    return Problem(where, f'no field {entry.text!r} among {has}; name it with | text=FIELD')
  source = str(record[entry.source]) if record.get(entry.source) else entry.name
  id = record[entry.id] if record.get(entry.id) is not None else place
  id = str(id) if str(id).startswith(f'{source}/') else f'{source}/{id}'
  return where, id, source, text


def _text(unit: Unit) -> Records:
  for path in unit.paths:
    name = unit.entry.name
    try:
      with files.open_bytes(path) as file:
        # `_document` refuses or cuts what is longer.
        data = cut(file.read(files.LONGEST_LINE + 1), files.LONGEST_LINE)
      yield path, f'{name}/{path}', name, data.decode()
    except UnicodeDecodeError as error:
      yield Problem(path, f'not UTF-8 ({error.reason} at byte {error.start})')
    except files.READ_ERRORS as error:
      yield Problem(path, files.describe(error))


def _jsonl(unit: Unit) -> Records:
  [path] = unit.paths
  number, short = 0, path.rsplit('/', 1)[-1]
  try:
    with files.open_bytes(path) as file:
      for number, line in files.lines(file):
        if not line.strip():
          continue
        where = f'{path}, line {number}'
        try:
          yield _from_fields(unit.entry, files.parse_line(line), where, f'{short}:{number}')
        except files.BadLineError as error:
          yield Problem(where, str(error))
  except files.READ_ERRORS as error:
    yield Problem(path if isinstance(error, FileNotFoundError) else f'{path}, line {number + 1}', files.describe(error))
    return
  if not number:
    yield Problem(path, 'the file is empty')


def _parquet(unit: Unit) -> Records:
  import pyarrow as pa
  import pyarrow.parquet as pq

  [path] = unit.paths
  row = 0
  try:
    with files.open_bytes(path) as file:
      table = pq.ParquetFile(file)
      names = table.schema_arrow.names
      if unit.entry.text not in names:
        yield Problem(path, f'no column {unit.entry.text!r} among {", ".join(names)}; name it with | text=COLUMN')
        return
      columns = [name for name in (unit.entry.text, unit.entry.id, unit.entry.source) if name in names]
      for batch in table.iter_batches(_ROWS, columns=columns):
        for place in range(batch.num_rows):
          record = {name: batch.column(name)[place].as_py() for name in columns}
          row += 1
          yield _from_fields(unit.entry, record, f'{path}, row {row}', f'{path.rsplit("/", 1)[-1]}:{row}')
  except (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
    yield Problem(f'{path}, row {row + 1}', files.describe(error))


def _arrow(unit: Unit) -> Records:
  import pyarrow as pa

  [path] = unit.paths
  row = 0
  try:
    with files.open_bytes(path) as file, pa.ipc.open_stream(file) as stream:
      for batch in stream:
        for record in batch.to_pylist():
          row += 1
          yield _from_fields(unit.entry, record, f'{path}, row {row}', f'{path.rsplit("/", 1)[-1]}:{row}')
  except (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
    yield Problem(f'{path}, row {row + 1}', files.describe(error))


def _tfds(unit: Unit) -> Records:
  entry = unit.entry
  records = tfds_items.records(tfds_builder(entry.target), f'{entry.split}[{unit.first}:{unit.stop}]')
  for row, record in enumerate(records, unit.first):
    yield _tensorflow_record(entry, record, row)


def _tensorflow_record(entry: Entry, record: Mapping[str, Any], row: int) -> Record | Problem:
  where = f'{entry.target}:{entry.split}, row {row}'
  fields = {entry.text, entry.id, entry.source}
  try:
    plain = {key: v.decode() if isinstance(v, bytes) and key in fields else v for key, v in record.items()}
  except UnicodeDecodeError as error:
    return Problem(where, f'not UTF-8 ({error.reason} at byte {error.start})')
  return _from_fields(entry, plain, where, f'{entry.split}:{row}')


def _seqio(entry: Entry) -> Records:
  """Records of a seqio task's source, in its order, before any preprocessor."""
  tensorflow_start.start()
  import importlib

  import seqio

  if entry.module:
    importlib.import_module(entry.module)
  if entry.target not in seqio.TaskRegistry.names():
    raise UserError(
      f'pool.sources: no seqio task {entry.target!r} is registered; name the module that registers it: '
      '| module=my.tasks'
    )
  source = seqio.TaskRegistry.get(entry.target).source
  if entry.split.partition('[')[0] not in source.splits:
    raise no_split(entry, source.splits)
  for row, record in enumerate(source.get_dataset(split=entry.split, shuffle=False).as_numpy_iterator()):
    yield _tensorflow_record(entry, record, row)


def generate(entry: Entry, config: ConfigDict, seed: int) -> Iterator[Document]:
  """Documents of a `sized` source, in an order that depends only on settings and text.

  Args:
    entry: the source; its own cap replaces `config.max_bytes`.
    config: the `pool` part of the config.
    seed: the root seed; sources draw their order from it.

  Raises:
    UserError: the function does not exist.
  """
  if entry.max_bytes:
    config = config.copy_and_resolve_references()
    config.max_bytes = entry.max_bytes
  function: Source = installed_packages
  if entry.kind == 'function':
    function = load_callable(entry.target, 'pool.sources')
  yield from function(config, seed)


def read_generated(entry: Entry, config: ConfigDict, seed: int) -> Records:
  """Records of a `generated` source; arguments and errors as `generate`, or no such seqio task or split."""
  if entry.kind == 'seqio':
    yield from _seqio(entry)
  else:
    for document in generate(entry, config, seed):
      yield document.id, document.id, document.source, document.text


_FIELDS = ('where', 'id', 'source', 'text')


def spill(records: Records, path: str) -> None:
  """Writes the records of a `generated` source to an Arrow file, so that they can be read as a unit."""
  import pyarrow as pa

  schema = pa.schema([(name, pa.string()) for name in (*_FIELDS, 'what')])
  with pa.OSFile(path, 'wb') as file, pa.ipc.new_stream(file, schema) as stream:
    batch: list[dict[str, str]] = []
    for record in records:
      batch.append(
        dataclasses.asdict(record) if isinstance(record, Problem) else dict(zip(_FIELDS, record, strict=True))
      )
      if len(batch) == _BATCH:
        stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        batch = []
    stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _spilled(unit: Unit) -> Records:
  import pyarrow as pa

  with pa.OSFile(unit.paths[0], 'rb') as file, pa.ipc.open_stream(file) as stream:
    for batch in stream:
      for record in batch.to_pylist():
        if record['what'] is None:
          where, id, source, text = (record[name] for name in _FIELDS)
          yield where, id, source, text
        else:
          yield Problem(record['where'], record['what'])


_READERS: Mapping[str, Callable[[Unit], Records]] = {
  **dict.fromkeys(('installed_packages', 'function', 'seqio'), _spilled),
  'text': _text,
  'jsonl': _jsonl,
  'parquet': _parquet,
  'hf': _arrow,
  'tfds': _tfds,
}

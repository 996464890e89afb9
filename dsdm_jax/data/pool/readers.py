"""Reads units of sources: each record becomes a document, or a problem that names the file and line.

Lines end at newline characters only: text with Unicode line separators stays in one piece.
"""

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import tensorflow_start
from dsdm_jax.data import files
from dsdm_jax.data.pool import parquet_footer
from dsdm_jax.data.pool.chat import Spans
from dsdm_jax.data.pool.installed_packages import installed_packages
from dsdm_jax.data.pool.sources import LARGEST, Document, Entry, Unit, cut, no_split, tfds_builder
from dsdm_jax.data.targets import tfds_items
from dsdm_jax.errors import UserError

Source = Callable[[ConfigDict, int], Iterator[Document]]
_BATCH = 1_024
_PIECE = 2**20  # bytes read at once of what is not used
_ROWS = 8  # Parquet rows decoded at once: each may hold a long text
_UNPACKED = 128 * 2**20  # bytes of a column of a row group that may unpack to more than
_EXPANSION = 200  # times its packed size
_MARK = '\ufeff'  # a byte order mark
_LONGEST_NAME = 1_000  # characters of an id or source


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a record is.

  Attributes:
    text: file and line, for messages.
    file: its label, as in ids of documents without one; '' for a source without files.
    number: of the line or row, from 1; 0 if the record is the whole file or there is none.
    begin, end: its bytes in the decompressed file; None if they are not known.
  """

  text: str
  file: str = ''
  number: int = 0
  begin: int | None = None
  end: int | None = None

  def __str__(self) -> str:
    return self.text


@dataclasses.dataclass(frozen=True)
class Problem:
  """Why a record gives no document: where (file and line) and what is wrong, and how many bytes of text are lost.

  `bytes` counts what was read: the text, or the line if it has none; 0 if nothing could be read. `id` and `source` are
  those of the record, as far as they are known.
  """

  where: Place
  what: str
  bytes: int = 0
  id: str = ''
  source: str = ''

  def __str__(self) -> str:
    return f'{self.where}: {self.what}'

  def listed(self) -> dict[str, Any]:
    """The problem as a line of `skipped.jsonl`."""
    return {'where': str(self.where), 'what': self.what, 'bytes': self.bytes}


Record = tuple[Place, Document]  # where, and the whole document as far as it was read
Records = Iterator[Record | Problem]


def read(unit: Unit, max_bytes: int = 0) -> Iterator[Document | Problem]:
  """Documents and problems of a unit, in order; documents are cut to `max_bytes` bytes of UTF-8 unless that is 0."""
  return (result for _, result in read_with_places(unit, max_bytes))


def read_with_places(unit: Unit, max_bytes: int = 0) -> Iterator[tuple[Place, Document | Problem]]:
  """As `read`, each with its place."""
  for record in _READERS[unit.entry.kind](unit):
    yield (record.where, record) if isinstance(record, Problem) else (record[0], _checked(*record, max_bytes))


def _checked(where: Place, document: Document, max_bytes: int) -> Document | Problem:
  """The document, cut to `max_bytes` and without a byte order mark, or what is wrong with it."""
  text, spans, names = document.text, document.spans, (document.id, document.source)
  if text.startswith(_MARK):
    text = text.removeprefix(_MARK)
    spans = spans and tuple((max(0, begin - 1), end - 1) for begin, end in spans)
  try:
    data = text.encode()
  except UnicodeEncodeError as error:
    named = names if all(map(_is_unicode, names)) else ('', '')
    return Problem(where, f'not valid Unicode (a lone surrogate at character {error.start})', 3 * len(text), *named)
  size = len(data) + document.lost
  if not all(map(_is_unicode, names)):
    return Problem(where, 'not valid Unicode (a lone surrogate in its id or source)', size)
  for name, value in (('id', document.id), ('source', document.source)):
    if len(value) > _LONGEST_NAME:
      return Problem(where, f'{name} has {len(value):,} characters, more than {_LONGEST_NAME:,}', size)
  if max_bytes and len(data) > max_bytes:
    data = cut(data, max_bytes)
    text = data.decode()
  elif size > LARGEST and not (max_bytes and document.lost):
    what = f'a document of {size:,} bytes, more than {LARGEST:,}; set --config.pool.max_document_bytes to cut it'
    return Problem(where, what, size, *names)
  if not text.strip():
    return Problem(where, 'a document without text', size, *names)
  lost = size - len(data)
  if lost == document.lost and text is document.text:
    return document
  spans = spans and tuple((begin, min(end, len(text))) for begin, end in spans if begin < len(text))
  return dataclasses.replace(document, text=text, lost=lost, spans=spans)


def _is_unicode(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:  # a lone surrogate
    return False
  return True


def _value(record: Mapping[str, Any], name: str) -> Any:
  """The value of the field `name`, None if there is none; 'meta.id' is also the field 'id' of the record 'meta'."""
  if name in record:
    return record[name]
  for at in (at for at, sign in enumerate(name) if sign == '.') if '.' in name else ():
    inside = record.get(name[:at])
    if isinstance(inside, Mapping) and (value := _value(inside, name[at + 1 :])) is not None:
      return value
  return None


def _name_in(record: Mapping[str, Any], option: str, named: str | None) -> str | None:
  """The id or source of a record; None if it has none and the user named no field.

  Raises:
    ValueError: the field that the user named is not there, or its value is no name.
  """
  field = option if named is None else named
  value = _value(record, field) if field else None
  if value and isinstance(value, str):
    return value
  if isinstance(value, float | np.floating) and np.isnan(value):  # what pandas writes for no value
    value = None
  if value is not None and isinstance(value, (Mapping, list, tuple, np.ndarray)):
    kind = type(value).__name__
    raise ValueError(f'field {field!r} is {kind}, not text or a number; name another with | {option}=FIELD')
  text = '' if value is None else value.decode() if isinstance(value, bytes) else str(value)
  if named and not text:
    raise ValueError(f'{_nothing_in(record, named)}; name another with | {option}=FIELD')
  return text or None


def _nothing_in(record: Mapping[str, Any], field: str) -> str:
  if field in record:
    return f'field {field!r} is empty'
  return f'no field {field!r} among {", ".join(sorted(map(str, record))) or "none"}'


def _from_fields(
  entry: Entry, record: Mapping[str, Any], where: Place, size: int = 0, label: str = ''
) -> Record | Problem:
  """The document of a record; file (or `label`) and number are its id if it has none, `size` counts without text."""
  text = None if entry.messages else _value(record, entry.content[-1][1])
  id = source = ''
  try:
    source = _name_in(record, 'source', entry.source) or entry.name
    id = _name_in(record, 'id', entry.id) or f'{source}/{label or where.file}:{where.number}'
    plain, spans = _content(entry, record)
    return where, Document(id, source, plain, 0, spans, bool(entry.messages))
  except UnicodeDecodeError as error:
    what = f'not UTF-8 ({error.reason} at byte {error.start})'
  except ValueError as error:
    what = str(error)
  if isinstance(text, (str, bytes)):
    size = len(text if isinstance(text, bytes) else text.encode(errors='surrogatepass'))
  named = all(map(_is_unicode, (id, source))) and max(len(id), len(source)) <= _LONGEST_NAME
  return Problem(where, what, size, *((id, source) if named else ('', '')))


def _content(entry: Entry, record: Mapping[str, Any]) -> tuple[str, Spans | None]:
  """The text of a record's document and the spans of it that count.

  Raises:
    ValueError: a field is missing or of another type; `UnicodeDecodeError`, a kind of it, if bytes are not UTF-8.
  """
  parts: list[str] = []
  for option, field in entry.content:
    value = _value(record, field)
    value = value.decode() if isinstance(value, bytes) else value
    if value is None and field not in record:
      raise ValueError(f'{_nothing_in(record, field)}; name it with | {option}=FIELD')
    if option == 'messages':
      assert entry.chat is not None
      try:
        return entry.chat.document(_messages(value))
      except ValueError as error:
        raise ValueError(f'field {field!r}: {error}') from error
    if not isinstance(value, str):
      raise ValueError(f'field {field!r} is {type(value).__name__}, not text')
    if option == 'completion' and not value.strip():
      raise ValueError(f'field {field!r} is empty, and the loss is on it alone')
    parts.append(value)
  text = ''.join(parts)
  return text, ((len(parts[0]), len(text)),) if entry.completion else None


def _messages(value: Any) -> Any:
  """A conversation as a list of messages. TFDS has a list for each of their fields, and bytes in place of text.

  Raises:
    ValueError: these lists have different lengths, or bytes are not UTF-8.
  """
  value = value.tolist() if isinstance(value, np.ndarray) else value
  if not isinstance(value, Mapping) or not all(isinstance(column, list | np.ndarray) for column in value.values()):
    return value
  columns = [[x.decode() if isinstance(x, bytes) else x for x in column] for column in value.values()]
  if len(set(sizes := [len(column) for column in columns])) > 1:
    raise ValueError(f'its fields have lists of {", ".join(map(str, sizes))} messages, which must be equally long')
  return [dict(zip(value, message, strict=True)) for message in zip(*columns, strict=True)]


def _text(unit: Unit) -> Records:
  name = unit.entry.name
  for path, label in zip(unit.paths, unit.labels or unit.paths, strict=True):
    size = 0
    try:
      with files.open_bytes(path) as file:
        data = file.read(LARGEST + 1)
        size = len(data)
        while rest := len(file.read(_PIECE)):
          size += rest
      kept = data if size == len(data) else cut(data, LARGEST)
      # A byte order mark is no text.
      text, where = kept.removeprefix(files.BOM).decode(), Place(path, label, begin=0, end=size)
      yield where, Document(f'{name}/{label}', name, text, size - len(kept))
    except UnicodeDecodeError as error:
      what = f'not UTF-8 ({error.reason} at byte {error.start})'
      yield Problem(Place(path, label), what, size, f'{name}/{label}', name)
    except files.READ_ERRORS as error:
      yield Problem(Place(path, label), files.describe(error), size, f'{name}/{label}', name)


def _jsonl(unit: Unit) -> Records:
  [path] = unit.paths
  [label] = unit.labels or unit.paths
  number, records, end = 0, 0, 0
  try:
    with files.open_bytes(path) as file:
      for number, line, size in files.sized_lines(file):
        begin, end = end, end + size
        if not line.strip():
          continue
        where = Place(f'{path}, line {number}', label, number, begin, end)
        records += 1
        try:
          yield _from_fields(unit.entry, files.parse_line(line), where, size)
        except files.BadLineError as error:
          yield Problem(where, str(error), size)
  except files.READ_ERRORS as error:
    where = Place(path if isinstance(error, FileNotFoundError) else f'{path}, line {number + 1}', label)
    yield Problem(where, files.describe(error))
    return
  if not records:
    yield Problem(Place(path, label), 'the file is empty')


def _parquet(unit: Unit) -> Records:
  import pyarrow as pa
  import pyarrow.parquet as pq

  [path] = unit.paths
  [label] = unit.labels or unit.paths
  row = 0
  try:
    with files.open_bytes(path) as file:
      table = pq.ParquetFile(file, buffer_size=_PIECE)
      columns = _columns(unit.entry, table.schema_arrow)
      if isinstance(columns, str):
        yield Problem(Place(path, label), columns)
        return
      if (group := _swollen(file, columns)) is not None:
        what = f'row group {group} unpacks to more than {_EXPANSION} times its size'
        yield Problem(Place(path, label), what)
        return
      for batch in table.iter_batches(_ROWS, columns=list(columns)):
        for record in _rows(batch):
          row += 1
          yield _from_fields(unit.entry, record, Place(f'{path}, row {row}', label, row))
  except (*files.READ_ERRORS, pa.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
    yield Problem(Place(f'{path}, row {row + 1}', label), files.describe(error))
    return
  if not row:
    yield Problem(Place(path, label), 'the file is empty')


def _columns(entry: Entry, schema: Any) -> dict[str, str] | str:
  """The columns with the fields of an entry → the outermost column of each, or what is wrong with them."""
  import pyarrow as pa

  def column(name: str, within: Any) -> list[str]:
    names = [field.name for field in within]
    if name in names:
      return [name]
    for at, sign in enumerate(name):
      if sign == '.' and name[:at] in names and pa.types.is_struct(inner := within.field(name[:at]).type):
        return [name[:at], *rest] if (rest := column(name[at + 1 :], inner)) else []
    return []

  found = {}
  for option, named in (*entry.content, ('id', entry.id), ('source', entry.source)):
    name = option if named is None else named
    if name and (parts := column(name, schema)):
      found['.'.join(parts)] = parts[0]
    elif named:
      return f'no column {name!r} among {", ".join(schema.names)}; name it with | {option}=COLUMN'
  return found


def _swollen(file: BinaryIO, columns: Mapping[str, str]) -> int | None:
  """The first row group that unpacks to far more than text does: a value of a few KB may have GBs."""
  for number, (_, chunks) in enumerate(parquet_footer.row_groups(file)):
    for chunk in chunks:
      used = any(f'{chunk.path}.'.startswith(f'{name}.') for name in columns)
      if used and chunk.unpacked_bytes > max(_UNPACKED, _EXPANSION * chunk.packed_bytes):
        return number
  return None


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
  """Records of a batch, one at a time: dictionaries of Arrow repeat a long text in few bytes."""
  names, columns = batch.schema.names, batch.columns
  for row in range(batch.num_rows):
    yield {name: column[row].as_py() for name, column in zip(names, columns, strict=True)}


def _arrow(unit: Unit) -> Records:
  import pyarrow as pa

  [path] = unit.paths
  [label] = unit.labels or unit.paths
  row = 0
  try:
    with files.open_bytes(path) as file:
      if _has_packed_buffers(file):
        what = 'its buffers are compressed, so that their size is unknown; write it with save_to_disk'
        yield Problem(Place(path, label), what)
        return
      file.seek(0)
      with pa.ipc.open_stream(file) as stream:
        columns = _columns(unit.entry, stream.schema)
        if isinstance(columns, str):
          yield Problem(Place(path, label), columns)
          return
        for batch in stream:
          used = batch.select(list(dict.fromkeys(columns.values())))
          used.validate(full=True)  # Arrow trusts the offsets in a file
          for record in _rows(used):
            row += 1
            yield _from_fields(unit.entry, record, Place(f'{path}, row {row}', label, row))
      file.seek(-len(_END_OF_STREAM), 2)
      if file.read() != _END_OF_STREAM:  # Arrow takes the end of the file for the end of the stream
        raise EOFError
  except (*files.READ_ERRORS, pa.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
    yield Problem(Place(f'{path}, row {row + 1}', label), files.describe(error))
    return
  if not row:
    yield Problem(Place(path, label), 'the file is empty')


def _has_packed_buffers(file: BinaryIO) -> bool:
  """Whether a message of an Arrow stream has compressed buffers, which Arrow would unpack whole, whatever their size.

  Reads the FlatBuffers table before each message; of a stream that is damaged, only as far as it can be read.
  """

  def number(kind: str, at: int) -> int:
    return struct.unpack_from(f'<{kind}', table, at)[0]

  def field(of: int, index: int) -> int:
    """Place of a field of the table at `of`; 0 if it is not there."""
    fields = of - number('i', of)
    at = 4 + 2 * index
    offset = number('H', fields + at) if at < number('H', fields) else 0
    return of + offset if offset else 0

  while len(head := file.read(8)) == 8:
    marker, size = struct.unpack('<ii', head)
    if marker != -1 or size <= 0:
      return False
    table = file.read(min(size, _PIECE))
    try:
      message = number('I', 0)
      kind, header, length = (field(message, index) for index in (1, 2, 3))
      batch = header + number('I', header)
      if (kind := number('B', kind) if kind else 0) == _DICTIONARY:
        batch = (inner := field(batch, 1)) + number('I', inner)
      if kind in (_DICTIONARY, _RECORDS) and field(batch, 3):
        return True
      file.seek(max(0, size - len(table)) + (number('q', length) if length else 0), 1)
    except (struct.error, OSError, ValueError):
      return False
  return False


_DICTIONARY, _RECORDS = 2, 3  # kinds of messages
_END_OF_STREAM = b'\xff\xff\xff\xff\0\0\0\0'


def _tfds(unit: Unit) -> Records:
  entry, row = unit.entry, unit.first
  try:
    for record in tfds_items.records(tfds_builder(entry.target), f'{entry.split}[{unit.first}:{unit.stop}]'):
      yield _tensorflow_record(entry, record, row, unit.labels)
      row += 1
  except OSError as error:
    yield Problem(Place(f'{entry.target}:{entry.split}, row {row}'), files.describe(error))


def _tensorflow_record(entry: Entry, record: Mapping[str, Any], row: int, labels: tuple[str, ...]) -> Record | Problem:
  [label] = labels or (entry.split,)
  return _from_fields(entry, record, Place(f'{entry.target}:{entry.split}, row {row}', number=row), label=label)


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
  import tensorflow_datasets as tfds

  source = seqio.TaskRegistry.get(entry.target).source
  if entry.split.partition('[')[0] not in source.splits:
    raise no_split(entry, source.splits)
  # By default a TFDS source takes records from 16 files in turn, and row numbers would name other rows than TFDS's.
  seqio.utils.set_tfds_read_config_override(tfds.ReadConfig(interleave_cycle_length=1))
  try:
    for row, record in enumerate(source.get_dataset(split=entry.split, shuffle=False).as_numpy_iterator()):
      yield _tensorflow_record(entry, record, row, ())
  finally:
    seqio.utils.set_tfds_read_config_override(None)


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
    yield from ((Place(document.id), document) for document in generate(entry, config, seed))


def spill(records: Records, path: str) -> None:
  """Writes the records of a `generated` source to an Arrow file, so that they can be read as a unit."""
  import pyarrow as pa

  texts, numbers = ('where', 'file', 'id', 'source', 'text', 'what'), ('number', 'lost', 'bytes')
  more = [('spans', pa.list_(pa.list_(pa.int64(), 2))), ('templated', pa.bool_())]
  schema = pa.schema([(name, pa.string()) for name in texts] + [(name, pa.int64()) for name in numbers] + more)
  with pa.OSFile(path, 'wb') as file, pa.ipc.new_stream(file, schema) as stream:
    batch: list[dict[str, Any]] = []
    for record in records:
      where, found = (record.where, record) if isinstance(record, Problem) else record
      batch.append(dataclasses.asdict(found) | {'where': where.text, 'file': where.file, 'number': where.number})
      if len(batch) == _BATCH:
        stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        batch = []
    stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _spilled(unit: Unit) -> Records:
  import pyarrow as pa

  with pa.OSFile(unit.paths[0], 'rb') as file, pa.ipc.open_stream(file) as stream:
    for batch in stream:
      for record in batch.to_pylist():
        where = Place(record['where'], record['file'], record['number'])
        if record['what'] is None:
          spans = record['spans'] and tuple(map(tuple, record['spans']))
          values = {name: record[name] for name in ('id', 'source', 'text', 'lost')}
          yield where, Document(**values, spans=spans, templated=bool(record['templated']))
        else:
          yield Problem(where, *(record[name] for name in ('what', 'bytes', 'id', 'source')))


_READERS: Mapping[str, Callable[[Unit], Records]] = {
  **dict.fromkeys(('installed_packages', 'function', 'seqio'), _spilled),
  'text': _text,
  'jsonl': _jsonl,
  'parquet': _parquet,
  'hf': _arrow,
  'tfds': _tfds,
}

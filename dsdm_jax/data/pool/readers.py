"""Reads units of sources: each record becomes a document, or a problem that names file and line.

Records of files end at newline characters only: text with Unicode line separators stays whole.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.core import tensorflow_start
from dsdm_jax.data import files, json_lines
from dsdm_jax.data.pool.documents import Document, cut
from dsdm_jax.data.pool.sources import Entry, Unit, generate, is_folder
from dsdm_jax.data.targets import tfds_items
from dsdm_jax.errors import UserError

LARGEST = 16 * 2**20  # bytes of UTF-8 that are encoded at once: more would take gigabytes
_BATCH = 1_024
_ROWS = 64  # of Parquet, decoded at once: each may hold a long text
_NAME = 1_000  # the most characters of an id or source


@dataclasses.dataclass(frozen=True)
class Problem:
  """Why there is no document: where (file and line) and what."""

  where: str
  what: str

  def __str__(self) -> str:
    return f'{self.where}: {self.what}'


Found = Document | Problem


def read(unit: Unit, most: int = 0) -> Iterator[Found]:
  """Documents and problems of a unit, in order.

  Args:
    unit: what to read.
    most: bytes of UTF-8 that a document is cut to, 0 for none.
  """
  return (found for _, found in placed(unit, most))


def placed(unit: Unit, most: int = 0) -> Iterator[tuple[str, Found]]:
  """`read`, each with where it stands: file and line."""
  for found in _READERS[unit.entry.kind](unit):
    yield (found.where, found) if isinstance(found, Problem) else (found[0], _checked(*found, most))


Record = tuple[str, str, str, str]  # where, id, source, text


def _checked(where: str, id: str, source: str, text: str, most: int) -> Found:
  try:
    data = text.encode()
  except UnicodeEncodeError as error:
    return Problem(where, f'not valid Unicode (a lone surrogate at character {error.start})')
  try:
    f'{id}{source}'.encode()
  except UnicodeEncodeError:
    return Problem(where, 'not valid Unicode (a lone surrogate in its id or source)')
  for name, value in (('id', id), ('source', source)):
    if len(value) > _NAME:
      return Problem(where, f'{name} has {len(value):,} characters, above {_NAME:,}')
  if most and len(data) > most:
    text = cut(data, most).decode()
  elif len(data) > LARGEST:
    return Problem(
      where, f'a document of {len(data):,} bytes, above {LARGEST:,}; set --config.pool.max_document_bytes to cut it'
    )
  if not text.strip():
    return Problem(where, 'a document without text')
  return Document(id, source, text)


def _ids(source: str, id: str) -> str:
  return id if id.startswith(f'{source}/') else f'{source}/{id}'


def _from_fields(entry: Entry, record: Mapping[str, Any], where: str, place: str) -> Record | Problem:
  text = record.get(entry.text)
  if not isinstance(text, str):
    if entry.text in record:
      return Problem(where, f'field {entry.text!r} holds {type(text).__name__}, not text')
    has = ', '.join(sorted(record)) or 'none'
    return Problem(where, f'no field {entry.text!r} among {has}; name it in pool.sources: | text=FIELD')
  source = str(record[entry.source]) if record.get(entry.source) else entry.name
  id = record[entry.id] if record.get(entry.id) is not None else place
  return where, _ids(source, str(id)), source, text


def _text(unit: Unit) -> Iterator[Record | Problem]:
  import zstandard

  for path in unit.paths:
    name = unit.entry.name
    try:
      with files.open_bytes(path) as file:
        data = cut(file.read(json_lines.LONGEST + 1), json_lines.LONGEST)  # `_checked` refuses or cuts what is longer
      yield path, f'{name}/{path}', name, data.decode()
    except UnicodeDecodeError as error:
      yield Problem(path, f'not UTF-8 ({error.reason} at byte {error.start})')
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
      yield Problem(path, _broken(error))


def _broken(error: Exception) -> str:
  if isinstance(error, EOFError):
    return 'the file ends in the middle of its packed data; copy it anew'
  said = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:200]
  return f'cannot be read ({said or type(error).__name__})'


def _jsonl(unit: Unit) -> Iterator[Record | Problem]:
  import zstandard

  [path] = unit.paths
  number, short = 0, path.rsplit('/', 1)[-1]
  try:
    with files.open_bytes(path) as file:
      for number, line in json_lines.lines(file):
        if line.strip():
          yield _json_line(unit.entry, line, f'{path}, line {number}', f'{short}:{number}')
  except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
    where = path if isinstance(error, FileNotFoundError) else f'{path}, line {number + 1}'
    yield Problem(where, _broken(error))
    return
  if not number:
    yield Problem(path, 'the file is empty')


def _json_line(entry: Entry, line: bytes, where: str, place: str) -> Record | Problem:
  try:
    return _from_fields(entry, json_lines.parse(line), where, place)
  except json_lines.BadLineError as error:
    return Problem(where, str(error))


def _parquet(unit: Unit) -> Iterator[Record | Problem]:
  import pyarrow as pa
  import pyarrow.parquet as pq

  [path] = unit.paths
  row = 0
  try:
    with files.open_bytes(path) as file:
      table = pq.ParquetFile(file)
      names = table.schema_arrow.names
      if unit.entry.text not in names:
        yield Problem(path, f'no column {unit.entry.text!r} among {", ".join(names)}; name it: | text=COLUMN')
        return
      wanted = [name for name in (unit.entry.text, unit.entry.id, unit.entry.source) if name in names]
      for batch in table.iter_batches(_ROWS, columns=wanted):
        for place in range(batch.num_rows):
          record = {name: batch.column(name)[place].as_py() for name in wanted}
          row += 1
          yield _from_fields(unit.entry, record, f'{path}, row {row}', f'{path.rsplit("/", 1)[-1]}:{row}')
  except (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
    yield Problem(f'{path}, row {row + 1}', _broken(error))


def _arrow(unit: Unit) -> Iterator[Record | Problem]:
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
    yield Problem(f'{path}, row {row + 1}', _broken(error))


def tfds_builder(name: str) -> Any:
  """The builder of a prepared TFDS dataset, by 'dataset/config' or by its folder.

  Raises:
    UserError: there is none.
  """
  tensorflow_start.start()
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(name) if is_folder(name) else tfds.builder(name)
    if builder.is_prepared() or is_folder(name):
      return builder
  except (tfds.core.DatasetNotFoundError, FileNotFoundError, KeyError) as error:
    raise UserError(f'pool.sources: TFDS has no dataset {name} ({" ".join(str(error).split())[:200]})') from error
  raise UserError(
    f'pool.sources: the TFDS dataset {name} is not prepared in {builder.data_dir}; where there is a network run: '
    f'{tfds_items.prepare_command(name)}'
  )


def tfds_records(builder: Any, split: str, first: int, stop: int) -> Iterator[Mapping[str, Any]]:
  """Records `first` to `stop` − 1 of a split, in the order of its files."""
  import tensorflow_datasets as tfds

  part = f'{split}[{first}:{stop}]'
  if 'array_record' in str(builder.info.file_format).lower():
    yield from builder.as_data_source(split=part)
  else:
    yield from tfds.as_numpy(builder.as_dataset(split=part, shuffle_files=False))


def _tfds(unit: Unit) -> Iterator[Record | Problem]:
  entry = unit.entry
  records = tfds_records(tfds_builder(entry.target), entry.split, unit.first, unit.stop)
  for row, record in enumerate(records, unit.first):
    yield _tensorflow_record(entry, record, row)


def _tensorflow_record(entry: Entry, record: Mapping[str, Any], row: int) -> Record | Problem:
  where = f'{entry.target}:{entry.split}, row {row}'
  wanted = {entry.text, entry.id, entry.source}
  try:
    plain = {key: v.decode() if isinstance(v, bytes) and key in wanted else v for key, v in record.items()}
  except UnicodeDecodeError as error:
    return Problem(where, f'not UTF-8 ({error.reason} at byte {error.start})')
  return _from_fields(entry, plain, where, f'{entry.split}:{row}')


def seqio_task(entry: Entry) -> Iterator[Record | Problem]:
  """What a seqio task's source holds, in its order: the field `entry.text` before any preprocessor.

  Raises:
    UserError: no such task or split.
  """
  tensorflow_start.start()
  import importlib

  import seqio

  if entry.module:
    importlib.import_module(entry.module)
  if entry.target not in seqio.TaskRegistry.names():
    raise UserError(
      f'pool.sources: no seqio task {entry.target!r} is registered; name the module that does: | module=my.tasks'
    )
  source = seqio.TaskRegistry.get(entry.target).source
  if entry.split.partition('[')[0] not in source.splits:
    raise no_split(entry, source.splits)
  for row, record in enumerate(source.get_dataset(split=entry.split, shuffle=False).as_numpy_iterator()):
    yield _tensorflow_record(entry, record, row)


def whole(entry: Entry, config: ConfigDict, seed: int) -> Iterator[Record | Problem]:
  """What a `generated` source gives, from beginning to end; arguments and errors as `sources.generate`."""
  if entry.kind == 'seqio':
    yield from seqio_task(entry)
  else:
    for document in generate(entry, config, seed):
      yield document.id, document.id, document.source, document.text


def no_split(entry: Entry, splits: Iterable[str]) -> UserError:
  return UserError(
    f'pool.sources: {entry.target} has no split {entry.split!r} but {", ".join(splits) or "none"}; '
    'name one: | split=SPLIT'
  )


_SPILLED = ('where', 'id', 'source', 'text')  # and what is wrong, where there is no document


def spill(found: Iterator[Record | Problem], path: str) -> None:
  """Keeps what a source gave that can only be read from beginning to end, for units to read."""
  import pyarrow as pa

  schema = pa.schema([(name, pa.string()) for name in (*_SPILLED, 'what')])
  with pa.OSFile(path, 'wb') as file, pa.ipc.new_stream(file, schema) as stream:
    batch: list[dict[str, str]] = []
    for item in found:
      batch.append(dataclasses.asdict(item) if isinstance(item, Problem) else dict(zip(_SPILLED, item, strict=True)))
      if len(batch) == _BATCH:
        stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        batch = []
    stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _spilled(unit: Unit) -> Iterator[Record | Problem]:
  import pyarrow as pa

  with pa.OSFile(unit.paths[0], 'rb') as file, pa.ipc.open_stream(file) as stream:
    for batch in stream:
      for record in batch.to_pylist():
        if record['what'] is None:
          where, id, source, text = (record[name] for name in _SPILLED)
          yield where, id, source, text
        else:
          yield Problem(record['where'], record['what'])


_READERS: Mapping[str, Callable[[Unit], Iterator[Record | Problem]]] = {
  **dict.fromkeys(('installed_packages', 'function', 'seqio'), _spilled),
  'text': _text,
  'jsonl': _jsonl,
  'parquet': _parquet,
  'hf': _arrow,
  'tfds': _tfds,
}

"""Pools of existing rows: Parquet files with a column of lists of ids, each list one row of the pool.

Rows and their order are unchanged: row numbers run through the files, part-2 before part-10. So scores and selections
that others published for such rows can be used. Nothing is dropped or shuffled; in the document table a file counts as
a document.
"""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.core import storage
from dsdm_jax.core.stage import Context
from dsdm_jax.data import files
from dsdm_jax.data.pool import layout, parquet_footer, passes, sources, vocabulary
from dsdm_jax.data.pool.pool import log_card, write_dataset
from dsdm_jax.errors import UserError

_BATCH = 256  # rows decoded at once


def wanted(config: ConfigDict) -> bool:
  """Whether `pool.sources` has such rows.

  Raises:
    UserError: it mixes them with text, no vocabulary is given, or bad rows should be skipped.
  """
  kinds = {sources.parse(line).kind for line in config.sources}
  if 'tokens' not in kinds:
    return False
  if len(config.sources) > 1:
    raise UserError('pool.sources has a tokens: source, whose rows are not changed; it must be the only source')
  if config.vocabulary == 'train':
    raise UserError('pool.sources has ids and no text; name their vocabulary: --config.pool.vocabulary=PATH')
  if config.on_error == 'skip':
    raise UserError(
      'pool.on_error=skip would change the numbers of later rows, but rows of a tokens: source have fixed numbers; '
      'set --config.pool.on_error=fail'
    )
  if not config.packed:
    raise UserError('pool.packed=False is for documents, and rows of a tokens: source do not change; leave it out')
  if config.plant_targets:
    raise UserError('pool.plant_targets needs text, but pool.sources has ids; set --config.pool.plant_targets=0')
  return True


@dataclasses.dataclass(frozen=True)
class _Part:
  """Rows of a shard and their files: (path, number of its first row)."""

  path: str
  first: int
  stop: int
  head: bytes
  column: str
  length: int
  dtype: str
  vocab_size: int
  files: tuple[tuple[str, int], ...]


def run(context: Context, out: Path) -> dict[str, Any]:
  """The pool stage for such pools, whose files go to `out`.

  Raises:
    UserError: no files, no such column, a row of another length, or an id outside the vocabulary.
  """
  began = time.monotonic()
  c = context.config.pool
  entry = sources.parse(c.sources[0])
  paths = files.glob(entry.target)
  if not paths:
    raise UserError(f'pool.sources: {entry.target} matches no file')
  vocabulary.save(c.vocabulary, out, c.end_piece)
  encoder = vocabulary.open_encoder(out)
  dtype = vocabulary.dtype_of(encoder.size)
  counts = [_rows_of(path, entry.text, c.length) for path in paths]
  first = [0, *np.cumsum(counts).tolist()]
  if not first[-1]:
    raise UserError(f'the pool is empty: {entry.target} has no rows')
  column = entry.text
  if encoder.begin != encoder.eos and not _first_rows_have(encoder.begin, paths, column):
    vocabulary.leave_out_begin_marks(out)
    context.log.say(f'  the first {_BATCH} rows have no begin mark: targets and prompts have none either')

  def write_shards(shards: Sequence[tuple[str, int, int]], head: bytes) -> list[int]:
    parts = []
    for path, begin, stop in shards:
      inside = tuple((f, first[i]) for i, f in enumerate(paths) if first[i] < stop and first[i + 1] > begin)
      parts.append(_Part(path, begin, stop, head, column, c.length, dtype.name, encoder.size, inside))
    with context.log.bar(total=first[-1] * c.length, desc='rows', unit='tokens') as bar:
      return passes.run_parallel(_write, parts, passes.worker_count(context.config.host.workers), bar)

  write_dataset(out / 'dataset', first[-1], c.length, dtype, write_shards)
  labels = [files.below(path, entry.target) for path in paths]
  _write_origins(out, labels, counts, entry.name, c.length)
  tokens = first[-1] * c.length
  card = {
    'rows': first[-1], 'length': c.length, 'vocab_size': encoder.size, 'documents': len(paths), 'bytes': 0,
    'tokens': tokens, 'bytes_per_token': 0.0, 'planted': 0, 'tables': {'text': 0, 'packages': []},
    'packed': True, 'read': layout.loss(len(paths)),
    'lost': {name: layout.loss() for name in passes.LOSSES}, 'unfilled_row': 0,
    'sources': {entry.name: {'documents': len(paths), 'bytes': 0, 'rows': first[-1]}},
    'special_ids': {'pad': encoder.pad, 'eos': encoder.eos}, 'end_marks': 0,
  }  # fmt: skip
  storage.write_json(out / 'card.json', card)
  log_card(context, card, time.monotonic() - began)
  return {
    'rows': first[-1],
    'length': c.length,
    'vocab_size': encoder.size,
    'special_ids': card['special_ids'],
    'row_order': 'an id is the row of the dataset: rows of the files, part-2 before part-10, in their order; not '
    'checked for duplicates',
  }


def _rows_of(path: str, column: str, length: int) -> int:
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    with files.open_bytes(path) as file:
      table = pq.ParquetFile(file)
      if column not in table.schema_arrow.names:
        raise UserError(
          f'{path} has columns {", ".join(table.schema_arrow.names)}; name the column of ids with | text=COLUMN'
        )
      kind = table.schema_arrow.field(column).type
      lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
      if not lists or not pa.types.is_integer(kind.value_type):
        raise UserError(
          f'{path}: column {column!r} has {kind}, not lists of integers; name the column of ids with | text=COLUMN'
        )
      for count, chunks in parquet_footer.row_groups(file):
        ids = sum(chunk.values for chunk in chunks if chunk.path.partition('.')[0] == column)
        if ids > 2 * count * length:  # reading them might take all memory
          raise UserError(f'{path} has {ids / max(count, 1):,.0f} ids a row, but pool.length is {length}')
      return table.metadata.num_rows
  except UserError:
    raise
  except (*files.READ_ERRORS, pa.ArrowException, ValueError) as error:
    raise UserError(f'{path} cannot be read as Parquet ({" ".join(str(error).split())})') from error


def _write(part: _Part) -> int:
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(part.path, 'group_size:1')
  total = 0
  for row in _rows(part):
    record = part.head + row.tobytes()
    writer.write(record)
    total += len(record)
    passes.report_progress(part.length)
  writer.close()
  return total


def _rows(part: _Part) -> Any:
  import pyarrow.parquet as pq

  for path, begin in part.files:
    number = begin
    with files.open_bytes(path) as file:
      table = pq.ParquetFile(file)
      for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        low, high = max(part.first - number, 0), min(part.stop - number, count)
        if low < high:
          at = number
          for batch in table.iter_batches(_BATCH, row_groups=[group], columns=[part.column]):
            start, stop = max(at, number + low), min(at + batch.num_rows, number + high)
            if start < stop:
              yield from _checked(part, batch.column(0).slice(start - at, stop - start), path, start - begin)
            at += batch.num_rows
        number += count


def _checked(part: _Part, column: Any, path: str, number: int) -> np.ndarray:
  """Lists of ids as rows [rows, L]; `number` is the number of the first one in its file, from 0."""
  import pyarrow as pa
  import pyarrow.compute as pc

  def wrong(bad_R: np.ndarray, what: str) -> UserError:
    row = int(np.flatnonzero(bad_R)[0])
    return UserError(f'{path}, row {number + row + 1}: {what}; rows of a tokens: source are not changed, fix the file')

  size_R = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
  if (size_R != part.length).any():
    size = int(size_R[size_R != part.length][0])
    raise wrong(size_R != part.length, f'{size} ids, but pool.length is {part.length}')
  flat = column.flatten()
  missing_RL = pc.is_null(flat).to_numpy(zero_copy_only=False).reshape(len(column), part.length)
  if missing_RL.any():
    raise wrong(missing_RL.any(axis=1), 'an id is null')
  ids_RL = pc.cast(flat, pa.int64(), safe=False).to_numpy(zero_copy_only=False).reshape(len(column), part.length)
  outside_RL = (ids_RL < 0) | (ids_RL >= part.vocab_size)
  if outside_RL.any():
    raise wrong(outside_RL.any(axis=1), f'id {ids_RL[outside_RL][0]}, but pool.vocabulary has {part.vocab_size}')
  return ids_RL.astype(part.dtype)


def _first_rows_have(id: int, paths: Sequence[str], column: str) -> bool:
  """Whether one of the first `_BATCH` rows has the id."""
  import pyarrow as pa
  import pyarrow.compute as pc
  import pyarrow.parquet as pq

  left = _BATCH
  for path in paths:
    with files.open_bytes(path) as file:
      batch = next(pq.ParquetFile(file).iter_batches(left, columns=[column]), None)
    if batch is None:  # a file without rows
      continue
    if pc.any(pc.equal(pc.cast(batch.column(0).flatten(), pa.int64(), safe=False), id)).as_py():
      return True
    left -= batch.num_rows
    if not left:
      break
  return False


def _write_origins(out: Path, paths: Sequence[str], counts: Sequence[int], name: str, length: int) -> None:
  shutil.rmtree(out / 'rows', ignore_errors=True)
  (out / 'rows').mkdir()
  total = sum(counts)
  offset_type = np.int32 if max(counts) * length < 2**31 else np.int64
  types = {'document': np.int32, 'offset': offset_type, 'source': np.int8, 'planted': np.int32}
  arrays = {k: np.lib.format.open_memmap(out / 'rows' / f'{k}.npy', 'w+', t, (total,)) for k, t in types.items()}
  arrays['planted'][:] = -1
  begin = 0
  for index, count in enumerate(counts):
    arrays['document'][begin : begin + count] = index
    arrays['offset'][begin : begin + count] = np.arange(count) * length
    begin += count
  for array in arrays.values():
    array.flush()
  storage.save_npy(out / 'rows' / 'order.npy', np.arange(len(paths), dtype=np.int64))
  rows = [
    {'id': f'{name}/{path}', 'source': name, 'file': path, 'bytes': 0, 'tokens': count * length}
    for path, count in zip(paths, counts, strict=True)
  ]
  passes.write_table(out / 'documents' / '000000.parquet', rows)
  storage.write_json(out / 'sources.json', [name])
  storage.write_json(out / 'planted.json', [])
  storage.write_text(out / 'skipped.jsonl', '')

"""The footer of Parquet files, against pyarrow; and damaged ones, in which pyarrow's accessor ends the process."""

import contextlib
import io
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsdm_jax.data.pool import parquet_footer, pretokenized, readers, sources
from dsdm_jax.errors import UserError


def written(table: pa.Table, **options) -> bytes:
  file = io.BytesIO()
  pq.write_table(table, file, **options)
  return file.getvalue()


@pytest.mark.parametrize('codec', ['none', 'snappy', 'zstd'])
def test_sizes_are_those_of_pyarrow(codec):
  table = pa.table(
    {
      'text': [f'text {i}' * 9 for i in range(50)],
      'meta': [{'id': i, 'tags': ['a', 'b'], 'share': i / 7} for i in range(50)],
      'kept': [i % 3 == 0 for i in range(50)],
    }
  )
  data = written(table, row_group_size=20, compression=codec, use_dictionary=False)
  metadata = pq.ParquetFile(io.BytesIO(data)).metadata
  found = parquet_footer.row_groups(io.BytesIO(data))
  assert [rows for rows, _ in found] == [20, 20, 10]
  for number, (_, chunks) in enumerate(found):
    wanted = [metadata.row_group(number).column(index) for index in range(metadata.num_columns)]
    assert chunks == [
      parquet_footer.Chunk(w.path_in_schema, w.num_values, w.total_uncompressed_size, w.total_compressed_size)
      for w in wanted
    ]
  assert found[0][1][1].path == 'meta.id'


def test_a_damaged_footer_is_a_problem_and_does_not_end_the_process(tmp_path):
  data = written(pa.table({'text': ['one two', None, 'three'], 'ids': [[1, 2], [3, 4], [5, 6]]}))
  (length,) = struct.unpack('<I', data[-8:-4])
  path, problems, counted = tmp_path / 'mine.parquet', 0, 0
  for at in range(len(data) - 8 - length, len(data) - 4, 3):
    damaged = bytearray(data)
    damaged[at] ^= 1 << at % 8
    path.write_bytes(damaged)
    unit = sources.Unit(sources.parse(f'parquet:{path}'), (str(path),))
    problems += any(isinstance(found, readers.Problem) for found in readers.read(unit))
    with contextlib.suppress(UserError):
      pretokenized._rows_of(str(path), 'ids', 2)
      counted += 1
  assert problems > 20 and counted > 20

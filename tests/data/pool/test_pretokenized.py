"""Pools of existing rows: unchanged and in their order, or an error that names the file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from tests.helpers.data import run_pool, run_targets, small_config

LENGTH = 96


def write(path: Path, rows_NL: np.ndarray | list[list[int]]) -> None:
  column = pa.array([list(map(int, row)) for row in rows_NL], pa.list_(pa.int32()))
  pq.write_table(pa.table({'input_ids': column}), path, row_group_size=4)


def build(folder: Path, *sources: str, **keys):
  keys = {'vocabulary': 'bytes', 'length': LENGTH} | keys
  return run_pool(small_config(sources=sources, **keys), folder)


def test_rows_do_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  from dsdm_jax.data.pool import pool as pool_lib

  monkeypatch.setattr(pool_lib, 'SHARD_ROWS', 8)  # shards and files begin at different rows
  rows_NL = np.random.default_rng(0).integers(3, 259, (21, LENGTH))
  for name, first, stop in (('b', 13, 21), ('a', 0, 13)):
    write(tmp_path / f'{name}.parquet', rows_NL[first:stop])
  artifact = build(tmp_path / 'run', f'tokens:{tmp_path}/*.parquet | text=input_ids | name=theirs')
  pool = Pool(artifact)
  np.testing.assert_array_equal(pool.tokens(range(21)), rows_NL)
  assert pool.sources == ['theirs'] and pool.card['tokens'] == 21 * LENGTH
  assert pool.documents[pool.document_N[13]]['id'].endswith('b.parquet') and pool.offset_N[14] == LENGTH
  run_targets(small_config(vocabulary='bytes', length=LENGTH), tmp_path / 'run', artifact)


def test_lists_of_every_kind(tmp_path: Path):
  rows_NL = np.random.default_rng(1).integers(3, 259, (6, LENGTH))
  kinds = (pa.list_(pa.uint16()), pa.large_list(pa.int64()), pa.list_(pa.int32(), LENGTH))
  for index, kind in enumerate(kinds):
    pq.write_table(pa.table({'ids': pa.array(rows_NL.tolist(), kind)}), tmp_path / f'{index}.parquet', row_group_size=4)
    pool = Pool(build(tmp_path / str(index), f'tokens:{tmp_path}/{index}.parquet | text=ids'))
    np.testing.assert_array_equal(pool.tokens(range(6)), rows_NL)


def test_rows_that_do_not_fit(tmp_path: Path):
  good = np.full((5, LENGTH), 7)
  for name, rows, expected in (
    ('short', [*good.tolist(), [7] * 9], f'row 6: 9 ids, but pool.length is {LENGTH}'),
    ('large', [*good.tolist(), [259] * LENGTH], 'row 6: id 259, but pool.vocabulary has 259'),
    ('below', [*good.tolist(), [-1] * LENGTH], 'row 6: id -1, but pool.vocabulary has 259'),
  ):
    write(tmp_path / f'{name}.parquet', rows)
    with pytest.raises(UserError, match=rf'{name}\.parquet, {expected}'):
      build(tmp_path / name, f'tokens:{tmp_path}/{name}.parquet | text=input_ids')
  nulls = pa.array([good[0].tolist(), [None, *good[0].tolist()[1:]]], pa.list_(pa.int32()))
  gone = pa.array([*good.tolist(), None], pa.list_(pa.int32()))
  decimals = pa.array([[5.7] * LENGTH], pa.list_(pa.float32()))
  for name, column, expected in (
    ('nulls', nulls, 'row 2: an id is null'),
    ('gone', gone, f'row 6: 0 ids, but pool.length is {LENGTH}'),
    ('decimals', decimals, r"column 'ids' has list<element: float>, not lists of integers"),
    ('numbers', pa.array([1, 2]), "column 'ids' has int64, not lists of integers"),
  ):
    pq.write_table(pa.table({'ids': column}), tmp_path / f'{name}.parquet')
    with pytest.raises(UserError, match=rf'{name}\.parquet[,:] {expected}') as caught:
      build(tmp_path / name, f'tokens:{tmp_path}/{name}.parquet | text=ids')
    assert '\n' not in str(caught.value)
  with pytest.raises(UserError, match=r'on_error=skip would change the numbers'):
    build(tmp_path / 'skip', f'tokens:{tmp_path}/short.parquet', on_error='skip')
  with pytest.raises(UserError, match=r'has columns input_ids; name the column of ids with \| text=COLUMN'):
    build(tmp_path / 'column', f'tokens:{tmp_path}/short.parquet')
  with pytest.raises(UserError, match='matches no file'):
    build(tmp_path / 'none', f'tokens:{tmp_path}/none-*.parquet')
  with pytest.raises(UserError, match='name their vocabulary'):
    build(tmp_path / 'train', f'tokens:{tmp_path}/short.parquet', vocabulary='train')
  with pytest.raises(UserError, match='must be the only source'):
    build(tmp_path / 'mixed', f'tokens:{tmp_path}/short.parquet', f'text:{tmp_path}/*')

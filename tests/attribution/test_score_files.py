"""Scores from files, and how far two sets of scores agree."""

import resource
import struct
import zipfile

import numpy as np
import pytest

from dsdm_jax.attribution import score_files
from dsdm_jax.core import artifacts
from dsdm_jax.errors import UserError
from tests.helpers import scores as saved_scores

SCORE_N = (np.arange(1_000) * 0.5 - 3).astype(np.float32)
# What torch 2.13 writes for SCORE_N, but for the numbers themselves: protocol 2 opcodes.
_PICKLE = (
  b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00((X\x07\x00\x00\x00storageq\x01ctorch\n%s\nq\x02X\x01\x00\x00\x000q'
  b'\x03X\x03\x00\x00\x00cpuq\x04M%stq\x05QK%cM%s\x85q\x06K%c\x85q\x07\x89ccollections\nOrderedDict\nq\x08)Rq\ttq\nRq\x0b.'
)


def _pickle(storage=b'FloatStorage', length=1_000, offset=0, size=None, stride=1):
  count = struct.pack('<H', length), struct.pack('<H', length if size is None else size)
  return _PICKLE % (storage, count[0], offset, count[1], stride)


def _pt(path, *, byteorder=b'little', data=None, **options):
  pickled = _pickle(**options)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('scores/data.pkl', pickled)
    archive.writestr('scores/byteorder', byteorder)
    archive.writestr('scores/data/0', SCORE_N.tobytes() if data is None else data)
    archive.writestr('scores/version', b'3\n')
  return path


def test_npy_and_pt_are_mapped_and_parquet_is_put_in_order(tmp_path):
  import pyarrow
  from pyarrow import parquet

  np.save(tmp_path / 'a.npy', SCORE_N)
  _pt(tmp_path / 'a.pt')
  order_N = np.random.default_rng(0).permutation(1_000)
  parquet.write_table(pyarrow.table({'row': order_N, 'score': SCORE_N[order_N], 'x': order_N}), tmp_path / 'a.parquet')
  parquet.write_table(pyarrow.table({'mine': SCORE_N}), tmp_path / 'b.parquet')
  for name in ('a.npy', 'a.pt', 'a.parquet'):
    np.testing.assert_array_equal(score_files.read(tmp_path / name, rows=1_000), SCORE_N)
  np.testing.assert_array_equal(score_files.read(tmp_path / 'b.parquet', column='mine'), SCORE_N)
  for name in ('a.npy', 'a.pt'):
    assert isinstance(score_files.read(tmp_path / name), np.memmap)


def test_pt_of_other_precision_and_a_compressed_one(tmp_path):
  half = SCORE_N.astype(np.float16)
  _pt(tmp_path / 'half.pt', storage=b'HalfStorage', data=half.tobytes())
  np.testing.assert_array_equal(score_files.read(tmp_path / 'half.pt'), half)
  with zipfile.ZipFile(_pt(tmp_path / 'plain.pt')) as old, zipfile.ZipFile(tmp_path / 'packed.pt', 'w') as new:
    for info in old.infolist():
      new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
  np.testing.assert_array_equal(score_files.read(tmp_path / 'packed.pt'), SCORE_N)


@pytest.mark.parametrize('where', ['byteorder', 'data/0', 'data.pkl', 'text', 'rows'])
def test_a_small_file_of_much_content_is_not_read_whole(tmp_path, where):
  import pyarrow
  from pyarrow import parquet

  path, size = tmp_path / 'a.pt', 192 << 20
  if where in ('text', 'rows'):
    path = tmp_path / 'a.parquet'
    column = pyarrow.array(['x' * 2**20] * 192) if where == 'text' else pyarrow.array(np.zeros(48 << 20, np.float32))
    parquet.write_table(pyarrow.table({'score': column}), path)
  else:
    members = {'data.pkl': _pickle(), 'byteorder': b'little', 'data/0': SCORE_N.tobytes()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
      for name, data in members.items():
        if name != where:
          archive.writestr(f'scores/{name}', data)
        else:
          info = zipfile.ZipInfo(f'scores/{name}')
          info.compress_type = zipfile.ZIP_DEFLATED
          with archive.open(info, 'w', force_zip64=True) as member:
            for _ in range(size >> 24):
              member.write(bytes(1 << 24))
  assert path.stat().st_size < 8 << 20
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  if where == 'data/0':  # the thousand numbers that the tensor has are at the beginning
    np.testing.assert_array_equal(score_files.read(path), np.zeros(1_000))
  else:
    with pytest.raises(UserError) as caught:
      score_files.read(path, rows=1_000)
    assert '\n' not in str(caught.value)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_pickle_that_would_run_something_is_only_looked_at(tmp_path):
  with zipfile.ZipFile(tmp_path / 'evil.pt', 'w') as archive:
    archive.writestr('x/data.pkl', b'\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch owned!\x85R.')
    archive.writestr('x/data/0', b'')
  with pytest.raises(UserError, match='holds no storage'):
    score_files.read(tmp_path / 'evil.pt')


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'storage': b'IntStorage'}, 'holds IntStorage'),
    ({'offset': 5}, 'a view, not a contiguous vector'),
    ({'stride': 2}, 'a view, not a contiguous vector'),
    ({'byteorder': b'big'}, 'not little-endian'),
    ({'data': SCORE_N[:-1].tobytes()}, 'truncated'),
  ],
)
def test_pt_that_is_no_plain_vector_is_refused(tmp_path, options, words):
  with pytest.raises(UserError, match=words):
    score_files.read(_pt(tmp_path / 'a.pt', **options))


def test_files_that_are_no_scores_are_refused_in_one_line(tmp_path):
  import pyarrow
  from pyarrow import parquet

  np.save(tmp_path / 'matrix.npy', np.zeros((3, 2)))
  np.save(tmp_path / 'whole.npy', np.arange(3))
  np.save(tmp_path / 'nan.npy', np.array([0.0, np.nan]))
  parquet.write_table(pyarrow.table({'row': [0, 0], 'score': [1.0, 2.0]}), tmp_path / 'twice.parquet')
  for name in ('cut.npy', 'cut.pt', 'cut.parquet', 'cut.csv'):
    (tmp_path / name).write_bytes(b'nothing')
  cases = {
    'matrix.npy': r'shape \(3, 2\)', 'whole.npy': 'holds int64', 'nan.npy': 'score of row 1 is not a number',
    'twice.parquet': 'name each of the 2 rows once', 'cut.npy': 'cannot be read', 'cut.pt': 'cannot be read',
    'cut.parquet': 'cannot be read', 'cut.csv': 'must end in', 'none.npy': 'cannot be read',
  }  # fmt: skip
  for name, words in cases.items():
    with pytest.raises(UserError, match=words) as caught:
      score_files.read(tmp_path / name)
    assert '\n' not in str(caught.value)
  np.save(tmp_path / 'a.npy', SCORE_N)
  with pytest.raises(UserError, match='1000 scores and the pool 5 rows'):
    score_files.read(tmp_path / 'a.npy', rows=5)
  with pytest.raises(UserError, match="no column 'other'; it has row, score"):
    score_files.read(tmp_path / 'twice.parquet', column='other')


def _workdir(folder, **scores):
  """A workdir with a finished datamodel stage."""
  identity = artifacts.Identity('datamodel', 2, {}, {})
  part = artifacts.begin(folder, identity)
  saved_scores.save(part, **{f'score_{name}_N': value for name, value in scores.items()})
  tasks = [name for name in scores if name != 'mix']
  semantics = {'tasks': tasks, 'mix': 'mean', 'half_width': {}}
  artifacts.commit(folder, identity, semantics, artifacts.Cost(part))
  return folder


def test_compare(tmp_path, capsys):
  rng = np.random.default_rng(0)
  noisy_N = (SCORE_N + 100 * rng.normal(size=1_000)).astype(np.float32)
  a = _workdir(tmp_path / 'a', docs=SCORE_N, mix=SCORE_N)
  b = _workdir(tmp_path / 'b', docs=-SCORE_N, mix=noisy_N)
  np.save(tmp_path / 'c.npy', SCORE_N)
  assert score_files.main([str(a), str(b)]) == 0
  out = capsys.readouterr().out
  head, docs, mix, _ = out.splitlines()
  assert head.split() == 'target Spearman top 1% top 5% top 10% top 25% top 50%'.split()
  assert docs.split() == ['docs', '-1.000', '0%', '0%', '0%', '0%', '0%']
  found = score_files.compare(SCORE_N, noisy_N)
  assert mix.split()[1] == f'{found["spearman"]:+.3f}'
  order = [set(np.argsort(-x)[:100]) for x in (SCORE_N, noisy_N)]
  assert found['0.1'] == len(order[0] & order[1]) / 100
  assert score_files.main([str(a / 'datamodel'), str(tmp_path / 'c.npy'), '--target=docs']) == 0
  assert capsys.readouterr().out.splitlines()[1].split() == ['docs', '+1.000', *['100%'] * 5]


def test_compare_refuses_in_one_line(tmp_path, capsys):
  a = _workdir(tmp_path / 'a', docs=SCORE_N, mix=SCORE_N)
  np.save(tmp_path / 'short.npy', SCORE_N[:7])
  (tmp_path / 'empty').mkdir()
  for other, words in [
    (tmp_path / 'short.npy', '1000 scores with 7'),
    (tmp_path / 'empty', 'nor a finished datamodel folder'),
  ]:
    assert score_files.main([str(a), str(other)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count('\n') == 1
  assert score_files.main([str(a), str(tmp_path / 'short.npy'), '--target=squad']) == 2
  assert 'set --target' in capsys.readouterr().err

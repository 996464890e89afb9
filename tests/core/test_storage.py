"""Files are written whole, created once, and hashed once."""

import errno
import gc
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from dsdm_jax.core import storage
from dsdm_jax.errors import UserError


def test_write_replaces_or_leaves_alone(tmp_path, monkeypatch):
  file = tmp_path / 'a.json'
  storage.write_json(file, {'b': 1, 'a': [1.5]})
  first = file.read_bytes()
  storage.write_json(file, {'a': [1.5], 'b': 1})
  assert file.read_bytes() == first, 'equal values are equal bytes'

  def full(_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    storage.write_json(file, {'a': 2})
  assert file.read_bytes() == first
  assert [p.name for p in tmp_path.iterdir()] == ['a.json'], 'no temporary file is left'
  with pytest.raises(ValueError, match='JSON compliant'):
    storage.write_json(file, {'a': float('nan')})
  assert file.read_bytes() == first


@pytest.mark.parametrize(
  'name', ['a b', 'ü漢字', '-dash', '--workdir=x', 'n' * 255, '{a}~#%20@5:b,;&$HOME|', '.hidden', 'deep/' * 100 + 'x']
)
def test_a_folder_may_have_any_other_name(tmp_path, monkeypatch, name):
  assert storage.check_folder(tmp_path / name, '--out') == tmp_path / name
  monkeypatch.chdir(tmp_path)
  assert storage.check_folder(name, '--out') == tmp_path / name


@pytest.mark.parametrize('address', ['gs://bucket/run', 's3://b', 'file:///tmp/run', 'gs://bucket'])
def test_an_address_is_not_taken_for_a_folder(tmp_path, monkeypatch, address):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=f"--out = '{address}' is an address; give a folder"):
    storage.check_folder(address, '--out')


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    *((f'a{sign}b/c', 'contains ') for sign in ('*', '?', '[', '\\', '\n', '\x1b', '\x00', '\udcff', '\u202e')),
    *((name, 'is too long') for name in ('n' * 256, '漢' * 86, 'deep/' * 700)),
  ],
  ids=ascii,
)
def test_a_folder_that_packages_misread_is_refused(tmp_path, monkeypatch, name, words):
  for path in (tmp_path / name, name):
    with pytest.raises(UserError, match=f'--out = .*{words}.*; use ') as caught:
      storage.check_folder(path, '--out')
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1_000


def test_equal_arrays_are_equal_bytes(tmp_path):
  arrays = {'x_N': np.arange(5, dtype=np.int32), 'y': np.array(['a', 'b'])}
  storage.save_npz(tmp_path / 'a.npz', **arrays)
  storage.save_npz(tmp_path / 'b.npz', **arrays)
  assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
  with np.load(tmp_path / 'a.npz') as found:
    np.testing.assert_array_equal(found['x_N'], arrays['x_N'])


def test_one_of_several_writers_creates_a_file(tmp_path):
  file = tmp_path / 'folder' / 'a'
  with ThreadPoolExecutor(8) as threads:
    created = list(threads.map(lambda number: storage.create(file, bytes([number])), range(8)))
  assert sum(created) == 1 and file.read_bytes() == bytes([created.index(True)])
  assert [p.name for p in file.parent.iterdir()] == ['a']


def test_replace_is_conditional(tmp_path):
  file = tmp_path / 'a'
  assert storage.read_bytes(file) is None
  assert not storage.replace(file, b'2', known=b'1')
  assert storage.replace(file, b'1', known=None) and not storage.replace(file, b'2', known=None)
  assert not storage.replace(file, b'3', known=b'2') and storage.read_bytes(file) == b'1'
  assert storage.replace(file, b'2', known=b'1') and storage.read_bytes(file) == b'2'


def test_a_file_is_hashed_once_also_after_its_folder_is_renamed_and_again_when_it_has_changed(tmp_path, monkeypatch):
  file, renamed, linked = tmp_path / 'a/file', tmp_path / 'b/file', tmp_path / 'c/file'
  storage.write_bytes(file, b'content')
  digest = storage.sha256(file)
  read = []
  monkeypatch.setattr(storage, 'sha256', lambda path: read.append(path) or 'read')
  assert storage.checksum(file) == digest
  file.parent.rename(renamed.parent)
  storage.copy(renamed, linked)
  assert storage.create(tmp_path / 'd', b'content')
  assert {storage.checksum(path) for path in (renamed, linked, tmp_path / 'd')} == {digest} and read == []
  renamed.write_bytes(b'more content')
  assert storage.checksum(renamed) == 'read' and read == [renamed]


def test_a_file_with_the_inode_size_and_time_of_another_is_hashed(tmp_path):
  """As a copied workdir has in the place of a deleted one."""
  file = tmp_path / 'file'
  storage.write_bytes(file, b'one')
  before, digest = file.stat(), storage.checksum(file)
  time.sleep(0.05)  # beyond the resolution of times
  file.write_bytes(b'two')
  os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
  after = file.stat()
  assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
  assert storage.checksum(file) != digest


def test_mark_tells_a_complete_file_from_any_other(tmp_path):
  file, more = tmp_path / 'runs/a.npz', tmp_path / 'answers/a.jsonl'
  for path in (file, more):
    storage.write_text(path, 'content')
  assert not storage.is_marked(file)
  storage.mark(file, more)
  assert storage.is_marked(file)
  note = file.with_name('a.npz.sha256')
  for path in (file, more, note):
    whole = path.read_bytes()
    for damage in (b'', whole[:-1], whole + b'x', bytes([whole[0] ^ 1]) + whole[1:], b'\xff\n'):
      path.write_bytes(damage)
      assert not storage.is_marked(file), (path, damage)
    path.unlink()
    assert not storage.is_marked(file)
    path.write_bytes(whole)
    assert storage.is_marked(file)
  storage.unmark(file)
  assert not file.exists() and not note.exists()


def test_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
  """What is damaged is deleted and computed again."""
  file = tmp_path / 'a.npz'
  storage.write_text(file, 'content')
  storage.mark(file)
  monkeypatch.setattr(storage, '_checksums', {})
  for code in (errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE):

    def fail(*_, code=code):
      raise OSError(code, os.strerror(code))

    for name in ('_sha256', 'read_bytes'):
      with monkeypatch.context() as patched:
        patched.setattr(storage, name, fail)
        patched.setattr(storage.time, 'sleep', lambda _: None)
        with pytest.raises(OSError, match=os.strerror(code)):
          storage.is_marked(file)
  assert storage.is_marked(file)


def test_copy_shares_the_bytes_and_replaces(tmp_path):
  (tmp_path / 'a').write_text('new')
  (tmp_path / 'b').write_text('old')
  for _ in range(2):
    storage.copy(tmp_path / 'a', tmp_path / 'b')
    assert (tmp_path / 'b').samefile(tmp_path / 'a')
  assert storage.files(tmp_path) == ['a', 'b']


class _Full(io.BytesIO):
  """A file on a disk that has room for what a table begins with."""

  def write(self, data) -> int:
    if self.tell() > 4:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return super().write(data)


def test_a_parquet_file_that_is_left_on_a_full_disk_says_nothing_more(monkeypatch):
  later = []
  monkeypatch.setattr(sys, 'unraisablehook', later.append)
  writer = storage.parquet_writer(_Full(), pa.schema({'text': pa.string()}))
  assert writer.is_open
  del writer
  gc.collect()
  assert not later

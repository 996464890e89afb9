"""A workdir in an object store, on emulators of S3 and Cloud Storage that run on this machine.

Both hold conditional writes to their condition, so races and takeovers are tested on both.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import quickstart
from dsdm_jax import pipeline
from dsdm_jax.core import artifacts, lock, object_store, storage
from dsdm_jax.core.artifacts import Cost, Identity
from dsdm_jax.core.command_line import exit_code
from dsdm_jax.core.storage import Address
from dsdm_jax.data.pool import pool as pool_lib
from dsdm_jax.errors import StoreError, UserError
from dsdm_jax.selection import export
from tests.conftest import FAULTS, ROOT

BOTH = pytest.mark.parametrize('address', ['s3', 'gs'], indirect=True)
IDENTITY = Identity('pool', 1, {'seed': 0}, {})


def test_an_address_joins_like_a_path_and_opens_nothing():
  run = Address('gs://bucket/a//run/./')
  assert str(run) == 'gs://bucket/a/run' and run.name == 'run' and run.parts == ('gs://bucket', 'a', 'run')
  assert str(run / 'pool' / 'x.npy') == 'gs://bucket/a/run/pool/x.npy'
  assert run.parent / 'run' == run and hash(run.parent / 'run') == hash(run)
  assert [str(parent) for parent in run.parents] == ['gs://bucket/a', 'gs://bucket']
  assert str((run / 'x.npy').with_name('y.npz')) == 'gs://bucket/a/run/y.npz' and (run / 'x.npy').suffix == '.npy'
  assert str((run / 'p' / 'x').relative_to(run)) == 'p/x' and sorted([run, run.parent])[0] == run.parent
  assert Address('gcs://b/x') == Address('gs://b/x') and Address('s3a://b') == Address('s3://b')
  for name in ('open', 'exists', '__fspath__', 'read_bytes', 'mkdir', 'iterdir'):
    assert not hasattr(run, name), 'code for local files would go on with a file of this name'
  with pytest.raises(UserError, match='is no address'):
    Address('gs://')


def test_only_what_has_a_scheme_is_an_address(tmp_path):
  assert storage.locate('runs/a') == storage.Path('runs/a') and storage.locate(tmp_path) == tmp_path
  assert storage.locate('file:///runs/a') == storage.locate('FILE:///runs/a') == storage.Path('/runs/a')
  assert storage.check_location(tmp_path / 'a:b', 'x') == tmp_path / 'a:b'
  assert storage.locate('s3://b/run') == Address('s3://b/run')


@BOTH
def test_files_of_a_store_are_written_whole_listed_copied_and_deleted(address):
  assert not storage.exists(address) and storage.read_bytes(address / 'a') is None and storage.files(address) == []
  storage.write_json(address / 'a b' / 'ü?.json', {'x': 1})
  storage.save_npz(address / 'x.npz', x_N=np.arange(5))
  assert storage.read_json(address / 'a b' / 'ü?.json', dict)['x'] == 1
  np.testing.assert_array_equal(storage.load(address / 'x.npz')['x_N'], np.arange(5))
  assert storage.files(address) == ['a b/ü?.json', 'x.npz']
  assert storage.children(address) == [address / 'a b', address / 'x.npz']
  assert storage.subfolders(address) == [address / 'a b']
  assert storage.is_file(address / 'x.npz') and not storage.is_file(address / 'a b') and storage.exists(address)
  storage.copy(address / 'x.npz', address / 'y' / 'x.npz')
  assert storage.read(address / 'y' / 'x.npz') == storage.read(address / 'x.npz')
  assert storage.size(address / 'x.npz') == len(storage.read(address / 'x.npz'))
  storage.mark(address / 'x.npz', address / 'y' / 'x.npz')
  assert storage.is_marked(address / 'x.npz') and not storage.marked(address / 'y' / 'x.npz')
  storage.write_bytes(address / 'y' / 'x.npz', b'changed')
  assert not storage.is_marked(address / 'x.npz')
  storage.delete(address / 'y')
  storage.unmark(address / 'x.npz')
  storage.unlink(address / 'nothing')
  assert storage.files(address) == ['a b/ü?.json']
  with pytest.raises(FileNotFoundError):
    storage.checksum(address / 'nothing')


@BOTH
def test_a_local_copy_is_checked_and_made_once(address, tmp_path, monkeypatch):
  with storage.uploading(address / 'folder') as folder:
    (folder / 'deep').mkdir()
    (folder / 'a.bin').write_bytes(b'a' * 1_000)
    (folder / 'deep' / 'b.bin').write_bytes(b'b')
  with contextlib.suppress(FileExistsError), storage.uploading(address / 'failed') as folder:
    (folder / 'a.bin').write_bytes(b'a')
    folder.mkdir()
  assert storage.files(address) == ['folder/a.bin', 'folder/deep/b.bin'], 'after an error nothing is uploaded'
  copy = storage.local(address / 'folder')
  assert storage.files(copy) == ['a.bin', 'deep/b.bin'] and (copy / 'a.bin').read_bytes() == b'a' * 1_000
  assert storage.local(address / 'folder' / 'a.bin').name == 'a.bin'
  with monkeypatch.context() as changed:
    changed.setattr(object_store, 'download', None)
    assert storage.local(address / 'folder') == copy, 'it is not downloaded again'
  with pytest.raises(FileNotFoundError):
    storage.local(address / 'nothing')


READER = """
import sys
from dsdm_jax.core import storage
for line in sys.stdin:
  print(storage.local(storage.locate(line.strip())), flush=True)
"""


def test_the_cache_is_bounded_and_keeps_what_processes_use(address, tmp_path, monkeypatch):
  """Objects of 1,000 bytes on a disk with 10,000, of which the cache takes half."""
  cache = tmp_path / 'cache' / 'dsdm_jax' / 'objects' / 'copies'
  names = [str(address / f'{number}') for number in range(9)]
  for number, name in enumerate(names):
    storage.write_bytes(name, bytes([number]) * 1_000)

  def start() -> subprocess.Popen:
    return subprocess.Popen(
      [sys.executable, '-c', READER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def ask(reader: subprocess.Popen, number: int) -> Path:
    reader.stdin.write(f'{names[number]}\n')
    reader.stdin.flush()
    return Path(reader.stdout.readline().strip())

  def held() -> int:
    return sum((cache / name).stat().st_size for name in storage.files(cache))

  lives, ended = start(), start()
  copies = [ask(lives, 0), ask(ended, 1), ask(ended, 2)]
  ended.communicate(timeout=60)
  (cache / '.half').mkdir()  # of a process that was killed while it downloaded
  (cache / '.half' / 'x').write_bytes(bytes(1_000))
  os.utime(cache / '.half', (0, 0))
  monkeypatch.setattr(storage.shutil, 'disk_usage', lambda path: SimpleNamespace(free=10_000 - held()))
  monkeypatch.setattr(storage, '_room', [0.0, 0.0])
  with ThreadPoolExecutor(8) as threads:  # as many readers of one object at the same moment
    assert len({*threads.map(lambda _: storage.local(storage.locate(names[3])), range(8))}) == 1
  copies.append(storage.local(storage.locate(names[4])))
  assert not (cache / '.half').exists() and copies[1].exists(), 'what was used longest ago goes first'
  for number in (5, 6):
    copies.append(storage.local(storage.locate(names[number])))
    storage._room[1] = 0.0
    assert held() <= 5_000
  assert [copy.exists() for copy in copies[:3]] == [True, False, False], 'a process that lives holds 0 alone'
  copies.append(storage.local(storage.locate(names[7])))
  assert all(
    copy.read_bytes() == bytes([n]) * 1_000 for n, copy in zip((0, 4, 5, 6, 7), [copies[0], *copies[3:]], strict=True)
  )
  assert storage.local(storage.locate(names[1])).read_bytes() == bytes([1]) * 1_000, 'it is downloaded again'
  monkeypatch.setattr(storage.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1_000))
  storage._room[1] = 0.0
  with pytest.raises(UserError, match='has no room for a copy; free space there'):
    storage.local(storage.locate(names[8]))
  lives.communicate(timeout=60)


@BOTH
def test_an_export_is_at_an_address_whole_or_not_at_all(address, monkeypatch):
  upload = object_store.upload

  def stops(files, folder):
    upload({'a': files['a']}, folder)
    raise ZeroDivisionError

  with monkeypatch.context() as patched, contextlib.suppress(ZeroDivisionError):
    patched.setattr(object_store, 'upload', stops)
    with export.new_folder(address / 'part') as folder:
      (folder / 'a').write_bytes(b'a')
  assert storage.files(address) == ['part/a']  # no word of success
  storage.delete(address)
  with contextlib.suppress(ZeroDivisionError), export.new_folder(address) as folder:
    (folder / 'a').write_bytes(b'a')
    raise ZeroDivisionError
  assert not storage.exists(address)
  with export.new_folder(address) as folder:
    (folder / 'b').mkdir()
    for name in ('a', 'b/c'):
      (folder / name).write_bytes(name.encode())
  assert storage.files(address) == [export.SUCCESS, 'a', 'b/c'] and storage.read(address / 'b' / 'c') == b'b/c'
  with pytest.raises(UserError, match='exists and is not an empty folder'), export.new_folder(address):
    pytest.fail('it is refused before anything is computed')
  with pytest.raises(UserError, match='does not exist; create that bucket'):  # noqa: SIM117
    with export.new_folder(Address(f'{address.scheme}://no-such-bucket/x')):
      pytest.fail('it is refused before anything is computed')


def test_of_a_pool_only_the_files_that_are_read_are_copied(address, tmp_path):
  rows = 3 * pool_lib.SHARD_ROWS - 5
  with storage.uploading(address) as folder:
    pool_lib.write_array(folder / 'dataset', np.arange(rows, dtype=np.uint16)[:, None])
    storage.write_json(folder / 'card.json', {'rows': rows, 'length': 1, 'vocab_size': 65_536})
  pool = pool_lib.Pool(address)
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(pool_lib, '_RESIDENT_BYTES', 0)
    assert pool.tokens([rows - 1, rows - 2])[:, 0].tolist() == [rows - 1, rows - 2]
  cache = tmp_path / 'cache' / 'dsdm_jax' / 'objects' / 'copies'
  copied = [name for name in storage.files(cache) if 'array_record' in name]
  assert [name.rpartition('-')[2] for name in copied] == ['00002']


@pytest.mark.parametrize('address', ['s3', 'gs'], indirect=True)
def test_a_copy_that_arrives_damaged_is_refused(address, monkeypatch):
  storage.write_bytes(address / 'a.bin', b'a' * 1_000)
  download = object_store.download

  def torn(source, files):
    download(source, files)
    for file in files.values():
      file.write_bytes(b'b' + file.read_bytes()[1:])

  monkeypatch.setattr(object_store, 'download', torn)
  with pytest.raises(UserError, match=r'a\.bin arrived damaged'):
    storage.local(address / 'a.bin')


@BOTH
def test_of_two_processes_that_compare_and_set_one_succeeds(address):
  """Each adds 1 to a number 8 times; a lost update would show in the sum."""
  program = (
    'import json, sys\n'
    'from dsdm_jax.core import storage\n'
    'file = storage.locate(sys.argv[1])\n'
    'print(int(storage.create(file.with_name("first"), sys.argv[2].encode())), flush=True)\n'
    'done = 0\n'
    'while done < 8:\n'
    '  known = storage.read(file)\n'
    '  done += storage.replace(file, json.dumps([int(json.loads(known)[0]) + 1, sys.argv[2], done]).encode(), known)\n'
  )
  storage.write_bytes(address / 'number', b'[0]')
  writers = [
    subprocess.Popen(
      [sys.executable, '-c', program, str(address / 'number'), name], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for name in ('a', 'b')
  ]
  created = [int(writer.communicate(timeout=120)[0]) for writer in writers]
  assert [writer.returncode for writer in writers] == [0, 0]
  assert json.loads(storage.read(address / 'number'))[0] == 16
  assert sorted(created) == [0, 1] and storage.read(address / 'first') == b'ab'[created.index(1) :][:1]


def _owner(**changes) -> bytes:
  return storage.as_json({**lock._this('f' * 16), 'host': 'elsewhere', 'machine': 'another', **changes})


@BOTH
def test_lock_of_a_dead_owner_is_taken_over_and_that_of_a_live_one_is_not(address, monkeypatch, capsys):
  monkeypatch.setattr(lock, 'TOUCH_SECONDS', 0.3)
  with lock.hold(address) as created:
    assert created
    first = json.loads(storage.read(address / lock.LOCK))
    with pytest.raises(UserError, match=r'run is in use by process \d+ of .*, for 0 min'), lock.hold(address):
      pass
    time.sleep(1)
    renewed = json.loads(storage.read(address / lock.LOCK))
    assert renewed['renewed'] > first['renewed'] and renewed['token'] == first['token']
  assert storage.files(address) == []
  storage.write_bytes(address / lock.LOCK, _owner())
  with pytest.raises(UserError, match='in use by process .* on elsewhere;'), lock.hold(address):
    pass
  storage.write_bytes(address / lock.LOCK, _owner(renewed=0))
  with lock.hold(address):
    assert json.loads(storage.read(address / lock.LOCK))['pid'] == os.getpid()
  assert 'on elsewhere, is dead; this one resumes it' in capsys.readouterr().out

  storage.write_bytes(address / lock.LOCK, _owner(renewed=0))  # a clock that is wrong, and an owner that lives
  stop = threading.Event()

  def renew():
    for number in range(1, 100):
      if stop.wait(0.1):
        return
      storage.write_bytes(address / lock.LOCK, _owner(renewed=number))

  thread = threading.Thread(target=renew)
  thread.start()
  try:
    with pytest.raises(UserError, match='in use by process .* on elsewhere'), lock.hold(address):
      pass
  finally:
    stop.set()
    thread.join()


@BOTH
def test_a_run_whose_lock_was_taken_stops(address):
  program = (
    'import sys, time\n'
    'from dsdm_jax.core import lock, storage\n'
    'lock.TOUCH_SECONDS = 0.2\n'
    'with lock.hold(storage.locate(sys.argv[1])):\n'
    '  print("held", flush=True)\n'
    '  time.sleep(60)\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', program, str(address)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as run:
    assert run.stdout.readline() == 'held\n'
    storage.write_bytes(address / lock.LOCK, _owner())
    error = run.communicate(timeout=60)[1]
  assert run.returncode == 2
  assert (
    error == f'dsdm_jax: the lock {address}/lock.json was taken from this run, which stops; finished stages are kept\n'
  )
  assert json.loads(storage.read(address / lock.LOCK))['host'] == 'elsewhere', 'the other run keeps it'


@BOTH
def test_whole_run_and_job_refuse_each_other(address):
  with lock.hold(address, job=0), lock.hold(address, job=1):
    with pytest.raises(UserError, match='is in use by'), lock.hold(address):
      pass
    assert len(storage.files(address)) == 2, 'the refused run leaves no lock'
  with lock.hold(address), pytest.raises(UserError, match='is in use by'), lock.hold(address, job=0):
    pass
  assert storage.files(address) == []


# Writes like a stage: six files, each noted as complete, and one that a library writes. The process kills itself
# before the write to the store whose number is its argument.
STAGE = """
import os, signal, sys
import s3fs
from dsdm_jax.core import artifacts, object_store, storage
from dsdm_jax.core.artifacts import Cost, Identity

workdir, put = storage.locate(sys.argv[1]), object_store._call

def stage(last):
  writes = []
  def counted(address, function, *arguments, **options):
    if function.__name__ in ('pipe_file', 'put', 'call_s3', 'cp_file', '_pipe_file', '_put') and function.__name__:
      writes.append(address)
      if len(writes) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(address, function, *arguments, **options)
  object_store._call = counted
  made = 0
  identity = Identity('pool', 1, {'seed': 0}, {})
  attempt = artifacts.begin(workdir, identity)
  for number in range(6):
    file = attempt / f'part_{number}.bin'
    if not storage.is_marked(file):
      storage.write_bytes(file, bytes([number]) * 1_000)
      storage.mark(file)
      made += 1
  with storage.uploading(attempt / 'library') as folder:
    (folder / 'x').write_bytes(b'x' * 1_000)
  cost = Cost(attempt)
  cost.save()
  artifacts.commit(workdir, identity, {}, cost)
  return made

for line in sys.stdin:  # forked, so that the imports are paid once
  child = os.fork()
  if not child:
    made = stage(int(line))
    print(f'made {made}', flush=True)
    os._exit(0)
  print('killed' if os.waitpid(child, 0)[1] == signal.SIGKILL else 'ended', flush=True)
"""


def test_a_kill_before_any_write_commits_nothing_and_loses_nothing(address):
  """begin, 6 × (part and note), the library's file, cost and manifest: 16 writes, of which the long form kills each."""
  runs = subprocess.Popen(
    [sys.executable, '-c', STAGE, str(address)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )

  def run(last: int) -> list[str]:
    runs.stdin.write(f'{last}\n')
    runs.stdin.flush()
    lines = [runs.stdout.readline().strip()]
    return lines if lines == ['killed'] else [*lines, runs.stdout.readline().strip()]

  kills = 0
  for last in [*range(1, 17), 2, 9, 16, 5] if FAULTS else (4, 16):
    storage.delete(address)
    assert run(last) == ['killed'], last
    kills += 1
    assert artifacts.open_stage(address, 'pool') is None, 'nothing is committed'
    before = {name for name in storage.files(address) if storage.is_mark(name)}
    artifacts.sweep(address, ['pool'])
    assert before <= set(storage.files(address)), 'what is complete is kept'
    assert run(0) == [f'made {6 - len(before)}', 'ended'], 'and not made again'
    found = artifacts.open_stage(address, 'pool')
    found.verify()
    assert len(found.manifest['files']) == 7
    assert storage.read(found.path / 'part_5.bin') == b'\5' * 1_000
  assert (runs.communicate(timeout=30), runs.returncode) == (('', None), 0)
  assert kills == (20 if FAULTS else 2)


def test_each_byte_is_hashed_once_on_a_disk_and_by_the_store_elsewhere(address, tmp_path, monkeypatch):
  hashed, read = [], []
  sha256, file_digest, plain = storage.hashlib.sha256, storage.hashlib.file_digest, object_store.read

  def counted(data=b'', **options):
    hashed.append(len(data))
    return sha256(data, **options)

  def counted_file(file, *arguments):
    hashed.append(os.fstat(file.fileno()).st_size)
    return file_digest(file, *arguments)

  def counted_read(name):
    read.append(name.name)
    return plain(name)

  monkeypatch.setattr(storage.hashlib, 'sha256', counted)
  monkeypatch.setattr(storage.hashlib, 'file_digest', counted_file)
  monkeypatch.setattr(object_store, 'read', counted_read)
  size = 1_000_000
  for workdir, expected in ((tmp_path / 'run', 3 * size), (address, 0)):
    hashed.clear()
    attempt = artifacts.begin(workdir, IDENTITY)
    for number in range(2):
      storage.write_bytes(attempt / f'{number}.bin', bytes([number]) * size)
      storage.mark(attempt / f'{number}.bin')
      assert storage.is_marked(attempt / f'{number}.bin')
    with storage.uploading(attempt / 'library') as folder:
      (folder / 'x.bin').write_bytes(b'x' * size)
    time.sleep(0.1)  # a change right after a file is hashed could not be seen, so it would be hashed again
    artifacts.commit(workdir, IDENTITY, {}, Cost(attempt)).verify()
    artifacts.read(workdir, 'pool')
    large = [count for count in hashed if count >= size]
    assert sum(large) == expected, 'opening and checking hash nothing again'
  assert not [name for name in read if name.endswith('.bin')], 'nothing is downloaded for a checksum'


@pytest.mark.parametrize(
  ('workdir', 'words'),
  [
    ('s3://no-such-bucket/run', 's3://no-such-bucket does not exist; create that bucket'),
    ('az://bucket/run', 'addresses that begin with az:// need adlfs; pip install adlfs'),
    ('nfs4x://bucket/run', 'nfs4x:// is no address that fsspec knows'),
    ('gs://', "'gs://' is no address; give one such as gs://bucket/run"),
    ('gs:/bucket/run', "--workdir = 'gs:/bucket/run' is no address; write gs://bucket/run"),
    ('s3:bucket/run', "--workdir = 's3:bucket/run' is no address; write s3://bucket/run"),
    ('file://runs/a', "'file://runs/a' names a machine; write file:///runs/a"),
    ('s3://tests/a/../run', r"--workdir = .* contains '\.\.'; use a plain address"),
    ('memory://bucket/run', 'memory://bucket/run cannot hold a run, which TensorStore writes; use gs:// or s3://'),
    ('s3://tests/a*/run', r"--workdir = .* contains '\*'; use a plain address"),
  ],
)
def test_an_address_that_cannot_be_used_is_one_line(address, workdir, words):
  with pytest.raises(UserError, match=words):
    pipeline.run(quickstart.get_config(), workdir)


def test_a_store_that_refuses_is_one_line(address, monkeypatch, capsys):
  monkeypatch.delenv('AWS_ACCESS_KEY_ID')
  monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')
  monkeypatch.setenv('AWS_CONFIG_FILE', os.devnull)
  monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', os.devnull)
  object_store._system_of.cache_clear()
  try:
    with pytest.raises(StoreError, match=r'cannot be used \(.*[Cc]redentials.*\); check the address') as caught:
      pipeline.run(quickstart.get_config(), str(address))
  finally:
    object_store._system_of.cache_clear()
  assert exit_code(caught.value, 'dsdm_jax', lambda: str(address)) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith(f'dsdm_jax: {address} cannot be used')


def test_a_run_on_a_disk_imports_no_client():
  code = 'import sys\nfrom dsdm_jax import pipeline\nprint(sorted({"fsspec", "s3fs", "gcsfs"} & sys.modules.keys()))'
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True).stdout == '[]\n'


def test_scratch_of_a_killed_process_is_deleted_and_that_of_a_live_one_is_not(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  code = 'import os\nfrom dsdm_jax.core import storage\nwith storage.scratch() as folder:\n  os.kill(os.getpid(), 9)\n'
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == -9
  (left,) = (tmp_path / 'dsdm_jax' / 'objects' / 'scratch').iterdir()
  with storage.scratch() as first, storage.scratch() as second:
    assert not left.exists() and first.is_dir() and second.is_dir()
  assert not first.exists() and not second.exists()

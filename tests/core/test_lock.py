"""One run on a workdir, tried with real processes: the second is refused, the dead give way, of many only one wins."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dsdm_jax.core import lock, storage
from dsdm_jax.errors import UserError
from tests.conftest import ROOT

HOLDER = """
  import pathlib, sys, time
  from dsdm_jax import errors
  from dsdm_jax.core import lock
  lock.TOUCH_SECONDS = 0.05
  try:
    with lock.hold(pathlib.Path(sys.argv[1])):
      print('held', flush=True)
      sys.stdin.readline()
  except errors.UserError as error:
    print(f'refused: {error}', flush=True)
"""


@contextlib.contextmanager
def holder(workdir: Path):
  """A process that tries for the lock at once and, where it has it, keeps it until its input ends."""
  process = subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(HOLDER), str(workdir)],
    cwd=ROOT,
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  try:
    yield process
  finally:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
      stream.close()


def edit(workdir: Path, **changes) -> None:
  file = workdir / lock.LOCK
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_second_is_refused_and_told_by_whom(workdir):
  with holder(workdir) as first:
    assert first.stdout.readline() == 'held\n'
    with pytest.raises(UserError, match=f'in use by process {first.pid} of .+ on .+, for 0 min .+ delete') as refused:
      lock.hold(workdir).__enter__()
    assert '\n' not in str(refused.value)
    first.stdin.close()
    assert first.wait(10) == 0
  assert list(workdir.iterdir()) == []
  with lock.hold(workdir) as made:
    assert not made


def test_jobs_share_a_workdir_with_each_other_and_with_no_whole_run(workdir):
  with lock.hold(workdir, job=0), lock.hold(workdir, job=1):
    for job in (None, 1):
      with pytest.raises(UserError, match='is in use'):
        lock.hold(workdir, job).__enter__()
  with lock.hold(workdir), pytest.raises(UserError, match='is in use'):
    lock.hold(workdir, job=0).__enter__()
  assert list(workdir.iterdir()) == []


def test_same_process_is_refused_too(workdir):
  with lock.hold(workdir), pytest.raises(UserError, match=f'process {os.getpid()} '):
    lock.hold(workdir).__enter__()


@pytest.mark.parametrize('reaped', [True, False], ids=['gone', 'zombie'])
def test_dead_owner_gives_way(workdir, capsys, reaped):
  with holder(workdir) as first:
    assert first.stdout.readline() == 'held\n'
    first.send_signal(signal.SIGKILL)
    if reaped:
      first.wait()
    else:
      while lock._started(first.pid):
        time.sleep(0.001)
    with lock.hold(workdir):
      assert json.loads((workdir / lock.LOCK).read_text())['pid'] == os.getpid()
  assert f'process {first.pid}' in capsys.readouterr().out


def test_another_process_of_the_same_number_is_not_the_owner(workdir):
  with lock.hold(workdir):
    edit(workdir, started='1')
    taken = lock.hold(workdir)
    taken.__enter__()
    taken.__exit__(None, None, None)


DAY = 86_400


@pytest.mark.parametrize(
  ('age', 'touched', 'refused'),
  [
    (lock.DEAD_SECONDS / 2, False, True),
    (lock.DEAD_SECONDS * 2, False, False),
    (-DAY, False, False),  # a clock that is ahead, and the run is dead
    (-DAY, True, True),
    (DAY, True, True),  # a clock that is behind
    (lock.DEAD_SECONDS * 2, True, True),
  ],
)
def test_owner_on_another_machine_is_judged_by_its_touches(workdir, monkeypatch, age, touched, refused):
  held = lock.hold(workdir)
  held.__enter__()
  edit(workdir, machine='another', host='elsewhere', pid=1, since=time.time() - age)
  file = workdir / lock.LOCK
  os.utime(file, (time.time() - age,) * 2)
  monkeypatch.setattr(lock, 'TOUCH_SECONDS', 0.2)
  ended = threading.Event()

  def touch() -> None:
    while touched and not ended.wait(0.01):
      os.utime(file, (time.time() - age,) * 2)

  threading.Thread(target=touch).start()
  second = lock.hold(workdir)
  if refused:
    with pytest.raises(UserError, match='in use by process 1 of .* on elsewhere; wait'):
      second.__enter__()
  else:
    second.__enter__()
    second.__exit__(None, None, None)
  ended.set()
  held.__exit__(None, None, None)


def test_living_owner_touches_its_lock(workdir):
  with holder(workdir) as first:
    assert first.stdout.readline() == 'held\n'
    os.utime(workdir / lock.LOCK, (0, 0))
    limit = time.monotonic() + 10
    while (workdir / lock.LOCK).stat().st_mtime == 0:
      assert time.monotonic() < limit
      time.sleep(0.01)


def test_owner_whose_lock_was_taken_stops(workdir):
  with holder(workdir) as first:
    assert first.stdout.readline() == 'held\n'
    edit(workdir, token='of another')
    assert first.wait(10) == 2
    assert 'was taken from this run' in first.stderr.read()
  assert (workdir / lock.LOCK).is_file()


def test_of_many_after_one_that_died_only_one_gets_it(workdir):
  """Six at once find the lock of a dead process."""
  with lock.hold(workdir):
    edit(workdir, started='1')
    with contextlib.ExitStack() as stack:
      processes = [stack.enter_context(holder(workdir)) for _ in range(6)]
      answers = [next(line for line in p.stdout if 'is dead' not in line) for p in processes]
  assert answers.count('held\n') == 1
  assert sum(line.startswith('refused: ') for line in answers) == 5


WHOLE = {'token': 't', 'user': 'u', 'host': 'h', 'machine': 'm', 'pid': 1, 'started': '1', 'since': 1.0}


@pytest.mark.parametrize('job', [None, 0])
@pytest.mark.parametrize(
  'content',
  ['', '{"pid"', '[]', '{}', '[' * 100_000, '"x"', 'null', '\ufeff{}']
  + [
    json.dumps(WHOLE | change)
    for change in (
      {'pid': 'one'},
      {'pid': None},
      {'pid': True},
      {'pid': 1.5},
      {'since': 'now'},
      {'since': 1e300},
      {'since': None},
      {'started': 3},
      {'machine': ['m']},
      {'host': None},
      {'user': {}},
      {'token': 1},
    )
  ],
)
def test_a_file_that_is_no_lock_is_named_and_stays(workdir, content, job):
  file = workdir / lock.LOCK
  file.write_text(content)
  with pytest.raises(UserError, match=f'^{file} is no lock of dsdm_jax; if no run uses {workdir}, delete that file'):
    lock.hold(workdir, job).__enter__()
  assert file.read_text() == content


@pytest.mark.parametrize('error', [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize('times', [2, 99])
def test_a_stale_lock_is_read_again(workdir, monkeypatch, error, times):
  monkeypatch.setattr(storage, '_STALE_SECONDS', (0.001,) * 3)
  left, read = [times], Path.read_bytes

  def fail(path: Path) -> bytes:
    left[0] -= 1
    if left[0] >= 0:
      raise OSError(error, os.strerror(error), str(path))
    return read(path)

  monkeypatch.setattr(Path, 'read_bytes', fail)
  if (error, times) == (errno.ESTALE, 2):
    with lock.hold(workdir):
      pass
    return
  with pytest.raises(OSError, match=os.strerror(error)) as raised:
    lock.hold(workdir).__enter__()
  assert raised.value.errno == error
  assert left[0] == times - (4 if error == errno.ESTALE else 1)


def test_folder_in_which_nothing_came_goes_again(tmp_path):
  with lock.hold(tmp_path / 'run') as made:
    assert made
  assert list(tmp_path.iterdir()) == []
  with lock.hold(tmp_path / 'run'):
    (tmp_path / 'run' / 'pool').mkdir()
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['pool']

"""One run at a time on a workdir: a lock file that names its owner. The lock of a dead owner is removed.

On the machine of the owner, its process number and start time show whether it is alive. From another machine or
container, only the lock file does, which an owner touches every few seconds. Clocks of two machines may differ, so a
lock that looks old, or comes from the future, is watched for some seconds before it is taken.

In an object store the lock is one object. It is taken, renewed and taken over by conditional writes, so of several runs
one succeeds, and a run that was taken for dead notices that its lock has changed.
"""

import contextlib
import errno
import fnmatch
import functools
import getpass
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsdm_jax.core import stopping, storage
from dsdm_jax.core.storage import Address, Location
from dsdm_jax.errors import UserError, visible

LOCK = 'lock.json'
_JOBS = 'lock_job_*.json'  # of jobs, which share a workdir with each other and not with a whole run
TOUCH_SECONDS = 10.0
DEAD_SECONDS = 120.0  # without a touch, for an owner on another machine
_OWNER = {'token': str, 'user': str, 'host': str, 'machine': str, 'pid': int, 'since': (int, float)}


@contextlib.contextmanager
def hold(workdir: Location, job: int | None = None) -> Iterator[bool]:
  """Locks `workdir` for this process and creates it when missing; yields whether it did.

  A folder that it created is deleted again if it is empty at the end.

  Args:
    job: number of one of several jobs that work there at once; None for a run that needs the folder for itself.

  Raises:
    UserError: another run holds the lock; the message says which, where and for how long.
  """
  created = not storage.exists(workdir)
  if isinstance(workdir, Path):
    try:
      workdir.mkdir(parents=True)
      created = True
    except FileExistsError:
      created = False
  file = workdir / (LOCK if job is None else _JOBS.replace('*', str(job)))
  token = secrets.token_hex(8)
  stop = threading.Event()
  try:
    _take(file, token)
    stopping.when_stopped(functools.partial(_release, file, token))
    thread = threading.Thread(target=_touch, args=(file, token, stop), name='lock', daemon=True)
    thread.start()
    try:
      yield created
    finally:
      stop.set()
      thread.join()
      _release(file, token)
  finally:
    if created:
      storage.delete_empty_folder(workdir)


def _take(file: Location, token: str) -> None:
  if isinstance(file, Address):
    _take_object(file, token)
    return
  with storage.guarded(file.parent):  # two processes must not take the same dead lock
    whole = file.parent / LOCK
    for other in [whole, *file.parent.glob(_JOBS)] if file == whole else [whole, file]:
      owner = _owner(other)
      if not owner:
        continue
      if _alive(owner, other):
        raise UserError(_refusal(other, owner))
      _say_dead(file, owner)
      other.unlink(missing_ok=True)
    storage.write_json(file, _this(token))


def _take_object(file: Address, token: str) -> None:
  whole = file.parent / LOCK
  jobs = [path for path in storage.children(file.parent) if fnmatch.fnmatch(path.name, _JOBS)]
  others = [other for other in ([whole, *jobs] if file == whole else [whole]) if other != file]
  mine = storage.as_json(_this(token))
  while True:
    known = storage.read_bytes(file)
    if known is not None:
      owner = _owner(file, known)
      if _alive(owner, file):
        raise UserError(_refusal(file, owner))
      _say_dead(file, owner)
    if storage.replace(file, mine, known):
      break
  try:
    # After this run's own lock is there: of a whole run and a job that start at once, at most one goes on.
    for other in others:
      known = storage.read_bytes(other)
      if known is None:
        continue
      owner = _owner(other, known)
      if _alive(owner, other):
        raise UserError(_refusal(other, owner))
      _say_dead(other, owner)
      if storage.replace(other, mine, known):
        storage.unlink(other)
  except BaseException:
    _release(file, token)
    raise


def _say_dead(file: Location, owner: Mapping[str, Any]) -> None:
  dead = f'{file.parent}: the run that held it, {_name(owner)}, is dead; this one resumes it'
  sys.stdout.write(f'{visible(dead)}\n')


def _this(token: str) -> dict[str, Any]:
  """What the lock of this process says."""
  now = round(time.time(), 1)
  return {
    'token': token,
    'user': _user(),
    'host': socket.gethostname(),
    'machine': _machine(),
    'pid': os.getpid(),
    'started': _started(os.getpid()),
    'since': now,
    'renewed': now,  # again and again in an object store, where nothing else shows that the owner is alive
  }


def _release(file: Location, token: str) -> None:
  with contextlib.suppress(UserError, OSError):  # changed by hand, or a disk that fails: an error of the run counts
    if _owner(file).get('token') == token:
      storage.unlink(file)


def _owner(file: Location, data: bytes | None = None) -> Mapping[str, Any]:
  """What the lock says; empty where there is none.

  Raises:
    UserError: the file is no lock of this program, which writes locks whole.
  """
  data = storage.read_bytes(file) if data is None else data
  if data is None:
    return {}
  try:
    owner = json.loads(data)
    fits = all(type(owner[key]) in (kind if isinstance(kind, tuple) else (kind,)) for key, kind in _OWNER.items())
    if fits and isinstance(owner['started'], (str, type(None))) and abs(owner['since']) < 1e12:
      return owner
  except (ValueError, KeyError, TypeError, RecursionError):
    pass
  raise UserError(f'{file} is no lock of dsdm_jax; if no run uses {file.parent}, delete that file and start again')


def _alive(owner: Mapping[str, Any], file: Location) -> bool:
  if owner['machine'] == _machine():
    return _started(owner['pid']) == owner['started']
  touched = _touched(file)
  if touched is None:  # its owner has just ended
    return False
  if -TOUCH_SECONDS < _now(file.parent) - touched < DEAD_SECONDS:
    return True
  sys.stdout.write(visible(f'{file.parent}: watching whether {_name(owner)} is still alive') + '\n')
  sys.stdout.flush()
  end = time.monotonic() + 3 * TOUCH_SECONDS
  while time.monotonic() < end:
    time.sleep(TOUCH_SECONDS / 20)
    if _touched(file) not in (touched, None):
      return True
  return False


def _touched(file: Location) -> float | None:
  """Time of the last touch; None if there is no such file."""
  if isinstance(file, Address):
    owner = _owner(file)
    return float(owner.get('renewed', owner['since'])) if owner else None
  try:
    with open(file, 'rb') as opened:  # a shared disk looks at the server's file when it is opened
      return os.fstat(opened.fileno()).st_mtime
  except FileNotFoundError:
    return None
  except OSError as error:
    if error.errno != errno.ESTALE:  # replaced on another machine at this moment
      raise
    return None


def _machine() -> str:
  """Where a process number is valid: this boot of this kernel, and the container."""
  try:
    boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return socket.gethostname()


def _started(pid: int) -> str | None:
  """Start time of process `pid` in kernel ticks, which tells it from a later process of that number; None if none."""
  try:
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return None if Path('/proc/self').exists() or not _signalable(pid) else 'running'
  return None if fields[0] in 'ZX' else fields[19]  # a zombie has ended


def _signalable(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _now(folder: Location) -> float:
  """The time of the file system, which on a shared disk may differ from this machine's."""
  if isinstance(folder, Address):
    return time.time()
  with tempfile.NamedTemporaryFile(dir=folder, prefix=f'.{LOCK}.') as probe:
    return os.fstat(probe.fileno()).st_mtime


def _user() -> str:
  try:
    return getpass.getuser()
  except (KeyError, OSError):  # a container's user may have no name
    return str(os.getuid())


def _name(owner: Mapping[str, Any]) -> str:
  return f'process {owner["pid"]} of {owner["user"]} on {owner["host"]}'


def _refusal(file: Location, owner: Mapping[str, Any]) -> str:
  minutes, seconds = divmod(max(0, round(time.time() - owner['since'])), 60)
  hours, minutes = divmod(minutes, 60)
  since = f', for {hours} h {minutes} min' if hours else f', for {minutes} min {seconds} s'
  if owner['machine'] != _machine():  # whose clock may differ
    since = ''
  return (
    f'{file.parent} is in use by {_name(owner)}{since}; wait for it, take another --workdir, or, if that run is '
    f'surely gone, delete {file} and start again'
  )


def _touch(file: Location, token: str, stop: threading.Event) -> None:
  """Touches the lock to show that its owner is alive; ends the process if another run has taken the lock."""
  while not stop.wait(TOUCH_SECONDS):
    try:
      data = storage.read(file)
      owner = json.loads(data)
      if owner['token'] == token:
        if isinstance(file, Path):
          os.utime(file)
        else:  # where it is taken at this moment, the next look sees it
          storage.replace(file, storage.as_json({**owner, 'renewed': round(time.time(), 1)}), data)
        continue
    except FileNotFoundError:
      pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a shared disk that fails for a moment
      continue
    # Two runs that write in one folder would damage both; what this one has finished is complete.
    taken = f'the lock {file} was taken from this run, which stops; finished stages are kept'
    sys.stderr.write(f'dsdm_jax: {visible(taken)}\n')
    sys.stderr.flush()
    os._exit(2)

"""One run at a time on a workdir: a lock file that says whose it is, and that a dead owner does not keep.

Whether an owner lives is known for certain on the machine it runs on: its process is there, started when the lock says.
From another machine, or another container, only the lock's age tells: an owner touches the file every few seconds.
"""

import contextlib
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

from dsdm_jax.core import storage
from dsdm_jax.errors import UserError

LOCK = 'lock.json'
_JOBS = 'lock_job_*.json'  # of jobs, which share a workdir with each other and with no whole run
TOUCH_SECONDS = 10.0
DEAD_SECONDS = 120.0  # without a touch, for an owner whose process cannot be seen


@contextlib.contextmanager
def hold(workdir: Path, job: int | None = None) -> Iterator[bool]:
  """Keeps `workdir` for this process, and makes it when missing: yields whether it did.

  A folder that it made, and in which nothing was left, goes again.

  Args:
    job: number of one of several that work there at once; None is a run that wants the folder for itself.

  Raises:
    UserError: another run has it; says whose, where and for how long.
  """
  try:
    workdir.mkdir(parents=True)
    made = True
  except FileExistsError:
    made = False
  file = workdir / (LOCK if job is None else _JOBS.replace('*', str(job)))
  token = secrets.token_hex(8)
  stop = threading.Event()
  try:
    _take(file, token)
    thread = threading.Thread(target=_touch, args=(file, token, stop), name='lock', daemon=True)
    thread.start()
    try:
      yield made
    finally:
      stop.set()
      thread.join()
      if _owner(file).get('token') == token:
        file.unlink(missing_ok=True)
  finally:
    if made:
      with contextlib.suppress(OSError):  # not empty: that is the run
        workdir.rmdir()


def _take(file: Path, token: str) -> None:
  with _guarded(file.parent):
    whole = file.parent / LOCK
    for other in [whole, *file.parent.glob(_JOBS)] if file == whole else [whole, file]:
      owner = _owner(other)
      if not owner:
        continue
      if _alive(owner, other):
        raise UserError(_refusal(other, owner))
      sys.stdout.write(f'{file.parent}: the run that had it, {_name(owner)}, is dead; this one goes on from there\n')
      other.unlink(missing_ok=True)
    storage.write_json(file, {
      'token': token, 'user': _user(), 'host': socket.gethostname(), 'machine': _machine(), 'pid': os.getpid(),
      'started': _started(os.getpid()), 'since': round(time.time(), 1),
    })  # fmt: skip


@contextlib.contextmanager
def _guarded(workdir: Path) -> Iterator[None]:
  """Two processes that find the same dead lock do not both take it, where the file system knows locks at all."""
  try:
    import fcntl
  except ImportError:  # not POSIX
    yield
    return
  folder = os.open(workdir, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(folder, fcntl.LOCK_EX)
    yield
  finally:
    os.close(folder)


def _owner(file: Path) -> Mapping[str, Any]:
  """What the lock says; empty where there is none. It is written at once, so one that is unreadable is nobody's."""
  try:
    owner = json.loads(file.read_bytes())
  except (FileNotFoundError, ValueError):
    return {}
  wanted = {'pid', 'started', 'machine', 'since', 'user', 'host'}
  return owner if isinstance(owner, dict) and wanted <= owner.keys() else {}


def _alive(owner: Mapping[str, Any], file: Path) -> bool:
  if owner['machine'] == _machine():
    return _started(int(owner['pid'])) == owner['started']
  try:
    return _now(file.parent) - file.stat().st_mtime < DEAD_SECONDS
  except FileNotFoundError:  # its owner has just ended
    return False


def _machine() -> str:
  """Names what a process number is valid in: this boot of this kernel, and the container."""
  try:
    boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return socket.gethostname()


def _started(pid: int) -> str | None:
  """When process `pid` began, in the kernel's own count, so that a later one of that number is another; None: none."""
  try:
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return None if Path('/proc/self').exists() or not _signalable(pid) else 'running'
  return None if fields[0] in 'ZX' else fields[19]  # a zombie runs no more


def _signalable(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _now(folder: Path) -> float:
  """The file system's own time, which on a shared disk need not be this machine's."""
  with tempfile.NamedTemporaryFile(dir=folder, prefix=f'.{LOCK}.') as probe:
    return os.fstat(probe.fileno()).st_mtime


def _user() -> str:
  try:
    return getpass.getuser()
  except (KeyError, OSError):  # a container's user may have no name
    return str(os.getuid())


def _name(owner: Mapping[str, Any]) -> str:
  return f'process {owner["pid"]} of {owner["user"]} on {owner["host"]}'


def _refusal(file: Path, owner: Mapping[str, Any]) -> str:
  minutes, seconds = divmod(max(0, round(time.time() - owner['since'])), 60)
  hours, minutes = divmod(minutes, 60)
  since = f'{hours} h {minutes} min' if hours else f'{minutes} min {seconds} s'
  return (
    f'{file.parent} is in use by {_name(owner)}, for {since}; wait for it, take another --workdir, or, if that run is '
    f'surely gone, delete {file} and start again'
  )


def _touch(file: Path, token: str, stop: threading.Event) -> None:
  """Shows that the owner lives; ends the process when the lock has become another's."""
  while not stop.wait(TOUCH_SECONDS):
    try:
      if json.loads(file.read_bytes())['token'] == token:
        os.utime(file)
        continue
    except FileNotFoundError:
      pass
    except (OSError, ValueError):  # a shared disk that is away for a moment
      continue
    # Two that write in one folder would spoil both; what this one has finished is whole.
    sys.stderr.write(f'dsdm_jax: the lock {file} was taken from this run, which stops; finished stages are kept\n')
    sys.stderr.flush()
    os._exit(2)

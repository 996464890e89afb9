"""JAX's cache of compiled programs, in the user's cache folder, with a checksum of each entry.

JAX runs what it reads from the cache, and checks neither where it comes from nor whether it is whole: one flipped byte
can end the process with a signal. So no workdir contains a cache. A process notes the checksums of the entries after
each stage and when it ends, and the next start deletes entries that are not as noted. Each process that uses the cache
also leaves a file beside it, in which Python's fault handler writes when a fatal signal ends the process; the next
start then empties it.
"""

import atexit
import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from dsdm_jax.core import stopping, storage

_MOST_BYTES = 2 * 2**30  # of entries; above it, the oldest are deleted
_CHECKSUMS = 'checksums.json'  # entry → SHA-256
_ALONE, _OF_SEVERAL = '.alone', '.several'  # suffixes of canaries
_SETTLED = 0.5  # seconds since the last write to an entry that is whole
_calls: list[Callable[[], None]] = []  # that are due when the process ends
_ABORTED = 'Aborted'  # how JAX ends a process whose partner was lost, too


def folder() -> Path:
  """The cache of this user for this kind of CPU: programs that are compiled for one kind need not run on another."""
  info = Path('/proc/cpuinfo')
  flags = next((line for line in info.read_text().splitlines() if 'flags' in line), '') if info.is_file() else ''
  kind = hashlib.sha256(f'{platform.platform()} {flags}'.encode()).hexdigest()[:12]
  base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(base) / 'dsdm_jax' / 'xla' / kind


def start(alone: bool = True) -> tuple[Path | None, str]:
  """Opens the cache for this process.

  Args:
    alone: whether this is the only process of its run.

  Returns:
    The folder, or None if it cannot be written; a line about a cache that was emptied, or ''.
  """
  line = ''
  try:
    cache = folder()
    canaries = cache / 'running'
    canaries.mkdir(parents=True, exist_ok=True)
    crash = _crash(canaries)
    known, kept, damaged, size = _known(cache), {}, 0, 0
    for path, state in sorted(_entries(cache), key=lambda entry: -entry[1].st_mtime):
      size += state.st_size
      noted = known.get(path.name)
      if noted is not None and not crash and size <= _MOST_BYTES and noted == storage.sha256(path):
        kept[path.name] = noted
      else:
        path.unlink(missing_ok=True)
        damaged += noted is not None and size <= _MOST_BYTES
    if kept != known:
      storage.write_json(cache / _CHECKSUMS, kept)  # a program that is compiled again need not have the same bytes
    if crash:
      line = f'an earlier start crashed ({crash}); the cache of compiled programs in {cache} may be damaged: emptied it'
    elif damaged:
      line = f'{damaged} compiled programs in {cache} have changed since they were written: deleted them'
    _at_end(functools.partial(note, cache))
    stopping.when_stopped(functools.partial(note, cache, _SETTLED))
    _put_canary(canaries / f'{os.getpid()}{_ALONE if alone else _OF_SEVERAL}')
  except (OSError, RuntimeError):  # no home, or one that cannot be written: every start compiles
    return None, line
  return cache, line


def _entries(cache: Path) -> list[tuple[Path, os.stat_result]]:
  return [(path, path.stat()) for path in cache.iterdir() if path.is_file() and path.name != _CHECKSUMS]


def _known(cache: Path) -> dict[str, str]:
  try:
    return dict(json.loads(storage.read_bytes(cache / _CHECKSUMS) or b'{}'))
  except (ValueError, TypeError, RecursionError):
    return {}


def note(cache: Path, settled: float = 0.0) -> None:
  """Notes the checksums of entries that are new. Those that a killed process did not note are compiled again.

  So is one that has changed in the last `settled` seconds: a process that is stopped may be writing it.
  """
  with contextlib.suppress(OSError, RuntimeError):
    known = _known(cache)
    before = time.time() - settled
    whole = [path for path, state in _entries(cache) if path.name in known or not settled or state.st_mtime < before]
    noted = {path.name: known.get(path.name) or storage.sha256(path) for path in whole}
    if noted != known:
      storage.write_json(cache / _CHECKSUMS, noted)


def _at_end(call: Callable[[], None]) -> None:
  _calls.append(call)
  atexit.register(end)


def end() -> None:
  """What is due when the process ends, for one that ends without the functions of `atexit`."""
  while _calls:
    _calls.pop()()


def _crash(canaries: Path) -> str:
  """The signal that ended an earlier process, or ''. Canaries of processes that have ended are deleted."""
  import fcntl

  crash = ''
  for path in canaries.iterdir():
    with contextlib.suppress(FileNotFoundError), open(path, 'r+b') as file:  # another start may delete it
      written = file.readline(200).decode('ascii', 'replace').strip().rpartition(': ')[2]
      with contextlib.suppress(BlockingIOError):  # its process is alive
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        if written and not (path.suffix == _OF_SEVERAL and _ABORTED in written):
          crash = written
  return crash


def _put_canary(path: Path) -> None:
  import fcntl

  if faulthandler.is_enabled():  # its output goes where somebody wants it
    return
  file = open(path, 'wb')  # noqa: SIM115  open until the process ends
  fcntl.flock(file, fcntl.LOCK_SH)
  faulthandler.enable(file)
  _at_end(functools.partial(_remove, path, file))


def _remove(path: Path, file: object) -> None:
  del file
  faulthandler.disable()
  path.unlink(missing_ok=True)

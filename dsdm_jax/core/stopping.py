"""Ctrl-C and SIGTERM: one line, exit code 130 or 143, no traceback, and no work is lost.

A run can be killed at any moment and resumes (`core/artifacts.py`). So a stop needs no help from the code that runs: a
thread, which the signal wakes even while XLA compiles, prints where the run is and ends the process. Only training asks
it to wait, from its first step until the state is saved. A second signal ends the process at once.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

from dsdm_jax.errors import visible

GO_ON = 'the same command goes on'
_SIGNALS = signal.SIGINT, signal.SIGTERM
_CLEAN_UP_SECONDS = 2.0


class _State:
  """Of this process."""

  watched = False
  received = 0  # number of the first signal
  stderr = 2  # also while a library's output is withheld
  holds = 0  # how many parts of the program have work that they will save
  where: Callable[[], str] | None = None  # where the run is, if there is one
  calls: list[Callable[[], None]] = []  # noqa: RUF012


_changed = threading.Condition()


def install() -> None:
  """Handles both signals in this process from now on. Does nothing in another thread than the main one."""
  if _State.watched or threading.current_thread() is not threading.main_thread():
    return
  _State.watched = True
  with contextlib.suppress(OSError):  # closed
    _State.stderr = os.dup(2)
  reads, writes = os.pipe()
  os.set_blocking(writes, False)
  signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(reads,), name='stopping', daemon=True).start()
  for number in _SIGNALS:
    signal.signal(number, _receive)


def _receive(number: int, _: object) -> None:
  """The handler, which runs when the main thread is in Python; the thread learns of the signal at once."""
  _State.received = _State.received or number


def _watch(reads: int) -> None:
  stops = False
  while True:
    for number in os.read(reads, 64):
      if number in _SIGNALS and stops:
        os._exit(128 + number)
      if number in _SIGNALS:
        stops, _State.received = True, number
        threading.Thread(target=_stop, name='stop', daemon=True).start()


def _stop() -> None:
  with _changed:
    _changed.wait_for(lambda: not _State.holds)
  line = visible(f'dsdm_jax: stopped {_State.where()}; {GO_ON}' if _State.where else 'dsdm_jax: stopped')
  ends = threading.Thread(target=_end, daemon=True)
  with contextlib.suppress(OSError):
    if os.isatty(_State.stderr):
      os.write(_State.stderr, b'\r\x1b[K')  # the line of progress
    os.write(_State.stderr, f'{line}\n'.encode(errors='backslashreplace'))
  ends.start()
  ends.join(_CLEAN_UP_SECONDS)
  os._exit(128 + _State.received)


def _end() -> None:
  for child in multiprocessing.active_children():  # they would end by themselves, but later
    child.kill()
  for call in reversed(_State.calls):
    with contextlib.suppress(Exception):
      call()


def when_stopped(call: Callable[[], None]) -> None:
  """Calls `call`, which takes a fraction of a second, when this process is stopped, beside the main thread."""
  _State.calls.append(call)


def say_where(where: Callable[[], str]) -> None:
  """Sets the function that completes the line 'stopped …', such as 'in features at row 2,048 of 4,007'."""
  _State.where = where


def wait_if_stopped() -> None:
  """Does not return if the process is being stopped: errors that follow from it, such as lost workers, are no news."""
  if _State.watched and _State.received and not _State.holds:
    time.sleep(60)


class Hold:
  """Inside, after `begin`, a signal does not end the process, because there is work to save.

  Who holds looks at `requested`, saves when it is not 0, and raises `Stopped`. Without `install`, as in a notebook, it
  also handles SIGTERM, in the main thread only.
  """

  def __enter__(self) -> 'Hold':
    self._holds = False
    self._mine = threading.current_thread() is threading.main_thread()
    self._previous = signal.getsignal(signal.SIGTERM)
    if self._mine:  # also after `install`: the start of several processes installs a handler of JAX
      signal.signal(signal.SIGTERM, _receive)
    return self

  def begin(self) -> None:
    """From now on there is work to save."""
    if not self._holds:
      with _changed:
        self._holds, _State.holds = True, _State.holds + 1

  @property
  def requested(self) -> int:
    """The number of the signal that was received, or 0."""
    return _State.received

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if self._holds and not (kind and _State.received):  # else the error is on its way to `main`, which prints it
      with _changed:
        _State.holds -= 1
        _changed.notify_all()
    if self._mine:
      signal.signal(signal.SIGTERM, self._previous)
    if not _State.watched:
      _State.received = 0

"""SIGTERM, as sent to preemptible machines and by job schedulers: asked to stop, not killed yet."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], bool]]:
  """In here SIGTERM does not end the process; yields a function that says whether one came.

  Outside the main thread, where Python lets nobody listen, nothing is watched.
  """
  came = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield came.is_set
    return
  before = signal.signal(signal.SIGTERM, lambda *_: came.set())
  try:
    yield came.is_set
  finally:
    signal.signal(signal.SIGTERM, before)

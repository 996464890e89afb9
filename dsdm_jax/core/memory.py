"""Memory of the process, as far as Python can say anything about it."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> None:
  """Lets glibc keep what is freed, in place of giving it back to the system and asking for it again.

  XLA on CPU allocates the temporary buffers of a step anew each time. As they are large, glibc maps and unmaps them,
  and the kernel clears each page on first touch: at the quickstart's size 16,000 page faults a step, a third of it.
  Does nothing where the C library has no mallopt (macOS, musl).
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
  """Gives what is free back to the system: what the process holds after that is in use, or leaked."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if malloc_trim is not None:
    malloc_trim(0)


def drop_storage_metrics() -> None:
  """Has Orbax leave out how many bytes TensorStore moved, which it asks for before and after each save and restore.

  Each time TensorStore 0.1.86 lists its metrics it leaks 4 kB, and no option of Orbax turns that off. Nothing but a
  line of Orbax's log and a scalar for `jax.monitoring` is made of the number; 0 stands for none.
  """
  from orbax.checkpoint._src.serialization import tensorstore_utils

  functions = vars(tensorstore_utils)
  if 'get_tensorstore_raw_bytes' in functions:
    functions['get_tensorstore_raw_bytes'] = lambda direction=None: 0

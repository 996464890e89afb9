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

"""Memory of the process, as far as Python can say anything about it."""

import ctypes
import functools
import glob
import os
import sys
import types
from typing import Any

# Which the drivers of NVIDIA, Google (two kinds) and AMD make.
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*', '/dev/kfd')
_HUGE_PAGES, _ARENAS = 'glibc.malloc.hugetlb', 'glibc.malloc.arena_max'
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def use_huge_pages(one_arena: bool = False) -> None:
  """Starts this program again, as the same process, with glibc told to ask the kernel for huge pages.

  XLA on CPU allocates the temporary buffers of a step anew each time. What is larger than 64 MiB glibc maps and unmaps,
  and the kernel clears each page of 4 KiB on first touch: 151,000 faults and 0.31 s of processor time for features of
  4,096 tokens at 4 layers × 256, in 0.76 s; with pages of 2 MiB 660 and 0.05 s, in 0.57 s. glibc (2.35 and later) reads
  the setting when a process starts and never again, hence the second start; call this first, and only as a program.

  Does nothing where GLIBC_TUNABLES has the setting, whatever it says, on other systems than Linux, where there is an
  accelerator, and where another program, such as a notebook's kernel, runs this one's module.

  Args:
    one_arena: all threads allocate from one pool of memory, from which nothing is unmapped (`keep_freed_memory`). No
      page is cleared twice then, but what is small settles between what is large: in the long run a program may hold
      several times what it uses.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  of_program = getattr(sys.modules['__main__'], '__spec__', None)
  is_ours = of_program is not None and of_program.name.startswith('dsdm_jax.')
  if sys.platform != 'linux' or _HUGE_PAGES in tunables or not is_ours or not _on_cpu():
    return
  wanted = [tunables, f'{_HUGE_PAGES}=1', f'{_ARENAS}=1' if one_arena else '']
  os.environ['GLIBC_TUNABLES'] = ':'.join(filter(None, wanted))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_cpu() -> bool:
  """Whether JAX will run on CPU, told without asking it."""
  return os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(map(glob.glob, _ACCELERATORS))


def keep_freed_memory() -> None:
  """Lets glibc keep what is freed, in place of giving it back to the system and asking for it again.

  Of what a thread's arena has room for, 64 MiB at most, pages are then cleared once and not in every step. Does nothing
  where the C library has no mallopt (macOS, musl).
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


def avoid_storage_leaks() -> None:
  """Has Orbax ask TensorStore for nothing that TensorStore 0.1.86 leaks: descriptions, and its metrics.

  `to_json()` leaves behind what it returns, and Orbax calls it for each array that it saves or restores, to learn how
  TensorStore would write {'driver': 'file', 'path': ...}: as it stands. Metrics, of which 4 kB are left behind, are
  listed before and after each save and restore, to say how many bytes TensorStore moved; nothing but a line of Orbax's
  log and a scalar for `jax.monitoring` is made of that number, and 0 stands for none. No option of Orbax turns either
  off.
  """
  from orbax.checkpoint._src.serialization import tensorstore_utils

  module = vars(tensorstore_utils)
  if 'get_tensorstore_raw_bytes' in module:
    module['get_tensorstore_raw_bytes'] = lambda direction=None: 0
  tensorstore = module.get('ts')
  if isinstance(tensorstore, types.ModuleType):
    stores = types.SimpleNamespace(Spec=functools.partial(_described, tensorstore), open=tensorstore.KvStore.open)
    module['ts'] = types.SimpleNamespace(**vars(tensorstore) | {'KvStore': stores})


class _Folder(dict[str, Any]):
  """{'driver': 'file', 'path': ...}, which is its own description."""

  def to_json(self) -> dict[str, Any]:
    return dict(self)


def _described(tensorstore: types.ModuleType, json: Any) -> Any:
  """What `tensorstore.KvStore.Spec(json)` does for what Orbax does with it."""
  plain = isinstance(json, dict) and json.keys() == {'driver', 'path'} and json['driver'] == 'file'
  return _Folder(json) if plain else tensorstore.KvStore.Spec(json)

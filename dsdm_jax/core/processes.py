"""Several processes as one run: who they are, what process 0 decides for all, and how they end together.

Every process runs the same program on the same config, but for `distributed.process`, and sees the same workdir.
Process 0 looks at the disk, decides and commits; the others take its answer. Without `distributed.coordinator` there is
one process, and everything here costs nothing.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from dsdm_jax.core import rendezvous
from dsdm_jax.core.exit_notice import LastWord
from dsdm_jax.errors import UserError

_T = TypeVar('_T')

AUTO = 'auto'
_OWN = ('distributed.process',)  # settings that differ between the processes of one run
_LEAVE_MILLISECONDS = 30_000  # for the others to say their last line before process 0 takes the connection down
_LAST_WORD_SECONDS = 2.0  # for the others to print and end after that
_FOREVER_MILLISECONDS = 30 * 24 * 3_600 * 1_000  # a lost process ends a wait long before
_turns = itertools.count()


class _State:
  """Where this process stands in the run that `running` connected."""

  processes, process = 1, 0
  last_word: LastWord | None = None


@contextlib.contextmanager
def running(config: ConfigDict, settings: Mapping[str, Any]) -> Iterator[None]:
  """Connects the processes that `config.distributed` names, and takes them apart at the end.

  Must come before the first look at a device. A failure of one process ends all: where the failing one can still speak,
  each prints why.

  Args:
    config: the whole config.
    settings: the same, flat, for the comparison between processes.

  Raises:
    UserError: a setting is wrong, processes disagree, or one did not come.
  """
  wanted = config.distributed
  if not wanted.coordinator:
    yield
    return
  _connect(wanted)
  _State.processes, _State.process = _connection().num_processes, _connection().process_id
  _State.last_word = LastWord(
    f'dsdm_jax: process {_State.process} was ended: another process of the run was lost, or this one was killed; see '
    'what the others said last, then start all of them again: work goes on where it stopped'
  )
  try:
    _check(wanted, settings)
    yield
    wait()
  except (UserError, OSError):
    _part()
    raise  # main says it, and `leave` ends the process
  except BaseException as error:  # noqa: BLE001  reported, and the process ends
    _say(error)
    _part()
    leave(1)
  import jax

  jax.distributed.shutdown()
  _withdraw()
  _State.processes, _State.process = 1, 0


def _connect(wanted: ConfigDict) -> None:
  import jax

  beats = {'heartbeat_timeout_seconds': wanted.heartbeat_seconds, 'initialization_timeout': wanted.start_seconds}
  if wanted.coordinator == AUTO:
    _check_slurm(os.environ)
    try:
      jax.distributed.initialize(**beats)
    except (ValueError, RuntimeError, OSError) as error:
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise UserError(
        f"distributed.coordinator = 'auto': this machine does not say what it is part of ({reason}); give 'host:port' "
        'with distributed.processes and distributed.process'
      ) from error
    return
  rendezvous.meet(wanted.coordinator, wanted.processes, wanted.process, wanted.start_seconds)
  jax.distributed.initialize(
    wanted.coordinator, wanted.processes, wanted.process, cluster_detection_method='deactivate', **beats
  )


def _check_slurm(environment: Mapping[str, str]) -> None:
  """Refuses a step with fewer tasks than GPUs on its node: under Slurm, JAX takes one GPU a task.

  Raises:
    UserError: GPUs would stay idle.
  """
  gpus, tasks = environment.get('SLURM_GPUS_ON_NODE', ''), environment.get('SLURM_STEP_TASKS_PER_NODE', '')
  counts: list[int] = []  # of each node; Slurm writes '8(x4),2'
  for count_, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', tasks):
    counts += [int(count_)] * int(times or 1)
  node = int(environment.get('SLURM_NODEID', 0))
  if not gpus.isdecimal() or node >= len(counts) or environment.get('JAX_PLATFORMS', '').startswith('cpu'):
    return
  if counts[node] < int(gpus):
    raise UserError(
      f"distributed.coordinator = 'auto': Slurm started {counts[node]} tasks on this node for its {gpus} GPUs, and JAX "
      f'takes one GPU a task; set srun --ntasks-per-node={gpus}, and distributed.processes to the tasks of all nodes'
    )


def _check(wanted: ConfigDict, settings: Mapping[str, Any]) -> None:
  if count() != wanted.processes:
    raise UserError(
      f'distributed.processes = {wanted.processes}, and {count()} processes found each other; set it to the number '
      'that you start (of machines, on a TPU pod), and start all of them'
    )
  common = {k: v for k, v in settings.items() if k not in _OWN}
  first = decide(lambda: common)
  common = json.loads(json.dumps(common))
  keys = [k for k in {**first, **common} if first.get(k) != common.get(k)]
  odd = [f'{k} is {first.get(k)!r} on process 0 and {common.get(k)!r}' for k in keys]
  for process, phrases in enumerate(gather(odd)):
    if phrases:
      raise UserError(f'{phrases[0]} on process {process}; start all processes with the same config')


def count() -> int:
  """Processes of the run; looks at no device."""
  return _State.processes


def is_first() -> bool:
  """Whether this process is the one that decides and commits."""
  return _State.process == 0


def decide(choose: Callable[[], _T]) -> _T:
  """What `choose` returns on process 0, on all: a value that JSON can hold. All processes must call, in one order.

  Raises:
    UserError: `choose` raised one on process 0.
    RuntimeError: it raised something else there.
  """
  if count() == 1:
    return choose()
  key, client = f'dsdm_jax/decide/{next(_turns)}', _client()
  if is_first():
    try:
      value = choose()
    except BaseException as error:
      said = {'error': str(error) or type(error).__name__, 'user': isinstance(error, (UserError, OSError))}
      client.key_value_set(key, json.dumps(said))
      raise
    client.key_value_set(key, json.dumps({'value': value}))
    return value
  said = json.loads(client.blocking_key_value_get(key, _FOREVER_MILLISECONDS))
  if 'error' in said:
    raise UserError(said['error']) if said['user'] else RuntimeError(f'process 0 failed: {said["error"]}')
  return said['value']


def gather(value: Any) -> list[Any]:
  """The JSON value of each process, in their order, on all of them."""
  if count() == 1:
    return [value]
  key, client = f'dsdm_jax/gather/{next(_turns)}', _client()
  client.key_value_set(f'{key}/{_State.process}', json.dumps(value))
  return [
    json.loads(client.blocking_key_value_get(f'{key}/{process}', _FOREVER_MILLISECONDS)) for process in range(count())
  ]


def wait() -> None:
  """Returns when all processes have come here. All must call, in one order with `decide` and `gather`."""
  if count() > 1:
    _client().wait_at_barrier(f'dsdm_jax/wait/{next(_turns)}', _FOREVER_MILLISECONDS)


def check_shared(folder: os.PathLike) -> None:
  """Checks that all processes see `folder`, which process 0 has just made or found.

  Raises:
    UserError: one does not.
  """
  if count() == 1:
    return
  name = hashlib.sha256(os.urandom(16)).hexdigest()[:16]
  token = os.path.join(folder, '.' + decide(lambda: name))
  if is_first():
    with open(token, 'wb'):
      pass
  wait()
  seen = gather(os.path.exists(token))
  if is_first():
    os.unlink(token)
  for process, sees in enumerate(seen):
    if not sees:
      raise UserError(
        f'process {process} does not see {folder} as process 0 does; give a workdir on a file system that all share'
      )


def leave(code: int) -> None:
  """Ends the process with exit code `code`.

  Where processes are still connected, it ends at once: the interpreter's own way out would wait for the others, who may
  be gone.
  """
  jax = sys.modules.get('jax')
  if jax is None or not jax.distributed.is_initialized():
    sys.exit(code)
  _withdraw()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _withdraw() -> None:
  if _State.last_word is not None:
    _State.last_word.withdraw()
    _State.last_word = None


def _part() -> None:
  # The coordinator lives in process 0: when that ends, the others are killed within a fraction of a second.
  with contextlib.suppress(Exception):  # a lost process does not come, and that is no news any more
    _client().wait_at_barrier('dsdm_jax/leave', _LEAVE_MILLISECONDS)
    if is_first():
      time.sleep(_LAST_WORD_SECONDS)


def _say(error: BaseException) -> None:
  import jax

  lost = isinstance(error, jax.errors.JaxRuntimeError) or 'Gloo' in str(error)  # JAX words some as ValueError
  if lost:
    reason = str(error).splitlines()[0][:200]
    print(  # noqa: T201
      f'dsdm_jax: process {_State.process}: a step that all processes take together failed ({reason}); if another '
      'process was lost, see what it said last, then start all of them again: work goes on where it stopped',
      file=sys.stderr,
    )  # fmt: skip
  elif isinstance(error, KeyboardInterrupt):
    print('dsdm_jax: interrupted', file=sys.stderr)  # noqa: T201
  else:
    traceback.print_exception(error)


def _client() -> Any:
  return _connection().client


def _connection() -> Any:
  # JAX has no public name for it. Barriers and values that go over devices instead (multihost_utils) give up while
  # process 0 builds a pool.
  from jax._src import distributed

  return distributed.global_state


def check_devices_are_ours() -> None:
  """Looks at the devices.

  Raises:
    UserError: they belong to more processes than the run knows of, which would each train a model of their own.
  """
  import jax

  if jax.process_count() != count():
    raise UserError(
      f'this machine is one of {jax.process_count()} that share their accelerators, and distributed.coordinator is '
      f"''; set --config.distributed.coordinator=auto --config.distributed.processes={jax.process_count()}"
    )

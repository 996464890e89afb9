"""The processes of a run: how they find each other, how process 0 decides for all, and how they end.

Every process runs the same program with the same config, except for `distributed.process`, and sees the same workdir.
Process 0 looks at the disk, decides and commits; the others follow. Without `distributed.coordinator` there is one
process, and everything here is free.
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from dsdm_jax.core import compile_cache, storage
from dsdm_jax.core.command_line import system_error
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import UserError, visible

_T = TypeVar('_T')
_S = TypeVar('_S')

AUTO = 'auto'
_OWN = ('distributed.process',)  # settings that differ between the processes of one run
_LEAVE_MILLISECONDS = 30_000  # for the other processes to print their last line before process 0 disconnects them
_LAST_LINE_SECONDS = 2.0  # for them to print and exit after that
_FOREVER_MILLISECONDS = 30 * 24 * 3_600 * 1_000  # a lost process ends a wait long before
_RETRY_SECONDS = 0.1
_LINE_BYTES = 4_096  # the longest message of a meeting
_EXIT_NOTICE = 'import sys\nif not sys.stdin.buffer.read(): sys.stderr.write(sys.argv[1])'
_turns = itertools.count()


class _State:
  """What `running` connected this process to."""

  processes, process = 1, 0
  decides = False  # whether this is process 0, while the others wait for what it decides
  exit_notice: subprocess.Popen | None = None


@contextlib.contextmanager
def running(config: ConfigDict, settings: Mapping[str, Any]) -> Iterator[None]:
  """Connects the processes that `config.distributed` names, and disconnects them at the end.

  Call it before the first look at a device. If one process fails, all end, and each prints the reason if the failing
  process can still send it.

  Args:
    config: the whole config.
    settings: the same, flat; compared between processes.

  Raises:
    UserError: a setting is wrong, processes disagree, or one did not connect.
  """
  wanted = config.distributed
  if not wanted.coordinator:
    yield
    return
  _connect(wanted)
  _State.processes, _State.process = _connection().num_processes, _connection().process_id
  _State.exit_notice = _start_exit_notice(
    f'dsdm_jax: process {_State.process} was ended: another process of the run was lost, or this one was killed; see '
    'the last messages of the others, then start all of them again: the run resumes\n'
  )
  try:
    _check(wanted, settings)
    yield
    wait()
  except BaseException as error:
    if isinstance(error, UserError) or system_error(error) is not None:
      _disconnect()
      raise  # main prints it, and `leave` ends the process
    _report(error)
    _disconnect()
    leave(1)
  import jax

  jax.distributed.shutdown()
  _cancel_exit_notice()
  _State.processes, _State.process = 1, 0


def _start_exit_notice(line: str) -> subprocess.Popen:
  """Starts a child that prints `line` on stderr when this process ends without `_cancel_exit_notice`.

  When the coordinator is lost, JAX aborts the other processes from a thread, and prints only a C++ stack trace.
  """
  return subprocess.Popen(
    [sys.executable, '-I', '-S', '-c', _EXIT_NOTICE, line], stdin=subprocess.PIPE, start_new_session=True
  )


def _cancel_exit_notice() -> None:
  if _State.exit_notice is not None:
    _State.exit_notice.communicate(b'.')
    _State.exit_notice = None


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
        f"distributed.coordinator = 'auto': JAX finds no cluster on this machine ({reason}); set 'host:port' with "
        'distributed.processes and distributed.process'
      ) from error
    return
  meet(wanted.coordinator, wanted.processes, wanted.process, wanted.start_seconds)
  jax.distributed.initialize(
    wanted.coordinator, wanted.processes, wanted.process, cluster_detection_method='deactivate', **beats
  )


def _check_slurm(environment: Mapping[str, str]) -> None:
  """Checks that Slurm starts one task per GPU of this node, since JAX uses one GPU per task.

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
      f'uses one GPU per task; set srun --ntasks-per-node={gpus}, and distributed.processes to the tasks of all nodes'
    )


def _check(wanted: ConfigDict, settings: Mapping[str, Any]) -> None:
  if count() != wanted.processes:
    raise UserError(
      f'distributed.processes = {wanted.processes}, and {count()} processes are connected; set it to the number '
      'that you start (of machines, on a TPU pod), and start all of them'
    )
  common = {k: v for k, v in settings.items() if k not in _OWN}
  first = decide(lambda: common)
  common = json.loads(json.dumps(common))
  keys = [k for k in {**first, **common} if first.get(k) != common.get(k)]
  differences = [f'{k} is {first.get(k)!r} on process 0 and {common.get(k)!r}' for k in keys]
  for process, phrases in enumerate(gather(differences)):
    if phrases:
      raise UserError(f'{phrases[0]} on process {process}; start all processes with the same config')


def count() -> int:
  """Number of processes of the run; does not look at devices."""
  return _State.processes


def is_first() -> bool:
  """Whether this is process 0, which decides and commits."""
  return _State.process == 0


def decide(choose: Callable[[], _T]) -> _T:
  """Calls `choose` on process 0 and returns its result, a JSON value, on all processes.

  All processes must call `decide`, `gather` and `wait` in the same order. Within `choose`, which process 0 calls alone,
  `decide` just calls its argument.

  Raises:
    UserError: `choose` raised one on process 0.
    RuntimeError: it raised something else there.
  """
  if count() == 1 or _State.decides:
    return choose()
  key, client = f'dsdm_jax/decide/{next(_turns)}', _client()
  if is_first():
    _State.decides = True
    try:
      value = choose()
    except BaseException as error:
      message = {'error': str(error) or type(error).__name__, 'user': isinstance(error, (UserError, OSError))}
      client.key_value_set(key, json.dumps(message))
      raise
    finally:
      _State.decides = False
    client.key_value_set(key, json.dumps({'value': value}))
    return value
  answer = json.loads(client.blocking_key_value_get(key, _FOREVER_MILLISECONDS))
  if 'error' in answer:
    raise UserError(answer['error']) if answer['user'] else RuntimeError(f'process 0 failed: {answer["error"]}')
  return answer['value']


def gather(value: Any) -> list[Any]:
  """Returns the JSON values of all processes, in their order, on each of them.

  Process 0 collects them, so that the number of messages grows with that of processes and not with its square. What
  processes agree on while they train goes over the devices instead (`core.mesh.greatest`).
  """
  if count() == 1:
    return [value]
  key, client = f'dsdm_jax/gather/{next(_turns)}', _client()
  if not is_first():
    client.key_value_set(f'{key}/{_State.process}', json.dumps(value))
    return json.loads(client.blocking_key_value_get(key, _FOREVER_MILLISECONDS))
  others = (client.blocking_key_value_get(f'{key}/{other}', _FOREVER_MILLISECONDS) for other in range(1, count()))
  message = json.dumps([value, *map(json.loads, others)])
  client.key_value_set(key, message)
  return json.loads(message)


def divide(items: Sequence[_S], work: Callable[[Sequence[_S]], Sequence[_T]]) -> list[_T]:
  """`work(items)`, of which each process does a part: one JSON value for each item, in order, on all processes.

  Raises:
    UserError: `work` raised one on any process.
  """
  if count() == 1:
    return list(work(items))
  results, message = list[_T](), ''
  try:
    results = list(work(items[_State.process :: count()]))
  except UserError as error:
    message = str(error)
  parts = gather([message, results])
  for other, _ in parts:
    if other:
      raise UserError(other)
  return [parts[place % count()][1][place // count()] for place in range(len(items))]


def wait() -> None:
  """Returns when all processes have called it."""
  if count() > 1:
    _client().wait_at_barrier(f'dsdm_jax/wait/{next(_turns)}', _FOREVER_MILLISECONDS)


def check_shared(folder: Location) -> None:
  """Checks that all processes read what process 0 writes in `folder`, which exists there.

  Raises:
    UserError: one does not.
  """
  if count() == 1:
    return
  name = hashlib.sha256(os.urandom(16)).hexdigest()[:16]
  token = folder / ('.' + decide(lambda: name))
  decide(lambda: storage.create(token, name.encode()))
  seen = gather(storage.is_file(token))
  if is_first():
    storage.unlink(token)
  for process, sees in enumerate(seen):
    if not sees:
      raise UserError(
        f'process {process} does not see the same {folder} as process 0; use a workdir that all processes read: a file '
        'system that they share, or the address of an object store'
      )


def leave(code: int) -> None:
  """Ends the process with exit code `code`, at once and with all output flushed.

  Nothing is waited for. The normal end of the interpreter joins threads and calls what libraries registered, of which
  one may never return: a thread of tf.data or of an object store's client, or a process of the run that was lost.
  """
  for child in multiprocessing.active_children():  # they would end by themselves, but later
    child.kill()
  _cancel_exit_notice()
  compile_cache.end()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
      stream.flush()
  os._exit(code)


def _disconnect() -> None:
  # The coordinator runs in process 0: when that ends, the others are killed within a fraction of a second.
  with contextlib.suppress(Exception):  # a lost process never arrives, and was reported already
    _client().wait_at_barrier('dsdm_jax/leave', _LEAVE_MILLISECONDS)
    if is_first():
      time.sleep(_LAST_LINE_SECONDS)


def _report(error: BaseException) -> None:
  import jax

  lost = isinstance(error, jax.errors.JaxRuntimeError) or 'Gloo' in str(error)  # JAX words some as ValueError
  if lost:
    reason = str(error).splitlines()[0][:200]
    print(  # noqa: T201
      visible(
        f'dsdm_jax: process {_State.process}: a step that all processes take together failed ({reason}); if another '
        'process was lost, see its last message, then start all of them again: the run resumes'
      ),
      file=sys.stderr,
    )
  elif isinstance(error, KeyboardInterrupt):
    print('dsdm_jax: interrupted', file=sys.stderr)  # noqa: T201
  else:
    traceback.print_exception(error)


def _client() -> Any:
  return _connection().client


def _connection() -> Any:
  # JAX has no public name for it. The public barriers (multihost_utils) go over devices and time out while process 0
  # builds a pool.
  from jax._src import distributed

  return distributed.global_state


def before_devices() -> None:
  """Applies the settings of JAX that must come before the first array; a second call changes nothing."""
  import jax

  simulated = jax.config.values['jax_num_cpu_devices'] > 1 or 'host_platform_device_count' in os.environ.get(
    'XLA_FLAGS', ''
  )
  if simulated or count() > 1:
    # A collective waits for one thread per device. XLA's pool has no more threads than devices or cores, so a copy
    # or a second program that holds one of them would block the others forever.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    os.environ.setdefault('PJRT_NPROC', '128')


def check_devices_are_ours() -> None:
  """Checks that the devices belong to the processes of this run alone.

  Raises:
    UserError: they belong to more processes, each of which would train its own model.
  """
  import jax

  if jax.process_count() != count():
    raise UserError(
      f'this machine is one of {jax.process_count()} that share their accelerators, but distributed.coordinator is '
      f"''; set --config.distributed.coordinator=auto --config.distributed.processes={jax.process_count()}"
    )


def meet(address: str, processes: int, process: int, seconds: float) -> None:
  """Returns once all processes have connected to `address` ('host:port' of process 0) and agree on their numbers.

  It comes before JAX connects them: JAX ends a process that cannot connect with a stack trace and no reason.

  Raises:
    UserError: on every process that can be reached, when two have the same number, when they disagree on how many they
      are, or when some have not connected after `seconds`.
  """
  host, port = split(address)
  deadline = time.monotonic() + seconds
  if process == 0:
    error = _accept(address, port, processes, deadline)
  else:
    error = _join(address, host, port, processes, process, deadline)
  if error:
    raise UserError(error)


def split(address: str) -> tuple[str, int]:
  """('host', port) of 'host:port'."""
  host, _, port = address.rpartition(':')
  return host.strip('[]'), int(port)


def _accept(address: str, port: int, processes: int, deadline: float) -> str:
  """Process 0's side of `meet`: hears all others and answers all; returns '' or the error."""
  connections: dict[int, socket.socket] = {}
  error = ''
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(socket.create_server(('', port), backlog=max(processes, 8)))
    except OSError as failure:
      return (
        f'distributed.coordinator = {address!r}: process 0 cannot listen there ({failure.strerror}); give an address '
        'of the machine of process 0 with a free port, and distributed.process = 0 to one process only'
      )
    rejected = []
    while len(connections) < processes - 1 and not error:
      server.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        connection = stack.enter_context(server.accept()[0])
      except TimeoutError:
        missing = [str(i) for i in range(1, processes) if i not in connections]
        error = (
          f'distributed.processes = {processes}: process {", ".join(missing)} did not connect to {address} in time; '
          'start all processes, each with its own distributed.process and all with the same distributed.processes'
        )
        break
      message = _receive(connection, 5.0)
      if message is None or not isinstance(message.get('process'), int):
        continue  # another program that probes for open ports
      number = message['process']
      if message.get('processes') != processes:
        rejected.append(connection)
        error = (
          f'distributed.processes is {processes} on process 0 and {message.get("processes")} on process {number}; '
          'give the same number to all'
        )
      elif number in connections:
        rejected.append(connection)
        error = f'two processes have distributed.process = {number}; give each a different number'
      else:
        connections[number] = connection
    for connection in [*connections.values(), *rejected]:
      with contextlib.suppress(OSError):  # it may be gone
        connection.sendall(json.dumps({'error': error}).encode() + b'\n')
  return error


def _join(address: str, host: str, port: int, processes: int, process: int, deadline: float) -> str:
  """The other processes' side of `meet`; returns '' or the error."""
  while True:
    left = max(0.01, deadline - time.monotonic())
    try:
      with socket.create_connection((host, port), timeout=left) as connection:
        connection.sendall(json.dumps({'process': process, 'processes': processes}).encode() + b'\n')
        answer = _receive(connection, max(0.01, deadline - time.monotonic()) + 5)
        if answer is not None:
          return str(answer['error'])
        reason = 'it closed the connection'
    except socket.gaierror as error:
      return f'distributed.coordinator = {address!r}: no such host ({error.strerror}); name the machine of process 0'
    except OSError as error:
      reason = error.strerror or type(error).__name__
    if time.monotonic() + _RETRY_SECONDS >= deadline:
      return (
        f'distributed.coordinator = {address!r}: process {process} could not reach process 0 there ({reason}); start '
        'process 0 too, and use an address that all machines can reach'
      )
    time.sleep(_RETRY_SECONDS)


def _receive(connection: socket.socket, seconds: float) -> dict | None:
  """One JSON object on a line; None if there is none."""
  connection.settimeout(seconds)
  data = b''
  try:
    while not data.endswith(b'\n') and len(data) < _LINE_BYTES:
      part = connection.recv(_LINE_BYTES)
      if not part:
        return None
      data += part
    message = json.loads(data)
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) else None


def keep_freed_memory() -> None:
  """Lets glibc keep freed memory instead of returning it to the system and asking for it again.

  XLA on CPU allocates the temporary buffers of each step. Up to what a thread's arena holds, 64 MiB, the kernel then
  clears their pages once and not in every step. Does nothing if the C library has no mallopt (macOS, musl).
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

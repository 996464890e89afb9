"""Starts runs for tests: imports everything once, which takes 6 s of a processor, then forks a process for each.

Nothing of JAX or TensorFlow has started when it forks, so that a child is what `python -m dsdm_jax.main` is after its
imports, and `main` is called there with the same arguments. The built-in tasks are read already, which takes another
5 s: a process reads them once. One JSON line in, one out. A library that is loaded before
all others (shim.c) stops a child at a chosen operation on files, or lets that operation fail.
"""

import ctypes
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # not of tests.conftest, which would give this process eight devices


WRITE, NAME, OPEN, READ, SYNC = (2**i for i in range(5))  # kinds of operations, as in shim.c
CHANGES = WRITE | NAME | OPEN
_MODES = ('count', 'before', 'during', 'after', 'fail', 'compile')


@dataclasses.dataclass(frozen=True)
class Fault:
  """What happens to a run at one of its operations on files.

  Attributes:
    below: prefix of the paths that count.
    how: 'before', 'during' (half of a write) or 'after' it, the run is killed; 'fail': the operation fails; 'compile':
      the run is killed while XLA compiles its `at`th program; 'count': nothing happens.
    at: which of these operations, from 1.
    kinds: of operations that count.
    error: number of the error of the system.
    times: how many operations fail from then on.
  """

  below: str
  how: str = 'count'
  at: int = 0
  kinds: int = CHANGES
  error: int = 0
  times: int = 1


class Server:
  """The process that forks, seen from the test."""

  def __init__(self, environment: dict[str, str]):
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.faults.server'],
      cwd=ROOT,
      env=environment,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )

  def __enter__(self) -> 'Server':
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    assert self._process.stdin is not None and self._process.stdout is not None
    self._process.stdin.close()
    self._process.wait(60)
    self._process.stdout.close()

  def start(
    self,
    log: Path,
    *flags: str,
    fault: Fault | None = None,
    err: Path | None = None,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    module: str = 'dsdm_jax.main',
  ) -> 'Child':
    """Starts a run.

    Args:
      log: file of its output.
      flags: what follows `python -m MODULE`.
      fault: what happens to it.
      err: file of its standard error; by default `log`.
      devices: number of fake CPU devices.
      environment: further variables, which JAX does not read.
      module: has `main(argv)`, which returns an exit code.
    """
    return Child(
      self,
      self.ask(
        flags=['main', *flags],
        logs=(str(log), str(err or log)),
        fault=dataclasses.asdict(fault) if fault else None,
        devices=devices,
        environment=dict(environment or {}),
        module=module,
      ),
    )

  def ask(self, **question: Any) -> Any:
    assert self._process.stdin is not None and self._process.stdout is not None
    print(json.dumps(question), file=self._process.stdin, flush=True)
    answer = self._process.stdout.readline()
    assert answer, 'the server is gone'
    return json.loads(answer)


class Child:
  """One run, in a session of its own."""

  def __init__(self, server: Server, pid: int):
    self._server, self.pid, self.code = server, pid, None

  def poll(self) -> int | None:
    """Exit code, negative after a signal; None while it runs."""
    if self.code is None:
      self.code = self._server.ask(poll=self.pid)
    return self.code

  def wait(self, seconds: float) -> int:
    limit = time.monotonic() + seconds
    while (code := self.poll()) is None:
      assert time.monotonic() < limit, f'still runs after {seconds} s'
      time.sleep(0.02)
    return code

  def kill(self) -> None:
    os.kill(self.pid, signal.SIGKILL)

  def left_behind(self) -> list[int]:
    """Processes of its session, but for itself."""
    found = []
    for folder in Path('/proc').iterdir():
      if folder.name.isdigit() and int(folder.name) != self.pid:
        try:
          fields = (folder / 'stat').read_text().rpartition(')')[2].split()
        except (FileNotFoundError, ProcessLookupError):
          continue
        if int(fields[3]) == self.pid and fields[0] != 'Z':
          found.append(int(folder.name))
    return found


def _arm(shim: ctypes.CDLL, fault: Fault) -> None:
  if fault.how == 'compile':
    _kill_while_compiling(fault.at)
    return
  mode = _MODES.index(fault.how)
  shim.shim_arm(fault.below.encode(), ctypes.c_long(fault.at), mode, fault.error, fault.kinds, fault.times)


def _kill_while_compiling(number: int) -> None:
  """Kills this process a moment after XLA has begun to compile its `number`th program."""
  import jax
  from jax._src import compiler

  jax.config.update('jax_enable_compilation_cache', False)  # an undisturbed run has filled it
  begun, compile = itertools.count(1), compiler.backend_compile_and_load

  def kill() -> None:
    os.write(2, b'stopped while XLA compiles\n')
    os.kill(os.getpid(), signal.SIGKILL)

  def compile_or_die(*arguments: Any, **options: Any) -> Any:
    if next(begun) == number:
      threading.Timer(0.001, kill).start()
    return compile(*arguments, **options)

  compiler.backend_compile_and_load = compile_or_die


def _run(
  flags: list[str],
  logs: tuple[str, str],
  fault: dict[str, Any] | None,
  devices: int,
  environment: dict[str, str],
  module: str,
  shim: ctypes.CDLL | None,
) -> None:
  os.setsid()
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for stream, log in enumerate(logs, 1):
    with open(log, 'ab') as file:
      os.dup2(file.fileno(), stream)
  import importlib

  import jax

  os.environ.update(environment)
  jax.config.update('jax_num_cpu_devices', devices)
  sys.argv = flags  # ml_collections looks there for the overrides
  code = 1
  if fault is not None:
    assert shim is not None
    _arm(shim, Fault(**fault))
  try:
    code = importlib.import_module(module).main(flags)
  except SystemExit as leaving:
    code = int(leaving.code or 0)
  except BaseException:  # noqa: BLE001  what the interpreter would print
    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    if fault is not None and fault['how'] == 'count':
      print('operations', *(shim.shim_seen(kind) for kind in range(5)), flush=True)  # type: ignore[union-attr]
    os._exit(code)


def _poll(pid: int) -> int | None:
  done, status = os.waitpid(pid, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if done else None


def _serve() -> None:
  import importlib

  from dsdm_jax import main, pipeline  # noqa: F401
  from dsdm_jax.data.targets import targets
  from tests.pipeline import tiny

  for code in ('plan.preflight', *(stage.code.partition(':')[0] for stage in pipeline.STAGES)):
    importlib.import_module(f'dsdm_jax.{code}')
  for heavy in ('seqio', 'tensorflow', 'tensorflow_datasets', 'clu.metric_writers', 'matplotlib.pyplot'):
    importlib.import_module(heavy)
  targets.split_tasks(tiny.get_config().targets)
  preloaded = os.environ.get('LD_PRELOAD')
  shim = ctypes.CDLL(preloaded) if preloaded else None
  for line in sys.stdin:
    question = json.loads(line)
    if 'poll' in question:
      answer = _poll(question['poll'])
    else:
      answer = os.fork()
      if answer == 0:
        _run(**question, shim=shim)
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  _serve()

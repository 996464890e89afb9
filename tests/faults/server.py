"""Starts runs for tests: imports everything once, which takes 6 s of a processor, then forks a process for each.

Nothing of JAX or TensorFlow has started when it forks, so that a child is what `python -m dsdm_jax.main` is after its
imports, and `main` is called there with the same arguments. One JSON line in, one out.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # not of tests.conftest, which would give this process eight devices


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
    kill_at: int = 0,
    below: Path | None = None,
    err: Path | None = None,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
  ) -> 'Child':
    """Starts a run; one that kills itself just before the `kill_at`th change of a file or folder in `below`.

    Args:
      log: file of its output.
      flags: what follows `python -m dsdm_jax.main`.
      err: file of its standard error; by default `log`.
      devices: number of fake CPU devices.
      environment: further variables, which JAX does not read.
    """
    return Child(
      self,
      self.ask(
        flags=['main', *flags],
        logs=(str(log), str(err or log)),
        kill_at=kill_at,
        below=str(below),
        devices=devices,
        environment=dict(environment or {}),
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


_CHANGES = ('os.rename', 'os.link', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'shutil.rmtree')


def _kill_at(number: int, folder: str) -> None:
  """Of the operations that Python sees: a file is opened for writing, renamed, linked or deleted, and a folder."""
  left, mine = number, os.getpid()

  def hook(event: str, arguments: tuple[Any, ...]) -> None:
    nonlocal left
    if event == 'open':
      _, mode, flags = arguments
      changes = bool(set(mode or '') & set('wax+')) or bool(flags & (os.O_WRONLY | os.O_RDWR))
    else:
      changes = event in _CHANGES
    if not changes or os.getpid() != mine:
      return
    paths = [os.fsdecode(path) for path in arguments if isinstance(path, (str, bytes, os.PathLike))]
    if any(path.startswith(folder) for path in paths) or (event == 'os.remove' and arguments[-1] != -1):
      left -= 1
      if not left:
        os.write(2, f'killed before {event} of {paths}\n'.encode())
        os.kill(mine, signal.SIGKILL)

  sys.addaudithook(hook)


def _run(
  flags: list[str], logs: tuple[str, str], kill_at: int, below: str, devices: int, environment: dict[str, str]
) -> None:
  os.setsid()
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for stream, log in enumerate(logs, 1):
    with open(log, 'ab') as file:
      os.dup2(file.fileno(), stream)
  import jax

  from dsdm_jax import main

  os.environ.update(environment)
  jax.config.update('jax_num_cpu_devices', devices)
  if kill_at:
    _kill_at(kill_at, below)
  sys.argv = flags  # ml_collections looks there for the overrides
  code = 1
  try:
    code = main.main(flags)
  except BaseException:  # noqa: BLE001  what the interpreter would print
    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _poll(pid: int) -> int | None:
  done, status = os.waitpid(pid, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if done else None


def _serve() -> None:
  import importlib

  from dsdm_jax import main, pipeline  # noqa: F401

  for stage in pipeline.STAGES:
    importlib.import_module(f'dsdm_jax.{stage.code.partition(":")[0]}')
  for heavy in ('seqio', 'tensorflow', 'tensorflow_datasets', 'clu.metric_writers', 'matplotlib.pyplot'):
    importlib.import_module(heavy)
  for line in sys.stdin:
    question = json.loads(line)
    if 'poll' in question:
      answer = _poll(question['poll'])
    else:
      answer = os.fork()
      if answer == 0:
        _run(**question)
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  _serve()

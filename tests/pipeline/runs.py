"""Starts the real command line on the tiny config, and compares what runs leave."""

import atexit
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.core.test_processes import free_port
from tests.faults.server import Child, Server
from tests.helpers import scores as saved_scores
from tests.helpers.workdirs import files_of

TINY = '--config=tests/pipeline/tiny.py'
SECRET = 'dsdm-no-secret-0d1e5f'  # what the shared run is given where clouds and hubs look for keys
KEYS = ('HF_TOKEN', 'AWS_SECRET_ACCESS_KEY', 'GITHUB_TOKEN', 'WANDB_API_KEY')


def environment(devices: int = 1, **more: str) -> dict[str, str]:
  """One device where the test is not about devices: eight of them share two cores and only cost time."""
  # The tiny programs are worth keeping too: the next process has them compiled.
  return os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', **more}


def command(*flags: str) -> list[str]:
  return [sys.executable, '-m', 'dsdm_jax.main', *flags]


@functools.cache
def server() -> Server:
  """The process that forks this worker's runs."""
  started = Server(environment())
  atexit.register(started.__exit__, None, None, None)
  return started


def start(*flags: str, devices: int = 1, module: str = 'dsdm_jax.main', **more: str) -> 'Run':
  """Starts a run without waiting for its end; `more` are variables of its environment."""
  folder = Path(tempfile.mkdtemp())
  out, err = folder / 'out', folder / 'err'
  child = server().start(out, *flags, err=err, devices=devices, environment=more, module=module)
  return Run(child, flags, out, err)


@dataclasses.dataclass
class Run:
  """One run, forked: what `python -m dsdm_jax.main` is after its imports."""

  child: Child
  flags: tuple[str, ...]
  out: Path
  err: Path

  def wait(self, seconds: float = 900) -> subprocess.CompletedProcess[str]:
    code = self.child.wait(seconds)
    texts = self.out.read_text(), self.err.read_text()
    shutil.rmtree(self.out.parent)
    return subprocess.CompletedProcess(self.flags, code, *texts)


def run(*flags: str, devices: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
  return start(*flags, devices=devices, **more).wait()


def run_two(*flags: str) -> list[subprocess.CompletedProcess[str]]:
  """Both ends of one run of two connected processes."""
  address = f'--config.distributed.coordinator=127.0.0.1:{free_port()}'
  started = [
    start(*flags, address, '--config.distributed.processes=2', f'--config.distributed.process={process}')
    for process in (0, 1)
  ]
  return [process.wait(300) for process in started]


def succeed(*flags: str, **options: Any) -> str:
  """Standard output of a run that must end well."""
  done = run(*flags, **options)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def refused(*flags: str, **options: Any) -> str:
  """The one line that a run must end with on stderr, exit code 2 and no other output there."""
  done = run(*flags, **options)
  assert done.returncode == 2, (done.returncode, done.stdout[-500:], done.stderr[-3000:])
  assert done.stderr.startswith('dsdm_jax: '), done.stderr[-3000:]
  assert done.stderr.count('\n') == 1, done.stderr[-3000:]
  return done.stderr.removeprefix('dsdm_jax: ').strip()


def finish(folder: Path) -> None:
  """A run of the tiny config from the first stage to the last, in a process of its own."""
  done = run(TINY, f'--workdir={folder}', **dict.fromkeys(KEYS, SECRET))
  assert done.returncode == 0, done.stderr[-3000:]
  save_output(done, folder)


def save_output(done: subprocess.CompletedProcess[str], folder: Path) -> None:
  """Writes the output of a run beside its folder."""
  folder.with_suffix('.out').write_text(done.stdout)
  folder.with_suffix('.err').write_text(done.stderr)


def secrets_in(folder: Path) -> list[str]:
  """Files of a run, and of its output, that contain SECRET."""
  every = [*folder.rglob('*'), folder.with_suffix('.out'), folder.with_suffix('.err')]
  return [str(path) for path in every if path.is_file() and SECRET.encode() in path.read_bytes()]


def events(workdir: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (workdir / 'events.jsonl').read_text().splitlines()]


def stages_run(workdir: Path, skip: int = 0) -> list[str]:
  """Stages that ended, in order, leaving out the first `skip` events."""
  return [e['stage'] for e in events(workdir)[skip:] if e['event'] == 'end']


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
  """Every file → its checksum and time of change: what is rewritten shows even where the bytes are the same."""
  return {
    str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
    for p in sorted(folder.rglob('*'))
    if p.is_file()
  }


def outcome(workdir: Path) -> dict[str, Any]:
  """All that two runs of the same settings must agree on to the last bit: scores, selections, items, results."""
  found: dict[str, Any] = {}
  scores = saved_scores.load(files_of(workdir, 'datamodel'))
  found |= {f'scores/{key}': value.tobytes() for key, value in scores.items()}
  stages = (files_of(workdir, name) for name in ('selection', 'evaluation'))
  for file in (f for s in stages for f in sorted(s.glob('*.npz'))):
    with np.load(file) as arrays:
      found |= {f'{file.name}/{key}': value.tobytes() for key, value in arrays.items()}
  results: Mapping[str, Any] = json.loads((workdir / 'results.json').read_text())
  return found | {f'results/{key}': without_seconds(value) for key, value in results.items()}


def without_seconds(value: Any) -> Any:
  """JSON without wall-clock times, which no two runs share; FLOP and what is read off them stay."""
  if isinstance(value, dict):
    return {k: without_seconds(v) for k, v in value.items() if 'seconds' not in k}
  return [without_seconds(v) for v in value] if isinstance(value, list) else value


def assert_same_outcome(found: Path, wanted: Path) -> None:
  a, b = outcome(found), outcome(wanted)
  assert a.keys() == b.keys()
  other = [key for key in b if a[key] != b[key]]
  assert not other, [(k, a[k], b[k]) for k in other]

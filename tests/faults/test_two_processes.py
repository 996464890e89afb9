"""A job of two processes: SIGTERM to one saves and ends both, a killed one ends the other, and the job resumes."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import FAULTS, ROOT
from tests.core.test_processes import free_port
from tests.pipeline import runs


def start(workdir: Path) -> list[subprocess.Popen[str]]:
  flags = (
    runs.TINY,
    f'--workdir={workdir}',
    '--stage=proxies',
    '--config.proxies.epochs=2.0',
    f'--config.distributed.coordinator=127.0.0.1:{free_port()}',
    '--config.distributed.processes=2',
    '--config.distributed.heartbeat_seconds=20',
  )
  begun = []
  for process in (0, 1):
    with workdir.with_suffix(f'.{process}').open('w') as errors:
      begun.append(subprocess.Popen(
        runs.command(*flags, f'--config.distributed.process={process}'), cwd=ROOT, env=runs.environment(),
        stdout=subprocess.DEVNULL, stderr=errors, text=True,
      ))  # fmt: skip
  return begun


def steps(workdir: Path) -> set[str]:
  return {p.name for p in workdir.glob('proxies/*/proxy_*/*') if p.name.isdecimal()}


def wait_for_a_save(workdir: Path, before: set[str]) -> None:
  limit = time.monotonic() + 120
  while steps(workdir) <= before:
    assert time.monotonic() < limit, workdir.with_suffix('.0').read_text()[-2000:]
    time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(
  not FAULTS, reason='launch/test.sh --faults runs it; tests/training/test_processes.py kills one too'
)
def test_terminated_then_killed_then_resumed(finished, tmp_path, count):
  workdir = tmp_path / 'run'
  for stage in ('pool', 'targets'):
    shutil.copytree(finished / stage, workdir / stage)
  processes = start(workdir)
  wait_for_a_save(workdir, set())
  processes[1].send_signal(signal.SIGTERM)
  assert [p.wait(60) for p in processes] == [143, 143]
  for process in (0, 1):
    assert ' at step ' in workdir.with_suffix(f'.{process}').read_text()
  saved = steps(workdir)
  assert saved
  processes = start(workdir)
  wait_for_a_save(workdir, saved)
  processes[1].kill()
  assert processes[0].wait(60) != 0
  processes[1].wait()
  time.sleep(1)  # for the last word, which comes after the end
  log = workdir.with_suffix('.0').read_text()
  assert 'a step that all processes take together failed' in log or 'dsdm_jax: process 0 was ended: another' in log
  assert 'the run resumes' in log
  processes = start(workdir)
  assert [p.wait(200) for p in processes] == [0, 0], workdir.with_suffix('.0').read_text()[-2000:]
  assert (workdir / 'proxies' / 'manifest.json').is_file()
  count('kills survived')
  count('SIGTERMs survived')

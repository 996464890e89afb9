"""SIGINT and SIGTERM: one line, exit code 130 or 143, nothing lost, no process left behind."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from dsdm_jax import pipeline
from dsdm_jax.core import stopping
from tests.pipeline import runs
from tests.pipeline.test_validation import SMALL

WHERE = r'in (\w+)( at \w+ [\d,]+ of [\d,]+( of [\w.-]+, which is saved)?)?|between two stages|before the first stage'
LINE = rf'dsdm_jax: stopped ({WHERE})'
SOME = {'pool': signal.SIGINT, 'proxies': signal.SIGTERM, 'features': signal.SIGINT}
SECONDS = 60  # a machine that runs other tests may be slow; docs/failures.md has what was measured


def stopped(workdir: Path, stage: str, number: int, delay: float, *flags: str, twice: bool = False) -> str:
  """Starts a run, stops it `delay` seconds after the stage began, and returns the line on stderr, which must be one."""
  run = runs.start(runs.TINY, f'--workdir={workdir}', *flags)
  limit = time.monotonic() + 300
  while not list((workdir / stage).glob('*-*')):
    assert run.child.poll() is None and time.monotonic() < limit, run.err.read_text()[-3000:]
    time.sleep(0.002)
  time.sleep(delay)
  os.kill(run.child.pid, number)
  if twice:
    time.sleep(0.01)
    os.kill(run.child.pid, number)
  done = run.wait(SECONDS)
  if done.returncode == 0 and (workdir / stage / 'manifest.json').is_file():
    return ''  # it ended before
  assert done.returncode == 128 + number, (done.returncode, done.stderr[-3000:])
  if not twice:
    assert re.fullmatch(LINE + f'; {stopping.GO_ON}\n', done.stderr), done.stderr
  assert 'Traceback' not in done.stderr, done.stderr
  assert 'Traceback' not in done.stdout, done.stdout
  assert not (workdir / 'lock.json').exists() or twice
  deadline = time.monotonic() + 20
  while run.child.left_behind():
    assert time.monotonic() < deadline, 'a process is left behind'
    time.sleep(0.05)
  return done.stderr


def without(finished: Path, workdir: Path, stage: str) -> Path:
  """A copy of a finished run that has to make `stage` and what follows."""
  later = pipeline.NAMES[pipeline.NAMES.index(stage) :]
  return Path(shutil.copytree(finished, workdir, ignore=lambda _, names: [name for name in names if name in later]))


@pytest.mark.parametrize('stage', SOME)
def test_a_signal_stops_with_one_line(finished: Path, tmp_path: Path, stage: str):
  workdir = without(finished, tmp_path / 'run', stage)
  # One process would read so small a pool; the flag of workers is no part of the result.
  line = stopped(workdir, stage, SOME[stage], 0.3)
  assert f'in {stage}' in line or 'between' in line


def test_the_second_signal_ends_at_once(finished: Path, tmp_path: Path):
  stopped(without(finished, tmp_path / 'run', 'proxies'), 'proxies', signal.SIGINT, 0.3, twice=True)


@pytest.mark.full
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('stage', [*pipeline.NAMES, *pipeline.ON_REQUEST])
def test_every_stage_goes_on_where_it_stopped(finished: Path, tmp_path: Path, stage: str, number: int):
  requested = stage in pipeline.ON_REQUEST
  if requested:
    workdir = Path(shutil.copytree(finished, tmp_path / 'run'))
  else:
    workdir = without(finished, tmp_path / 'run', stage)
  rng, flags = random.Random(f'{stage} {number}'), (f'--stage={stage}', *SMALL) if requested else ()
  for delay in (0.0, *(rng.uniform(0, 3) for _ in range(3))):
    if not (workdir / stage / 'manifest.json').is_file():
      stopped(workdir, stage, number, delay, *flags)
  runs.succeed(runs.TINY, f'--workdir={workdir}', *flags)
  runs.assert_same_outcome(workdir, finished)

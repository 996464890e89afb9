"""SIGKILL at a random moment of each stage, then the same command again: the same scores and results, to the bit.

`DSDM_KILLS=5 pytest tests/faults` kills in five runs, each at other moments.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dsdm_jax import pipeline
from tests.pipeline import runs
from tests.pipeline.runs import ROOT

KILLS = int(os.environ.get('DSDM_KILLS', '1'))


def start(workdir: Path) -> subprocess.Popen[bytes]:
  with open(workdir.with_suffix('.log'), 'ab') as log:
    return subprocess.Popen(
      runs.command(runs.TINY, f'--workdir={workdir}'), cwd=ROOT, env=runs.environment(), stdout=log, stderr=log
    )


def kill_in(stage: str, workdir: Path, seconds: float, rng: random.Random) -> str:
  """Starts the run and kills it at a random moment of `stage`; tells what stood there."""
  process = start(workdir)
  part, whole = workdir / f'{stage}.part', workdir / stage
  limit = time.monotonic() + 300
  while not part.is_dir() and not whole.is_dir() and process.poll() is None:
    assert time.monotonic() < limit
    time.sleep(0.002)
  time.sleep(rng.random() * seconds)
  ended = process.poll()
  if ended is None:
    os.kill(process.pid, signal.SIGKILL)
  code = process.wait()
  log = workdir.with_suffix('.log').read_text()
  assert code == (-signal.SIGKILL if ended is None else 0), log[-2000:]
  files = len([p for p in part.rglob('*') if p.is_file()]) if part.is_dir() else 0
  return f'{stage}: {"whole" if whole.is_dir() else f"{files} files in its part"}'


@pytest.mark.slow
@pytest.mark.parametrize('attempt', range(KILLS))
def test_kill_in_every_stage(finished, tmp_path, attempt):
  """One run, killed once in each stage in turn: ten processes make it together."""
  rng = random.Random(attempt)
  seconds = {e['stage']: e['seconds'] for e in runs.events(finished) if e['event'] == 'end'}
  workdir = tmp_path / 'run'
  # The pool, the targets and the proxies are the undisturbed run's where their turn is another test's.
  shutil.copytree(finished / 'pool', workdir / 'pool')
  shutil.copytree(finished / 'targets', workdir / 'targets')
  moments = [kill_in(name, workdir, seconds[name], rng) for name in pipeline.NAMES[2:]]
  print('\n'.join(moments))
  runs.succeed(runs.TINY, f'--workdir={workdir}')
  runs.assert_same_outcome(workdir, finished)
  assert not list(workdir.glob('*.part')) and not list(workdir.glob('*.old'))


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['pool', 'targets'])
@pytest.mark.parametrize('attempt', range(KILLS))
def test_kill_where_data_is_made(finished, tmp_path, stage, attempt):
  """Data comes out the same byte for byte, so all that was made of it stands."""
  workdir = Path(shutil.copytree(finished, tmp_path / 'run'))
  shutil.rmtree(workdir / stage)
  seconds = next(e['seconds'] for e in runs.events(finished) if (e['stage'], e['event']) == (stage, 'end'))
  print(kill_in(stage, workdir, seconds, random.Random(attempt)))
  count = len(runs.events(workdir))
  runs.succeed(runs.TINY, f'--workdir={workdir}')
  assert set(runs.stages_run(workdir, count)) <= {stage}
  runs.assert_same_outcome(workdir, finished)

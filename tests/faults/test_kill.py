"""SIGKILL at random moments of every stage, each followed by the same command: the same results, to the bit.

The normal tests kill one run once in each stage; `launch/test.sh --faults` kills more than 100.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dsdm_jax import pipeline
from dsdm_jax.core import artifacts, storage
from tests.conftest import FAULTS
from tests.faults.conftest import LADDER
from tests.helpers.workdirs import files_of
from tests.pipeline import runs
from tests.pipeline.test_validation import SMALL

# One kill in each stage; the ladder has nothing to do there.
NORMAL = [stage for stage in pipeline.NAMES if stage != 'ladder']
RUNS = 5 if FAULTS else 1
FLIPS = 20  # of each stage
# Without derivatives through training in the normal tests, which take most of the stage's time.
VALIDATION = SMALL if FAULTS else (
  *SMALL, '--config.validation.oracle=False', '--config.validation.seeds=1', '--config.validation.halves=4',
  '--config.validation.stratified=0',
)  # fmt: skip
ORPHAN_SECONDS = 20


class Killer:
  """Kills one run again and again.

  Args:
    server, workdir: who starts the run, and where.
    seconds: of each stage, guessed; shortened where a stage turns out to take less.
    rng: of the moments.
    flags: of the run, beside the config and the workdir.
  """

  def __init__(self, server, workdir: Path, seconds: dict[str, float], rng: random.Random, flags: tuple[str, ...]):
    self.server, self.workdir, self.rng, self.flags = server, workdir, rng, flags
    self.seconds, self.log = dict(seconds), workdir.with_suffix('.log')
    self.moments: list[str] = []

  def start(self):
    return self.server.start(self.log, runs.TINY, f'--workdir={self.workdir}', *self.flags)

  def kill_in(self, stage: str) -> bool:
    """Starts the run and kills it at a random moment of `stage`; False where it ended before."""
    if (self.workdir / stage / 'manifest.json').is_file():  # the last kill came late
      shutil.rmtree(self.workdir / stage)
    child = self.start()
    part, whole = self.workdir / stage, self.workdir / stage / 'manifest.json'
    share, changes, limit = self.rng.random(), self.rng.choice((0, 0, 1, 2, 5)), time.monotonic() + 300
    while not list(part.glob('*-*')) and child.poll() is None:
      assert time.monotonic() < limit, self.log_tail()
      time.sleep(0.001)
    began, seen, counted = time.monotonic(), self.look(part), changes
    while changes and not whole.is_file() and child.poll() is None:
      if (now := self.look(part)) != seen:
        seen, changes = now, changes - 1
    # Some kills fall anywhere in the stage, which mostly compiles; the others soon after something was written.
    moment = time.monotonic() + share * 0.1 if counted else began + share * self.seconds[stage]
    while time.monotonic() < moment and not whole.is_file() and child.poll() is None:
      time.sleep(0.0005)
    if whole.is_file():
      self.seconds[stage] = min(self.seconds[stage], max(time.monotonic() - began, 0.05))
    if child.poll() is None:
      child.kill()
    code = child.wait(60)
    assert code in (0, -signal.SIGKILL), self.log_tail()
    self.no_orphans(child)
    files = sum(p.is_file() for p in part.rglob('*'))
    self.moments.append(f'{stage}: ' + ('just finished' if whole.is_file() else f'{files} files'))
    return code != 0

  def look(self, part: Path) -> set[str]:
    found = set()
    for folder, _, names in os.walk(part):
      found |= {f'{folder}/{name}' for name in names}
    return found

  def no_orphans(self, child) -> None:
    """What a killed run had started ends by itself."""
    limit = time.monotonic() + ORPHAN_SECONDS
    while left := child.left_behind():
      assert time.monotonic() < limit, f'processes {left} outlive the run that started them'
      time.sleep(0.01)

  def finish(self) -> None:
    assert self.start().wait(300) == 0, self.log_tail()

  def log_tail(self) -> str:
    return self.log.read_text()[-3000:]


def stage_seconds(finished: Path) -> dict[str, float]:
  return {e['stage']: e['seconds'] for e in runs.events(finished) if e['event'] == 'end'}


def left_over(workdir: Path) -> list[str]:
  """Attempts that are not the finished one, and temporary files."""
  names = (*pipeline.NAMES, *pipeline.ON_REQUEST)
  paths = [path for name in names for path in artifacts._attempts(workdir, name)]
  paths += [path for path in (*workdir.glob('.*'), *workdir.glob('*/.*'), *workdir.glob('*/*/.*')) if path.is_file()]
  return [str(path) for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize('attempt', range(RUNS))
def test_run_that_is_killed_again_and_again(server, whole, tmp_path, count, attempt):
  flags = LADDER if FAULTS else ()
  killer = Killer(server, tmp_path / 'run', stage_seconds(whole), random.Random(attempt), flags)
  plan = NORMAL if not FAULTS else [stage for stage in pipeline.NAMES for _ in range(2)]
  killed = sum(killer.kill_in(stage) for stage in plan)
  print('\n'.join(killer.moments))
  assert killed == len(plan)
  killer.finish()
  runs.assert_same_outcome(tmp_path / 'run', whole)
  assert left_over(tmp_path / 'run') == []
  count('kills survived', killed)


@pytest.mark.slow
@pytest.mark.skipif(not FAULTS, reason='launch/test.sh --faults runs it')
@pytest.mark.parametrize('stage', pipeline.NAMES[:-1])
def test_flipped_bits_of_an_unfinished_stage(server, with_ladder, tmp_path, count, stage):
  """One bit of any file of an attempt, notes included: an error line, or the same files as before."""
  workdir, log, rng = tmp_path / 'run', tmp_path / 'log', random.Random(f'flips {stage}')
  wanted = artifacts.read(with_ladder, stage)[stage]
  for _ in range(FLIPS):
    shutil.rmtree(workdir, ignore_errors=True)
    log.unlink(missing_ok=True)
    shutil.copytree(with_ladder, workdir)
    for later in pipeline.NAMES[pipeline.NAMES.index(stage) + 1 :]:
      shutil.rmtree(workdir / later)
    (workdir / stage / artifacts.MANIFEST).unlink()
    attempt = workdir / stage / wanted.path.name
    names = [name for name in storage.files(attempt) if (attempt / name).stat().st_size]
    notes = [name for name in names if name not in wanted.manifest['files']]
    file = attempt / rng.choice(notes if rng.random() < 0.5 else names)
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    code = server.start(log, runs.TINY, f'--workdir={workdir}', *LADDER, f'--stage={stage}').wait(300)
    where = f'a flip in byte {at} of {file}: {log.read_text()[-2000:]}'
    assert code in (0, 2) and 'Traceback' not in log.read_text(), where
    if code == 0:
      found = artifacts.read(workdir, stage)[stage]
      assert content(found) == content(wanted), where
      assert found.manifest['cost']['flop'] == wanted.manifest['cost']['flop'], where
  count('bits flipped in unfinished stages', FLIPS)


def content(artifact: artifacts.Artifact) -> dict[str, Any]:
  """Checksum of each file but those of models, of which checkpoints have checksums of their own; without seconds."""
  files = artifact.manifest['files'].items()
  found = {name: entry['sha256'] for name, entry in files if name.split('/')[0] not in artifact.manifest['models']}
  if artifact.identity['stage'] == 'ladder':
    found['index.json'] = runs.without_seconds(json.loads((artifact.path / 'index.json').read_text()))
  return found


def compare(workdir: Path, wanted: Path) -> None:
  runs.assert_same_outcome(workdir, wanted)
  assert left_over(workdir) == []
  assert {finding.kind for finding in artifacts.inspect(workdir)} == {'whole'}


@pytest.mark.slow
@pytest.mark.skipif(not FAULTS, reason='launch/test.sh --faults runs it')
@pytest.mark.parametrize('stage', ['pool', 'targets'])
def test_kill_where_data_is_made_again(server, finished, tmp_path, count, stage):
  """Data comes out the same byte for byte, so all that was made of it stands."""
  workdir = Path(shutil.copytree(finished, tmp_path / 'run'))
  shutil.rmtree(workdir / stage)
  killer = Killer(server, workdir, stage_seconds(finished), random.Random(stage), ())
  killed = killer.kill_in(stage)
  events = len(runs.events(workdir))
  killer.finish()
  assert set(runs.stages_run(workdir, events)) <= {stage}
  runs.assert_same_outcome(workdir, finished)
  count('kills survived', int(killed))


def without_validation(finished: Path, workdir: Path) -> Path:
  """What validation stands on: it runs alone, when it is asked for."""
  for stage in ('pool', 'leakage', 'targets'):
    shutil.copytree(finished / stage, workdir / stage)
  return workdir


@pytest.fixture(scope='module')
def validated(server, finished, tmp_path_factory) -> Path:
  folder = without_validation(finished, tmp_path_factory.mktemp('validated') / 'run')
  Killer(server, folder, {}, random.Random(), VALIDATION).finish()
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('attempt', range(2 if FAULTS else 1))
def test_validation_that_is_killed(server, finished, validated, tmp_path, count, attempt):
  """Models of the bank, scores and tables, all files byte for byte."""
  workdir = without_validation(finished, tmp_path / 'run')
  killer = Killer(server, workdir, stage_seconds(validated), random.Random(f'validation {attempt}'), VALIDATION)
  killed = wanted = 4 if FAULTS else 1
  for _ in range(wanted):
    while not killer.kill_in('validation'):
      shutil.rmtree(workdir / 'validation')  # the run was faster: the next moment is drawn from the time it took
  print('\n'.join(killer.moments))
  killer.finish()

  def files(folder: Path) -> dict[str, str]:
    found = runs.fingerprint(files_of(folder, 'validation'))
    return {name: digest for name, (digest, _) in found.items() if name not in ('begun.json', 'cost.json')}

  assert files(workdir) == files(validated)
  assert left_over(workdir) == []
  count('kills survived', killed)

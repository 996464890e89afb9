"""Kills and errors of the system at single operations on files, in each stage; then the same command, the same results.

`launch/test.sh --faults` tries 240 kills and 168 errors in twelve stages, CI two errors in the quickest.
"""

import errno
import itertools
import random
import shutil
import signal
from pathlib import Path

import pytest

from dsdm_jax import pipeline
from dsdm_jax.core import artifacts
from tests.conftest import FAULTS
from tests.faults import server as faults
from tests.faults.conftest import LADDER
from tests.faults.server import Fault, Server
from tests.faults.test_kill import compare, content
from tests.pipeline import runs

STAGES = pipeline.NAMES if FAULTS else ['datamodel']
KILLS = 20  # in each stage
EVERY = faults.WRITE | faults.NAME | faults.OPEN | faults.SYNC
ERRORS = {  # → operations that can fail so
  errno.ENOSPC: EVERY,
  errno.EDQUOT: EVERY,
  errno.EIO: EVERY | faults.READ,
  errno.EROFS: faults.NAME | faults.OPEN,
  errno.ESTALE: faults.OPEN | faults.READ,
  errno.EXDEV: faults.NAME,
  errno.EMFILE: faults.OPEN | faults.READ,
}


class Stage:
  """One stage of a copied run, of which the earlier ones are finished."""

  def __init__(self, server: Server, whole: Path, folder: Path, name: str):
    self.server, self.whole, self.name = server, whole, name
    self.workdir, self.log = folder / 'run', folder / 'log'
    self.begin()
    assert self.run(Fault(f'{self.workdir}/', kinds=EVERY | faults.READ)) == 0, self.tail()
    self.operations = dict(zip((2**i for i in range(5)), map(int, self.tail().split()[-5:]), strict=True))
    self.compare()
    self.begin()

  def begin(self) -> None:
    shutil.rmtree(self.workdir, ignore_errors=True)
    shutil.copytree(self.whole, self.workdir)
    for later in pipeline.NAMES[pipeline.NAMES.index(self.name) :]:
      shutil.rmtree(self.workdir / later)

  def seen(self, kinds: int) -> int:
    """Operations of an undisturbed run."""
    return sum(number for kind, number in self.operations.items() if kind & kinds)

  def run(self, fault: Fault | None = None) -> int:
    self.log.unlink(missing_ok=True)
    flags = (runs.TINY, f'--workdir={self.workdir}', *(LADDER if FAULTS else ()), f'--stage={self.name}')
    code = self.server.start(self.log, *flags, fault=fault).wait(300)
    assert 'Traceback' not in self.tail() and code in (0, 2, -signal.SIGKILL), (fault, self.log.read_text()[-5000:])
    return code

  def tail(self) -> str:
    return self.log.read_text(errors='replace')[-20_000:]

  def compare(self) -> None:
    found, wanted = (artifacts.read(folder, self.name)[self.name] for folder in (self.workdir, self.whole))
    assert self.name == 'report' or content(found) == content(wanted)
    assert found.manifest['cost']['flop'] == wanted.manifest['cost']['flop']
    assert not [finding for finding in artifacts.inspect(self.workdir) if finding.kind != 'whole']

  def finish(self) -> None:
    assert self.run() == 0, self.tail()
    self.compare()


@pytest.mark.slow
@pytest.mark.skipif(not FAULTS, reason='launch/test.sh --faults runs it; test_kill.py has the short one')
@pytest.mark.parametrize('name', STAGES)
def test_kills_at_operations_on_files(shimmed, with_ladder, tmp_path, count, name):
  stage, rng, killed = Stage(shimmed, with_ladder, tmp_path, name), random.Random(f'kills {name}'), 0
  for how in itertools.cycle(('before', 'during', 'after')):
    if killed == KILLS:
      break
    at = rng.randint(1, max(1, stage.seen(faults.CHANGES) * 2 // 3))
    code = stage.run(Fault(f'{stage.workdir}/', how, at))
    killed += code < 0
    if code == 0:
      stage.compare()
      stage.begin()
  stage.finish()
  assert shimmed.start(stage.log, runs.TINY, f'--workdir={stage.workdir}', *LADDER).wait(300) == 0, stage.tail()
  compare(stage.workdir, with_ladder)
  count('kills at operations on files survived', killed)


@pytest.mark.slow
@pytest.mark.skipif(not FAULTS, reason='launch/test.sh --faults runs it')
@pytest.mark.parametrize('name', ['proxies', 'features', 'datamodel', 'pretraining', 'evaluation'])
def test_kills_while_xla_compiles(shimmed, with_ladder, tmp_path, count, name):
  stage = Stage(shimmed, with_ladder, tmp_path, name)
  codes = [stage.run(Fault('', 'compile', at)) for at in (1, 2, 3, 5, 8)]
  stage.finish()
  assert codes[0] < 0
  count('kills while XLA compiles survived', sum(code < 0 for code in codes))


@pytest.mark.slow
@pytest.mark.parametrize('name', STAGES)
def test_errors_of_the_system_at_operations_on_files(shimmed, whole, tmp_path, count, name):
  """One operation fails, or all that follow: one line and exit code 2, or the same files as without the fault."""
  stage, rng = Stage(shimmed, whole, tmp_path, name), random.Random(f'errors {name}')
  tries = (
    [(error, times) for error in ERRORS for times in (1, 10**6)] if FAULTS else [(errno.EIO, 1), (errno.EDQUOT, 10**6)]
  )
  failed = []
  for error, times in tries:
    kinds = ERRORS[error]
    fault = Fault(f'{stage.workdir}/', 'fail', rng.randint(1, max(1, stage.seen(kinds) * 2 // 3)), kinds, error, times)
    try:
      code = stage.run(fault)
      assert code in (0, 2), code
      if code == 2:
        assert f'\n{stage.tail()}'.count('\ndsdm_jax: ') == 1, stage.tail()
        stage.finish()
      else:
        stage.compare()
      count('errors of the system')
    except AssertionError as error_:  # the next one may tell more
      failed.append((errno.errorcode[error], fault, str(error_)[-3000:]))
    stage.begin()
  assert not failed, failed

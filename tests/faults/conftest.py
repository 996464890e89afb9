"""The finished run and its copies are those of the pipeline's tests; one server starts the runs that are killed."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import FAULTS
from tests.faults.server import Server
from tests.helpers.workdirs import once
from tests.pipeline import runs
from tests.pipeline.conftest import copied, finished

__all__ = ['copied', 'finished', 'server', 'shimmed', 'whole', 'with_ladder']

LADDER = (
  "--config.ladder.rungs=('0.5','1')",
  '--config.ladder.step=1',
  '--config.ladder.seeds=2',
)  # of the run that is killed in every stage


@pytest.fixture(scope='session')
def server() -> Server:
  return runs.server()


@pytest.fixture(scope='session')
def shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
  """A server whose runs stop or fail at operations on files."""
  compiler = next(filter(shutil.which, ('cc', 'gcc', 'clang')), None)
  if compiler is None or sys.platform != 'linux':
    pytest.skip('faults at operations on files take Linux and a C compiler')
  library = tmp_path_factory.mktemp('shim') / 'shim.so'
  source = Path(__file__).with_name('shim.c')
  command = [compiler, '-shared', '-fPIC', '-O1', '-D_LARGEFILE64_SOURCE', '-o', str(library), str(source), '-ldl']
  subprocess.run(command, check=True)
  with Server(runs.environment(LD_PRELOAD=str(library))) as started:
    yield started


@pytest.fixture(scope='session')
def with_ladder(server: Server, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The finished run with a ladder, undisturbed: what was made before the ladder stands."""

  def make(folder: Path) -> None:
    shutil.copytree(finished, folder)
    log = folder.with_suffix('.log')
    code = server.start(log, runs.TINY, f'--workdir={folder}', *LADDER, '--rerun').wait(300)
    assert code == 0, log.read_text()[-3000:]

  return once(tmp_path_factory, 'with_ladder', make)


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> Path:
  """An undisturbed run: the finished one, or that with a ladder in the long suites."""
  return request.getfixturevalue('with_ladder' if FAULTS else 'finished')

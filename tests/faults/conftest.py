"""The finished run and its copies are those of the pipeline's tests; one server starts the runs that are killed."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.server import Server
from tests.pipeline import runs
from tests.pipeline.conftest import copied, finished

__all__ = ['copied', 'finished', 'server', 'with_ladder']

LADDER = ("--config.ladder.rungs=('0.5','1')", '--config.ladder.seeds=2')  # of the run that is killed in every stage


@pytest.fixture(scope='session')
def server() -> Iterator[Server]:
  with Server(runs.environment()) as started:
    yield started


@pytest.fixture(scope='session')
def with_ladder(server: Server, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The finished run with a ladder, undisturbed: what was made before the ladder stands."""
  folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp('with_ladder') / 'run'))
  log = folder.with_suffix('.log')
  assert server.start(log, runs.TINY, f'--workdir={folder}', *LADDER, '--rerun').wait(300) == 0, log.read_text()[-3000:]
  return folder

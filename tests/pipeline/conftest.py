"""One finished run for all tests that only look at it, and copies for those that change it."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.workdirs import once
from tests.pipeline import runs


@pytest.fixture(scope='session')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return once(tmp_path_factory, 'finished', runs.finish)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
  return Path(shutil.copytree(finished, tmp_path / 'run'))

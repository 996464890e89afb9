"""The finished run and its copies are those of the pipeline's tests; one server starts the runs that are killed."""

from collections.abc import Iterator

import pytest

from tests.faults.server import Server
from tests.pipeline import runs
from tests.pipeline.conftest import copied, finished

__all__ = ['copied', 'finished', 'server']


@pytest.fixture(scope='session')
def server() -> Iterator[Server]:
  with Server(runs.environment()) as started:
    yield started

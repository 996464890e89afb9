"""Fixtures of the data tests: a tiny pool, and a way to write JSON lines."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.pool import pool
from tests.helpers.data import run_pool, small_config


@pytest.fixture(scope='session')
def tiny_config() -> ConfigDict:
  return small_config()


@pytest.fixture(scope='session')
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
  return run_pool(small_config(), tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def tiny_pool(tiny_artifact: Artifact) -> pool.Pool:
  return pool.Pool(tiny_artifact)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str], str]:
  """Writes text to a .jsonl file byte for byte and gives its path."""

  def write(text: str) -> str:
    path = tmp_path / 'mine.jsonl'
    path.write_bytes(text.encode())
    return str(path)

  return write

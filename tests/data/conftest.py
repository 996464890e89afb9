"""A tiny pool of invented documents, and the means to run the data stages on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.base import get_config
from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool import pool
from dsdm_jax.data.pool.documents import Document
from dsdm_jax.data.targets import targets

WORDS = (
  'river stone lantern copper walked slowly over under bright green paper window seven many it was and the'.split()
)


def invented(config: ConfigDict, seed: int) -> Iterator[Document]:
  """Nonsense of two kinds; about `config.max_bytes` in all."""
  rng = np.random.default_rng(seed)
  left = config.max_bytes
  number = 0
  while left > 0:
    kind = ('prose', 'code')[number % 2]
    lines = [' '.join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(rng.integers(1, 30))]
    if kind == 'code':
      lines = [f'{"  " * (i % 4)}{line.replace(" ", "_", 2)} = {i}' for i, line in enumerate(lines)]
    text = '\n'.join(lines) + '\n'
    left -= len(text)
    yield Document(f'{kind}/{number}', kind, text)
    number += 1


def small_config(**pool_keys: Any) -> ConfigDict:
  """The base config on invented documents, with two quick tasks."""
  config = get_config()
  config.pool.sources = (f'{__name__}:invented',)
  config.pool.max_bytes = 40_000
  config.pool.length = 48
  config.pool.vocab_size = 340
  config.targets.tasks = ('cs_algorithms',)
  config.targets.max_examples = 8
  config.pool.update(pool_keys)
  return config


def context(config: ConfigDict, workdir: Path, stage: str, **inputs: Artifact) -> Context:
  out = workdir / stage
  out.mkdir(parents=True, exist_ok=True)
  return Context(config, out, inputs, Log(workdir, stage, enabled=False), Cost(out))


def run_pool(config: ConfigDict, workdir: Path) -> Artifact:
  made = context(config, workdir, 'pool')
  return Artifact(made.out, {'semantics': pool.run(made)})


def run_targets(config: ConfigDict, workdir: Path, pool_artifact: Artifact) -> Artifact:
  made = context(config, workdir, 'targets', pool=pool_artifact)
  return Artifact(made.out, {'semantics': targets.run(made)})


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

"""A tiny pool of generated documents, and functions that run the data stages on it."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs.base import get_config
from dsdm_jax.config.validate import resolve
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.data.pool import build
from dsdm_jax.data.pool.sources import Document
from dsdm_jax.data.targets import masked, targets

WORDS = (
  'river stone lantern copper walked slowly over under bright green paper window seven many it was and the'.split()
)


def invented(config: ConfigDict, seed: int) -> Iterator[Document]:
  """Random words of two kinds, about `config.max_bytes` in total."""
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
  """The base config on `invented` documents, with a quick task."""
  config = get_config()
  config.pool.sources = (f'{__name__}:invented',)
  config.pool.max_bytes = 40_000
  config.pool.length = 48
  config.pool.vocab_size = 340
  config.targets.tasks = ('cs_algorithms',)
  config.targets.max_examples = 8
  config.pool.update(pool_keys)
  return config


def context(config: ConfigDict, workdir: Location, stage: str, **inputs: Artifact) -> Context:
  out = workdir / stage
  storage.make_folder(out)
  return Context(resolve(config, dict), out, inputs, Log(workdir, stage, enabled=False), Cost(out))


def run_pool(config: ConfigDict, workdir: Location) -> Artifact:
  of_stage = context(config, workdir, 'pool')
  return Artifact(of_stage.out, {'semantics': build.run(of_stage)})


def run_leakage(config: ConfigDict, workdir: Location, pool_artifact: Artifact) -> Artifact:
  of_stage = context(config, workdir, 'leakage', pool=pool_artifact)
  return Artifact(of_stage.out, {'semantics': masked.run(of_stage)})


def run_targets(config: ConfigDict, workdir: Location, pool_artifact: Artifact) -> Artifact:
  of_stage = context(config, workdir, 'targets', pool=pool_artifact)
  return Artifact(of_stage.out, {'semantics': targets.run(of_stage)})


RECORDS = [{'id': d.id, 'source': d.source, 'text': d.text} for d in invented(small_config(max_bytes=20_000).pool, 3)]


def lines(records: list[dict]) -> bytes:
  """`records` as JSON lines."""
  return ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records).encode()


def contents(folder: Location) -> dict[str, bytes]:
  """Relative path → bytes of every file in `folder`, without that of the seconds that it took."""
  return {name: storage.read(folder / name) for name in storage.files(folder) if not name.endswith('cost.json')}

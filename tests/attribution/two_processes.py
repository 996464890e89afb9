"""Makes features and scores on two processes; test_processes.py calls `main` with ADDRESS PROCESS DIR… in each.

Each DIR is a run that stands as far as the proxies; the settings of each come from its name (see SETTINGS).
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jax._src.array import ArrayImpl

from dsdm_jax import pipeline
from dsdm_jax.attribution import datamodel, features
from dsdm_jax.attribution.sources import RowSource, deal
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.config import validate as checks
from dsdm_jax.core import processes, storage
from dsdm_jax.core.mesh import Team, make_mesh, team
from dsdm_jax.errors import UserError
from tests.pipeline.tiny import get_config

SETTINGS = {
  'plain': {},
  'store': {'basis': 'eigenvectors', 'basis_rows': 40, 'precondition': 'adam'},
  'jvp': {'projection': 'dense', 'mode': 'jvp', 'gram_rows': 64, 'precondition': 'adam', 'dimension': 48},
  'ekfac': {'projection': 'ekfac', 'mode': 'jvp', 'basis_rows': 41},
}  # of features


def begin():
  """A smaller pool than that of other tests: each step of two processes waits for both, several times."""
  config = get_config()
  config.pool.max_bytes, config.features.batch_size, config.features.shard_rows = 16_000, 64, 128
  return config


def settings(name: str):
  config = begin()
  config.features.update(SETTINGS[name])
  config.datamodel.bootstrap, config.datamodel.groups, config.datamodel.examples = 0, 1, 0
  return config


def run(config, folder: Path, stages: tuple[str, ...] = ('features', 'target_features', 'datamodel')) -> None:
  for stage in stages:
    pipeline.run_connected(pipeline.runner_config(config), folder, stage)


@contextlib.contextmanager
def counted(file: Path) -> Iterator[None]:
  """Writes how many bytes the passes over the pool bring from the devices to this process, and which it writes."""
  counts = {'crossed': 0, 'written': 0, 'hashed': 0}
  fetch, extract = ArrayImpl._single_device_array_to_np_array_did_copy, features._extract_pool
  write, sha256, depth = FeatureStore.write, storage._sha256, []

  def counting_fetch(array):
    counts['crossed'] += array.nbytes * bool(depth)
    return fetch(array)

  def counting_extract(*arguments):
    depth.append(None)
    extract(*arguments)
    depth.pop()

  def counting_write(store, shard, encoded):
    counts['written'] += sum(x.nbytes for x in encoded[:2] if x is not None)
    time.sleep(0.5 * file.stem.endswith('-1'))  # process 1 has a slow disk
    write(store, shard, encoded)

  def counting_hash(path):
    counts['hashed'] += path.stat().st_size * ('.zarr/c/' in str(path))
    return sha256(path)

  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(ArrayImpl, '_single_device_array_to_np_array_did_copy', counting_fetch)
    patched.setattr(features, '_extract_pool', counting_extract)
    patched.setattr(FeatureStore, 'write', counting_write)
    patched.setattr(storage, '_sha256', counting_hash)
    yield
  file.write_text(json.dumps(counts))


class Rows(RowSource):
  """70 rows in shards of 16, of which each process has some."""

  rows, dimension, shard_rows = 70, 12, 16

  def __init__(self, team: Team):
    self.team, self.phi_NJ = team, np.random.default_rng(0).normal(size=(70, 12)).astype(np.float32)

  def from_row(self, row: int):
    shards = [(start, min(start + 16, 70)) for start in range(row, 70, 16)]
    for (start, stop), _ in deal(shards, self.team):
      yield start, stop, self.phi_NJ[start:stop]


def check_shared_work(mesh, process: int) -> None:
  """Gram matrix, sums and scores of rows that two processes share, against NumPy; items that they divide."""
  assert processes.divide(range(5), lambda items: [10 * item for item in items]) == [0, 10, 20, 30, 40]

  def fail(items):
    if process:
      raise UserError('the second process fails')
    return [None for _ in items]

  with pytest.raises(UserError, match='the second process fails'):
    processes.divide(range(3), fail)
  source = Rows(team(mesh))
  assert source.team.count == 2 and source.team.leads
  assert sum(stop - start for start, stop, _ in source) in (38, 32)
  phi_NJ, rng = source.phi_NJ.astype(np.float64), np.random.default_rng(1)
  np.testing.assert_allclose(datamodel.gram(source, mesh=mesh)[0], phi_NJ.T @ phi_NJ / 70, atol=1e-6)
  weight_CN, u_JK = rng.random((2, 70)), rng.normal(size=(12, 3))
  np.testing.assert_allclose(datamodel.sums(source, weight_CN), weight_CN @ phi_NJ, atol=1e-5)
  np.testing.assert_allclose(datamodel.scores(source, u_JK), phi_NJ @ u_JK, atol=1e-5)


def main(argv: list[str]) -> int:
  address, process, folders = argv[1], int(argv[2]), [Path(name) for name in argv[3:]]
  wanted = {'coordinator': address, 'processes': 2, 'process': process, 'heartbeat_seconds': 20}
  config = begin()
  config.distributed.update(wanted)
  with processes.running(config, checks.flatten(config)):
    processes.before_devices()
    check_shared_work(make_mesh(config.mesh), process)
    for folder in folders:
      with counted(folder.parent / f'{folder.name}-{process}.json'):
        run(settings(folder.name), folder)
  return 0

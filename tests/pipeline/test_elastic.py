"""The features stage is killed on four devices and goes on with three, in batches of another size."""

import shutil
import time

import numpy as np
import pytest

from dsdm_jax.attribution.store import Features
from dsdm_jax.core import artifacts
from tests.helpers.workdirs import attempt_of, files_of
from tests.pipeline import runs

SHARD_ROWS = 32
FLAGS = (
  runs.TINY,
  '--config.proxies.count=1',
  '--config.features.store_dtype=float32',
  f'--config.features.shard_rows={SHARD_ROWS}',
)


@pytest.fixture(scope='module')
def begun(finished, tmp_path_factory):
  """A run of one proxy that stands as far as it."""
  folder = tmp_path_factory.mktemp('elastic') / 'begun'
  for stage in ('pool', 'targets'):
    shutil.copytree(finished / stage, folder / stage)
  runs.succeed(*FLAGS, f'--workdir={folder}', '--stage=proxies')
  return folder


def _stage(name, folder, flags, devices):
  return runs.succeed(*FLAGS, *flags, f'--workdir={folder}', f'--stage={name}', devices=devices)


@pytest.mark.parametrize(
  ('kind', 'first', 'second'),
  [
    ({}, ['batch_size=32'], ['batch_size=40']),
    (
      {'basis': 'eigenvectors', 'basis_rows': 41, 'precondition': 'adam'},
      ['batch_size=8'],
      ['batch_size=33', 'microbatch=5'],
    ),
    ({'projection': 'dense', 'dimension': 48}, ['batch_size=16', 'microbatch=8'], ['batch_size=20', 'microbatch=4']),
  ],
  ids=['two_sided', 'eigenvectors', 'dense'],
)
def test_a_killed_stage_goes_on_with_other_devices_and_batches(kind, first, second, begun, tmp_path):
  kept = [f'--config.features.{key}={value}' for key, value in kind.items()]
  one, other = ([*kept, *(f'--config.features.{flag}' for flag in flags)] for flags in (first, second))
  elastic, undisturbed = (shutil.copytree(begun, tmp_path / name) for name in ('elastic', 'undisturbed'))

  process = runs.start(*FLAGS, *one, f'--workdir={elastic}', '--stage=features', devices=4)
  while not list(elastic.glob('features/*/features_0.done/000002.json')) and process.child.poll() is None:
    time.sleep(0.005)
  process.child.kill()
  process.wait()
  part = attempt_of(elastic, 'features')
  by_four = sorted((part / 'features_0.done').glob('*.json'))
  markers = {file: file.read_bytes() for file in by_four}
  assert len(by_four) >= 3
  basis = [file.read_bytes() for file in part.glob('basis_*.npz')]
  assert len(basis) == ('basis' in kind)
  other_part = undisturbed / 'features' / part.name
  other_part.mkdir(parents=True)
  for file in (part / 'begun.json', *part.glob('basis_*.npz')):
    shutil.copy(file, other_part)  # rounding could turn eigenvectors of another machine's own

  _stage('features', elastic, other, devices=3)
  assert [e['resumed'] for e in runs.events(elastic) if e['event'] == 'begin' and e['stage'] == 'features'][-1]
  _stage('features', undisturbed, one, devices=1)
  mine, wanted = (artifacts.open_stage(folder, 'features') for folder in (elastic, undisturbed))
  mine.verify()
  assert mine.identity == wanted.identity
  assert all(
    (files_of(elastic, 'features') / 'features_0.done' / file.name).read_bytes() == data
    for file, data in markers.items()
  )
  assert [file.read_bytes() for file in files_of(elastic, 'features').glob('basis_*.npz')] == basis
  a, b = Features(mine), Features(wanted)
  shards = list(zip(a.pool(0), b.pool(0), strict=True))
  assert len(shards) > len(by_four), 'something was left for three devices'
  pairs = [(x, y) for (_, _, x), (_, _, y) in shards]
  for x_BJ, y_BJ in pairs:
    assert np.all(np.linalg.norm(x_BJ - y_BJ, axis=1) <= 1e-5 * np.linalg.norm(y_BJ, axis=1))

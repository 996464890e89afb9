"""What a disk does to finished work: the next run names the file, and one stage, or one shard, is made anew."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core.errors import UserError
from tests.conftest import FAULTS
from tests.pipeline import runs
from tests.pipeline.test_bad_input import _flip


def cut(file: Path) -> None:
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


CASES = {
  'flipped bit in the pool': ('pool', 'dataset/*.array_record*', _flip, 'has changed'),
  'manifest cut short': ('targets', 'manifest.json', cut, 'is unreadable'),
  'file missing': ('targets', '*.target.npz', Path.unlink, 'is missing'),
  'write torn': ('datamodel', 'scores.npz', cut, 'bytes where'),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES if FAULTS else list(CASES)[1:3])
def test_fault_is_named_and_one_stage_made_anew(server, finished, copied, tmp_path, count, case):
  stage, pattern, fault, words = CASES[case]
  file = sorted((copied / stage).glob(pattern))[0]
  fault(file)
  before = runs.fingerprint(copied)
  log = tmp_path / 'log'

  def run() -> int:
    return server.start(log, runs.TINY, f'--workdir={copied}').wait(300)

  assert run() == 2
  said = log.read_text().splitlines()[-1]
  assert said.startswith('dsdm_jax: ') and str(file) in said and words in said and f'delete {copied / stage}' in said
  assert runs.fingerprint(copied) == before
  shutil.rmtree(copied / stage)
  events = len(runs.events(copied))
  assert run() == 0, log.read_text()[-2000:]
  assert runs.stages_run(copied, events) == [stage]
  runs.assert_same_outcome(copied, finished)
  count('faults injected')


FAULTS_OF_A_SHARD = {
  'flipped bit': _flip,
  'cut to ten bytes': lambda file: file.write_bytes(file.read_bytes()[:10]),
  'lost': Path.unlink,
}


@pytest.mark.parametrize('fault', FAULTS_OF_A_SHARD)
@pytest.mark.parametrize(('dtype', 'shard', 'rows'), [('bfloat16', 1, '4 to 7'), ('int8', 2, '8 to 9')])
def test_one_shard_of_a_store_is_made_anew(tmp_path, count, dtype, shard, rows, fault):
  phi_NJ = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)

  def opened() -> FeatureStore:
    return FeatureStore(tmp_path / 'features_0.zarr', 10, 8, 4, dtype)

  def mend() -> None:
    store = opened()
    assert store.missing() == [shard]
    store.write(shard, phi_NJ[slice(*store.bounds(shard))])
    assert opened().missing() == []

  store = opened()
  for number in store.missing():
    store.write(number, phi_NJ[slice(*store.bounds(number))])
  wanted = store.read(shard)
  others = {k: v for k, v in runs.fingerprint(tmp_path).items() if f'/{shard}' not in k and f'00{shard}' not in k}
  for array in ('features_0.zarr', 'features_0.scales.zarr')[: 2 if dtype == 'int8' else 1]:
    FAULTS_OF_A_SHARD[fault](tmp_path / array / 'c' / str(shard) / '0')
    with pytest.raises(UserError, match=rf'rows {rows} in .*features_0.zarr cannot be read'):  # and not zeros
      opened().read(shard)
    mend()
    np.testing.assert_array_equal(opened().read(shard), wanted)
  (tmp_path / 'features_0.done' / f'00000{shard}.json').write_text('{"ro')
  mend()
  after = runs.fingerprint(tmp_path)
  assert {k: after[k] for k in others} == others
  count('faults injected', 2)


def test_shards_of_another_run_are_refused_by_name(tmp_path):
  """As where folders of jobs are laid over each other: markers say whose a shard is, whichever notes came last."""

  def opened(folder: Path, origin: str) -> FeatureStore:
    return FeatureStore(folder / 'features_0.zarr', 12, 8, 4, 'bfloat16', origin=origin)

  mine, theirs = (opened(tmp_path / name, name) for name in ('mine', 'theirs'))
  mine.write(0, np.ones((4, 8), np.float32))
  theirs.write(2, np.ones((4, 8), np.float32))
  shutil.copytree(tmp_path / 'theirs', tmp_path / 'mine', dirs_exist_ok=True)
  with pytest.raises(
    UserError, match=r'mine/features_0.zarr/c/2/0 is of a run with other settings.*000002.json'
  ) as error:
    opened(tmp_path / 'mine', 'mine').missing()
  assert 'delete that marker' in str(error.value)
  (tmp_path / 'mine/features_0.done/000002.json').unlink()
  assert opened(tmp_path / 'mine', 'mine').missing() == [1, 2]


def test_store_of_zeros_is_whole(tmp_path):
  store = FeatureStore(tmp_path / 'features_0.zarr', 4, 8, 4, 'float32')
  store.write(0, np.zeros((4, 8), np.float32))
  assert store.missing() == []
  assert not store.read(0).any()

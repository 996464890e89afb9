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


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_one_shard_of_a_store_is_made_anew(tmp_path, count, dtype):
  def opened() -> FeatureStore:
    return FeatureStore(tmp_path / 'features_0.zarr', 12, 8, 4, dtype)

  store = opened()
  for shard in range(3):
    store.write(shard, np.ones((4, 8), np.float32))
  others = {k: v for k, v in runs.fingerprint(tmp_path).items() if '/1' not in k and '000001' not in k}
  chunk = tmp_path / 'features_0.zarr' / 'c' / '1' / '0'
  _flip(chunk)
  with pytest.raises(UserError, match=r'rows 4 to 7 in .*features_0.zarr cannot be read'):
    opened().read(1)
  chunk.unlink()
  with pytest.raises(UserError, match='rows 4 to 7'):  # and not zeros
    opened().read(1)
  assert opened().missing() == [1]
  (tmp_path / 'features_0.done' / '000001.json').write_text('{"ro')
  assert opened().missing() == [1]
  opened().write(1, store.read(0))
  assert opened().missing() == []
  after = runs.fingerprint(tmp_path)
  assert {k: after[k] for k in others} == others
  count('faults injected', 3)


def test_store_of_zeros_is_whole(tmp_path):
  store = FeatureStore(tmp_path / 'features_0.zarr', 4, 8, 4, 'float32')
  store.write(0, np.zeros((4, 8), np.float32))
  assert store.missing() == []
  assert not store.read(0).any()

"""Two processes make features and scores as one: stored, recomputed, and by directional derivatives."""

import json
import shutil

import numpy as np
import pytest
import scipy.stats

from dsdm_jax.attribution.store import Features
from dsdm_jax.core import artifacts
from tests.attribution.two_processes import SETTINGS, begin, run, settings
from tests.conftest import FAULTS
from tests.core.test_processes import free_port
from tests.helpers import scores as saved_scores
from tests.helpers.workdirs import files_of
from tests.pipeline import runs


@pytest.mark.slow
def test_two_processes_make_the_features_and_scores_of_one(tmp_path):
  names = SETTINGS if FAULTS else ('plain',)
  pairs = {name: (tmp_path / 'two' / name, tmp_path / 'one' / name) for name in names}
  run(begin(), tmp_path / 'begun', ('pool', 'targets', 'proxies'))
  for folders in pairs.values():
    for folder in folders:
      shutil.copytree(tmp_path / 'begun', folder)
  address = f'127.0.0.1:{free_port()}'
  module, folders = 'tests.attribution.two_processes', [str(two) for two, _ in pairs.values()]
  started = [runs.start(address, str(process), *folders, module=module) for process in (0, 1)]
  first, second = (process.wait(250) for process in started)
  assert first.returncode == second.returncode == 0, (first.stderr + second.stderr)[-3000:]
  said = [line for line in second.stdout.splitlines() if not line.startswith('[Gloo]')]  # XLA's collectives
  assert '] datamodel  ' in first.stdout and said == []
  for name, (two, one) in pairs.items():
    run(settings(name), one)
    mine, theirs = (artifacts.open_stage(folder, 'features') for folder in (two, one))
    mine.verify()
    assert mine.manifest['cost']['flop'] == pytest.approx(theirs.manifest['cost']['flop'], rel=1e-9)
    readers = [
      Features(x, targets=artifacts.open_stage(folder, 'target_features')) for x, folder in ((mine, two), (theirs, one))
    ]
    for task in () if name == 'ekfac' else settings(name).targets.tasks:
      a_TJ, b_TJ = (reader.target(task, 1) for reader in readers)
      if name == 'jvp':  # eigenvectors are only determined up to their sign
        assert np.all(np.linalg.norm(a_TJ - b_TJ, axis=1) <= 1e-5 * np.linalg.norm(b_TJ, axis=1))
    if name in ('plain', 'store'):
      # Each process brings to its host, writes and hashes what its devices computed, and nothing twice.
      counts = [json.loads((two.parent / f'{name}-{process}.json').read_text()) for process in (0, 1)]
      files = mine.manifest['files']
      stored = sum(entry['bytes'] for file, entry in files.items() if '.zarr/c/' in file)
      assert all(0 < c['crossed'] <= 1.05 * c['written'] for c in counts), counts
      assert min(c['written'] for c in counts) > stored / 4
      assert sum(c['hashed'] for c in counts) == stored, counts
    a, b = (saved_scores.load(files_of(folder, 'datamodel')) for folder in (two, one))
    assert a.keys() == b.keys()
    for key in (k for k in a if k.startswith('score_') and k.endswith('_N')):
      correlation = scipy.stats.spearmanr(a[key], b[key]).statistic
      # The store's rounding to bfloat16 may fall either way; nothing else differs by more than float32's.
      assert correlation > 0.9999, (name, key, correlation)

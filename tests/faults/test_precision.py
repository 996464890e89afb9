"""Features computed in bfloat16, or kept in bfloat16 or int8, choose the rows that float32 chooses, but for few.

The suite prints how many.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax.attribution import features, score_files, scores, target_features
from dsdm_jax.core import artifacts
from dsdm_jax.core.artifacts import Cost, Identity
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from tests.faults.server import Server
from tests.pipeline import runs, tiny

SHARE = 0.25  # of the pool that a selection takes


def _top(score_N: np.ndarray) -> set[int]:
  return set((-score_N).argsort(kind='stable')[: round(SHARE * len(score_N))].tolist())


def _computed_in(dtype: str, finished: Path, folder: Path) -> dict[str, np.ndarray]:
  """Target → score_N of the finished run's proxies, whose float32 weights are used in `dtype`; features in float32."""
  config = tiny.get_config()
  model = config.proxies.model.copy_and_resolve_references()
  with config.unlocked(), model.unlocked():
    model.compute_dtype = dtype
    config.proxies.model = model
  config.features.store_dtype = 'float32'
  inputs = {}
  for stage in ('pool', 'targets', 'proxies'):
    made = artifacts.open_stage(finished, stage)
    assert made is not None
    inputs[stage] = made

  steps = ('features', features.run), ('target_features', target_features.run), ('datamodel', scores.run)
  for stage, run in steps:
    settings = {'features.output_fn': config.features.output_fn} if stage == 'features' else {}
    identity = Identity(stage, 1, settings, {})
    out = artifacts.begin(folder, identity)
    cost = Cost(out)
    semantics = run(Context(config, out, inputs, Log(folder, stage, enabled=False), cost))
    assert semantics is not None
    inputs[stage] = artifacts.commit(folder, identity, semantics, cost)
  read = scores.Scores(inputs['datamodel'])
  return {target: read.score_N(target) for target in (*read.tasks, 'mix')}


def _kept_in(dtype: str, server: Server, finished: Path, folder: Path) -> dict[str, np.ndarray]:
  """Target → score_N of the finished run's proxies, with features in `dtype`."""
  log = folder.with_suffix('.log')
  for stage in ('pool', 'targets', 'proxies'):
    shutil.copytree(finished / stage, folder / stage)
  for stage in ('features', 'target_features', 'datamodel'):
    flags = (runs.TINY, f'--workdir={folder}', f'--stage={stage}', f'--config.features.store_dtype={dtype}')
    assert server.start(log, *flags).wait(300) == 0, log.read_text()[-3000:]
  identity = artifacts.read(folder, 'features')['features'].identity
  assert identity['settings']['features.store_dtype'] == dtype
  return score_files.load(folder, 'mix')


@pytest.fixture(scope='module')
def exact(server, finished, tmp_path_factory) -> dict[str, np.ndarray]:
  return _kept_in('float32', server, finished, tmp_path_factory.mktemp('exact') / 'run')


def test_top_rows_of_features_computed_in_bfloat16_are_those_of_float32(exact, finished, tmp_path, count):
  """Weights, losses and sums stay float32; activations, their gradients and matmuls are bfloat16."""
  rounded = _computed_in('bfloat16', finished, tmp_path)
  assert exact.keys() == rounded.keys()
  for target, score_N in exact.items():
    assert np.abs(rounded[target] - score_N).max() > 1e-4 * np.abs(score_N).max()  # it was another computation
    top, found = _top(score_N), _top(rounded[target])
    assert len(top & found) >= 0.95 * len(top), target
    count('top rows by float32 looked for in those computed in bfloat16', len(top))
    count('top rows by float32 found in those computed in bfloat16', len(top & found))


@pytest.mark.slow
@pytest.mark.parametrize(('dtype', 'least'), [('bfloat16', 0.97), ('int8', 0.9)])
def test_top_rows_of_narrow_features_are_those_of_float32(exact, server, finished, tmp_path, count, dtype, least):
  """The same pool, targets and proxies; of scores of every target, and of the mix."""
  stored = dtype == 'bfloat16'  # by the finished run
  narrow = score_files.load(finished, 'mix') if stored else _kept_in(dtype, server, finished, tmp_path / 'run')
  assert exact.keys() == narrow.keys()
  for target, score_N in exact.items():
    top, found = _top(score_N), _top(narrow[target])
    assert len(top & found) >= least * len(top), target
    count(f'top rows by float32 looked for in those by {dtype}', len(top))
    count(f'top rows by float32 found in those by {dtype}', len(top & found))

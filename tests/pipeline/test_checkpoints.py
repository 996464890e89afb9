"""Several checkpoints of each proxy, from training to scores."""

import shutil

import jax
import numpy as np

from dsdm_jax.attribution.extractor import feature_step
from dsdm_jax.attribution.store import Features
from dsdm_jax.core import artifacts, mesh
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import Trainer
from tests.helpers import scores as saved_scores
from tests.helpers.workdirs import files_of
from tests.pipeline import runs
from tests.pipeline.tiny import get_config

EACH = 3


def test_features_are_of_each_checkpoint_and_scores_of_all(finished, tmp_path):
  workdir = tmp_path / 'run'
  for stage in ('pool', 'targets'):
    shutil.copytree(finished / stage, workdir / stage)
  for stage in ('proxies', 'features', 'target_features', 'datamodel'):
    runs.succeed(runs.TINY, f'--workdir={workdir}', f'--stage={stage}', f'--config.proxies.checkpoints={EACH}')
  made = {
    name: artifacts.open_stage(workdir, name) for name in ('pool', 'targets', 'proxies', 'features', 'target_features')
  }
  steps = made['proxies'].semantics['steps']
  wanted = [round(steps * (i + 1) / EACH) for i in range(EACH)]
  assert len(set(wanted)) == EACH

  config = get_config()
  one = mesh.make_mesh(config.mesh, jax.devices()[:1])
  vocab_size = Pool(made['pool']).vocab_size
  trainer = Trainer(config.proxies.model, config.proxies.train, vocab_size, config.pool.length, one)
  step = feature_step(config, vocab_size, config.pool.length, one)
  examples = Targets(made['targets']).examples('docs', 'target')
  features = Features(made['features'], targets=made['target_features'])
  assert features.checkpoints == 2 * EACH
  for checkpoint in range(features.checkpoints):
    proxy, place = divmod(checkpoint, EACH)
    state = load_state(made['proxies'].path / f'proxy_{proxy}', trainer, wanted[place])
    phi_TJ = step(step.prepare(state.params, checkpoint), examples.tokens_TL, examples.weights_TL)
    found_TJ = features.target('docs', checkpoint)
    # One row at a time and a batch at once round otherwise.
    np.testing.assert_allclose(found_TJ, phi_TJ, atol=1e-5 * np.abs(found_TJ).max())
  scores = saved_scores.load(files_of(workdir, 'datamodel'))
  assert scores['score_docs_CN'].shape == (2 * EACH, features.rows)
  assert len({row.tobytes() for row in scores['score_docs_CN']}) == 2 * EACH

  # The last of each is what one checkpoint would be.
  before = artifacts.open_stage(finished, 'proxies')
  for proxy in range(2):
    ends = [load_state(s.path / f'proxy_{proxy}', trainer) for s in (before, made['proxies'])]
    for x, y in zip(*map(jax.tree.leaves, ends), strict=True):
      np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_more_checkpoints_than_steps_are_told(finished, tmp_path):
  shutil.copytree(finished / 'pool', tmp_path / 'run' / 'pool')
  flags = (runs.TINY, f'--workdir={tmp_path / "run"}', '--stage=proxies', '--config.proxies.checkpoints=1000')
  assert 'are fewer than proxies.checkpoints = 1000' in runs.refused(*flags)

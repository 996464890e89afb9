"""Only the rows that a model-free method keeps are scored, and arms that read scores choose among them."""

import shutil

import numpy as np
import pytest

from dsdm_jax import pipeline
from dsdm_jax.attribution.scores import Scores
from dsdm_jax.config.validate import flatten
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.stage import existing
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from tests.helpers.workdirs import files_of
from tests.pipeline.tiny import get_config


def config_of(**selection):
  config = get_config()
  config.selection.update({'prefilter': 'lsa 2', 'targets': ('mix', 'docs'), **selection})
  return config


def test_a_run_without_a_prefilter_has_the_stages_that_it_had():
  stages = existing(pipeline.STAGES, flatten(get_config()))
  assert [stage.name for stage in stages if not stage.on_request] == list(pipeline.NAMES)
  assert not any('prefilter' in stage.reads for stage in stages)
  assert not any(key.startswith('selection') for s in stages if s.name == 'features' for key in s.keys)
  with pytest.raises(UserError, match='selection.prefilter, which is not set'):
    pipeline.run(get_config(), '/nowhere/run', 'prefilter')


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'prefilter': 'dsdm 2'}, 'must be empty'),
    ({'prefilter': 'lsa 0.5'}, 'must be empty'),
    ({'methods': ('gradient', 'random')}, 'features of those of all rows|need those of all rows'),
    ({'unit': 'document'}, "needs selection.unit = 'row'"),
  ],
)
def test_refused(change, words):
  with pytest.raises(UserError, match=words):
    pipeline.run(config_of(**change), '/nowhere/run', 'prefilter')


@pytest.fixture(scope='module')
def filtered(finished, tmp_path_factory):
  """A run whose scores are of the rows that LSA keeps."""
  folder = tmp_path_factory.mktemp('filtered') / 'run'
  for stage in ('pool', 'leakage', 'targets', 'proxies'):
    shutil.copytree(finished / stage, folder / stage)
  methods = ('dsdm', 'bottom', 'dsdm_gumbel', 'dsdm_boltzmann', 'dsdm_shifted', 'dsdm_distilled', 'hybrid', 'lsa')
  config = config_of(methods=(*methods, 'random'))
  config.features.projection, config.datamodel.examples = 'ekfac', 1
  for stage in ('prefilter', 'features', 'target_features', 'datamodel', 'selection'):
    pipeline.run(config, folder, stage)
  return folder


@pytest.mark.full
def test_arms_choose_among_the_rows_that_are_kept(filtered):
  kept = storage.load(files_of(filtered, 'prefilter') / 'rows.npy')
  total = artifacts.open_stage(filtered, 'prefilter').semantics['of']
  assert 64 <= len(kept) <= 128 < total and np.all(np.diff(kept) > 0)
  score_N = Scores(artifacts.open_stage(filtered, 'datamodel')).score_N('mix')
  assert np.flatnonzero(~np.isnan(score_N)).tolist() == kept.tolist()
  chosen = files_of(filtered, 'selection')
  rows = {name: Selection.load(chosen, f'{name}--mix--0').rows for name in ('dsdm', 'bottom', 'hybrid', 'dsdm_gumbel')}
  for name in rows:
    assert set(rows[name]) <= set(kept), name
  order = kept[np.argsort(-score_N[kept], kind='stable')]
  assert rows['dsdm'].tolist() == order[:32].tolist() and set(rows['bottom']) == set(order[-32:])
  # Methods that read no scores choose from the whole pool.
  assert set(Selection.load(chosen, 'lsa--mix--0').rows) <= set(kept)
  assert not set(Selection.load(chosen, 'random--any--0').rows) <= set(kept)
  assert Selection.load(chosen, 'dsdm_distilled--mix--0').provenance['fitted_rows'] <= len(kept)
  prefilter, costs = (
    artifacts.open_stage(filtered, 'prefilter').manifest['cost'],
    [artifacts.open_stage(filtered, stage).manifest['cost']['flop'] for stage in ('features', 'datamodel')],
  )
  assert prefilter['flop'] > 0 and all(flop > 0 for flop in costs)


@pytest.mark.full
def test_scores_of_kept_rows_are_those_of_a_run_that_scores_all(filtered, tmp_path):
  """The curvature is that of the pool, not of the rows that are kept."""
  for stage in ('pool', 'leakage', 'targets', 'proxies'):
    shutil.copytree(filtered / stage, tmp_path / 'run' / stage)
  config = config_of(prefilter='')
  config.features.projection, config.datamodel.examples = 'ekfac', 1
  for stage in ('features', 'target_features', 'datamodel'):
    pipeline.run(config, tmp_path / 'run', stage)
  some, every = (Scores(artifacts.open_stage(run, 'datamodel')).score_N('docs') for run in (filtered, tmp_path / 'run'))
  kept = np.flatnonzero(~np.isnan(some))
  assert np.abs(some[kept] - every[kept]).max() < 1e-4 * np.abs(every).max()

"""Scores of single tokens, from finished runs of every kind, against the rows' scores."""

import shutil

import numpy as np
import pytest

import dsdm_jax
from dsdm_jax import pipeline
from dsdm_jax.attribution.tokens import TokenScores
from dsdm_jax.errors import UserError
from tests.helpers.workdirs import files_of
from tests.pipeline.tiny import get_config

ROWS = [5, 0, 17, 3, 100]
JVP = {'projection': 'dense', 'mode': 'jvp', 'gram_rows': 64, 'dimension': 48, 'precondition': 'adam'}


def test_tokens_sum_up_to_the_row_in_a_finished_run(finished):
  """A store of bfloat16, whose rounding moves a sum of products by some 2^-9 of their size."""
  run = dsdm_jax.load(finished)
  found_BL = run.scores.tokens('docs', ROWS)
  assert found_BL.dtype == np.float32 and found_BL.shape == (len(ROWS), run.pool.length)
  assert not found_BL[:, 0].any() and np.all(found_BL[:, 1:].std(axis=1) > 0)
  error_B = np.abs(found_BL.sum(axis=1) - run.scores['docs'][ROWS])
  assert error_B.max() < 0.02 * run.scores['docs'].std()
  np.testing.assert_allclose(run.scores.tokens('docs', ROWS[2:3], batch_size=2), found_BL[2:3], rtol=1e-3, atol=1e-6)
  assert run.scores.tokens('docs', []).shape == (0, run.pool.length)
  with pytest.raises(KeyError, match="no scores of tokens for 'mix', only for docs"):
    run.scores.tokens('mix', ROWS)


def test_rows_that_a_prefilter_left_out_have_no_score_of_a_token(copied):
  run = dsdm_jax.load(copied)
  inputs = {stage: run.artifact(stage) for stage in ('pool', 'proxies', 'features', 'datamodel')}
  every_BL = TokenScores(inputs)('docs', ROWS)
  scored_N = np.ones(run.pool.num_rows, bool)
  scored_N[ROWS[1:3]] = False
  np.save(inputs['datamodel'].path / 'scored.npy', scored_N)
  inputs['datamodel'].manifest['files']['scored.npy'] = {}
  tokens = TokenScores(inputs)
  found_BL = tokens('docs', ROWS)
  assert np.isnan(found_BL[1:3]).all()
  np.testing.assert_array_equal(found_BL[[0, 3, 4]], every_BL[[0, 3, 4]])
  assert np.isnan(tokens('docs', ROWS[1:2])).all()


@pytest.mark.parametrize(
  ('features', 'datamodel'),
  [
    ({'precondition': 'adam'}, {'q': True, 'average': 'unseen'}),
    ({'basis': 'eigenvectors', 'basis_rows': 40, 'mode': 'stream'}, {'gram': 'joint'}),
    ({'output_fn': 'dsdm_jax.lm.outputs:log_likelihood', **JVP}, {'bootstrap': 0, 'groups': 1, 'examples': 0}),
    ({'projection': 'ekfac', 'mode': 'jvp', 'basis_rows': 41}, {'bootstrap': 3, 'average': 'unseen'}),
  ],
  ids=['two_sided', 'eigenvectors', 'dense', 'ekfac'],
)
def test_tokens_sum_up_to_the_row(features, datamodel, finished, tmp_path):
  config = get_config()
  config.features.update({'store_dtype': 'float32', 'shard_rows': 128, **features})
  config.datamodel.update(datamodel)
  folder = tmp_path / 'run'
  for stage in ('pool', 'targets', 'proxies'):
    shutil.copytree(finished / stage, folder / stage)
  for stage in ('features', 'target_features', 'datamodel'):
    pipeline.run(config, folder, stage)
  run = dsdm_jax.load(folder)
  for task in run.scores.tasks:
    found_B, wanted_N = run.scores.tokens(task, ROWS).sum(axis=1), run.scores[task]
    level = 0.0
    if config.datamodel.average == 'unseen':  # a row that both proxies saw is shifted by a constant
      level = (wanted_N[ROWS] - found_B) * _seen_by_all(folder, config.proxies.count)[ROWS]
      assert len(np.unique(np.round(level[level != 0] / wanted_N.std(), 3))) <= 1
    # As far as directional derivatives and features agree: sums of a few ten thousand products in another order.
    np.testing.assert_allclose(found_B + level, wanted_N[ROWS], rtol=0, atol=1e-4 * np.abs(wanted_N).max())


def _seen_by_all(folder, count):
  subsets = [np.load(files_of(folder, 'proxies') / f'subset_{c}.npy') for c in range(count)]
  rows = dsdm_jax.load(folder).pool.num_rows
  return np.all([np.isin(np.arange(rows), subset) for subset in subsets], axis=0)


def test_what_does_not_tell_of_tokens_is_refused(copied):
  run = dsdm_jax.load(copied)
  inputs = {stage: run.artifact(stage) for stage in ('pool', 'proxies', 'features', 'datamodel')}
  name = 'tests.helpers.custom_models:last_token_logit'
  inputs['features'].manifest['identity']['settings']['features.output_fn'] = name
  with pytest.raises(UserError, match=r'features.output_fn of the run is the function .*load\(..., functions='):
    TokenScores(inputs)
  with pytest.raises(UserError, match='write a function last_token_logit_shares beside it'):
    TokenScores(inputs, functions=(name,))
  inputs['datamodel'].manifest['semantics']['unit_norm'] = True
  with pytest.raises(UserError, match='unit_norm divides a row by its norm'):
    TokenScores(inputs)

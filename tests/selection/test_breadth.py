"""Documents held out of the pool are one more task: no arm takes their rows, and the two splits share none."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dsdm_jax import pipeline
from dsdm_jax.attribution import scores
from dsdm_jax.core import artifacts
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets import breadth
from dsdm_jax.data.targets.masked import masked_rows
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.errors import UserError
from tests.helpers.selection import target as target_of
from tests.helpers.workdirs import files_of
from tests.pipeline.tiny import get_config


@pytest.fixture(scope='module')
def broad(finished, tmp_path_factory):
  """Pool, leakage and targets of a run with breadth."""
  folder = tmp_path_factory.mktemp('broad') / 'run'
  shutil.copytree(finished / 'pool', folder / 'pool')
  config = get_config()
  config.targets.breadth = 0.5
  for stage in ('leakage', 'targets'):
    pipeline.run(config, folder, stage)
  return folder


def test_held_out_documents_are_a_task_and_their_rows_are_masked(broad):
  pool, leakage = Pool(artifacts.open_stage(broad, 'pool')), artifacts.open_stage(broad, 'leakage')
  targets = Targets(artifacts.open_stage(broad, 'targets'))
  assert targets.tasks[-1] == 'breadth' and targets.weight('breadth') == 0.5 and targets.weight('docs') == 1
  documents = np.load(leakage.path / 'breadth.npy')
  ids = {pool.documents[int(document)]['id'] for document in documents}
  by_split = {split: targets.examples('breadth', split) for split in ('target', 'holdout')}
  of_split = {split: {record['document'] for record in e.records} for split, e in by_split.items()}
  assert all(of_split.values()) and not set.intersection(*of_split.values())
  assert set.union(*of_split.values()) <= ids
  sizes, room = np.array([len(tokens) for tokens in pool.document_tokens(documents)]), pool.length - 1
  short = int(((sizes > room) & (sizes % room > 0) & (sizes % room < room // 4)).sum())
  assert json.loads((files_of(broad, 'targets') / 'breadth.json').read_text())['short'] == short
  # Every row with a token of a held-out document is masked, and few others.
  masked_N, text_N = masked_rows(leakage), np.load(leakage.path / 'mask.npy')
  rows = pool.spans.rows_of(documents)[1]
  assert masked_N[rows].all() and not text_N[rows].any()
  assert masked_N.sum() == len(set(rows)) + text_N.sum()
  assert 0 < pool.spans.tokens_D[documents].sum() <= breadth.SHARE * pool.num_rows * pool.length
  # An example is an end mark and the tokens that its document has in the pool.
  for examples in by_split.values():
    assert len(examples) <= get_config().targets.max_examples
    for tokens_L, weights_L, record in zip(examples.tokens_TL, examples.weights_TL, examples.records, strict=True):
      name, number = record['id'].rsplit('#', 1)
      [document] = [d for d in documents if pool.documents[int(d)]['id'] == name]
      [whole] = pool.document_tokens([document])
      start, size = int(number) * (pool.length - 1), int((weights_L > 0).nonzero()[0].max())
      assert tokens_L[0] == pool.encoder.eos and weights_L[0] == 0
      assert tokens_L[1 : 1 + size].tolist() == whole[start : start + size].tolist()


def test_without_breadth_there_is_nothing_of_it(finished):
  assert 'breadth' not in json.loads((files_of(finished, 'targets') / 'tasks.json').read_text())
  assert not (files_of(finished, 'targets') / 'weights.json').exists()
  assert not (files_of(finished, 'leakage') / 'held_out.npy').exists()


def test_few_documents_are_refused(broad):
  pool = Pool(artifacts.open_stage(broad, 'pool'))
  with pytest.raises(UserError, match='fewer than 4'):
    breadth.draw(pool, np.ones(pool.num_rows, bool), 0)


def test_weights_of_a_mix():
  score_TN = np.random.default_rng(0).normal(size=(3, 50)) * [[1], [10], [3]]
  z_TN = (score_TN - score_TN.mean(axis=1, keepdims=True)) / score_TN.std(axis=1, keepdims=True)
  weights = (1.0, 1.0, 0.5)
  np.testing.assert_allclose(scores.mix(score_TN, 'zscore', weights), np.array(weights) @ z_TN / 2.5, atol=1e-6)
  assert np.array_equal(scores.mix(score_TN, 'zscore'), scores.mix(score_TN, 'zscore', (1.0, 1.0, 1.0)))
  error_N = scores.mix_error(np.abs(score_TN), score_TN, 'mean', weights)
  expected_N = np.sqrt((np.array(weights)[:, None] ** 2 * score_TN**2).sum(axis=0)) / 2.5
  np.testing.assert_allclose(error_N, expected_N, rtol=1e-6)


def test_selectors_mix_by_the_same_weights():
  own = dataclasses.replace(target_of(['a b', 'c d']), name='mix', tasks=('docs', 'breadth'), weights=(1.0, 0.25))
  score = {'docs': np.arange(4.0), 'breadth': np.array([3.0, -1.0, 0.0, 5.0])}
  np.testing.assert_array_equal(
    own.mixed(score.__getitem__), scores.mix(np.stack([*score.values()]), 'zscore', (1.0, 0.25))
  )


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'targets__breadth': -1.0}, 'greater than or equal|at least 0'),
    ({'selection__targets': ('docs+breadth',)}, "must be 'mix', the name of a task"),
  ],
)
def test_refused(change, words):
  config = get_config()
  for key, value in change.items():
    section, _, name = key.partition('__')
    config[section][name] = value
  with pytest.raises(UserError, match=words):
    pipeline.run(config, '/nowhere/run', 'targets')

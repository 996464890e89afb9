"""Averages over checkpoints: over all proxies, or those that did not train on a row."""

import numpy as np
import pytest

from dsdm_jax.attribution import scores
from dsdm_jax.attribution.scores import SubsetEffect

SEEN_CN = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0]], bool)


def test_weights_by_hand():
  third, half = 1 / 3, 1 / 2
  np.testing.assert_allclose(scores.proxy_weights(SEEN_CN, 'all'), np.full((3, 5), third))
  expected = [[third, 0, half, third, 0], [third, half, 0, third, 0], [third, half, half, third, 1]]
  np.testing.assert_allclose(scores.proxy_weights(SEEN_CN, 'unseen'), expected)


def _scores(shift, rows=4_000, checkpoints=3, seed=0):
  rng = np.random.default_rng(seed)
  seen_CN = rng.random((checkpoints, rows)) < 0.4
  truth_N = rng.normal(size=rows)
  score_CN = truth_N + 0.5 * rng.normal(size=(checkpoints, rows)) + 5 + shift * seen_CN
  return truth_N, score_CN, seen_CN


def _effect(score_CN, seen_CN, shard=300):
  effect = SubsetEffect.empty(len(score_CN), 1)
  for start in range(0, score_CN.shape[1], shard):
    effect.add(score_CN[:, start : start + shard, None], seen_CN[:, start : start + shard])
  return effect


def test_subset_effect_against_whole_arrays():
  _, score_CN, seen_CN = _scores(-0.7)
  effect = _effect(score_CN, seen_CN).describe(0)
  z_CN = (score_CN - score_CN.mean(axis=1, keepdims=True)) / score_CN.std(axis=1, keepdims=True)
  assert effect['inside_mean_sd'] == pytest.approx(z_CN[seen_CN].mean())
  assert effect['outside_mean_sd'] == pytest.approx(z_CN[~seen_CN].mean())
  assert effect['shift_sd'] == pytest.approx(-0.7 / np.sqrt(1.25 + 0.24 * 0.49), abs=0.03)
  difference_C = [s[m].mean() - s[~m].mean() for s, m in zip(score_CN, seen_CN, strict=True)]
  np.testing.assert_allclose(_effect(score_CN, seen_CN).difference_CK[:, 0], difference_C)


@pytest.mark.parametrize(('shift', 'expected'), [(0.0, 'all'), (0.05, 'all'), (-0.3, 'unseen'), (0.3, 'unseen')])
def test_auto_is_unseen_where_the_subset_shifts_scores(shift, expected):
  _, score_CN, seen_CN = _scores(shift)
  described = _effect(score_CN, seen_CN).describe(0)
  assert scores.resolve_average('auto', described) == expected
  assert scores.resolve_average('all', described) == 'all'


def test_auto_ignores_a_shift_by_chance():
  """Means of 40 rows differ by more than 0.1 sd more often than not."""
  shifts, chosen = [], []
  for seed in range(40):
    _, score_CN, seen_CN = _scores(0.0, rows=40, checkpoints=1, seed=seed)
    described = _effect(score_CN, seen_CN).describe(0)
    shifts.append(abs(described['shift_sd']) > 0.1)
    chosen.append(scores.resolve_average('auto', described) == 'unseen')
  assert np.mean(shifts) > 0.5
  assert np.mean(chosen) < 0.15


def test_unseen_scores_are_free_of_the_shift():
  truth_N, score_CN, seen_CN = _scores(-3.0)

  def correlation(average):
    score_N = (score_CN * scores.proxy_weights(seen_CN, average)).sum(axis=0)
    if average == 'unseen':
      scores.level(score_N[:, None], seen_CN, _effect(score_CN, seen_CN).difference_CK)
    return np.corrcoef(score_N, truth_N)[0, 1], score_N

  # Var of truth 1, of the mean of three noises 1/12, of the mean of three shifts 9 · 0.24/3.
  assert correlation('all')[0] == pytest.approx((1 + 1 / 12 + 0.72) ** -0.5, abs=0.04)
  clean, score_N = correlation('unseen')
  assert clean > 0.9
  # Rows that every proxy trained on are on the level of the others.
  everywhere = seen_CN.all(axis=0)
  assert 200 < everywhere.sum() < 320
  error = 4 * np.sqrt(1.25 / everywhere.sum())
  assert abs(score_N[everywhere].mean() - score_N[~everywhere].mean()) < error


def test_a_checkpoint_that_trained_on_everything_has_no_difference():
  score_CN = np.random.default_rng(0).normal(size=(2, 50))
  seen_CN = np.zeros((2, 50), bool)
  seen_CN[0] = True
  assert _effect(score_CN, seen_CN).difference_CK.tolist() == [[0.0], [0.0]]
  assert np.isfinite(list(_effect(score_CN, seen_CN).describe(0).values())).all()


def test_agreement():
  score_N = np.arange(10.0)
  assert scores.agreement(score_N[None]) == 1
  assert scores.agreement(np.stack([score_N, np.exp(score_N)])) == pytest.approx(1)
  assert scores.agreement(np.stack([score_N, -score_N])) == pytest.approx(-1)

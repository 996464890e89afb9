"""What a score is worth, on a bank whose answer is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax.attribution import calibration
from dsdm_jax.attribution.calibration import Bank
from dsdm_jax.core.artifacts import Artifact

ROWS, SUBSETS, SLOPE = 400, 60, 0.003  # nats per token for a row of weight 1 and score 1


ROW_N = np.delete(np.arange(ROWS + 4), [0, 3, 80, 81])  # masked rows of the pool are not in the bank


def bank(noise: float, seed: int = 0) -> tuple[Bank, np.ndarray]:
  """Two families of subsets with levels of their own, whose log-likelihoods are linear in two tasks' scores."""
  rng = np.random.default_rng(seed)
  of_pool_XK = rng.normal(size=(ROWS + 4, 2)) * (1, 7)
  score_NK = of_pool_XK[ROW_N]
  weight_SN = np.concatenate([rng.random((SUBSETS, ROWS)) < share for share in (0.5, 0.1)])
  level = np.repeat([-2.0, -5.0], SUBSETS)[:, None]
  truth_SK = level + SLOPE * weight_SN @ score_NK + noise * rng.normal(size=(2 * SUBSETS, 2))
  return Bank(ROW_N, np.repeat(['halves', 'deciles'], SUBSETS), weight_SN, truth_SK, ('a', 'b')), of_pool_XK


def test_the_slope_is_exact_without_noise_and_scales_with_the_scores():
  exact, score_XK = bank(0)
  wanted = SLOPE * 0.01 * ROWS  # 1 % of the budget is the weight of four rows
  for factor in (1, -10):
    found = exact.worth(np.append(score_XK[:, 0], [np.inf] * 3) * factor, ['a'])  # later rows are not in the bank
    assert found['nats_per_token'] == pytest.approx(wanted / factor)
    assert found['error'] == pytest.approx(0, abs=1e-12)
    assert found['families'] == pytest.approx({'halves': wanted / factor, 'deciles': wanted / factor})
  assert exact.worth(np.ones(ROWS + 4), ['a'])['nats_per_token'] != found['nats_per_token']


def test_the_error_is_that_of_repeated_banks():
  found = [b.worth(score_XK[:, 1], ['b']) for b, score_XK in (bank(0.05, seed) for seed in range(40))]
  values, errors = (np.array([f[key] for f in found]) for key in ('nats_per_token', 'error'))
  spread = values.std(ddof=1)  # known to 11 % from 40 banks
  assert 0.7 * spread < errors.mean() < 1.4 * spread
  assert np.mean(np.abs(values - SLOPE * 0.01 * ROWS) < 2 * errors) > 0.8


def test_scores_that_do_not_differ_are_worth_nothing_known():
  exact, _ = bank(0)
  halves = exact.family_S == 'halves'
  even = Bank(
    ROW_N, exact.family_S[halves], np.tile(exact.weight_SN[:1], (SUBSETS, 1)), exact.truth_SK[halves], exact.tasks
  )
  wanted = {'nats_per_token': None, 'error': None, 'families': {'halves': None}}
  assert even.worth(np.ones(ROWS + 4), ['a']) == wanted


def test_what_exports_say(tmp_path: Path):
  exact, score_XK = bank(0)
  exact.save(tmp_path)
  validation = Artifact(tmp_path, {'files': {calibration.FILE: {}}})
  scores = {'a': (score_XK[:, 0], ('a',)), 'mix': (score_XK.sum(axis=1), ('a', 'b')), 'c': (score_XK[:, 0], ('c',))}
  found = calibration.describe(validation, scores)['calibration']
  assert set(found['targets']) == {'a', 'mix'} and '1% of the training budget' in found['unit']
  assert found['targets']['a']['nats_per_token'] == pytest.approx(SLOPE * 0.01 * ROWS)
  assert json.loads(json.dumps(found)) == found
  for missing in (None, Artifact(tmp_path, {'files': {}})):
    assert calibration.describe(missing, scores)['calibration'].startswith('not calibrated')
  for row, is_known in ((0, True), (1, False)):  # row 0 is not in the bank
    prefiltered = score_XK[:, 0].copy()
    prefiltered[row] = np.nan
    found = calibration.describe(validation, {'a': (prefiltered, ('a',))})['calibration']
    assert ('targets' in found) == is_known and ('a prefilter left rows' in found) != is_known

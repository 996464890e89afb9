"""Weightings of target examples, and the statistics of their resamples."""

import numpy as np
import pytest

from dsdm_jax.attribution import scores
from dsdm_jax.attribution.solve import TargetWeights


def test_weights_are_means_over_all_groups_and_documents():
  documents = ['a', 'a', 'b', 'c', 'c', 'c', 'd', 'e']
  c = TargetWeights.of_documents(documents, groups=3, resamples=200, seed=0, task='docs')
  assert (c.clusters, c.groups, c.resamples, c.weight_KT.shape) == (5, 3, 200, (204, 8))
  np.testing.assert_allclose(c.weight_KT.sum(axis=1), 1)
  np.testing.assert_allclose(c.weight_KT[0], 1 / 8)
  assert set(c.group_T) == {0, 1, 2}
  for g, row in enumerate(c.weight_KT[c.group_rows]):
    np.testing.assert_allclose(row, (c.group_T == g) / (c.group_T == g).sum())
  for same in ([0, 1], [3, 4, 5]):  # examples of one document stay together
    assert len(set(c.group_T[same])) == 1
    assert (np.ptp(c.weight_KT[c.resample_rows][:, same], axis=1) == 0).all()
  again = TargetWeights.of_documents(documents, 3, 200, 0, 'docs')
  np.testing.assert_array_equal(again.weight_KT, c.weight_KT)
  assert not np.array_equal(TargetWeights.of_documents(documents, 3, 200, 1, 'docs').weight_KT, c.weight_KT)


def test_first_examples_come_between_groups_and_resamples():
  documents = ['a', 'a', 'b', 'c']
  c, plain = (
    TargetWeights.of_documents(documents, 2, 30, 0, 't', examples=3),
    TargetWeights.of_documents(documents, 2, 30, 0, 't'),
  )
  np.testing.assert_array_equal(c.weight_KT[c.example_rows], np.eye(4)[:3])
  np.testing.assert_array_equal(c.weight_KT[c.resample_rows], plain.weight_KT[plain.resample_rows])
  np.testing.assert_array_equal(c.weight_KT[c.group_rows], plain.weight_KT[plain.group_rows])
  assert len(c.weight_KT) == 1 + c.groups + 3 + 30
  assert TargetWeights.of_documents(documents, 2, 30, 0, 't', examples=9).examples == 4


def test_examples_that_all_name_one_document_are_independent():
  assert TargetWeights.of_documents(['x'] * 6, 4, 10, 0, 't').clusters == 6


def test_one_example_has_one_group_and_no_resamples():
  c = TargetWeights.of_documents(['x'], 8, 64, 0, 't')
  assert (c.groups, c.resamples) == (1, 0)
  np.testing.assert_array_equal(c.weight_KT, [[1], [1]])


def test_error_of_the_mean_is_that_of_the_documents():
  """Standard error by resamples against σ/√M of M documents whose examples all have the same value."""
  rng = np.random.default_rng(0)
  per_document = rng.normal(size=100)
  documents = [f'{d}' for d in range(100) for _ in range(4)]
  value_T = np.repeat(per_document, 4)
  c = TargetWeights.of_documents(documents, 1, 4_000, 0, 't')
  error = (c.weight_KT[c.resample_rows] @ value_T).std(ddof=1)
  # The spread of 4,000 resamples is known to 1/√8000; independent examples would give half of it.
  assert error == pytest.approx(per_document.std() / 10, rel=4 / np.sqrt(8_000))


def test_intervals_cover():
  """Of 400 rows whose true score is known, about 95 % lie in their intervals."""
  rng = np.random.default_rng(1)
  truth_N, noise_NT = rng.normal(size=400), rng.normal(size=(400, 40))
  c = TargetWeights.of_documents([str(i) for i in range(40)], 1, 200, 0, 't')
  value_NT = truth_N[:, None] + noise_NT
  score_N = value_NT.mean(axis=1)
  reach_N = scores.half_width(c.clusters, 0.95) * (value_NT @ c.weight_KT[c.resample_rows].T).std(axis=1, ddof=1)
  covered = (np.abs(score_N - truth_N) < reach_N).mean()
  # Binomial error 0.011; the bootstrap's own shrinkage by √(39/40) costs 0.4 points.
  assert 0.91 < covered < 0.98


def test_overlap_and_stability_by_hand():
  score_N = np.array([5.0, 4, 3, 2, 1, 0])
  assert scores.overlap(score_N, score_N, 3) == 1
  assert scores.overlap(score_N, -score_N, 3) == 0
  assert scores.overlap(score_N, np.array([5.0, 0, 3, 2, 4, 1]), 3) == pytest.approx(2 / 3)
  assert scores.overlap(np.zeros(6), np.zeros(6), 2) == 1  # ties go to the lower row in both
  result = scores.stability(np.arange(100.0), np.stack([np.arange(100.0), -np.arange(100.0)]))
  assert result == {'0.01': 0.5, '0.05': 0.5, '0.1': 0.5, '0.25': 0.5, '0.5': 0.5}


def test_by_group_all_weightings_are_sums_over_groups_and_examples():
  rng = np.random.default_rng(0)
  documents = [f'{d}' for d in range(40) for _ in range(rng.integers(1, 4))]
  c = TargetWeights.of_documents(documents, 8, 3_000, 0, 't', 5, by_group=True)
  assert c.clusters == 8 and len(c.basis_BT) == 8 + 5
  np.testing.assert_allclose(c.combination_BK.T @ c.basis_BT, c.weight_KT, atol=1e-15)
  # Groups as the only units: seven draws of eight give the standard error of their mean without bias.
  per_group = rng.normal(size=8)
  equal = TargetWeights.of_documents([f'{d}' for d in range(64)], 8, 8_000, 0, 't', by_group=True)
  error = (equal.weight_KT[equal.resample_rows] @ per_group[equal.group_T]).std(ddof=1)
  assert error == pytest.approx(per_group.std(ddof=1) / np.sqrt(8), rel=4 / np.sqrt(16_000))

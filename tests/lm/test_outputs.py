"""Output functions against float64 NumPy."""

import jax
import numpy as np
import pytest

from dsdm_jax.lm import outputs

L, V = 7, 11


def _example(seed=0, scale=3.0):
  rng = np.random.default_rng(seed)
  logits_LV = rng.normal(size=(L, V)) * scale
  tokens_L = rng.integers(0, V, L).astype(np.int32)
  weights_L = np.array([0, 1, 0, 1, 1, 0, 1], np.float32)
  return logits_LV, tokens_L, weights_L


def _probabilities(logits_LV, tokens_L):
  p_LV = np.exp(logits_LV - logits_LV.max(-1, keepdims=True))
  p_LV /= p_LV.sum(-1, keepdims=True)
  return np.array([p_LV[i, tokens_L[i + 1]] for i in range(L - 1)])


def test_margin_is_the_mean_log_odds_of_counted_tokens():
  logits_LV, tokens_L, weights_L = _example()
  p_L = _probabilities(logits_LV, tokens_L)
  expected = np.log(p_L / (1 - p_L))[weights_L[1:] > 0].mean()
  got = outputs.margin(logits_LV.astype(np.float32), tokens_L, weights_L)
  assert got == pytest.approx(expected, rel=1e-5)


def test_log_likelihood_is_the_mean_log_probability_of_counted_tokens():
  logits_LV, tokens_L, weights_L = _example(1)
  expected = np.log(_probabilities(logits_LV, tokens_L))[weights_L[1:] > 0].mean()
  got = outputs.log_likelihood(logits_LV.astype(np.float32), tokens_L, weights_L)
  assert got == pytest.approx(expected, rel=1e-5)


def test_margin_survives_probabilities_that_round_to_one():
  logits_LV = np.zeros((L, V), np.float32)
  tokens_L = np.arange(L, dtype=np.int32)
  logits_LV[np.arange(L - 1), tokens_L[1:]] = 60.0
  weights_L = np.array([0] + [1] * (L - 1), np.float32)
  value, gradient = jax.value_and_grad(outputs.margin)(logits_LV, tokens_L, weights_L)
  assert value == pytest.approx(60.0 - np.log(V - 1), rel=1e-6)
  assert np.isfinite(gradient).all()


def test_first_weight_never_counts():
  logits_LV, tokens_L, weights_L = _example(2)
  changed_L = weights_L.copy()
  changed_L[0] = 5.0
  logits_LV = logits_LV.astype(np.float32)
  assert outputs.margin(logits_LV, tokens_L, weights_L) == outputs.margin(logits_LV, tokens_L, changed_L)

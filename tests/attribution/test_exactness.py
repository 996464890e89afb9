"""Where the truth is known: leave-one-out retraining of logistic regression, and planted right and wrong answers."""

import numpy as np

from dsdm_jax.attribution import datamodel
from tests.attribution.test_datamodel import Rows


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _fit(x_NJ, y_N, ridge, theta_J=None):
  """Minimum of the mean-free sum of log(1 + exp(−y x·θ)) + ridge/2 ‖θ‖², by Newton's method to the last digit."""
  theta_J = np.zeros(x_NJ.shape[1]) if theta_J is None else theta_J
  for _ in range(50):
    p_N = _sigmoid(y_N * (x_NJ @ theta_J))
    gradient_J = -x_NJ.T @ ((1 - p_N) * y_N) + ridge * theta_J
    hessian_JJ = (x_NJ * (p_N * (1 - p_N))[:, None]).T @ x_NJ + ridge * np.eye(len(theta_J))
    step_J = np.linalg.solve(hessian_JJ, gradient_J)
    theta_J = theta_J - step_J
    if np.abs(step_J).max() < 1e-12:
      break
  return theta_J


def test_scores_are_leave_one_out_effects_of_logistic_regression():
  """Binary logistic regression, identity projection, Gram weighted with p(1−p), Q on: Pearson at least 0.99.

  The margin of a row is y x·θ, so its gradient is y x and ΦᵀΦ weighted with p(1−p) is the Hessian. What a score
  predicts is f_t(θ) − f_t(θ without n), which retraining without n gives exactly.
  """
  rng = np.random.default_rng(0)
  rows, dimension, targets, ridge = 200, 12, 5, 1.0
  x_NJ, truth_J = rng.normal(size=(rows, dimension)), rng.normal(size=dimension)
  y_N = np.where(rng.random(rows) < _sigmoid(x_NJ @ truth_J), 1.0, -1.0)
  x_TJ = rng.normal(size=(targets, dimension))
  theta_J = _fit(x_NJ, y_N, ridge)
  p_N = _sigmoid(y_N * (x_NJ @ theta_J))

  phi_NJ = (y_N[:, None] * x_NJ).astype(np.float32)
  weighted_NJ = (phi_NJ * np.sqrt(p_N * (1 - p_N))[:, None]).astype(np.float32)
  parts = datamodel.gram(Rows(weighted_NJ))
  damping = ridge / np.trace(rows * parts[0]) * dimension  # λ of the sum is the ridge
  u_JT = datamodel.solve(parts, datamodel.whole(dimension), x_TJ, damping).u_JK
  score_NT = datamodel.scores(Rows(phi_NJ), u_JT) * (1 - p_N)[:, None] / rows

  without = [_fit(np.delete(x_NJ, n, axis=0), np.delete(y_N, n), ridge, theta_J) for n in range(rows)]
  effect_NT = (theta_J - np.stack(without)) @ x_TJ.T
  for score_N, effect_N in zip(score_NT.T, effect_NT.T, strict=True):
    assert np.corrcoef(score_N, effect_N)[0, 1] >= 0.99
  # Not only proportional: the scale is that of the effect, but for what one row adds to the Hessian.
  slope = (score_NT * effect_NT).sum() / (effect_NT**2).sum()
  assert 0.8 < slope < 1
  # Without Q the same scores fall short, so the test can fail.
  assert np.corrcoef((score_NT / (1 - p_N)[:, None])[:, 0], effect_NT[:, 0])[0, 1] < 0.9

"""Preconditioning against gradients divided entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsdm_jax.attribution import probes, rademacher
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.errors import UserError
from dsdm_jax.lm import outputs
from dsdm_jax.lm.partition import path_name

from .conftest import make_problem

EPSILON = 1e-8


def _moment(problem, draw) -> SecondMoment:
  leaves = jax.tree_util.tree_leaves_with_path(problem.params)
  return SecondMoment({path_name(path): jnp.asarray(draw(x.shape), jnp.float32) for path, x in leaves}, EPSILON)


def _any(shape):
  return np.random.default_rng(sum(shape)).lognormal(sigma=2, size=shape) * 1e-6


def _rank_one(shape):
  if len(shape) == 1 or (len(shape) == 2 and shape[0] == 2):  # a vector, or a stack of vectors
    return np.random.default_rng(sum(shape)).lognormal(size=shape) * 1e-6
  rng = np.random.default_rng(sum(shape))
  return rng.lognormal(size=(*shape[:-1], 1)) * rng.lognormal(size=(*shape[:-2], 1, shape[-1])) * 1e-6


def test_dense_is_exact_and_jvp_agrees(plain_problem, one_device):
  p, dimension = plain_problem, 96
  moment = _moment(p, _any)
  step = DenseFeatures(p.model, outputs.margin, dimension, 3, one_device)
  phi_BJ = np.asarray(step(step.prepare(p.params, 0, moment), p.tokens_BL, p.weights_BL))
  gradient = p.gradient(5)
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(p.params)]
  divided = [gradient[n] / (np.sqrt(np.asarray(moment.of_path[n], np.float64)) + EPSILON) for n in names]
  keys = rademacher.keys(p.params, 3, 0)
  unit_TJ = np.eye(dimension, dtype=np.float32)
  rows = jax.tree.leaves(rademacher.transpose(unit_TJ, p.params, keys))  # R itself, parameter by parameter
  expected_J = sum(
    np.asarray(r, np.float64).reshape(dimension, -1) @ g.ravel() for r, g in zip(rows, divided, strict=True)
  )
  assert np.linalg.norm(phi_BJ[5] - expected_J) < 3e-6 * np.linalg.norm(expected_J)

  u_JT = np.random.default_rng(0).normal(size=(dimension, 2)).astype(np.float32)
  scorer = DirectionalScores(p.model, outputs.margin, 3, one_device)
  got_BT = np.asarray(scorer(scorer.prepare(p.params, u_JT, 0, moment), p.tokens_BL, p.weights_BL))
  assert np.abs(got_BT - phi_BJ @ u_JT).max() < 1e-5 * np.abs(phi_BJ @ u_JT).max()


@pytest.mark.parametrize('scan', [False, True])
def test_two_sided_is_exact_where_the_moment_has_rank_one(scan, one_device):
  p = make_problem(scan_layers=scan)
  moment = _moment(p, _rank_one)
  step = TwoSidedFeatures(p.model, outputs.margin, '.*', 512, 3, one_device)
  phi_BJ = step(step.prepare(p.params, 0, moment), p.tokens_BL, p.weights_BL)
  scale = {path: 1 / np.sqrt(np.asarray(v, np.float64)) for path, v in moment.of_path.items()}
  expected_J = p.projected(5, step.layers, probes.random_projections(step.layers, 3, 0), scale)
  assert np.linalg.norm(np.asarray(phi_BJ[5]) - expected_J) < 1e-5 * np.linalg.norm(expected_J)
  assert max(moment.rank_one_error(step.layers).values()) < 1e-3  # ε is not in the rank-one root


def test_error_is_large_where_the_moment_has_not_rank_one(plain_problem, one_device):
  step = TwoSidedFeatures(plain_problem.model, outputs.margin, '.*', 512, 3, one_device)
  errors = _moment(plain_problem, _any).rank_one_error(step.layers)
  assert set(errors) == {layer.path for layer in step.layers}
  assert errors.pop('vectors') < 1e-3  # one column is of rank one
  assert min(errors.values()) > 0.3


def test_moments_of_an_optimizer_state():
  params = {'a': {'kernel': jnp.ones((2, 3))}}
  optimizer = optax.chain(optax.clip_by_global_norm(1e9), optax.scale_by_adam(b1=0.9, b2=0.95))
  state = optimizer.init(params)
  with pytest.raises(UserError, match='features.precondition=none'):
    SecondMoment.of_state(state, 0.95, EPSILON)
  for size in (2.0, 4.0):
    _, state = optimizer.update(jax.tree.map(lambda x, s=size: x * s, params), state, params)
  expected = (0.95 * 0.05 * 4 + 0.05 * 16) / (1 - 0.95**2)
  moment = SecondMoment.of_state(state, 0.95, EPSILON)
  np.testing.assert_allclose(moment.of_path['a/kernel'], expected, rtol=1e-6)
  with pytest.raises(UserError, match='the proxy took no step of Adam'):
    SecondMoment.of_state(optax.sgd(0.1).init(params), 0.95, EPSILON)


def test_what_adam_never_moved_counts_for_a_thousand_typical_entries_and_not_for_more():
  """As the rows of tokens that no proxy met: dense and two-sided have one floor, 1e-6 of the mean of v."""
  v_IO = np.full((4, 8), 1e-2, np.float32)
  v_IO[1] = 0
  moment = SecondMoment({'a/kernel': jnp.asarray(v_IO)}, EPSILON)
  scale_IO = np.asarray(moment.scale({'a': {'kernel': jnp.ones((4, 8))}})['a']['kernel'])
  np.testing.assert_allclose(scale_IO[0], 10, rtol=1e-5)
  np.testing.assert_allclose(scale_IO[1], 1 / np.sqrt(1e-6 * 0.75e-2), rtol=1e-3)
  row_I, column_O = moment.factors(probes.ProbedLayer('a/kernel', (), 4, 8, 2, 2, 0))
  np.testing.assert_allclose(1 / (row_I[:, None] * column_O[None]), scale_IO, rtol=1e-3)


def test_epsilon_under_the_root_is_taken_along():
  v_IO = jnp.full((2, 3), 3e-4)
  moment = SecondMoment({'a/kernel': v_IO}, EPSILON, 1e-4)
  np.testing.assert_allclose(moment.scale({'a': {'kernel': v_IO}})['a']['kernel'], 50, rtol=1e-4)
  layer = probes.ProbedLayer('a/kernel', (), 2, 3, 2, 2, 0)
  row_I, column_O = moment.factors(layer)
  np.testing.assert_allclose(row_I[:, None] * column_O[None], 0.02, rtol=1e-5)
  assert moment.rank_one_error([layer])['a/kernel'] < 1e-4
  optimizer = optax.scale_by_adam(b2=0.95, eps_root=1e-4)
  gradient = {'a': {'kernel': jnp.asarray([[0.02, 0.0, 0.1]])}}
  update, state = optimizer.update(gradient, optimizer.init(gradient))
  scale = SecondMoment.of_state(state, 0.95, EPSILON, 1e-4).scale(gradient)
  moved = jax.tree.map(lambda g, s: g * s, gradient, scale)
  np.testing.assert_allclose(moved['a']['kernel'], update['a']['kernel'], rtol=1e-4)  # as Adam itself moves


def test_without_preconditioning_dense_features_hold_no_scale(plain_problem, one_device):
  p = plain_problem
  step = DenseFeatures(p.model, outputs.margin, 32, 3, one_device)
  prepared = step.prepare(p.params, 0)
  held = sum(x.nbytes for x in jax.tree.leaves(prepared[::2]))  # keys are a few bytes, and have no `nbytes`
  assert held == sum(x.nbytes for x in jax.tree.leaves(p.params))

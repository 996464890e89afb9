"""EK-FAC against a float64 oracle of explicit gradients, for models of every shape."""

import jax
import numpy as np
import pytest

from dsdm_jax.attribution import ekfac, probes
from dsdm_jax.attribution.covariances import MomentStep
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.ekfac import WholeGradients
from dsdm_jax.lm import outputs

from .conftest import BATCH, SOME_VARIANTS, VARIANTS, make_problem

DAMPING = 0.1
WEIGHT_KT = np.eye(3, BATCH) / 2 + np.eye(3, BATCH, 1) / 2  # the means of three pairs of rows


def _oracle(path: str, grad_BX: np.ndarray, moments: dict) -> np.ndarray:
  """v [K, *shape] of one parameter, one matrix after the other; all rows are the sample and the targets."""
  if path.endswith(('bias', 'scale')):
    return np.zeros((len(WEIGHT_KT), *grad_BX.shape[1:]))
  grad_SBIO = grad_BX.reshape(BATCH, -1, *grad_BX.shape[-2:]).swapaxes(0, 1).astype(np.float64)
  v = []
  for s, g in enumerate(grad_SBIO):
    q_in, q_out = (np.eye(n) for n in g.shape[1:])
    if path.endswith('kernel') and max(g.shape[1:]) <= 6 * min(g.shape[1:]):
      q_in, q_out = (np.linalg.eigh(x.reshape(-1, *x.shape[-2:])[s])[1] for x in moments[path])
    square = np.mean([(q_in.T @ x @ q_out) ** 2 for x in g], axis=0)
    means = [q_in.T @ np.tensordot(weight_T, g, 1) @ q_out for weight_T in WEIGHT_KT]
    v.append([q_in @ (mean / (square + DAMPING * square.mean())) @ q_out.T for mean in means])
  return np.stack(v, axis=1).reshape(-1, *grad_BX.shape[1:])


def _directions(problem, mesh, rows: int) -> tuple[WholeGradients, dict[str, ekfac.Factors], dict[str, np.ndarray]]:
  step = WholeGradients(problem.model, outputs.margin, mesh, rows)
  inputs = np.asarray(problem.tokens_BL), np.asarray(problem.weights_BL)
  factors = step.factors(problem.params, *inputs)
  means = step.means(problem.params, *inputs, WEIGHT_KT)
  parts = {path: [f.solve(x, f.damped(DAMPING)) for x in step.blocks([means], path)] for path, f in factors.items()}
  return step, factors, {path: np.concatenate(part) for path, part in parts.items()}


def _flat(directions: dict[str, np.ndarray]) -> np.ndarray:
  return np.concatenate([v.reshape(len(v), -1) for v in directions.values()], axis=1).T


@pytest.mark.parametrize('variant', SOME_VARIANTS)
def test_scores_are_those_of_the_oracle(variant, one_device):
  """Batches of three rows, the last one padded; both ways to score."""
  p = make_problem(**VARIANTS[variant])
  layers = probes.linears(p.model)
  measure = MomentStep(p.model, outputs.margin, layers, one_device)
  moments = measure.sums(measure.prepare(p.params), [(p.tokens_BL, p.weights_BL)])
  grads = [p.gradient(row) for row in range(BATCH)]
  wanted_BK = np.zeros((BATCH, len(WEIGHT_KT)))
  for path in grads[0]:
    grad_BX = np.stack([g[path] for g in grads])
    v_KX = _oracle(path, grad_BX, moments)
    wanted_BK += grad_BX.reshape(BATCH, -1).astype(np.float64) @ v_KX.reshape(len(WEIGHT_KT), -1).T
  step, _, directions = _directions(p, one_device, rows=3)
  scorer = DirectionalScores(p.model, outputs.margin, 0, one_device)
  for columns in (slice(None), slice(1)):
    prepared = scorer.placed(p.params, step.tree({path: v[columns] for path, v in directions.items()}, p.params))
    found_BK = np.asarray(scorer(prepared, p.tokens_BL, p.weights_BL))
    # λ may be tiny where eight rows have no gradient; damping bounds its inverse, and magnifies rounding tenfold.
    assert np.abs(found_BK - wanted_BK[:, columns]).max() < 1e-4 * np.abs(wanted_BK).max()
  phi_BJ = np.asarray(step(step.prepare(p.params, 0), p.tokens_BL, p.weights_BL))
  np.testing.assert_allclose(phi_BJ @ _flat(directions), wanted_BK, rtol=0, atol=1e-4 * np.abs(wanted_BK).max())


def test_same_directions_on_any_mesh_and_from_a_file(plain_problem, one_device, eight_devices, tmp_path):
  step, factors, directions = _directions(plain_problem, one_device, 8)
  u_JK = _flat(directions)
  for path, v in step.split(u_JK).items():
    np.testing.assert_array_equal(v, directions[path])
  ekfac.save(tmp_path / 'factors.npz', factors)
  loaded = ekfac.load(tmp_path / 'factors.npz')
  assert loaded.keys() == factors.keys()
  for path, f in loaded.items():
    assert (f.in_SII is None) == path.endswith('embedding')
    for x, y in zip(jax.tree.leaves(vars(factors[path])), jax.tree.leaves(vars(f)), strict=True):
      np.testing.assert_array_equal(x, y)
  split_JK = _flat(_directions(plain_problem, eight_devices, 8)[2])
  np.testing.assert_allclose(split_JK, u_JK, rtol=0, atol=1e-4 * np.abs(u_JK).max())


def test_a_host_holds_some_directions_of_one_matrix_and_devices_their_parts(plain_problem, eight_devices, monkeypatch):
  step, factors, whole = _directions(plain_problem, eight_devices, 8)
  inputs = np.asarray(plain_problem.tokens_BL), np.asarray(plain_problem.weights_BL)
  means = step.means(plain_problem.params, *inputs, WEIGHT_KT)
  monkeypatch.setattr(ekfac, 'ENTRIES', 1)
  split = []
  for path, f in factors.items():
    blocks = list(step.blocks([means, means], path))
    assert [len(block) for block in blocks] == [1] * 2 * len(WEIGHT_KT), 'one direction is more than the limit'
    placed = ekfac.joined([step.place(path, f.solve(block, f.damped(DAMPING))) for block in blocks])
    split.append(not means[path].is_fully_replicated)
    assert placed.is_fully_replicated == means[path].is_fully_replicated
    np.testing.assert_array_equal(placed, np.concatenate([whole[path]] * 2).reshape(placed.shape))
    largest = np.abs(whole[path]).max(axis=(1, 2, 3))
    scaled = ekfac.scaled(step.place(path, whole[path]), largest)
    wanted = (whole[path] / largest[:, None, None, None].astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(scaled, wanted.reshape(scaled.shape))
  assert any(split), 'the eight devices share them'


def test_a_matrix_without_gradient_gets_no_direction():
  factors = ekfac.Factors(None, None, np.zeros((2, 3, 4), np.float32))
  v_KSIO = factors.solve(np.zeros((5, 2, 3, 4), np.float32), factors.damped(DAMPING))
  assert v_KSIO.shape == (5, 2, 3, 4) and not v_KSIO.any()

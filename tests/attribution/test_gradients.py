"""Features against explicit per-example gradients, projected explicitly."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.attribution import probes, rademacher
from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
from dsdm_jax.core import flops
from dsdm_jax.core.mesh import batch_sharding, make_mesh
from dsdm_jax.errors import UserError
from dsdm_jax.lm import outputs
from dsdm_jax.lm.partition import path_name

from .conftest import BATCH, LENGTH, VOCAB, Problem, make_problem

# Two float32 programs that sum the same 16 tokens and 64 columns in another order: a few ulp (6e-8) times √terms.
ROUNDING = 3e-6


def _relative(a, b) -> float:
  return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@functools.cache  # compiles once for all tests
def _two_sided(problem, mesh, dimension=512, pattern='.*', seed=3):
  return TwoSidedFeatures(problem.model, outputs.margin, pattern, dimension, seed, mesh)


def test_two_sided_is_the_projection_of_the_explicit_gradient(problem, one_device):
  step = _two_sided(problem, one_device)
  phi_BJ = step(step.prepare(problem.params, 0), problem.tokens_BL, problem.weights_BL)
  assert phi_BJ.dtype == np.float32 and phi_BJ.shape == (BATCH, step.dimension)
  assert {path for layer in step.layers for path in layer.parameters} == problem.gradient(0).keys()
  projections = probes.random_projections(step.layers, 3, 0)
  for row in (0, 5):
    assert _relative(phi_BJ[row], problem.projected(row, step.layers, projections)) < ROUNDING


def _matrix(params, seed, checkpoint, dimension):
  """R written out, [W, J], rows in tree order: whole blocks from each parameter's key, what is left from the last."""
  sizes = [x.size for x in jax.tree.leaves(params)]
  keys = rademacher.keys(params, seed, checkpoint)
  left = sum(size % rademacher.BLOCK for size in sizes)
  rest = [np.asarray(rademacher.signs(keys[-1], i, dimension)) for i in range(-(-left // rademacher.BLOCK))]
  rest, used, rows = np.concatenate(rest), 0, []
  for size, key in zip(sizes, keys[:-1], strict=True):
    rows += [np.asarray(rademacher.signs(key, i, dimension)) for i in range(size // rademacher.BLOCK)]
    rows.append(rest[used : used + size % rademacher.BLOCK])
    used += size % rademacher.BLOCK
  return np.concatenate(rows) / np.sqrt(dimension)


def _flat(problem, row):
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(problem.params)]
  gradient = problem.gradient(row)
  return np.concatenate([gradient[name].astype(np.float64).ravel() for name in names])


@pytest.mark.parametrize(('microbatch', 'dimension'), [(0, 96), (2, 70)])
def test_dense_is_the_projection_of_the_explicit_gradient(microbatch, dimension, one_device):
  problem = make_problem(layers=1, width=64, mlp_width=256)  # has parameters of more than a block, and others of less
  step = DenseFeatures(problem.model, outputs.margin, dimension, 3, one_device, microbatch)
  phi_BJ = step(step.prepare(problem.params, 1), problem.tokens_BL, problem.weights_BL)
  matrix_WJ = _matrix(problem.params, 3, 1, dimension)
  for row in (0, 5):
    assert _relative(phi_BJ[row], _flat(problem, row) @ matrix_WJ) < ROUNDING


def test_transpose_is_the_transpose(one_device):
  problem = make_problem(layers=1, width=64, mlp_width=256)
  u_JT = np.random.default_rng(0).normal(size=(70, 3)).astype(np.float32)
  keys = rademacher.keys(problem.params, 3, 1)
  back = rademacher.transpose(u_JT, problem.params, keys)
  flat_TW = np.concatenate([np.asarray(x).reshape(3, -1) for x in jax.tree.leaves(back)], axis=1)
  assert _relative(flat_TW.T, _matrix(problem.params, 3, 1, 70) @ u_JT) < ROUNDING


def test_dense_columns_differ_between_checkpoints_at_every_dimension(plain_problem):
  """Also past 10,000 columns, where a peer repeats its columns."""
  key_sets = [rademacher.keys(plain_problem.params, 0, c) for c in (0, 1)]
  for dimension in (1, 33, 10_100):
    first, second = (np.asarray(rademacher.signs(keys[-1], 0, dimension)) for keys in key_sets)
    agree_J = (first == second).mean(axis=0)
    # Equal in half of 8,192 entries, give or take six standard deviations.
    assert np.abs(agree_J - 0.5).max() < 6 * 0.5 / np.sqrt(rademacher.BLOCK)
  assert len(np.unique(first[:64], axis=1).T) == dimension


@pytest.mark.parametrize(('kind', 'data', 'model'), [('two_sided', 4, 2), ('dense', 4, 2)])
def test_same_features_on_any_mesh(kind, data, model, plain_problem, one_device):
  """One device against several, weights split over both axes: ‖Δφ‖/‖φ‖ ≤ 1e-5 per row."""

  def features(mesh):
    if kind == 'dense':
      step = DenseFeatures(plain_problem.model, outputs.margin, 96, 0, mesh)
    else:
      step = _two_sided(plain_problem, mesh)
    return step(step.prepare(plain_problem.params, 0), plain_problem.tokens_BL, plain_problem.weights_BL)

  config = base.get_config().mesh
  config.data, config.model = data, model
  one, split = features(one_device), features(make_mesh(config, jax.devices()[: data * model]))
  assert split.sharding.spec[0] == batch_sharding(split.sharding.mesh).spec[0]
  assert len(split.sharding.device_set) == data * model
  for row in range(BATCH):
    assert _relative(split[row], one[row]) < 1e-5


@pytest.mark.parametrize(
  ('variant', 'bound'),
  [
    ({'scan_layers': True}, 1e-5),
    # Three roundings a term, as in test_bfloat16.py, on both sides: their difference has √2 times the spread of one.
    pytest.param({'compute_dtype': 'bfloat16', 'scan_layers': True}, 2**0.5 * 3 * 2**-8, marks=pytest.mark.full),
  ],
)
def test_same_two_sided_features_scanned_and_in_bfloat16_on_a_mesh(variant, bound, one_device):
  problem, config = make_problem(**variant), base.get_config().mesh
  config.data, config.model = 4, 2
  one, eight = (
    step(step.prepare(problem.params, 0), problem.tokens_BL, problem.weights_BL)
    for step in (_two_sided(problem, mesh) for mesh in (one_device, make_mesh(config)))
  )
  assert eight.dtype == np.float32 and len(eight.sharding.device_set) == 8
  for row in range(BATCH):
    assert _relative(eight[row], one[row]) < bound


def test_weights_are_split_over_the_mesh(plain_problem, eight_devices):
  step = _two_sided(plain_problem, eight_devices)
  kernel = step.prepare(plain_problem.params, 0)['blocks'][0]['mlp']['up']['kernel'][...]
  data, model = eight_devices.shape['data'], eight_devices.shape['model']
  assert kernel.addressable_shards[0].data.shape == (32 // data, 64 // model)


@pytest.mark.parametrize('kind', ['two_sided', 'dense'])
def test_inner_products_are_kept_in_expectation(kind, one_device):
  """Mean over independent projections of φ(g)·φ(g') against g·g', within four standard errors of the mean."""
  problem = make_problem(width=16, mlp_width=32, layers=1)
  draws = 64
  gradients = [problem.gradient(row) for row in (1, 2)]
  pairs = [(0, 0), (0, 1)]
  if kind == 'dense':
    step = DenseFeatures(problem.model, outputs.margin, 64, 0, one_device)
    names = list(gradients[0])
  else:
    step = _two_sided(problem, one_device, dimension=256, seed=0)
    names = [path for layer in step.layers for path in layer.parameters]
    assert set(names) == set(gradients[0])
  exact = [sum(float(np.vdot(gradients[i][n], gradients[j][n])) for n in names) for i, j in pairs]
  got = []
  for checkpoint in range(draws):
    phi = np.asarray(step(step.prepare(problem.params, checkpoint), problem.tokens_BL, problem.weights_BL))[[1, 2]]
    got.append([phi[i] @ phi[j] for i, j in pairs])
  mean, error = np.mean(got, axis=0), np.std(got, axis=0, ddof=1) / np.sqrt(draws)
  assert np.all(np.abs(mean - exact) < 4 * error), (mean, exact, error)
  assert error[0] < 0.15 * exact[0]  # otherwise the test could not fail


def test_checkpoints_have_projections_of_their_own(plain_problem, one_device):
  p, step = plain_problem, _two_sided(plain_problem, one_device)
  first, second = (np.asarray(step(step.prepare(p.params, c), p.tokens_BL, p.weights_BL)) for c in (0, 1))
  for j in range(0, step.dimension, 37):
    assert not np.allclose(first[:, j], second[:, j])


def test_plan_keeps_to_the_budget_and_the_layers_sizes(plain_problem):
  layers = probes.plan(nnx.merge(*nnx.split(plain_problem.model)), 'mlp/.*kernel', 400)
  assert [layer.path.split('/')[-2] for layer in layers] == ['down', 'up', 'down', 'up']
  assert all((layer.a, layer.b) == (10, 10) for layer in layers)
  wide = probes.plan(plain_problem.model, 'mlp/up/kernel', 10**9)
  assert all((layer.a, layer.b) == (32, 64) for layer in wide)


def test_no_layer_and_too_small_a_dimension_are_refused(plain_problem):
  with pytest.raises(UserError, match='config.features.layers.*matches no parameter'):
    probes.plan(plain_problem.model, 'convolution', 64)
  with pytest.raises(UserError, match='config.features.dimension=3'):
    probes.plan(plain_problem.model, '.*', 3)


class Shared(nnx.Module):
  """The head is another module that holds the same table, and one table is of a class of its own."""

  class Doubled(nnx.Embed):
    def __call__(self, tokens):
      return 2 * super().__call__(tokens)

  class Head(nnx.Module):
    def __init__(self, table, whole):
      self.table, self.whole = table, whole

    def __call__(self, x_BLD):
      return x_BLD @ self.table.embedding[...].T if self.whole else self.table.attend(x_BLD)

  def __init__(self, whole):
    rngs = nnx.Rngs(0)
    self.table, self.other = nnx.Embed(VOCAB, 8, rngs=rngs), self.Doubled(VOCAB, 8, rngs=rngs)
    self.head = self.Head(self.table, whole)

  def __call__(self, tokens_BL):
    return self.head(self.table(tokens_BL) + self.other(tokens_BL))


def test_tables_of_a_custom_model_are_complete_or_refused(plain_problem, one_device):
  model = Shared(whole=False)
  p = Problem(model, nnx.state(model, nnx.Param), plain_problem.tokens_BL, plain_problem.weights_BL)
  step = _two_sided(p, one_device)
  (layer,) = step.layers
  phi_BJ = step(step.prepare(p.params, 0), p.tokens_BL, p.weights_BL)
  wanted_J = p.projected(5, step.layers, probes.random_projections(step.layers, 3, 0))
  assert layer.vectors == () and _relative(phi_BJ[5], wanted_J) < ROUNDING
  step = _two_sided(Problem(Shared(whole=True), p.params, p.tokens_BL, p.weights_BL), one_device)
  with pytest.raises(UserError, match=r'reads the table .* itself.*attend\(x\)'):
    step(step.prepare(p.params, 0), p.tokens_BL, p.weights_BL)


def test_forward_mode_is_refused():
  x, w, z = np.ones((2, 4), np.float32), np.ones((4, 3), np.float32), np.zeros((2, 2), np.float32)
  a, b = np.ones((4, 2), np.float32), np.ones((3, 2), np.float32)
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(lambda z: probes.probed_matmul(x, w, z, a, b), (z,), (z,))


def test_two_sided_step_computes_no_weight_gradient(one_device):
  """FLOP of the step against the design's floor: forward and dx of every matmul, and the thin products."""
  p = make_problem(width=64, mlp_width=256)
  step = _two_sided(p, one_device, dimension=1_024)
  counted = flops.count(step.apply, step.prepare(p.params, 0), p.tokens_BL, p.weights_BL)
  tokens = p.tokens_BL.size
  matmuls = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 64 * 64
  attention = 12 * 2 * 16 * 64
  floor = tokens * (4 * matmuls + attention) + BATCH * probes.least_flop(step.layers, LENGTH, ['embedding/embedding'])
  assert floor <= counted < 1.001 * floor, counted / floor

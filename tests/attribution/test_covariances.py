"""A and B of eigenvectors against covariances from explicit activations and output gradients."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.attribution import covariances, probes
from dsdm_jax.attribution.covariances import Basis, MomentStep
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.errors import UserError
from dsdm_jax.lm import outputs
from dsdm_jax.lm.partition import path_name

from .conftest import BATCH, LENGTH, make_problem

ORDER = ('attention/qkv', 'attention/out', 'mlp/up', 'mlp/down')  # in which a block calls its linear layers


def explicit(problem, layers, monkeypatch):
  """Path → (Σ x xᵀ, Σ dy dyᵀ): inputs as linear layers meet them, dy from an array added to what they give."""
  names = [f'blocks/{i}/{name}' for i in range(2) for name in ORDER]
  sizes = {layer.module: layer.outputs for layer in layers}
  call, found = nnx.Linear.__call__, dict.fromkeys(names, (0.0, 0.0))

  def output(taps, tokens_L, weights_L):
    met = []

    def tapped(self, x):
      met.append(x)
      return call(self, x) + taps[len(met) - 1]

    with monkeypatch.context() as patch:
      patch.setattr(nnx.Linear, '__call__', tapped)
      return outputs.margin(problem.model(tokens_L[None])[0], tokens_L, weights_L), met

  taps, one = (
    [np.zeros((1, LENGTH, sizes[name]), np.float32) for name in names],
    jax.jit(jax.grad(output, has_aux=True)),
  )
  for tokens_L, weights_L in zip(problem.tokens_BL, problem.weights_BL, strict=True):
    gradients, inputs = one(taps, tokens_L, weights_L)
    for name, x, dy in zip(names, inputs, gradients, strict=True):
      x, dy = np.asarray(x[0], np.float64), np.asarray(dy[0], np.float64)
      x = x[(dy != 0).any(1)]
      found[name] = (found[name][0] + x.T @ x, found[name][1] + dy.T @ dy)
  return {f'{name}/kernel': sides for name, sides in found.items()}


@functools.cache  # compiles once for all tests
def _moments(problem, mesh, batches=1, dimension=512):
  layers = probes.plan(problem.model, 'kernel$', dimension)
  step = MomentStep(problem.model, outputs.margin, layers, mesh)
  size = BATCH // batches
  parts = covariances.batches(BATCH, size, mesh.shape['data'])
  return layers, step.sums(step.prepare(problem.params), [(problem.tokens_BL[p], problem.weights_BL[p]) for p in parts])


def _close(a, b):
  assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize(('remat', 'batches'), [(False, 1), (True, 4)])
def test_moments_against_explicit_inputs_and_output_gradients(remat, batches, one_device, monkeypatch):
  problem = make_problem(remat=remat)
  layers, moments = _moments(problem, one_device, batches)
  wanted = explicit(make_problem(), layers, monkeypatch)
  assert wanted.keys() == moments.keys()
  for path, sides in moments.items():
    for got, expected in zip(sides, wanted[path], strict=True):
      _close(got, expected)


def test_padding_does_not_count(plain_problem, one_device):
  tokens_BL, weights_BL = np.array(plain_problem.tokens_BL), np.array(plain_problem.weights_BL)
  weights_BL[:, LENGTH // 2 :] = 0
  layers = probes.plan(plain_problem.model, 'kernel$', 512)
  step = MomentStep(plain_problem.model, outputs.margin, layers, one_device)
  results = []
  for pad in (3, 5):
    tokens_BL[:, LENGTH // 2 :] = pad
    results.append(step.sums(step.prepare(plain_problem.params), [(tokens_BL, weights_BL)]))
  for path, sides in results[0].items():
    for got, expected in zip(sides, results[1][path], strict=True):
      assert np.linalg.norm(expected) > 0
      _close(got, expected)


def test_each_row_counts_once_whatever_devices_and_batches_are(plain_problem, one_device):
  """Eight rows on three devices, in batches of six: one of six, and two rows that each device makes."""
  three = make_mesh(base.get_config().mesh, jax.devices()[:3])
  assert covariances.batches(8, 6, 3) == [slice(0, 6), slice(6, 7), slice(7, 8)]
  assert covariances.batches(23, 6, 3) == [
    slice(0, 6),
    slice(6, 12),
    slice(12, 18),
    slice(18, 21),
    slice(21, 22),
    slice(22, 23),
  ]
  assert covariances.batches(2, 6, 1) == [slice(0, 2)]
  layers, wanted = _moments(plain_problem, one_device)
  step = MomentStep(plain_problem.model, outputs.margin, layers, three)
  rows = [(plain_problem.tokens_BL[p], plain_problem.weights_BL[p]) for p in covariances.batches(8, 6, 3)]
  for path, sides in step.sums(step.prepare(plain_problem.params), rows).items():
    for got, expected in zip(sides, wanted[path], strict=True):
      _close(got, expected)


def test_a_scanned_stack_has_moments_for_each_of_its_layers(one_device):
  scanned, unrolled = make_problem(scan_layers=True), make_problem.__wrapped__()  # whose weights are changed
  stacked = dict(nnx.to_flat_state(scanned.params))
  for path, variable in nnx.to_flat_state(unrolled.params):
    block = path[0] == 'blocks'
    value = stacked[(path[0], *path[2:])][...][path[1]] if block else stacked[path][...]
    variable[...] = value
  _, of_stack = _moments(scanned, one_device)
  _, of_layers = _moments(unrolled, one_device)
  for path, sides in of_stack.items():
    for side, moment in enumerate(sides):
      for i in range(2):
        _close(moment[i], of_layers[path.replace('blocks/', f'blocks/{i}/')][side])


def test_moments_do_not_depend_on_the_mesh(plain_problem, one_device, eight_devices):
  _, one = _moments(plain_problem, one_device)
  _, eight = _moments(plain_problem, eight_devices)
  for path, sides in one.items():
    for a, b in zip(eight[path], sides, strict=True):
      _close(a, b)


def test_features_are_explicit_gradients_in_the_eigenvectors(one_device, tmp_path):
  problem = make_problem(scan_layers=True)
  step = TwoSidedFeatures(problem.model, outputs.margin, '.*', 512, 3, one_device)
  layers = step.layers
  measure = MomentStep(problem.model, outputs.margin, layers, one_device)
  moments = measure.sums(measure.prepare(problem.params), [(problem.tokens_BL, problem.weights_BL)])
  Basis.leading(layers, moments, None).save(tmp_path / 'basis.npz', layers)
  basis = Basis.load(tmp_path / 'basis.npz', layers)
  prepared = step.prepare(problem.params, 0, projections=basis.projections)
  phi_BJ = step(prepared, problem.tokens_BL, problem.weights_BL)
  for layer in covariances.measured(layers):
    depth = math.prod(layer.stack)
    of_side = [np.asarray(x).reshape(depth, *x.shape[-2:]) for x in basis.projections[layer.path]]
    kept = [[], []]
    for i in range(depth):
      for side, count in enumerate((layer.a, layer.b)):
        moment = moments[layer.path][side].reshape(depth, *moments[layer.path][side].shape[-2:])[i]
        values, vectors = np.linalg.eigh(moment)
        vectors = vectors[:, ::-1][:, :count]
        # The same directions in the same order, each up to its sign.
        cosine = np.abs(np.sum(vectors * of_side[side][i], axis=0))
        assert np.all(cosine > 1 - 1e-5)
        kept[side].append(values[::-1][:count].sum() / values.sum())
    assert basis.kept[layer.path] == pytest.approx([np.mean(k) for k in kept], rel=1e-6)
    assert 0 < min(basis.kept[layer.path]) <= max(basis.kept[layer.path]) <= 1 + 1e-9
  others = [x for x in step.layers if x.path not in basis.kept]
  assert [x.path for x in others] == ['embedding/embedding', 'positions/embedding', 'vectors']
  expected_J = problem.projected(5, step.layers, probes.random_projections(step.layers, 3, 0) | basis.projections)
  assert np.linalg.norm(phi_BJ[5] - expected_J) < 3e-6 * np.linalg.norm(expected_J)


def test_eigenvectors_keep_more_of_the_gradients_than_chance(plain_problem, one_device):
  """Share of ‖g‖² of the batch's own gradients in the kept directions, against that of as many random ones."""
  layers, moments = _moments(plain_problem, one_device)
  basis = Basis.leading(layers, moments, None)
  rng, gradients = np.random.default_rng(0), [plain_problem.gradient(row) for row in (0, 5)]
  for layer in layers:
    g_BIO = np.stack([gradient[layer.path] for gradient in gradients])
    chance = [np.linalg.qr(rng.normal(size=(n, k)))[0] for n, k in ((layer.inputs, layer.a), (layer.outputs, layer.b))]
    kept, random = (
      np.square(a.T @ g_BIO @ b).sum() / np.square(g_BIO).sum()
      for a, b in (map(np.asarray, basis.projections[layer.path]), chance)
    )
    assert kept > 2 * random


def test_preconditioned_eigenvectors_are_those_of_preconditioned_moments(plain_problem, one_device):
  """With v of rank one: G/√v has inputs x/√r and output gradients dy/√c."""
  rng = np.random.default_rng(1)
  layers, moments = _moments(plain_problem, one_device)
  factor = {x.path: (rng.uniform(0.1, 9, x.inputs), rng.uniform(0.1, 9, x.outputs)) for x in layers}
  v = {path: np.outer(r, c) for path, (r, c) in factor.items()}
  others = {path_name(p): np.ones(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(plain_problem.params)}
  second = SecondMoment({name: jax.numpy.asarray(x, np.float32) for name, x in (others | v).items()}, 1e-12)
  basis = Basis.leading(layers, moments, second)
  for layer in layers:
    for moment, f, got in zip(moments[layer.path], factor[layer.path], basis.projections[layer.path], strict=True):
      _, vectors = np.linalg.eigh(moment / np.sqrt(np.outer(f, f)))
      cosine = np.abs(np.sum(vectors[:, ::-1][:, : got.shape[1]] * np.asarray(got), axis=0))
      assert np.all(cosine > 1 - 1e-4)


def test_the_first_of_several_jobs_makes_the_basis(plain_problem, one_device, tmp_path):
  layers, moments = _moments(plain_problem, one_device)
  file = tmp_path / 'basis.npz'
  Basis.leading(layers, moments, None).save(file, layers)
  before = file.read_bytes()
  doubled = {path: (a + np.eye(len(a)), b) for path, (a, b) in moments.items()}
  Basis.leading(layers, doubled, None).save(file, layers)
  assert file.read_bytes() == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ['basis.npz', 'basis.npz.sha256']


def test_shards_of_another_basis_are_refused(tmp_path):
  FeatureStore(tmp_path / 'f.zarr', 4, 3, 2, 'float32', basis='one').write(1, np.ones((2, 3), np.float32))
  assert FeatureStore(tmp_path / 'f.zarr', 4, 3, 2, 'float32', basis='one').missing() == [0]
  with pytest.raises(UserError, match='shard 1 of .*f.zarr was computed with another basis'):
    FeatureStore(tmp_path / 'f.zarr', 4, 3, 2, 'float32', basis='two').missing()

"""What parameters without a probe carry of the gradient, against explicit gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdm_jax.attribution import probes
from dsdm_jax.attribution.coverage import GradientCoverage
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.lm import outputs
from dsdm_jax.lm.partition import path_name

from .conftest import VARIANTS, make_problem

ROWS = [0, 3, 5]


def _measured(problem, mesh, pattern, moment=None):
  step = GradientCoverage(problem.model, outputs.margin, probes.plan(problem.model, pattern, 512), mesh)
  tokens_BL, weights_BL = (np.asarray(x)[ROWS] for x in (problem.tokens_BL, problem.weights_BL))
  return step.unprobed(problem.params, tokens_BL, weights_BL, moment)


def _explicit(problem, seen, moment=None):
  """Mean over rows of the share of what `seen` says no to, and of the embedding alone."""
  shares = []
  for row in ROWS:
    squares = {}
    for name, g in problem.gradient(row).items():
      divisor = 1.0 if moment is None else np.sqrt(np.asarray(moment.of_path[name], np.float64)) + moment.epsilon
      squares[name] = float(np.sum((g.astype(np.float64) / divisor) ** 2))
    missed = sum(square for name, square in squares.items() if not seen(name))
    shares.append((missed / sum(squares.values()), squares['embedding/embedding'] / sum(squares.values())))
  return np.mean(shares, axis=0)


def _is_kernel(name):
  return name.endswith('/kernel')


def test_share_against_explicit_gradients(one_device):
  problem = make_problem(**VARIANTS['scanned_rematerialised'])
  found = _measured(problem, one_device, 'kernel$')
  share, embedding = _explicit(problem, _is_kernel)
  assert 0.01 < share < 0.99  # otherwise little would be tested
  # Sums of some ten thousand squares in float32, whose errors are some 6e-8 each.
  assert found['share'] == pytest.approx(share, rel=1e-5)
  assert found['parameters']['embedding/embedding'] == pytest.approx(embedding, rel=1e-5)
  assert found['rows'] == len(ROWS)
  assert sum(found['parameters'].values()) == pytest.approx(found['share'])
  assert not any(_is_kernel(name) for name in found['parameters'])
  norms = [name for name in found['parameters'] if name.endswith('mlp_norm/scale')]
  assert norms == ['blocks/mlp_norm/scale']


def test_layers_that_the_regex_leaves_out_are_missed(plain_problem, one_device):
  found = _measured(plain_problem, one_device, 'mlp/')
  share, _ = _explicit(plain_problem, lambda name: 'mlp/' in name)
  assert found['share'] == pytest.approx(share, rel=1e-5)
  assert found['parameters']['blocks/*/attention/qkv/kernel'] > 0


@pytest.mark.parametrize('variant', ['unrolled', 'scanned_rematerialised', 'modern', 'neox'])
def test_all_parameters_of_the_decoder_have_a_probe(variant, one_device):
  found = _measured(make_problem(**VARIANTS[variant]), one_device, '.*')
  assert (found['share'], found['parameters']) == (0, {})


def test_of_gradients_that_are_divided_by_the_root_of_second_moments(plain_problem, one_device):
  leaves = jax.tree_util.tree_leaves_with_path(plain_problem.params)
  v = {}
  for n, (name, x) in enumerate((path_name(path), x) for path, x in leaves):
    # Of the embedding the largest: its gradient, most of all here, counts for less.
    size = 1e-6 if _is_kernel(name) else 1e-4
    v[name] = jnp.asarray(np.random.default_rng(n).lognormal(size=x.shape) * size, jnp.float32)
  moment = SecondMoment(v, 1e-8)
  found = _measured(plain_problem, one_device, 'kernel$', moment)
  share, _ = _explicit(plain_problem, _is_kernel, moment)
  assert found['share'] == pytest.approx(share, rel=1e-5)
  assert abs(share - _explicit(plain_problem, _is_kernel)[0]) > 0.01


def test_same_on_any_mesh(plain_problem, one_device, eight_devices):
  one, eight = (_measured(plain_problem, mesh, 'kernel$') for mesh in (one_device, eight_devices))
  assert eight['share'] == pytest.approx(one['share'], rel=1e-5)

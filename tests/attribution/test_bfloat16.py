"""Features computed in bfloat16 and accumulated in float32, against explicit gradients of the same bfloat16 model."""

import jax
import numpy as np
import pytest

from dsdm_jax.attribution import probes
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.lm import outputs

from .conftest import VARIANTS, make_problem


@pytest.mark.parametrize('variant', ['scanned_rematerialised', 'modern'])
def test_two_sided_against_explicit_gradients(variant, one_device):
  """xA and dyB are rounded once each to bfloat16 where the explicit dW is: three roundings of 2⁻⁸ a term, averaged."""
  p = make_problem(compute_dtype='bfloat16', **VARIANTS[variant])
  step = TwoSidedFeatures(p.model, outputs.margin, '.*', 512, 3, one_device)
  phi_BJ = step(step.prepare(p.params, 0), p.tokens_BL, p.weights_BL)
  assert phi_BJ.dtype == np.float32
  expected_J = p.projected(5, step.layers, probes.random_projections(step.layers, 3, 0))
  assert np.linalg.norm(np.asarray(phi_BJ[5]) - expected_J) < 3 * 2**-8 * np.linalg.norm(expected_J)


def test_long_sums_do_not_lose_what_is_small():
  """4,096 tokens that each add 2⁻⁸ to a sum that begins at one: in bfloat16 it would stay at one."""
  tokens = 4_096
  x = np.full((tokens, 1), 2.0**-8, jax.numpy.bfloat16)
  x[0] = 1
  one = np.ones((1, 1), jax.numpy.bfloat16)

  def value(probe_ab):
    return probes.probed_matmul(x, one, probe_ab, np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)).sum()

  grad_ab = jax.grad(value)(np.zeros((1, 1), np.float32))
  assert grad_ab.dtype == np.float32
  np.testing.assert_allclose(grad_ab, 1 + (tokens - 1) / 256, rtol=1e-6)

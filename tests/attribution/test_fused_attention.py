"""Two-sided features through the TPU's attention kernel, interpreted, against gradients through plain attention."""

import functools

import jax
import numpy as np
import pytest

from configs import base
from dsdm_jax.attribution import probes
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.lm import attention_tpu, outputs

from .conftest import make_problem

LENGTH = attention_tpu.LANES  # the shortest that the kernel takes
# Of 128 products in another order, through two layers and back: some √128 · 2⁻²⁴ each time, and four of these.
ROUNDING = 1e-5


@pytest.fixture
def interpreted(monkeypatch) -> None:
  """The kernel serves here too, and is interpreted: all else is as on a TPU."""
  kernel = functools.partial(attention_tpu.causal, interpret=True)
  monkeypatch.setattr(attention_tpu, 'causal', kernel)
  monkeypatch.setattr(attention_tpu, 'serves', lambda length: length % attention_tpu.LANES == 0)


def test_features_are_those_of_plain_attention(interpreted):
  del interpreted
  variant = {'kv_heads': 1, 'positions': 'rope', 'scan_layers': True, 'remat': True}
  config = base.get_config().mesh
  config.data, config.model = 4, 2
  mesh = make_mesh(config)
  plain, fused = (make_problem(length=LENGTH, attention=kind, **variant) for kind in ('xla', 'fused'))
  step = TwoSidedFeatures(fused.model, outputs.margin, '.*', 512, 3, mesh)
  inputs = step.prepare(fused.params, 0), fused.tokens_BL, fused.weights_BL
  assert 'pallas_call' in str(jax.make_jaxpr(step.apply)(*inputs)), 'the kernel is what runs'
  phi_BJ = np.asarray(step(*inputs))
  for row in (0, 5):
    wanted_J = plain.projected(row, step.layers, probes.random_projections(step.layers, 3, 0))
    assert np.linalg.norm(phi_BJ[row] - wanted_J) < ROUNDING * np.linalg.norm(wanted_J)

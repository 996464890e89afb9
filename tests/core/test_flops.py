"""The counter of floating-point operations against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from configs import base
from dsdm_jax.core import flops
from dsdm_jax.training.step import abstract_model

A, B, C = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 5), (5, 7), (4, 3, 5)))


@pytest.mark.parametrize(
  ('function', 'arguments', 'wanted'),
  [
    (lambda a, b: a @ b, (A, B), 2 * 3 * 5 * 7),
    (lambda c, b: jnp.einsum('nij,jk->nik', c, b), (C, B), 4 * 2 * 3 * 5 * 7),
    (lambda c: jnp.einsum('nij,nkj->nik', c, c), (C,), 4 * 2 * 3 * 5 * 3),
    (lambda a: a + jnp.sin(a), (A,), 0),
    (jax.jit(lambda a, b: jnp.tanh(a @ b)), (A, B), 210),
    (jax.grad(lambda a, b: (a @ b).sum()), (A, B), 210 + 2 * 3 * 5 * 7),
    (jax.vmap(lambda c, b: c @ b, in_axes=(0, None)), (C, B), 4 * 210),
    (jax.checkpoint(lambda a, b: a @ b), (A, B), 210),
    (lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: jnp.zeros((3, 7))), (A, B), 210),
  ],
)
def test_by_hand(function, arguments, wanted):
  found = flops.count(function, *arguments)
  if 'grad' in getattr(function, '__qualname__', ''):
    assert 210 <= found <= wanted
  else:
    assert found == wanted


def test_scan_counts_its_body_as_often_as_it_runs():
  def scanned(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]

  def nested(x, w):
    return jax.lax.scan(lambda x, _: (scanned(x, w), None), x, None, length=2)[0]

  x, w = jnp.ones((3, 5)), jnp.ones((5, 5))
  assert flops.count(scanned, x, w) == 6 * 2 * 3 * 5 * 5
  assert flops.count(nested, x, w) == 2 * 6 * 2 * 3 * 5 * 5


@pytest.mark.parametrize('backward', [False, True])
def test_scanned_decoder_costs_what_the_unrolled_one_does(backward):
  from flax import nnx

  found = []
  for scan in (False, True):
    config = base.model()
    config.update({'layers': 3, 'width': 16, 'heads': 2, 'kv_heads': 2, 'mlp_width': 32, 'scan_layers': scan})
    graphdef, state = nnx.split(abstract_model(config, 64, 8))
    tokens_BL = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def loss(state, tokens_BL, graphdef=graphdef):
      return nnx.merge(graphdef, state)(tokens_BL).sum()

    found.append(flops.count(jax.grad(loss) if backward else loss, state, tokens_BL))
  assert found[0] == found[1]
  # By hand: qkv, out, up, down and the logits, and the two products of attention (whole square), per token 2·I·O.
  tokens, width, mlp = 2 * 8, 16, 32
  layer = 2 * tokens * (width * 3 * width + width * width + 2 * width * mlp) + 2 * 2 * tokens * 8 * width
  forward = 3 * layer + 2 * tokens * width * 64
  assert found[0] == (3 * forward if backward else forward)

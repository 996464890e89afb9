"""The product of training: its gradients are those of the plain one, and it stands nowhere but in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdm_jax.lm import products
from tests.training.test_step import batches, cached_trainer

DIMENSIONS = (((2,), (0,)), ((), ()))


def whole(inputs: int, outputs: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Small whole numbers: every sum is exact in float32, so any order gives the same bits."""
  rng = np.random.default_rng(0)
  shapes = ((2, 3, inputs), (inputs, outputs), (2, 3, outputs))
  x, kernel, gradient = (jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in shapes)
  return x, kernel, gradient


@pytest.mark.parametrize(('inputs', 'outputs'), [(4, 7), (7, 4), (5, 5)])
def test_gradients_are_those_of_the_plain_product(inputs, outputs):
  x, kernel, gradient = whole(inputs, outputs)
  y, backward = jax.vjp(lambda x, k: products.dot_general(x, k, DIMENSIONS), x, kernel)
  with products.in_training():
    found, found_backward = jax.vjp(lambda x, k: products.dot_general(x, k, DIMENSIONS), x, kernel)
  np.testing.assert_array_equal(found, y)
  for a, b in zip(found_backward(gradient), backward(gradient), strict=True):
    assert a.shape == b.shape
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(('inputs', 'outputs', 'left'), [(4, 7, (2, 3, 4)), (7, 4, (2, 3, 4))])
def test_the_narrower_side_is_written_on_the_left(inputs, outputs, left):
  x, kernel, gradient = whole(inputs, outputs)

  def kernel_gradient(x, kernel, gradient):
    with products.in_training():
      return jax.vjp(lambda k: products.dot_general(x, k, DIMENSIONS), kernel)[1](gradient)

  jaxpr = jax.make_jaxpr(kernel_gradient)(x, kernel, gradient)
  dots = [e for e in jaxpr.eqns if e.primitive.name == 'dot_general']
  over_tokens = [e for e in dots if len(e.params['dimension_numbers'][0][0]) == 2]
  assert [e.invars[0].aval.shape for e in over_tokens] == [left]


def test_forward_mode_is_left_elsewhere():
  x, kernel, _ = whole(4, 7)
  _, tangent = jax.jvp(lambda k: products.dot_general(x, k, DIMENSIONS), (kernel,), (kernel,))
  np.testing.assert_array_equal(tangent, x @ kernel)


@pytest.mark.parametrize('keys', [{}, {'tied_embeddings': False}, {'scan_layers': True, 'remat': True}], ids=str)
def test_a_step_is_the_plain_one_up_to_rounding(keys, monkeypatch):
  """The gradient's norm and the loss of three steps, with the products of training and with plain ones."""

  def steps() -> list[float]:
    trainer = cached_trainer.__wrapped__(1, tuple(keys.items()), ())  # traced again
    state = trainer.init(jax.random.key(0))
    seen = []
    for tokens_BL in batches(3):
      pair = jax.device_put((tokens_BL, np.ones(len(tokens_BL), np.float32)), trainer.batch_sharding)
      state, metrics = trainer.step(state, *pair, jnp.int32(3))
      seen += [float(metrics['loss']), float(metrics['gradient_norm'])]
    return seen

  found, traced = steps(), []
  monkeypatch.setattr(products, '_product', lambda x, kernel: traced.append(kernel.shape) or x @ kernel)
  plain = steps()
  assert len(traced) >= 5, 'each of qkv, out, up, down and the head is one of them'
  assert found == pytest.approx(plain, rel=1e-5)

"""Plain causal attention, in blocks of queries, against float64 NumPy and JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdm_jax.core import flops, prng
from dsdm_jax.lm import attention

LENGTHS = [1, 17, 64, 100]  # below and above a block, and what four of them divide and do not


def _inputs(length: int, heads: int = 4, shared: int = 2) -> tuple[np.ndarray, ...]:
  random = prng.numpy_stream(0, 'attention', length)
  return tuple(random.standard_normal((2, length, count, 8)).astype(np.float32) for count in (heads, shared, shared))


def _oracle(q_BLHK: np.ndarray, k_BLGK: np.ndarray, v_BLGK: np.ndarray) -> np.ndarray:
  q_BLHK, k_BLGK, v_BLGK = (x.astype(np.float64) for x in (q_BLHK, k_BLGK, v_BLGK))
  group = q_BLHK.shape[2] // k_BLGK.shape[2]
  y_BLHK = np.zeros_like(q_BLHK)
  for b, t, h in np.ndindex(q_BLHK.shape[:3]):
    scores = k_BLGK[b, : t + 1, h // group] @ q_BLHK[b, t, h] / np.sqrt(q_BLHK.shape[-1])
    weights = np.exp(scores - scores.max())
    y_BLHK[b, t, h] = weights @ v_BLGK[b, : t + 1, h // group] / weights.sum()
  return y_BLHK


def _jax(q, k, v):
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize('length', LENGTHS)
def test_values_agree_with_float64(length):
  inputs = _inputs(length)
  found = jax.jit(attention.causal)(*inputs)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, _oracle(*inputs), rtol=0, atol=3e-6)


@pytest.mark.parametrize('length', LENGTHS)
def test_reverse_and_forward_mode_agree_with_plain_attention(length):
  inputs, tangents = _inputs(length), _inputs(length + 1_000)
  tangents = tuple(t[:, :length] for t in tangents)

  def backwards(attend, inputs, tangents):
    del tangents
    y, pullback = jax.vjp(attend, *inputs)
    return y, pullback(jnp.sin(y))  # which differs from entry to entry

  for of in (backwards, jax.jvp):
    want, found = (jax.jit(of, static_argnums=0)(attend, inputs, tangents) for attend in (_jax, attention.causal))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, want)


def test_one_example_is_the_same_alone_and_among_others():
  q, k, v = _inputs(40)
  both = jax.vmap(lambda *x: attention.causal(*(y[None] for y in x))[0])(q, k, v)
  np.testing.assert_allclose(both, attention.causal(q, k, v), rtol=0, atol=1e-6)


def test_scores_far_apart_neither_overflow_nor_vanish():
  q, k, v = _inputs(40)
  found = attention.causal(1_000 * q, k, v)
  np.testing.assert_allclose(found, _oracle(1_000 * q, k, v), rtol=0, atol=2e-3)  # scores of 1,000 have 6e-5 to round


def test_bfloat16_keeps_scores_and_sums_in_float32():
  inputs = tuple(jnp.asarray(x, jnp.bfloat16) for x in _inputs(64))
  found = attention.causal(*inputs)
  assert found.dtype == jnp.bfloat16
  exact = _oracle(*(np.asarray(x, np.float64) for x in inputs))
  # Queries over √K, weights and the result each lose 2⁻⁹ of themselves.
  np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=4 * 2**-9 * np.abs(exact).max())
  dots = [e for e in jax.make_jaxpr(attention.causal)(*inputs).eqns if e.primitive.name == 'dot_general']
  assert len(dots) == 2 * attention.BLOCKS
  assert {str(e.outvars[0].aval.dtype) for e in dots} == {'float32'}


def test_keys_that_no_query_of_a_block_sees_are_not_computed():
  for length in LENGTHS:
    whole = flops.count(_jax, *_inputs(length))
    share = flops.count(attention.causal, *_inputs(length)) / whole
    assert share == pytest.approx(attention.computed_share(length))
  n = attention.BLOCKS
  assert attention.computed_share(64) == (n + 1) / (2 * n)

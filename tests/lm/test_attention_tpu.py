"""The TPU's attention kernel, interpreted, against plain attention: over a mesh and under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dsdm_jax.core import prng
from dsdm_jax.core.mesh import BATCH, batch_sharding, make_mesh
from dsdm_jax.lm import attention_tpu


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
  config = base.get_config().mesh
  config.data, config.model = 4, 2
  return make_mesh(config)


def _inputs(batch: int, kv_heads: int) -> tuple[np.ndarray, ...]:
  random = prng.numpy_stream(0, 'attention')
  return tuple(random.standard_normal((batch, 128, heads, 16)).astype(np.float32) for heads in (2, kv_heads, kv_heads))


def _plain(q, k, v):
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def test_values_and_gradients_are_those_of_plain_attention_where_queries_share_a_key(mesh):
  inputs = _inputs(4, kv_heads=1)

  def loss(attention, q, k, v):
    return jnp.sum(jnp.sin(attention(q, k, v)))  # whose gradient differs from entry to entry

  def kernel(q, k, v):
    with attention_tpu.on_mesh(mesh):
      return attention_tpu.causal(q, k, v, interpret=True)

  want = jax.value_and_grad(loss, argnums=(1, 2, 3))(_plain, *inputs)
  step = jax.jit(jax.value_and_grad(lambda *x: loss(kernel, *x), argnums=(0, 1, 2)))
  found = step(*jax.device_put(inputs, batch_sharding(mesh)))
  # Sums of 128 products in another order, in float32: some 128 · 2⁻²⁴ of the largest entry, which is of order one.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found[1], want[1])
  np.testing.assert_allclose(found[0], want[0], rtol=1e-5)


def test_gradients_of_each_example_under_vmap(mesh):
  inputs = _inputs(4, kv_heads=2)

  def output(attention, q_LHK, k_LHK, v_LHK):
    return jnp.sum(jnp.sin(attention(q_LHK[None], k_LHK[None], v_LHK[None])))

  def kernel(q, k, v):
    return attention_tpu.causal(q, k, v, interpret=True)

  def gradients(q, k, v):
    with attention_tpu.on_mesh(mesh):
      return jax.vmap(jax.grad(lambda *x: output(kernel, *x)), spmd_axis_name=BATCH)(q, k, v)

  batch = batch_sharding(mesh)
  found = jax.jit(gradients, in_shardings=batch, out_shardings=batch)(*jax.device_put(inputs, batch))
  want = jax.vmap(jax.grad(lambda *x: output(_plain, *x)))(*inputs)
  np.testing.assert_allclose(found, want, atol=3e-5)


def test_serves_tpus_alone_and_only_where_a_mesh_is_known(mesh):
  assert not attention_tpu.serves(128)
  with attention_tpu.on_mesh(mesh):
    assert not attention_tpu.serves(128)  # a CPU's mesh
  device = jax.sharding.AbstractDevice('TPU v5 lite', 1, 'tpu')
  abstract = jax.sharding.AbstractMesh((4, 2), ('data', 'model'), abstract_device=device)
  with jax.sharding.use_abstract_mesh(abstract):
    assert attention_tpu.serves(128)
    assert attention_tpu.serves(1_024)
    assert not attention_tpu.serves(100)

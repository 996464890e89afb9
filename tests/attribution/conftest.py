"""A small decoder in every shape that features must work for, and its explicit per-example gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.core import mesh
from dsdm_jax.lm import decoder, outputs

VOCAB, LENGTH, BATCH = 64, 16, 8

VARIANTS = {
  'unrolled': {},
  'scanned': {'scan_layers': True},
  'rematerialised': {'remat': True},
  'scanned_rematerialised': {'scan_layers': True, 'remat': True},
  'modern': {
    'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'tied_embeddings': False, 'kv_heads': 2, 'bias': False,
  },
  # The keys of OLMo-2 with those of Qwen2 and Llama 3.1, and the keys of Gemma 2 and 3.
  'post_norm': {
    'positions': 'rope', 'rotary_scaling': (8.0, 1.0, 4.0, 32.0), 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False,
    'qkv_bias': True, 'qk_norm': 'all', 'norm_place': 'post', 'head_size': 8, 'heads': 4, 'kv_heads': 2,
  },
  'gemma': {
    'positions': 'rope', 'rotary_global_every': 2, 'rotary_local_base': 100.0, 'rotary_scaling': (8.0,), 'bias': False,
    'norm': 'rmsnorm', 'mlp': 'geglu', 'qk_norm': 'head', 'norm_place': 'both', 'head_size': 8, 'kv_heads': 1,
    'embedding_scale': 32**0.5, 'attention_cap': 2.0, 'logit_cap': 3.0,
  },
}  # fmt: skip


@dataclasses.dataclass
class Problem:
  """A model with batch and, for the oracle, a Python loop over plain gradients."""

  model: nnx.Module
  params: nnx.State
  tokens_BL: jax.Array
  weights_BL: jax.Array

  def gradient(self, row: int) -> dict[str, np.ndarray]:
    """Path → gradient of the margin of one example, one call of `jax.grad` each."""
    graphdef, params = nnx.split(self.model, nnx.Param)

    def output(params):
      logits_LV = nnx.merge(graphdef, params)(self.tokens_BL[row : row + 1])[0]
      return outputs.margin(logits_LV, self.tokens_BL[row], self.weights_BL[row])

    grads = jax.jit(jax.grad(output))(params)
    return {'/'.join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(grads)}


def make_problem(seed: int = 0, length: int = LENGTH, **overrides) -> Problem:
  config = base.model()
  config.update({'width': 32, 'mlp_width': 64, 'layers': 2, **overrides})
  model = decoder.build(config, VOCAB, length, nnx.Rngs(seed))
  # Weights of the initialisation make attention nearly uniform; larger ones exercise every path.
  for _, module in nnx.iter_modules(model):
    if isinstance(module, nnx.Linear):
      module.kernel[...] = module.kernel[...] * 8
  tokens_BL = jax.random.randint(jax.random.key(seed), (BATCH, length), 0, VOCAB)
  weights_BL = jnp.ones((BATCH, length)).at[:, 0].set(0).at[0, 5:9].set(0)
  return Problem(model, nnx.state(model, nnx.Param), tokens_BL, weights_BL)


@pytest.fixture(params=VARIANTS, ids=str)
def problem(request) -> Problem:
  return make_problem(**VARIANTS[request.param])


@pytest.fixture
def plain_problem() -> Problem:
  return make_problem()


@pytest.fixture
def one_device() -> jax.sharding.Mesh:
  config = base.get_config().mesh
  return mesh.make_mesh(config, jax.devices()[:1])


@pytest.fixture(params=[(8, 1), (4, 2), (1, 8)], ids=['8x1', '4x2', '1x8'])
def eight_devices(request) -> jax.sharding.Mesh:
  config = base.get_config().mesh
  config.data, config.model = request.param
  return mesh.make_mesh(config)

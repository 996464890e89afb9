"""A small decoder in every shape that features must work for, and its explicit per-example gradients."""

import dataclasses
import functools
from collections.abc import Callable

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
  'scanned_rematerialised': {'scan_layers': True, 'remat': True},
  'modern': {
    'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'tied_embeddings': False, 'kv_heads': 2, 'bias': False,
    'layers': 1,
  },
  'neox': {'positions': 'rope', 'mlp': 'gelu_exact', 'tied_embeddings': False, 'parallel_residual': True, 'layers': 1},
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
# Where a test compiles two programs of each kind: a scanned stack, and the kind with most keys; the others with --all.
SOME_VARIANTS = [
  v if v in ('scanned_rematerialised', 'gemma') else pytest.param(v, marks=pytest.mark.full) for v in VARIANTS
]


@dataclasses.dataclass(eq=False)  # so that functions of it can be cached
class Problem:
  """A model with batch and, for the oracle, a Python loop over plain gradients."""

  model: nnx.Module
  params: nnx.State
  tokens_BL: jax.Array
  weights_BL: jax.Array

  @functools.cached_property
  def _gradient(self) -> Callable[[nnx.State, jax.Array, jax.Array], nnx.State]:
    graphdef = nnx.split(self.model, nnx.Param)[0]

    def output(params, tokens_L, weights_L):
      return outputs.margin(nnx.merge(graphdef, params)(tokens_L[None])[0], tokens_L, weights_L)

    return jax.jit(jax.grad(output))

  def gradient(self, row: int) -> dict[str, np.ndarray]:
    """Path → gradient of the margin of one example, one call of `jax.grad` each."""
    params = nnx.split(self.model, nnx.Param)[1]
    grads = self._gradient(params, self.tokens_BL[row], self.weights_BL[row])
    return {'/'.join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(grads)}

  def projected(self, row: int, layers, projections, scale=None) -> np.ndarray:
    """AᵀGB of the explicit gradient of one example, in float64; entries of G times `scale` (path → array), if any."""
    gradient, parts = self.gradient(row), []
    for layer in layers:
      whole = [gradient[path] * (1 if scale is None else scale[path]) for path in layer.parameters]
      g = np.concatenate([x.reshape(*layer.stack, -1, layer.outputs) for x in whole], axis=-2).astype(np.float64)
      sides = (np.asarray(x, np.float64) for x in projections[layer.path])
      parts.append(np.einsum('...io,...ia,...ob->...ab', g, *sides).ravel())
    return np.concatenate(parts)


@functools.cache
def make_problem(seed: int = 0, length: int = LENGTH, **overrides) -> Problem:
  """The same object for the same arguments, with its compiled gradient: change none of its arrays."""
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


@pytest.fixture
def eight_devices() -> jax.sharding.Mesh:
  """Split over rows and weights."""
  config = base.get_config().mesh
  config.data, config.model = 4, 2
  return mesh.make_mesh(config)

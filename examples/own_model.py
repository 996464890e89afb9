"""Scores training rows with a model of your own, without the pipeline. Run it with: python -m examples.own_model"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsdm_jax


class OwnModel(nnx.Module):
  """Any NNX module that maps tokens_BL to logits_BLV; its linear layers and embeddings are probed."""

  def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs):
    self.embed = nnx.Embed(vocab_size, width, rngs=rngs)
    self.hidden = nnx.Linear(width, width, rngs=rngs)
    self.logits = nnx.Linear(width, vocab_size, rngs=rngs)

  def __call__(self, tokens_BL: jax.Array) -> jax.Array:
    return self.logits(nnx.gelu(self.hidden(self.embed(tokens_BL))))


def log_likelihood(logits_LV: jax.Array, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
  """The output that scores are about; weights_L says how much each token counts."""
  log_p_LV = jax.nn.log_softmax(logits_LV[:-1])
  return jnp.sum(weights_L[1:] * jnp.take_along_axis(log_p_LV, tokens_L[1:, None], axis=1)[:, 0])


def main() -> dsdm_jax.Selection:
  tokens_NL = jax.random.randint(jax.random.key(0), (256, 16), 0, 64)
  weights_BL = jnp.ones((64, 16))
  model = OwnModel(vocab_size=64, width=32, rngs=nnx.Rngs(0))
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ('data', 'model'))
  features = dsdm_jax.TwoSidedFeatures(model, log_likelihood, pattern='.*', requested_dimension=128, seed=0, mesh=mesh)
  prepared, blocks = features.prepare(nnx.state(model), checkpoint=0), ((0, features.dimension),)
  with tempfile.TemporaryDirectory() as folder:
    store = dsdm_jax.FeatureStore(Path(folder, 'pool.zarr'), 256, features.dimension, 64, 'float32')
    for shard in range(store.shards):
      start, stop = store.bounds(shard)
      store.write(shard, np.asarray(features(prepared, tokens_NL[start:stop], weights_BL)))
    # The target examples are the first eight rows of the pool, so these rows must get the highest scores.
    phi_TJ = store.read(0)[:8]
    solution = dsdm_jax.solve(dsdm_jax.gram(store, blocks), blocks, phi_TJ.mean(axis=0, keepdims=True), damping=0.1)
    score_N = np.concatenate([phi_BJ @ solution.u_JK[:, 0] for _, _, phi_BJ in store])
  return dsdm_jax.Selection.of(np.argsort(-score_N)[:8], method='own model')


if __name__ == '__main__':
  print(main().rows)

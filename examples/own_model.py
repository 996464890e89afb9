"""Scores training rows with a model of your own, without the pipeline. Run it with: python -m examples.own_model"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsdm_jax
from dsdm_jax.lm.outputs import log_likelihood


class OwnModel(nnx.Module):
  """Any NNX module that maps tokens_BL to logits_BLV; its tables, linear layers and vectors are probed."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed, self.logits = nnx.Embed(64, 32, rngs=rngs), nnx.Linear(32, 64, rngs=rngs)

  def __call__(self, tokens_BL: jax.Array) -> jax.Array:
    return self.logits(nnx.gelu(self.embed(tokens_BL)))


def main() -> dsdm_jax.Selection:
  model = OwnModel(nnx.Rngs(0))
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, -1, 1), ('replica', 'data', 'model'))
  features = dsdm_jax.TwoSidedFeatures(model, log_likelihood, pattern='.*', requested_dimension=256, seed=0, mesh=mesh)
  prepared, blocks = features.prepare(nnx.state(model), checkpoint=0), ((0, features.dimension),)
  tokens_NL = jax.random.randint(jax.random.key(0), (256, 16), 0, 64)
  with tempfile.TemporaryDirectory() as folder:
    store = dsdm_jax.FeatureStore(Path(folder, 'pool.zarr'), 256, features.dimension, 256, 'float32')
    store.write(0, np.asarray(features(prepared, tokens_NL, jnp.ones((256, 16)))))
    # The target examples are the first eight rows of the pool, so these rows must get the highest scores.
    phi_NJ = store.read(0)
    solution = dsdm_jax.solve(dsdm_jax.gram(store, blocks), blocks, phi_NJ[:8].mean(0, keepdims=True), damping=0.1)
  return dsdm_jax.Selection.of(np.argsort(-phi_NJ @ solution.u_JK[:, 0])[:8], method='own model')


if __name__ == '__main__':
  print(main().rows)

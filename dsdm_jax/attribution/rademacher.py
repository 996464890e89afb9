"""Dense random projection φ = R g with R ∈ {±1}^{J×W}/√J, as in the paper, without ever holding R.

R is made block by block of parameters from a counter-based generator: the bits of a block depend on (key, parameter,
block) alone, so they are the same for any batch, mesh and number of hosts. One 32-bit draw gives 32 signs, and a block
serves the whole batch.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsdm_jax.core.prng import stream
from dsdm_jax.lm.partition import path_name

BLOCK = 1_024  # parameters per block: a block of signs at J = 16,384 is 64 MiB in float32


def keys(parameters: Any, seed: int, checkpoint: int) -> list[jax.Array]:
  """One key per leaf of `parameters`, in tree order, named by its path."""
  paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
  return [stream(seed, 'projection', 'dense', checkpoint, path) for path in paths]


def signs(key: jax.Array, block: jax.Array | int, dimension: int) -> jax.Array:
  """Block number `block` of Rᵀ·√J for one parameter: ±1 in float32, shape [BLOCK, dimension]."""
  words = math.ceil(dimension / 32)
  bits_BW = jax.random.bits(jax.random.fold_in(key, block), (BLOCK, words), jnp.uint32)
  shifts = jnp.arange(32, dtype=jnp.uint32)
  bit = (bits_BW[:, :, None] >> shifts[None, None, :]) & jnp.uint32(1)
  return (1.0 - 2.0 * bit.astype(jnp.float32)).reshape(BLOCK, words * 32)[:, :dimension]


def project(grads: Any, leaf_keys: list[jax.Array], dimension: int) -> jax.Array:
  """Projects per-example gradients.

  Args:
    grads: pytree of float arrays [B, *parameter shape].
    leaf_keys: from `keys`, in the order of the leaves.
    dimension: J.

  Returns:
    phi_BJ in float32; E over R of φ(g)·φ(g') is g·g'.
  """
  leaves = jax.tree.leaves(grads)
  batch = leaves[0].shape[0]
  phi_BJ = jnp.zeros((batch, dimension), jnp.float32)
  for leaf, key in zip(leaves, leaf_keys, strict=True):
    flat_BW = leaf.reshape(batch, -1).astype(jnp.float32)
    blocks = math.ceil(flat_BW.shape[1] / BLOCK)
    flat_BW = jnp.pad(flat_BW, ((0, 0), (0, blocks * BLOCK - flat_BW.shape[1])))

    def add_block(
      phi_BJ: jax.Array, block: jax.Array, flat_BW: jax.Array = flat_BW, key: jax.Array = key
    ) -> tuple[jax.Array, None]:
      part = jax.lax.dynamic_slice_in_dim(flat_BW, block * BLOCK, BLOCK, axis=1)
      return phi_BJ + part @ signs(key, block, dimension), None

    phi_BJ, _ = jax.lax.scan(add_block, phi_BJ, jnp.arange(blocks))
  return phi_BJ / math.sqrt(dimension)

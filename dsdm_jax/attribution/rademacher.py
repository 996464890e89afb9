"""Dense random projection φ = R g with R ∈ {±1}^{J×W}/√J, as in the paper, without storing R.

R is generated in blocks of parameters by a counter-based generator: the bits of a block depend on (key, parameter,
block) alone, so they are the same for any batch, mesh and number of hosts. One 32-bit draw gives 32 signs, one for
each of 32 slices of a block. Each block is generated once for the whole batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsdm_jax.core.prng import stream
from dsdm_jax.lm.partition import path_name

SLICES = 32  # of a block: as many as a draw has bits
SLICE = 256  # parameters: a slice of signs at J = 4,096 is 4 MiB, which fits a cache between its two uses
BLOCK = SLICES * SLICE

Place = Callable[[jax.Array], jax.Array]


def keys(parameters: Any, seed: int, checkpoint: int) -> list[jax.Array]:
  """One key per leaf of `parameters`, in tree order, named by its path, and one for remainders that fill no block."""
  paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
  return [stream(seed, 'projection', 'dense', checkpoint, path) for path in (*paths, 'remainders of all parameters')]


def signs(key: jax.Array, block: jax.Array | int, dimension: int) -> jax.Array:
  """Block number `block` of Rᵀ·√J for one parameter: ±1 in float32, shape [BLOCK, dimension]."""
  bits_SJ = _bits(key, block, dimension)
  return jnp.concatenate([_slice_signs(bits_SJ, jnp.uint32(s)) for s in range(SLICES)])


def project(grads: Any, leaf_keys: Sequence[jax.Array], dimension: int, place: Place = lambda phi: phi) -> jax.Array:
  """Projects per-example gradients.

  Args:
    grads: pytree of float arrays [B, *parameter shape].
    leaf_keys: from `keys`.
    dimension: J.
    place: constrains the sharding of phi_BJ.

  Returns:
    phi_BJ in float32; E over R of φ(g)·φ(g') is g·g'.
  """
  leaves = jax.tree.leaves(grads)
  batch = leaves[0].shape[0]
  flat = [leaf.reshape(batch, -1) for leaf in leaves]
  whole = [(part, part.shape[1] // BLOCK, key) for part, key in zip(flat, leaf_keys[:-1], strict=True)]
  rest_BW = jnp.concatenate([part[:, blocks * BLOCK :].astype(jnp.float32) for part, blocks, _ in whole], axis=1)
  blocks = math.ceil(rest_BW.shape[1] / BLOCK)
  rest_BW = jnp.pad(rest_BW, ((0, 0), (0, blocks * BLOCK - rest_BW.shape[1])))

  phi_BJ = place(jnp.zeros((batch, dimension), jnp.float32))
  for part_BW, count, key in (*whole, (rest_BW, blocks, leaf_keys[-1])):
    if count:
      phi_BJ = _project_blocks(phi_BJ, part_BW, count, key, place)
  return phi_BJ / math.sqrt(dimension)


def transpose(u_JT: jax.Array, like: Any, leaf_keys: Sequence[jax.Array]) -> Any:
  """Rᵀu in parameter space: `project(g) @ u` is the inner product of g with it.

  Args:
    u_JT: float32.
    like: pytree of arrays or shapes of the parameters.
    leaf_keys: from `keys`.

  Returns:
    A pytree like `like` of float32 arrays [T, *parameter shape].
  """
  dimension, targets = u_JT.shape
  u_JT = u_JT / math.sqrt(dimension)
  leaves = jax.tree.leaves(like)
  sizes = [math.prod(leaf.shape) for leaf in leaves]
  rest = sum(size % BLOCK for size in sizes)
  rest_TW = _transpose_blocks(u_JT, math.ceil(rest / BLOCK), leaf_keys[-1])
  out, used = [], 0
  for leaf, size, key in zip(leaves, sizes, leaf_keys[:-1], strict=True):
    whole_TW = _transpose_blocks(u_JT, size // BLOCK, key)
    left = size % BLOCK
    flat_TW = jnp.concatenate([whole_TW, rest_TW[:, used : used + left]], axis=1)
    out.append(flat_TW.reshape(targets, *leaf.shape))
    used += left
  return jax.tree.unflatten(jax.tree.structure(like), out)


def _bits(key: jax.Array, block: jax.Array | int, dimension: int) -> jax.Array:
  return jax.random.bits(jax.random.fold_in(key, block), (SLICE, dimension), jnp.uint32)


def _slice_signs(bits_SJ: jax.Array, number: jax.Array) -> jax.Array:
  # Bit `number` from the top becomes the sign of 1.0: two operations on integers and no conversion.
  sign = (bits_SJ << number) & jnp.uint32(0x80000000)
  return jax.lax.bitcast_convert_type(sign | jnp.uint32(0x3F800000), jnp.float32)


def _project_blocks(phi_BJ: jax.Array, part_BW: jax.Array, blocks: int, key: jax.Array, place: Place) -> jax.Array:
  dimension = phi_BJ.shape[1]

  def add_block(phi_BJ: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
    bits_SJ = _bits(key, block, dimension)

    def add_slice(phi_BJ: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
      first = block * BLOCK + number * SLICE
      slice_BS = jax.lax.dynamic_slice_in_dim(part_BW, first, SLICE, axis=1).astype(jnp.float32)
      return place(phi_BJ + slice_BS @ _slice_signs(bits_SJ, number.astype(jnp.uint32))), None

    return jax.lax.scan(add_slice, phi_BJ, jnp.arange(SLICES))[0], None

  return jax.lax.scan(add_block, phi_BJ, jnp.arange(blocks))[0]


def _transpose_blocks(u_JT: jax.Array, blocks: int, key: jax.Array) -> jax.Array:
  """float32 [T, blocks · BLOCK]."""
  dimension, targets = u_JT.shape

  def one_block(block: jax.Array) -> jax.Array:
    bits_SJ = _bits(key, block, dimension)
    numbers = jnp.arange(SLICES, dtype=jnp.uint32)
    return jax.lax.map(lambda number: _slice_signs(bits_SJ, number) @ u_JT, numbers).reshape(BLOCK, targets)

  if not blocks:
    return jnp.zeros((targets, 0), jnp.float32)
  return jax.lax.map(one_block, jnp.arange(blocks)).reshape(blocks * BLOCK, targets).T

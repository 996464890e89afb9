"""Causal attention in plain JAX for every device, in blocks of queries, without the keys that a block cannot see.

With n blocks, (n + 1) / 2n of the L² scores are computed. Queries, keys and values are first laid out head by head, so
that the products read contiguous memory. Rows are divided by their sum after the product with the values (L × K
numbers) and not before it (L × L), as in arXiv 2205.14135.
"""

import jax
import jax.numpy as jnp

BLOCKS = 4  # 0.625 of the scores; 8 blocks would save a tenth of that and lose more to smaller products on CPUs
_SHORTEST = 16  # least number of queries in a block


def causal(q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, cap: float = 0.0) -> jax.Array:
  """softmax(QKᵀ/√K) V, where each position sees itself and earlier ones; shape and dtype of `q_BLHK`.

  Scores, exponentials and sums are float32. Differentiable in forward and reverse mode, to any order.

  Args:
    q_BLHK: queries of H heads.
    k_BLGK: keys of G heads, a divisor of H: H/G consecutive query heads share one.
    v_BLGK: values, shaped like the keys.
    cap: c > 0 replaces each score s by c·tanh(s/c), as in Gemma 2 (arXiv 2408.00118).
  """
  length = q_BLHK.shape[1]
  q_BGHLK, k_BGLK, v_BGLK = _by_head(q_BLHK, k_BLGK, v_BLGK)

  def block(start: int, stop: int) -> jax.Array:
    sees_TS = jnp.arange(stop)[None] <= start + jnp.arange(stop - start)[:, None]
    sees = sees_TS[None, None, None]
    return _attend(q_BGHLK[..., start:stop, :], k_BGLK[..., :stop, :], v_BGLK[..., :stop, :], sees, cap)

  y_BGHLK = jnp.concatenate([block(start, stop) for start, stop in _bounds(length)], axis=3)
  return y_BGHLK.transpose(0, 3, 1, 2, 4).reshape(q_BLHK.shape)


def seeing(q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, sees_BLS: jax.Array, cap: float = 0.0) -> jax.Array:
  """`causal` for queries that see the keys where `sees_BLS` is true, in one block."""
  y_BGHLK = _attend(*_by_head(q_BLHK, k_BSGK, v_BSGK), sees_BLS[:, None, None], cap)
  return y_BGHLK.transpose(0, 3, 1, 2, 4).reshape(q_BLHK.shape)


def _by_head(q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  batch, length, _, head_size = q_BLHK.shape
  q_BLGHK = (q_BLHK * head_size**-0.5).reshape(batch, length, k_BSGK.shape[2], -1, head_size)
  return q_BLGHK.transpose(0, 2, 3, 1, 4), k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)


def computed_share(length: int) -> float:
  """The share of the L² scores of a sequence that `causal` computes."""
  return sum((stop - start) * stop for start, stop in _bounds(length)) / length**2


def _bounds(length: int) -> list[tuple[int, int]]:
  side = max(_SHORTEST, -(-length // BLOCKS))
  return [(start, min(start + side, length)) for start in range(0, length, side)]


def _attend(q_BGHTK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, sees: jax.Array, cap: float) -> jax.Array:
  scores = _product(q_BGHTK, k_BGSK, 3)
  if cap:
    scores = cap * jnp.tanh(scores / cap)
  # Adding is faster than selecting on CPUs; no score comes near this number.
  scores = scores + jnp.where(sees, 0.0, -1e30)
  # A constant of a row cancels, so its derivative is not needed.
  largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.exp(scores - largest)
  y = _product(weights.astype(v_BGSK.dtype), v_BGSK, 2)
  return (y / weights.sum(axis=-1, keepdims=True)).astype(q_BGHTK.dtype)


def _product(x_BGHTX: jax.Array, y_BGXX: jax.Array, axis: int) -> jax.Array:
  """Contracts the last axis of `x` with `axis` of `y`, head by head, in float32.

  Same as `jnp.einsum`, which adds an entry to one of JAX's caches with each call.
  """
  dimensions = ((4,), (axis,)), ((0, 1), (0, 1))
  return jax.lax.dot_general(x_BGHTX, y_BGXX, dimensions, preferred_element_type=jnp.float32)

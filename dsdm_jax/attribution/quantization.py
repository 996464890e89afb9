"""Quantization of stored features: bfloat16, float32, or int8 with a scale for each row and layer."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

Blocks = tuple[tuple[int, int], ...]  # columns [start, stop) of each block, in order; together all columns 0…J


def column_blocks(described: Mapping[str, Any], dimension: int) -> Blocks:
  """Columns of each layer, with one block for each layer of a scanned stack; one block of all if not two-sided.

  Args:
    described: what `describe` of the features says, or the manifest of a features stage.
    dimension: J.
  """
  if described['projection'] != 'two_sided':
    return ((0, dimension),)
  sizes = [layer['a'] * layer['b'] for layer in described['layers'] for _ in range(math.prod(layer['stack']))]
  stops = np.cumsum(sizes).tolist()
  return tuple(zip([0, *stops[:-1]], stops, strict=True))


class Encoded(NamedTuple):
  """Rows as a store holds them, on a device or on the host.

  Attributes:
    codes_BJ: in the dtype of the store.
    scale_BK: for int8 the float32 scale of each row and block; otherwise None.
    bad_B: int32, the first column that was not finite, or −1.
  """

  codes_BJ: Any
  scale_BK: Any
  bad_B: Any


@dataclasses.dataclass(frozen=True)
class Quantizer:
  """Attributes: dtype, 'float32', 'bfloat16' or 'int8'; blocks of columns that share a scale in int8, symmetric."""

  dtype: str
  blocks: Blocks

  @property
  def scaled(self) -> bool:
    return self.dtype == 'int8'

  def encode(self, phi_BJ: jax.Array | np.ndarray) -> Encoded:
    """Codes of float32 rows, on the device; a scale is the largest magnitude of its block over 127."""
    return _encode(phi_BJ, self.dtype, self.blocks)

  def decode(self, encoded: Encoded) -> np.ndarray:
    """[B, J] on the host: float32 for int8, otherwise the codes."""
    codes_BJ = np.asarray(encoded.codes_BJ)
    if encoded.scale_BK is None:
      return codes_BJ
    width_K = [j - i for i, j in self.blocks]
    return codes_BJ.astype(np.float32) * np.repeat(np.asarray(encoded.scale_BK), width_K, axis=1)

  def round_trip(self, phi_BJ: jax.Array | np.ndarray) -> np.ndarray:
    """What a store returns for these features."""
    return self.decode(self.encode(phi_BJ))

  def value(self, encoded: Encoded, row: int) -> float:
    """The entry of a row that is not finite, or its magnitude."""
    column = int(encoded.bad_B[row])
    if encoded.scale_BK is None:
      return float(encoded.codes_BJ[row, column])
    block = next(number for number, (_, stop) in enumerate(self.blocks) if column < stop)
    return float(encoded.scale_BK[row, block])

  def fidelity(self, phi_BJ: jax.Array | np.ndarray, top: int = 10) -> dict[str, float]:
    """Effect of quantization on the inner products of all pairs of rows, computed on the device in float32.

    Returns:
      'inner_product_error': ‖K̂ − K‖/‖K‖ off the diagonal; 'top_overlap': share of each row's `top` nearest neighbours
      (largest inner products with others) that stay among them; 'bytes_per_row' as stored.
    """
    rows, columns = phi_BJ.shape
    error, overlap = _fidelity(phi_BJ, self.dtype, self.blocks, min(top, rows - 1))
    stored = columns * np.dtype(self.dtype).itemsize + 4 * len(self.blocks) * self.scaled
    return {'inner_product_error': float(error), 'top_overlap': float(overlap), 'bytes_per_row': float(stored)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode(phi_BJ: jax.Array, dtype: str, blocks: Blocks) -> Encoded:
  phi_BJ = phi_BJ.astype(jnp.float32)
  wrong_BJ = ~jnp.isfinite(phi_BJ)
  bad_B = jnp.where(wrong_BJ.any(axis=1), jnp.argmax(wrong_BJ, axis=1), -1).astype(jnp.int32)
  if dtype != 'int8':
    return Encoded(phi_BJ.astype(dtype), None, bad_B)
  scale_BK = jnp.stack([jnp.abs(phi_BJ[:, i:j]).max(axis=1) for i, j in blocks], axis=1) / 127
  divisor_BJ = _spread(jnp.where(scale_BK > 0, scale_BK, 1), blocks)
  return Encoded(jnp.clip(jnp.rint(phi_BJ / divisor_BJ), -127, 127).astype(jnp.int8), scale_BK, bad_B)


def _spread(scale_BK: jax.Array, blocks: Blocks) -> jax.Array:
  widths = np.array([j - i for i, j in blocks])
  return jnp.repeat(scale_BK, widths, axis=1, total_repeat_length=int(widths.sum()))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fidelity(phi_BJ: jax.Array, dtype: str, blocks: Blocks, top: int) -> tuple[jax.Array, jax.Array]:
  # No product may overflow; a power of two leaves the rounding as it is.
  phi_BJ = jnp.ldexp(phi_BJ, -jnp.frexp(jnp.abs(phi_BJ).max())[1][None, None])
  codes_BJ, scale_BK, _ = _encode(phi_BJ, dtype, blocks)
  stored_BJ = codes_BJ.astype(jnp.float32)
  if scale_BK is not None:
    stored_BJ = stored_BJ * _spread(scale_BK, blocks)
  own = jnp.eye(len(phi_BJ), dtype=bool)
  dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

  def products(x_BJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inner products, and their order in each row, in which what all rows have in common would cost digits."""
    mean_J = x_BJ.mean(axis=0)
    apart_BJ = x_BJ - mean_J[None]
    order_BB = dot(apart_BJ, apart_BJ.T) + dot(apart_BJ, mean_J)[None]
    return jnp.where(own, 0, dot(x_BJ, x_BJ.T)), jnp.where(own, -jnp.inf, order_BB)  # a row is not its own neighbour

  (exact, order), (stored, stored_order) = products(phi_BJ), products(stored_BJ)
  norm = jnp.linalg.norm(exact)
  error = jnp.where(norm > 0, jnp.linalg.norm(stored - exact) / jnp.where(norm > 0, norm, 1), 0)
  if not top:
    return error, jnp.float32(1)
  a_Bt, b_Bt = (jax.lax.top_k(x_BB, top)[1] for x_BB in (order, stored_order))
  return error, (a_Bt[:, :, None] == b_Bt[:, None, :]).any(axis=2).mean()

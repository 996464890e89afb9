"""Quantization of stored features: bfloat16, float32, or int8 with a scale for each row and layer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Quantizer:
  """Attributes: dtype, 'float32', 'bfloat16' or 'int8'; blocks of columns that share a scale in int8, symmetric."""

  dtype: str
  blocks: Blocks

  @property
  def scaled(self) -> bool:
    return self.dtype == 'int8'

  def encode(self, phi_BJ: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes [B, J], and for int8 the float32 scale of each row and block: its largest magnitude over 127."""
    if not self.scaled:
      return phi_BJ.astype(self.dtype), None
    scale_BK = np.stack([np.abs(phi_BJ[:, i:j]).max(axis=1) for i, j in self.blocks], axis=1).astype(np.float32) / 127
    divisor_BJ = self._spread(np.where(scale_BK > 0, scale_BK, np.float32(1)))
    return np.clip(np.rint(phi_BJ / divisor_BJ), -127, 127).astype(np.int8), scale_BK

  def decode(self, codes_BJ: np.ndarray, scale_BK: np.ndarray | None) -> np.ndarray:
    """float32 for int8, otherwise the codes."""
    return codes_BJ if scale_BK is None else codes_BJ.astype(np.float32) * self._spread(scale_BK)

  def round_trip(self, phi_BJ: np.ndarray) -> np.ndarray:
    """What a store returns for these features."""
    return self.decode(*self.encode(phi_BJ))

  def fidelity(self, phi_BJ: np.ndarray, top: int = 10) -> dict[str, float]:
    """Effect of quantization on the inner products of all pairs of rows.

    Returns:
      'inner_product_error': ‖K̂ − K‖/‖K‖ off the diagonal; 'top_overlap': share of each row's `top` nearest neighbours
      (largest inner products with others) that stay among them; 'bytes_per_row' as stored.
    """
    codes_BJ, scale_BK = self.encode(phi_BJ)
    exact, quantized = (self._products(x) for x in (phi_BJ, self.decode(codes_BJ, scale_BK)))
    off = ~np.eye(len(exact), dtype=bool)
    norm, difference = np.linalg.norm(exact[off]), np.linalg.norm((quantized - exact)[off])
    top = min(top, len(exact) - 1)
    for products in (exact, quantized):
      np.fill_diagonal(products, -np.inf)  # a row is not its own neighbour
    nearest = (np.argsort(products, axis=1)[:, -top:] for products in (exact, quantized))
    overlap = [len(np.intersect1d(a, b)) / top for a, b in zip(*nearest, strict=True)] if top else [1.0]
    stored = codes_BJ.nbytes + (0 if scale_BK is None else scale_BK.nbytes)
    return {
      'inner_product_error': float(difference / norm) if norm else 0.0,
      'top_overlap': float(np.mean(overlap)),
      'bytes_per_row': stored / len(codes_BJ),
    }

  def _products(self, phi_BJ: np.ndarray) -> np.ndarray:
    phi_BJ = phi_BJ.astype(np.float64)
    return phi_BJ @ phi_BJ.T

  def _spread(self, scale_BK: np.ndarray) -> np.ndarray:
    return np.repeat(scale_BK, [j - i for i, j in self.blocks], axis=1)

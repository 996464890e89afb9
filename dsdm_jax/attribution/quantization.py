"""How features are kept: as bfloat16 or float32, or as int8 with a scale for each row and layer."""

import dataclasses

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

Blocks = tuple[tuple[int, int], ...]  # first column and the column after the last, side by side from 0 to J


@dataclasses.dataclass(frozen=True)
class Rounding:
  """Attributes: dtype, 'float32', 'bfloat16' or 'int8'; blocks of columns that share a scale in int8."""

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
    """What the codes stand for: float32 for int8, otherwise the codes."""
    return codes_BJ if scale_BK is None else codes_BJ.astype(np.float32) * self._spread(scale_BK)

  def rounded(self, phi_BJ: np.ndarray) -> np.ndarray:
    """What a store would give back."""
    return self.decode(*self.encode(phi_BJ))

  def fidelity(self, phi_BJ: np.ndarray, top: int = 10) -> dict[str, float]:
    """What rounding does to inner products of rows, all pairs of `phi_BJ`.

    Returns:
      'inner_product_error': ‖K̂ − K‖/‖K‖ off the diagonal; 'top_overlap': share of each row's `top` largest inner
      products with others that stay among them; 'bytes_per_row' as stored.
    """
    codes_BJ, scale_BK = self.encode(phi_BJ)
    exact, kept = (self._products(x) for x in (phi_BJ, self.decode(codes_BJ, scale_BK)))
    off = ~np.eye(len(exact), dtype=bool)
    norm = np.linalg.norm(exact[off])
    top = min(top, len(exact) - 1)
    best, best_kept = (np.argsort(k, axis=1)[:, -top:] if top else k[:, :0] for k in map(_without_self, (exact, kept)))
    overlap = [len(np.intersect1d(a, b)) / top for a, b in zip(best, best_kept, strict=True)] if top else [1.0]
    stored = codes_BJ.nbytes + (0 if scale_BK is None else scale_BK.nbytes)
    return {
      'inner_product_error': float(np.linalg.norm((kept - exact)[off]) / norm) if norm else 0.0,
      'top_overlap': float(np.mean(overlap)),
      'bytes_per_row': stored / len(codes_BJ),
    }

  def _products(self, phi_BJ: np.ndarray) -> np.ndarray:
    phi_BJ = phi_BJ.astype(np.float64)
    return phi_BJ @ phi_BJ.T

  def _spread(self, scale_BK: np.ndarray) -> np.ndarray:
    return np.repeat(scale_BK, [j - i for i, j in self.blocks], axis=1)


def _without_self(products: np.ndarray) -> np.ndarray:
  out = products.copy()
  np.fill_diagonal(out, -np.inf)
  return out

"""The linear datamodel in closed form, and its scores.

Per checkpoint c, with features Φ [N, J] of the pool and φ̄ the mean feature of a target's examples,

    s_c(n) = φ_c(n) · (ΦᵀΦ/N + λI)⁻¹ φ̄_c,      λ = damping · tr(ΦᵀΦ/N)/J,

and the score is the mean of s_c(n) over checkpoints (TRAK, arXiv 2303.14186, eq. 13 without its Q; DsDm, section 3).
Higher is better: training on n raises the target's output function. s_c does not change when φ is scaled, so
checkpoints enter with equal weight as they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core.errors import UserError

Progress = Callable[[int], object]


def _silent(rows: int) -> None:
  del rows


@jax.jit
def _partial_gram(phi_BJ: jax.Array) -> jax.Array:
  phi_BJ = phi_BJ.astype(jnp.float32)
  return jnp.matmul(phi_BJ.T, phi_BJ, precision=jax.lax.Precision.HIGHEST)


def gram(store: FeatureStore, progress: Progress = _silent) -> np.ndarray:
  """ΦᵀΦ/N, float64 [J, J]: each shard in float32, the sum over shards in float64 and in their order."""
  total_JJ = np.zeros((store.dimension, store.dimension), np.float64)
  for start, stop, phi_BJ in store:
    total_JJ += np.asarray(_partial_gram(phi_BJ), np.float64)
    progress(stop - start)
  return total_JJ / store.rows


def solve(gram_JJ: np.ndarray, targets_TJ: np.ndarray, damping: float) -> np.ndarray:
  """(gram + λI)⁻¹ targetsᵀ, float64 [J, T], λ = damping · tr(gram)/J, by Cholesky.

  Raises:
    UserError: the damped matrix is not positive definite, or all features are zero.
  """
  dimension = len(gram_JJ)
  scale = np.trace(gram_JJ) / dimension
  if not scale > 0:
    raise UserError(
      'the features of the whole pool are zero (or not finite), so no datamodel exists; '
      'check features.output_fn and features.layers'
    )
  damped_JJ = gram_JJ + damping * scale * np.eye(dimension)
  try:
    factor = scipy.linalg.cho_factor(damped_JJ, lower=True, overwrite_a=True)
  except scipy.linalg.LinAlgError as error:
    raise UserError(
      f'the Gram matrix of {dimension} features is singular at datamodel.damping={damping}; raise datamodel.damping'
    ) from error
  return scipy.linalg.cho_solve(factor, targets_TJ.T.astype(np.float64))


@jax.jit
def _dot(phi_BJ: jax.Array, u_JT: jax.Array) -> jax.Array:
  return jnp.matmul(phi_BJ.astype(jnp.float32), u_JT, precision=jax.lax.Precision.HIGHEST)


def scores(store: FeatureStore, u_JT: np.ndarray, progress: Progress = _silent) -> np.ndarray:
  """score_NT = Φ u, float32."""
  score_NT = np.empty((store.rows, u_JT.shape[1]), np.float32)
  # A common scale per target keeps float32 far from its limits; it comes back afterwards.
  scale_T = np.maximum(np.abs(u_JT).max(axis=0), np.finfo(np.float64).tiny)
  unit_JT = (u_JT / scale_T).astype(np.float32)
  for start, stop, phi_BJ in store:
    score_NT[start:stop] = np.asarray(_dot(phi_BJ, unit_JT)) * scale_T
    progress(stop - start)
  return score_NT


def spectrum(gram_JJ: np.ndarray) -> dict[str, float]:
  """What the Gram matrix looks like: extreme eigenvalues relative to their mean, effective rank (tr)²/‖·‖²_F."""
  eigenvalues = scipy.linalg.eigvalsh(gram_JJ)
  mean = eigenvalues.mean()
  return {
    'largest_over_mean': float(eigenvalues[-1] / mean),
    'smallest_over_mean': float(eigenvalues[0] / mean),
    'effective_rank': float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()),
  }

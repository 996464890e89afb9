"""The linear datamodel in closed form, and its scores.

With features Φ [N, J] of the pool and φ̄ the mean feature of a target's examples,

    s(n) = φ(n) · (G + λI)⁻¹ φ̄,      G = ΦᵀΦ/N,      λ = damping · tr(G)/J

(TRAK, arXiv 2303.14186, eq. 13; DsDm, section 3). Higher is better: training on n raises the target's output function.
s does not change when φ is scaled. G is the full matrix, its diagonal blocks alone (one per layer), or one matrix over
the columns of all checkpoints; it may be blended with the second moment of the targets. `docs/datamodel.md` describes
what each does to the scores.

Nothing here holds more than one shard of rows: rows come from a `RowSource`, such as a `FeatureStore`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsdm_jax.attribution.accumulators import Accumulator, Progress, silent
from dsdm_jax.attribution.quantization import Blocks
from dsdm_jax.attribution.sources import RowSource, Shard, column_groups, dot
from dsdm_jax.core.mesh import MODEL, assemble, batch_sharding, batch_shards, replicated, team, total
from dsdm_jax.errors import UserError

_STRIPE = 1_024  # rows of a matrix that a temporary copy may hold


def whole(dimension: int) -> Blocks:
  """One block: the full Gram matrix."""
  return ((0, dimension),)


def _partial_gram(blocks: Blocks, mesh: Mesh | None, rows: int = 0) -> Callable[[np.ndarray], list[jax.Array]]:
  """phi_BJ → φᵀφ of each block in float32; rows sharded over `data`, rows of the result over `model`.

  Several processes pass the rows of their own shards, and the devices add up their products.

  Args:
    rows: of a shard; needed with several processes, whose arrays have one shape.
  """

  def apply(phi_BJ: jax.Array) -> list[jax.Array]:
    phi_BJ = phi_BJ.astype(jnp.float32)
    parts = [phi_BJ[:, start:stop] for start, stop in blocks]
    return [jnp.matmul(phi.T, phi, precision=jax.lax.Precision.HIGHEST) for phi in parts]

  if mesh is None:
    step = jax.jit(apply)
    return lambda phi_BJ: step(phi_BJ)
  out = [
    NamedSharding(mesh, PartitionSpec(MODEL)) if (stop - start) % mesh.shape[MODEL] == 0 else replicated(mesh)
    for start, stop in blocks
  ]
  sharding, teams = batch_sharding(mesh), team(mesh).count
  step = jax.jit(apply, in_shardings=sharding, out_shardings=out)

  def sharded(phi_BJ: np.ndarray) -> list[jax.Array]:
    wanted = rows if teams > 1 else len(phi_BJ)
    missing = wanted - len(phi_BJ) + -wanted % (batch_shards(mesh) // teams)  # rows of zeros add nothing
    phi_BJ = np.pad(phi_BJ, ((0, missing), (0, 0))) if missing else phi_BJ
    return step(assemble(phi_BJ, sharding, teams * len(phi_BJ)))

  return sharded


def gram(
  source: RowSource,
  blocks: Blocks | None = None,
  mesh: Mesh | None = None,
  progress: Progress = silent,
  accumulator: Accumulator | None = None,
  name: str = 'gram',
) -> list[np.ndarray]:
  """ΦᵀΦ/N, one float64 matrix for each block: each shard in float32, the sum over shards in float64 in their order.

  Of several processes each reads its own shards; the products of a round are added in float32 on the devices.

  Args:
    source: of the pool's rows.
    blocks: columns of each diagonal block, in order; together they are all columns. None is one block of all columns.
    mesh: rows of a shard are sharded over `data`, rows of the matrix over `model`; None takes one device.
    progress: called with the rows of each round.
    accumulator: saves the sums under `name`, so that a killed pass resumes and gives the same bits; None saves nothing.
  """
  source = source.gram_rows()
  blocks = whole(source.dimension) if blocks is None else blocks
  step = _partial_gram(blocks, mesh, source.shard_rows)

  def parts(row: int) -> Iterator[tuple[int, int, list[jax.Array]]]:
    for (first, end), (_, _, phi_BJ) in source.rounds(row):
      yield first, end, step(phi_BJ)  # returns at once: the device computes while the last shard is added

  shapes = [(stop - start, stop - start) for start, stop in blocks]
  totals = (accumulator or Accumulator()).sum(name, shapes, parts, progress)
  for matrix in totals:
    matrix /= source.rows
  return totals


def sums(
  source: RowSource, weight_CN: np.ndarray, accumulator: Accumulator | None = None, name: str = 'sums'
) -> np.ndarray:
  """Σ_n weight(n) φ(n) for several weightings of the rows, float64 [C, J]; `accumulator` and `name` as for `gram`."""

  def parts(row: int) -> Iterator[tuple[int, int, list[np.ndarray]]]:
    for (first, end), (start, stop, phi_BJ) in source.rounds(row):
      sum_CJ = dot(np.asarray(weight_CN[:, start:stop], np.float32), phi_BJ)
      yield first, end, [total(np.asarray(sum_CJ) * source.team.leads) if source.team.count > 1 else sum_CJ]

  return (accumulator or Accumulator()).sum(name, [(len(weight_CN), source.dimension)], parts)[0]


def blend(parts: list[np.ndarray], blocks: Blocks, targets: Sequence[np.ndarray], share: float) -> None:
  """Blends, in place, the pool's Gram with the targets' second moment; the traces stay as they are, block by block.

  G ← (1 − share) G + share · M · tr(G)/tr(M), where M is the mean over tasks of the second moment of their examples.
  Directions that the targets' own examples have in common then count for less, as those of the pool do.

  Args:
    parts: blocks of the Gram matrix.
    blocks: their columns.
    targets: phi_TJ of each task.
    share: of the trace, at least 0 and below 1.
  """
  if not share:
    return
  for part, (start, stop) in zip(parts, blocks, strict=True):
    moment = np.zeros_like(part)
    for phi_TJ in targets:
      phi = np.asarray(phi_TJ[:, start:stop], np.float64)
      moment += phi.T @ phi / (len(phi) * len(targets))
    trace = np.trace(moment)
    if trace > 0:
      part *= 1 - share
      moment *= share / (1 - share) * np.trace(part) / trace
      part += moment


def equalise(gram_JJ: np.ndarray, blocks: Blocks) -> np.ndarray:
  """Scales, in place, each block's columns to the same mean square, and returns the factor of each column, [J].

  For a joint Gram over checkpoints: λ then acts on each equally, whatever the size of its gradients.
  """
  scale_J = np.ones(len(gram_JJ))
  for start, stop in blocks:
    mean = np.trace(gram_JJ[start:stop, start:stop]) / (stop - start)
    scale_J[start:stop] = 1 / np.sqrt(mean) if mean > 0 else 1
  gram_JJ *= scale_J[:, None]
  gram_JJ *= scale_J[None, :]
  return scale_J


@dataclasses.dataclass(frozen=True)
class Directions:
  """Solved directions in parameter space, on the devices: no process holds them whole.

  Attributes:
    by_path: path of a parameter → float32 [K, *parameter shape], laid out like it.
    scale_K: float64, by which they are multiplied.
    columns: number of a scored column → float64 [J]; of those that are saved, on process 0 alone.
  """

  by_path: Mapping[str, jax.Array]
  scale_K: np.ndarray
  columns: Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Solution:
  """The solution of one datamodel.

  Attributes:
    u_JK: (G + λI)⁻¹ columnsᵀ, a float64 array; `Directions` by EK-FAC.
    damping: λ of each block, absolute.
    condition: condition number of each damped block, estimated in the 1-norm.
    combination_KX: weight of each of these columns in those that are scored; None takes them as they are.
  """

  u_JK: Any
  damping: tuple[float, ...]
  condition: tuple[float, ...]
  combination_KX: np.ndarray | None = None

  def column(self, at: int) -> np.ndarray:
    """A column of u that is scored, [J]."""
    return self.u_JK.columns[at] if isinstance(self.u_JK, Directions) else self.u_JK[:, at]


def solve(
  parts: Sequence[np.ndarray],
  blocks: Blocks,
  columns_KJ: np.ndarray,
  damping: float,
  *,
  recentre: bool = False,
  overwrite: bool = False,
  groups: Sequence[int] = (),
) -> Solution:
  """(G + λI)⁻¹ columnsᵀ by Cholesky in float64, block by block, with λ = damping · tr(block)/J of the block.

  Args:
    parts: blocks of G, as `gram` gives them.
    blocks: their columns.
    columns_KJ: right-hand sides, such as the mean feature of each target.
    damping: relative to the mean of the block's diagonal, above 0.
    recentre: divide the inverse by the mean absolute value of its J² entries, as the reference does. Scores then scale
      with the square of the features.
    overwrite: factor in place: no second matrix is allocated, and `parts` are destroyed.
    groups: numbers of right-hand sides that are solved together; none solves all together. Rounding depends on it, so
      the columns of a target are a group: they do not depend on other targets.

  Raises:
    UserError: all features are zero, some are not finite, or the damped matrix is singular to working precision.
  """
  u_JK = np.empty((columns_KJ.shape[1], len(columns_KJ)), np.float64)
  lambdas, conditions, entries = [], [], 0.0
  for part, (start, stop) in zip(parts, blocks, strict=True):
    scale = _scale(part, start, stop)
    factor = part if overwrite else part.copy()
    factor.flat[:: len(factor) + 1] += damping * scale
    norm = _one_norm(factor)
    try:
      cholesky(factor)
    except scipy.linalg.LinAlgError as error:
      raise _singular(start, stop, damping) from error
    upper = factor.T  # in LAPACK's order, nothing is copied
    inverse_condition, _ = scipy.linalg.lapack.dpocon(upper, norm, uplo='U')
    if not inverse_condition > np.finfo(np.float64).eps * len(factor) ** 0.5:
      raise _singular(start, stop, damping)
    right_JK = np.asarray(columns_KJ[:, start:stop].T, np.float64)
    for k in column_groups(groups, len(columns_KJ)):
      u_JK[start:stop, k] = scipy.linalg.cho_solve((upper, False), right_JK[:, k], check_finite=False)
    lambdas.append(damping * scale)
    conditions.append(1 / float(inverse_condition))
    if recentre:
      entries += _inverse_entries(upper)
  if recentre:
    u_JK /= entries / columns_KJ.shape[1] ** 2
  return Solution(u_JK, tuple(lambdas), tuple(conditions))


def _scale(part: np.ndarray, start: int, stop: int) -> float:
  if not np.isfinite(np.diagonal(part)).all():  # a feature that is not finite makes its column's square not finite
    raise UserError(
      f'the Gram matrix of columns {start} to {stop - 1} is not finite, so a feature is not; '
      'delete the features folder and run again, with a lower proxies.train.learning_rate if this returns'
    )
  scale = float(np.trace(part)) / len(part)
  if not scale > 0:
    raise UserError(
      f'the features of the whole pool are zero in columns {start} to {stop - 1}, so no datamodel exists; '
      'check features.output_fn and features.layers'
    )
  return scale


def _singular(start: int, stop: int, damping: float) -> UserError:
  return UserError(
    f'the Gram matrix of columns {start} to {stop - 1} is singular at datamodel.damping={damping}; raise '
    'datamodel.damping (default: 0.1) or lower features.dimension'
  )


def _one_norm(matrix: np.ndarray) -> float:
  return max(float(np.abs(matrix[i : i + _STRIPE]).sum(axis=1).max()) for i in range(0, len(matrix), _STRIPE))


def _inverse_entries(upper: np.ndarray) -> float:
  """Σ|x| over the inverse of the matrix with this factor, some columns at a time."""
  total = 0.0
  for start in range(0, len(upper), _STRIPE):
    unit = np.eye(len(upper), min(_STRIPE, len(upper) - start), -start)
    total += float(np.abs(scipy.linalg.cho_solve((upper, False), unit, overwrite_b=True, check_finite=False)).sum())
  return total


def cholesky(matrix_JJ: np.ndarray) -> None:
  """Puts the lower Cholesky factor into the lower triangle of a float64 matrix, in place, panel by panel.

  Entries above the diagonal do not change. SciPy's LAPACK routine (OpenBLAS) crashes with a segmentation fault at
  J = 16,384 with several threads; panels of a thousand columns are far below that.

  Raises:
    scipy.linalg.LinAlgError: the matrix is not positive definite.
  """
  size = len(matrix_JJ)
  for start in range(0, size, _STRIPE):
    stop = min(start + _STRIPE, size)
    corner = scipy.linalg.cholesky(matrix_JJ[start:stop, start:stop], lower=True, check_finite=False)
    below = np.tril_indices(stop - start)
    matrix_JJ[start:stop, start:stop][below] = corner[below]
    panel = matrix_JJ[stop:, start:stop]
    for i in range(0, len(panel), _STRIPE):
      rows = panel[i : i + _STRIPE]
      rows[:] = scipy.linalg.solve_triangular(corner, rows.T, lower=True, check_finite=False).T
    for i in range(0, len(panel), _STRIPE):
      end = min(i + _STRIPE, len(panel))
      matrix_JJ[stop + i : stop + end, stop : stop + end] -= panel[i:end] @ panel[:end].T


def score_shards(
  source: RowSource,
  u_JK: np.ndarray | Directions,
  row: int = 0,
  groups: Sequence[int] = (),
  combination_KX: np.ndarray | None = None,
) -> Iterator[Shard]:
  """(start, stop, φ u in float32 [B, K]) of this process's shards from `row` on, where a shard starts, in order.

  Args:
    groups: numbers of columns that are multiplied together, as for `solve`; passes without features ignore it.
    combination_KX: the columns are multiplied by it; None leaves them.
  """
  # A common scale per column keeps float32 far from its limits; it is restored afterwards.
  if isinstance(u_JK, Directions):
    scale_K, passes = u_JK.scale_K, source.scores(u_JK.by_path, row, groups)
  else:
    scale_K = np.maximum(np.abs(u_JK).max(axis=0), np.finfo(np.float64).tiny)
    passes = source.scores((u_JK / scale_K).astype(np.float32), row, groups)
  for start, stop, score_BK in passes:
    scaled_BK = score_BK * scale_K
    yield start, stop, (scaled_BK if combination_KX is None else scaled_BK @ combination_KX).astype(np.float32)


def scores(source: RowSource, u_JK: np.ndarray, progress: Progress = silent) -> np.ndarray:
  """score_NK = Φ u, float32, of all rows on each process."""
  score_NK = np.zeros((source.rows, u_JK.shape[1]), np.float32)
  for start, stop, score_BK in score_shards(source, u_JK):
    score_NK[start:stop] = score_BK
    progress(stop - start)
  return total(score_NK * source.team.leads) if source.team.count > 1 else score_NK


def spectrum(gram_JJ: np.ndarray, exact: int = 2_048) -> dict[str, float | None]:
  """Extreme eigenvalues of a Gram matrix, relative to their mean, and its effective rank.

  Args:
    gram_JJ: without damping; not changed.
    exact: largest number of columns for which all eigenvalues are computed. Above it the largest comes from Lanczos'
      method and the smallest is None; neither needs a second matrix.

  Returns:
    `largest_over_mean`, `smallest_over_mean` and `effective_rank`, (tr)²/‖·‖²_F.
  """
  mean = float(np.trace(gram_JJ)) / len(gram_JJ)
  squares = sum(float(np.square(gram_JJ[i : i + _STRIPE]).sum()) for i in range(0, len(gram_JJ), _STRIPE))
  smallest: float | None = None
  if len(gram_JJ) <= exact:
    eigenvalues = scipy.linalg.eigvalsh(gram_JJ)
    largest, smallest = float(eigenvalues[-1]), float(eigenvalues[0]) / mean
  else:
    start = np.ones(len(gram_JJ))  # fixed, so that the report is the same each time
    largest = float(scipy.sparse.linalg.eigsh(gram_JJ, k=1, v0=start, tol=1e-4, return_eigenvectors=False)[0])
  return {
    'largest_over_mean': largest / mean,
    'smallest_over_mean': smallest,
    'effective_rank': (mean * len(gram_JJ)) ** 2 / squares,
  }

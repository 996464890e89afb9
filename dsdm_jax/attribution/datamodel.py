"""The linear datamodel in closed form, and its scores.

With features Φ [N, J] of the pool and φ̄ the mean feature of a target's examples,

    s(n) = φ(n) · (G + λI)⁻¹ φ̄,      G = ΦᵀΦ/N,      λ = damping · tr(G)/J

(TRAK, arXiv 2303.14186, eq. 13; DsDm, section 3). Higher is better: training on n raises the target's output function.
s does not change when φ is scaled. What may vary is G: all of it, its diagonal blocks alone (one per layer), or one
over the columns of all checkpoints together; pure, or blended with the second moment of the targets.
`docs/datamodel.md` says what each does to the scores.

Nothing here holds more than one shard of rows: rows come from a `RowSource`, such as a feature store.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsdm_jax.attribution.accumulators import Partials
from dsdm_jax.attribution.sources import DirectionalSource
from dsdm_jax.core import processes
from dsdm_jax.core.mesh import DATA, MODEL, batch_sharding, fetch, place, replicated
from dsdm_jax.errors import UserError

Progress = Callable[[int], object]
Shard = tuple[int, int, np.ndarray]
# Columns [start, stop) of the diagonal blocks of a Gram matrix, in order; together they are all columns.
Blocks = tuple[tuple[int, int], ...]

_STRIPE = 1_024  # rows of a matrix that a temporary copy may hold


class RowSource(Protocol):
  """Features by shards of rows in order; may be gone through again and gives the same each time."""

  @property
  def rows(self) -> int: ...

  @property
  def dimension(self) -> int: ...

  def __iter__(self) -> Iterator[Shard]: ...


@runtime_checkable
class Startable(Protocol):
  """A source that can begin at any shard, at no cost for those before it."""

  def starting(self, row: int) -> Iterator[Shard]: ...


def unit_rows(phi_BJ: np.ndarray) -> np.ndarray:
  """Each row divided by its norm, float32; a row of zeros stays one."""
  phi_BJ = np.asarray(phi_BJ, np.float32)
  largest_B = np.abs(phi_BJ).max(axis=1, keepdims=True)  # first, so that no square leaves float32
  phi_BJ = phi_BJ / np.where(largest_B > 0, largest_B, 1)
  norm_B = np.linalg.norm(phi_BJ, axis=1, keepdims=True)
  return phi_BJ / np.where(norm_B > 0, norm_B, 1)


class UnitNorm:
  """A source whose rows are brought to norm one."""

  def __init__(self, source: RowSource):
    self._source = source
    self.rows, self.dimension = source.rows, source.dimension

  def __iter__(self) -> Iterator[Shard]:
    return self.starting(0)

  def starting(self, row: int) -> Iterator[Shard]:
    for start, stop, phi_BJ in _starting(self._source, row):
      yield start, stop, unit_rows(phi_BJ)


class Concatenated:
  """Columns of several sources of the same rows and shards side by side."""

  def __init__(self, sources: Sequence[RowSource]):
    self._sources = sources
    self.rows, self.dimension = sources[0].rows, sum(source.dimension for source in sources)

  def __iter__(self) -> Iterator[Shard]:
    return self.starting(0)

  def starting(self, row: int) -> Iterator[Shard]:
    for shards in zip(*(_starting(source, row) for source in self._sources), strict=True):
      start, stop, _ = shards[0]
      if any(shard[:2] != (start, stop) for shard in shards):
        raise ValueError(f'sources have other shards than the first, which has rows {start} to {stop - 1}')
      yield start, stop, np.concatenate([phi_BJ for _, _, phi_BJ in shards], axis=1)


def _silent(rows: int) -> None:
  del rows


def _starting(source: RowSource, row: int) -> Iterator[Shard]:
  """The shards from `row` on, which begins one; a source that cannot begin there is read from its first."""
  if isinstance(source, Startable):
    return source.starting(row)
  return (shard for shard in source if shard[0] >= row)


def _ahead(source: RowSource, row: int = 0) -> Iterator[Shard]:
  """The shards of `source` from `row` on, the next one read while the caller works on this one."""
  shards = _starting(source, row)
  if processes.count() > 1:  # steps that processes take together must come in one order on all, so in one thread
    yield from shards
    return
  with ThreadPoolExecutor(1) as reader:
    coming = reader.submit(next, shards, None)
    while (shard := coming.result()) is not None:
      coming = reader.submit(next, shards, None)
      yield shard


def whole(dimension: int) -> Blocks:
  """One block: the full Gram matrix."""
  return ((0, dimension),)


def _partial_gram(blocks: Blocks, mesh: Mesh | None) -> Callable[[np.ndarray], list[np.ndarray]]:
  """phi_BJ → φᵀφ of each block in float32; rows shared over `data`, rows of the result over `model`."""

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
  rows = batch_sharding(mesh)
  step = jax.jit(apply, in_shardings=rows, out_shardings=out)

  def sharded(phi_BJ: np.ndarray) -> list[np.ndarray]:
    missing = -len(phi_BJ) % mesh.shape[DATA]  # rows of zeros add nothing
    return step(place(np.pad(phi_BJ, ((0, missing), (0, 0))) if missing else phi_BJ, rows))

  return sharded


def gram(
  source: RowSource,
  blocks: Blocks | None = None,
  mesh: Mesh | None = None,
  progress: Progress = _silent,
  partials: Partials | None = None,
  name: str = 'gram',
) -> list[np.ndarray]:
  """ΦᵀΦ/N, one float64 matrix for each block: each shard in float32, the sum over shards in float64 in their order.

  Args:
    source: of the pool's rows.
    blocks: columns of each diagonal block; None is one block of all columns.
    mesh: rows of a shard are shared over `data`, rows of the matrix over `model`; None takes one device.
    progress: told the rows of each shard.
    partials: keep what is summed up under `name`; what an earlier attempt kept there is gone on from: the same bits.
  """
  partials = partials or Partials(None)
  if isinstance(source, DirectionalSource):
    source = source.sample
  blocks = whole(source.dimension) if blocks is None else blocks
  step = _partial_gram(blocks, mesh)
  totals = [np.zeros((stop - start, stop - start), np.float64) for start, stop in blocks]
  pending: list[np.ndarray] = []
  begin = partials.sums(name, totals)
  progress(begin)
  if begin < source.rows:
    for start, stop, phi_BJ in _ahead(source, begin):
      coming = step(phi_BJ)  # returns at once: the device works on while the last shard is added up here
      _add(totals, pending)
      if pending:
        partials.save_sums(name, totals, start)
      pending = coming
      progress(stop - start)
    _add(totals, pending)
    partials.save_sums(name, totals, source.rows, last=True)
  for total in totals:
    total /= source.rows
  return totals


def _add(totals: list[np.ndarray], parts: Sequence[np.ndarray]) -> None:
  for total, part in zip(totals, parts, strict=False):
    np.add(total, fetch(part), out=total)


def sums(source: RowSource, weight_CN: np.ndarray) -> np.ndarray:
  """Σ_n weight(n) φ(n) for several weightings of the rows, float64 [C, J]."""
  total_CJ = np.zeros((len(weight_CN), source.dimension), np.float64)
  for start, stop, phi_BJ in _ahead(source):
    total_CJ += np.asarray(_dot(np.asarray(weight_CN[:, start:stop], np.float32), phi_BJ), np.float64)
  return total_CJ


def blend(parts: list[np.ndarray], blocks: Blocks, targets: Sequence[np.ndarray], share: float) -> None:
  """Blends, in place, the pool's Gram with the targets' second moment; the traces stay as they are, block by block.

  G ← (1 − share) G + share · M · tr(G)/tr(M), where M is the mean over tasks of the second moment of their examples.
  Directions that the targets' own examples have in common then count for less, as those of the pool do.

  Args:
    parts: of the Gram matrix.
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
  """Scales, in place, each block's columns to the same mean square, and returns the factor of each column.

  For a joint Gram over checkpoints: λ then bears on each alike, however large the gradients of one are.
  """
  scale_J = np.ones(len(gram_JJ))
  for start, stop in blocks:
    mean = np.trace(gram_JJ[start:stop, start:stop]) / (stop - start)
    scale_J[start:stop] = 1 / np.sqrt(mean) if mean > 0 else 1
  gram_JJ *= scale_J[:, None]
  gram_JJ *= scale_J[None, :]
  return scale_J


@dataclasses.dataclass(frozen=True)
class Solution:
  """Attributes: u_JK, float64; damping λ of each block as it was added; condition number of each damped block."""

  u_JK: np.ndarray
  damping: tuple[float, ...]
  condition: tuple[float, ...]


def solve(
  parts: Sequence[np.ndarray],
  blocks: Blocks,
  columns_KJ: np.ndarray,
  damping: float,
  *,
  recentre: bool = False,
  overwrite: bool = False,
) -> Solution:
  """(G + λI)⁻¹ columnsᵀ by Cholesky in float64, block by block, with λ = damping · tr(block)/J of the block.

  Args:
    parts: blocks of G, as `gram` gives them.
    blocks: their columns.
    columns_KJ: right-hand sides.
    damping: relative, above 0.
    recentre: divide the inverse by the mean absolute value of its J² entries, as the reference does. Scores then scale
      with the square of the features.
    overwrite: factor in place: no second matrix is made, and `parts` are lost.

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
    u_JK[start:stop] = scipy.linalg.cho_solve((upper, False), right_JK, check_finite=False)
    lambdas.append(damping * scale)
    conditions.append(1 / float(inverse_condition))
    if recentre:
      entries += _inverse_entries(upper)
  if recentre:
    u_JK /= entries / columns_KJ.shape[1] ** 2
  return Solution(u_JK, tuple(lambdas), tuple(conditions))


def _scale(part: np.ndarray, start: int, stop: int) -> float:
  if not np.isfinite(np.diagonal(part)).all():  # where a feature is not, its column's square is not
    raise UserError(
      f'the Gram matrix of columns {start} to {stop - 1} is not finite, so a feature is not; '
      'delete the features folder and start again, with a lower proxies.train.learning_rate if it returns'
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
    'datamodel.damping (0.1 suits most), or lower features.dimension'
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

  Above the diagonal the matrix stays as it was. LAPACK's own routine, as SciPy brings it (OpenBLAS), dies of a
  segmentation fault at J = 16,384 with several threads; panels of a thousand columns are far from that.

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


@jax.jit
def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
  return jnp.matmul(left.astype(jnp.float32), right.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def score_shards(source: RowSource, u_JK: np.ndarray, row: int = 0) -> Iterator[Shard]:
  """(start, stop, φ u in float32 [B, K]) of each shard from `row` on, which begins one, in order."""
  # A common scale per column keeps float32 far from its limits; it comes back afterwards.
  scale_K = np.maximum(np.abs(u_JK).max(axis=0), np.finfo(np.float64).tiny)
  unit_JK = jnp.asarray((u_JK / scale_K).astype(np.float32))
  if isinstance(source, DirectionalSource):
    for start, stop, score_BK in source.score_shards(np.asarray(unit_JK), row):
      yield start, stop, (score_BK * scale_K).astype(np.float32)
    return
  for start, stop, phi_BJ in _ahead(source, row):
    yield start, stop, (np.asarray(_dot(phi_BJ, unit_JK)) * scale_K).astype(np.float32)


def scores(source: RowSource, u_JK: np.ndarray, progress: Progress = _silent) -> np.ndarray:
  """score_NK = Φ u, float32."""
  score_NK = np.empty((source.rows, u_JK.shape[1]), np.float32)
  for start, stop, score_BK in score_shards(source, u_JK):
    score_NK[start:stop] = score_BK
    progress(stop - start)
  return score_NK


def spectrum(gram_JJ: np.ndarray, exact: int = 2_048) -> dict[str, float | None]:
  """What a Gram matrix looks like, eigenvalues relative to their mean.

  Args:
    gram_JJ: not damped yet; not changed.
    exact: most columns for which all eigenvalues are found. Above that the largest comes from Lanczos' method and the
      smallest is None; neither needs a second matrix.

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

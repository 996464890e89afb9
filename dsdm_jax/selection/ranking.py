"""From scores to rows: exact top-k, caps, noise. Ties always go to the lower row."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection.candidates import Candidates

CHUNK = 1 << 22  # scores that are checked or drawn together


def top(score_N: np.ndarray, count: int) -> np.ndarray:
  """The `count` rows with the highest scores, best first; ties go to the lower row.

  Needs memory for one copy of the scores, and about 24 bytes per row of the result.

  Raises:
    UserError: `count` is larger than the number of rows, or a score is not a number.
  """
  if count > len(score_N):
    raise UserError(
      f'cannot select {count} rows, the pool has {len(score_N)}; lower selection.examples or raise pool.max_bytes'
    )
  check_finite(score_N)
  if count == len(score_N):
    rows = np.arange(count)
  else:
    # All rows above the k-th score, then the lowest rows that equal it.
    cut = np.partition(score_N, len(score_N) - count)[len(score_N) - count]
    better = np.flatnonzero(score_N > cut)
    tied = np.flatnonzero(score_N == cut)[: count - len(better)]
    rows = np.concatenate([better, tied])
    rows.sort()
  # Negation is exact, and a stable sort keeps the lower row first.
  return rows[np.argsort(-score_N[rows], kind='stable')]


def uncounted_last(score_N: np.ndarray, pool: Candidates) -> np.ndarray:
  """The scores, lowest where the loss counts no token of the row: such a row teaches nothing."""
  counted_N = pool.pool.counted_N
  return np.where(counted_N, score_N, score_N[counted_N].min() - 1)


def capped_order(score_N: np.ndarray, count: int, pool: Candidates, most: int | None = None) -> np.ndarray:
  """Unmasked rows, best first, that `document_cap` and `source_cap` allow in a selection of `count` rows.

  First each document keeps at most its cap of rows, the best ones. Then each source keeps at most its share of `count`,
  rounded down to whole rows.

  Args:
    score_N: higher is better.
    count: rows of the selection.
    pool: has the caps, and the document and source of each row.
    most: rows to return; None for `count`. The result can be shorter, but has at least `count` rows.

  Raises:
    UserError: a score is not a number, or the caps leave fewer than `count` rows.
  """
  documents, share = pool.options.document_cap, pool.options.source_cap
  most = most or count
  score_A, rows_of = _unmasked(score_N, pool)
  # Whether a row is allowed depends only on better rows, so start with the best rows, and add more if needed.
  examined = min(2 * most, len(score_A))
  while True:
    order = rows_of(top(score_A, examined))
    if documents:
      order = order[rank_in_group(pool.document_N[order]) < documents]
    if share < 1:
      order = order[rank_in_group(pool.source_N[order]) < rows_of_share(share, count)]
    if len(order) >= most or examined == len(score_A):
      break
    examined = min(4 * examined, len(score_A))
  if len(order) < count:
    raise UserError(
      f'selection.document_cap = {documents} and selection.source_cap = {share} leave {len(order)} of {count} rows; '
      f'raise them, lower selection.examples or raise pool.max_bytes'
    )
  return order[:most]


def _unmasked(score_N: np.ndarray, pool: Candidates) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
  """(scores of the rows that may be selected, in their order; place among them → row).

  They are neither masked, nor without a score because a prefilter left them out.
  """
  closed_N = pool.masked_N
  if pool.unscored_N.any():
    closed_N = closed_N | (pool.unscored_N & np.isnan(score_N))
  closed = np.flatnonzero(closed_N)
  if not len(closed):
    return score_N, lambda places: places
  before = closed - np.arange(len(closed))  # of a closed row, the number of rows before it that are open
  return score_N[~closed_N], lambda places: places + np.searchsorted(before, places, side='right')


def rows_of_share(share: float, count: int) -> int:
  """The whole rows in a share of `count`: 0.29 of 100 is 29, although no binary fraction equals 0.29."""
  return math.floor(Fraction(str(share)) * count)


def ranked(score_N: np.ndarray, pool: Candidates, count: int, **provenance: Any) -> Selection:
  """The best `count` unmasked rows within the caps of the config, with their scores; or the best documents."""
  if pool.options.unit == 'document':
    from dsdm_jax.selection import whole  # which needs this module

    return whole.best(score_N, pool, count, **provenance)
  if pool.options.document_cap or pool.options.source_cap < 1:
    rows = capped_order(score_N, count, pool)
  else:
    score_A, rows_of = _unmasked(score_N, pool)
    rows = rows_of(top(score_A, count))
  return Selection.of(rows, score_N[rows].astype(np.float32), **provenance)


def gumbel(rows: int, seed: int, name: str) -> np.ndarray:
  """Standard Gumbel noise, float32 [rows]. The k highest of log-weight + noise are k draws without replacement."""
  noise_N = np.empty(rows, np.float32)
  for chunk, start in enumerate(range(0, rows, CHUNK)):
    # Drawn in float64: the winners are near zero, where float32 draws are too coarse.
    exponential = prng.numpy_stream(seed, 'selection', name, chunk).standard_exponential(min(CHUNK, rows - start))
    np.maximum(exponential, np.finfo(np.float64).tiny, out=exponential)
    noise_N[start : start + CHUNK] = np.negative(np.log(exponential, out=exponential), out=exponential)
  return noise_N


def standardised(score_N: np.ndarray) -> np.ndarray:
  """Scores in standard deviations from their mean, float32; NaN where a prefilter left a row out."""
  scored_M = score_N[~np.isnan(score_N)] if np.isnan(score_N).any() else score_N
  spread = float(scored_M.std(dtype=np.float64))
  z_N = score_N - np.float32(scored_M.mean(dtype=np.float64))
  return np.divide(z_N, np.float32(spread or 1.0), out=z_N)


def check_finite(score_N: np.ndarray) -> None:
  """Raises a UserError that names the first row whose score is not a number."""
  for start in range(0, len(score_N), CHUNK):
    bad = np.flatnonzero(~np.isfinite(score_N[start : start + CHUNK]))
    if len(bad):
      raise UserError(f'the score of row {start + int(bad[0])} is not a number; run the stage that computed it again')


def rank_in_group(group_N: np.ndarray) -> np.ndarray:
  """Number of earlier entries of the same group, for each entry."""
  order = np.argsort(group_N, kind='stable')
  sorted_N = group_N[order]
  first = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
  begin_N = np.repeat(first, np.diff(np.append(first, len(group_N))))
  rank_N = np.empty(len(group_N), np.int64)
  rank_N[order] = np.arange(len(group_N)) - begin_N
  return rank_N

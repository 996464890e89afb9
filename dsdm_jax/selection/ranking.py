"""From scores to rows: exact top-k, caps, noise. Ties go to the lower row, never to the order of arrival."""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection.candidates import Candidates

CHUNK = 1 << 22  # scores that are looked at, or drawn, together


def top(score_N: np.ndarray, count: int) -> np.ndarray:
  """The `count` rows of highest score, best first; equal scores go to the lower row.

  Holds one copy of the scores, and some 24 bytes for each row that is wanted.

  Raises:
    UserError: more rows are wanted than there are, or a score is not a number.
  """
  if count > len(score_N):
    raise UserError(
      f'{count} rows are wanted and the pool has {len(score_N)}; lower selection.examples or raise pool.max_bytes'
    )
  check_finite(score_N)
  if count == len(score_N):
    rows = np.arange(count)
  else:
    # The k-th score cuts: all that are strictly better, then the lowest rows of those that equal it.
    cut = np.partition(score_N, len(score_N) - count)[len(score_N) - count]
    better = np.flatnonzero(score_N > cut)
    tied = np.flatnonzero(score_N == cut)[: count - len(better)]
    rows = np.concatenate([better, tied])
    rows.sort()
  # Negation is exact, and a stable sort keeps the lower row first.
  return rows[np.argsort(-score_N[rows], kind='stable')]


def capped_order(score_N: np.ndarray, count: int, pool: Candidates, most: int | None = None) -> np.ndarray:
  """Rows, best first, that `selection.document_cap` and `selection.source_cap` admit into a selection of `count`.

  First no document keeps more than its cap of rows, the best; then no source gives more than its share of `count`,
  which is rounded down to whole rows.

  Args:
    most: rows that are wanted of this order; None for `count`. There may be fewer, but not fewer than `count`.

  Raises:
    UserError: a score is not a number, or the caps leave fewer than `count` rows.
  """
  documents, share = pool.options.document_cap, pool.options.source_cap
  wanted = most or count
  # What is admitted depends on better rows alone, so the best rows are looked at first, and more if they do not do.
  looked_at = min(2 * wanted, len(score_N))
  while True:
    order = top(score_N, looked_at)
    if documents:
      order = order[rank_in_group(pool.document_N[order]) < documents]
    if share < 1:
      order = order[rank_in_group(pool.source_N[order]) < rows_of_share(share, count)]
    if len(order) >= wanted or looked_at == len(score_N):
      break
    looked_at = min(4 * looked_at, len(score_N))
  if len(order) < count:
    raise UserError(
      f'selection.document_cap = {documents} and selection.source_cap = {share} leave {len(order)} rows of the '
      f'{count} wanted; raise them, lower selection.examples or raise pool.max_bytes'
    )
  return order[:wanted]


def rows_of_share(share: float, count: int) -> int:
  """The whole rows in a share of `count`: 0.29 of 100 are 29, though no binary fraction is 0.29."""
  return math.floor(Fraction(str(share)) * count)


def top_capped(score_N: np.ndarray, count: int, pool: Candidates) -> np.ndarray:
  """As `top`, under the caps of `capped_order`."""
  if not pool.options.document_cap and pool.options.source_cap == 1:
    return top(score_N, count)
  return capped_order(score_N, count, pool)


def ranked(score_N: np.ndarray, pool: Candidates, count: int, **provenance: Any) -> Selection:
  """The best `count` rows under the caps of the config, as a selection that remembers their scores."""
  rows = top_capped(score_N, count, pool)
  return Selection.of(rows, score_N[rows].astype(np.float32), **provenance)


def gumbel(rows: int, seed: int, name: str) -> np.ndarray:
  """Standard Gumbel noise, float32 [rows]: the k highest of log-weight + noise are k draws without replacement."""
  noise_N = np.empty(rows, np.float32)
  for chunk, start in enumerate(range(0, rows, CHUNK)):
    # Drawn in float64: what wins is near zero, where float32 has few numbers.
    exponential = prng.numpy_stream(seed, 'selection', name, chunk).standard_exponential(min(CHUNK, rows - start))
    np.maximum(exponential, np.finfo(np.float64).tiny, out=exponential)
    noise_N[start : start + CHUNK] = np.negative(np.log(exponential, out=exponential), out=exponential)
  return noise_N


def standardised(score_N: np.ndarray) -> np.ndarray:
  """Scores in standard deviations from their mean, float32."""
  spread = float(score_N.std(dtype=np.float64))
  found_N = score_N - np.float32(score_N.mean(dtype=np.float64))
  return np.divide(found_N, np.float32(spread or 1.0), out=found_N)


def check_finite(score_N: np.ndarray) -> None:
  """Raises UserError that names the first row whose score is not a number."""
  for start in range(0, len(score_N), CHUNK):
    bad = np.flatnonzero(~np.isfinite(score_N[start : start + CHUNK]))
    if len(bad):
      raise UserError(f'the score of row {start + int(bad[0])} is not a number; make what it comes from anew')


def rank_in_group(group_N: np.ndarray) -> np.ndarray:
  """How many entries before each one are of its own group."""
  order = np.argsort(group_N, kind='stable')
  sorted_N = group_N[order]
  first = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
  begin_N = np.repeat(first, np.diff(np.append(first, len(group_N))))
  rank_N = np.empty(len(group_N), np.int64)
  rank_N[order] = np.arange(len(group_N)) - begin_N
  return rank_N

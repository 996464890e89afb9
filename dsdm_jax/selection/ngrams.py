"""Hashed uni- and bigrams of rows, over words or over token ids, and linear scores of them.

A *unit* (a word or a token id) is a 64-bit hash; a bigram is a hash of two units. Each falls into one of `buckets`. All
counts and sums are array operations, so that a pass over ids runs at memory speed, and a pass over words is dominated
by splitting the text.
"""

import collections
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import scipy.sparse

from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.selection.candidates import BLOCK, Candidates, Target

_BLOCK_TOKENS = 1 << 15  # tokens that are hashed together: three times as fast if they fit a core's cache
_SAMPLE = 65_536  # rows
TERMS = 1 << 18  # buckets of methods that are published without hashing: few words of a pool share one
FITTED = 1 << 16  # of methods that learn a weight for each bucket
_BASIC = 1 << 16  # code points of the basic plane
ODD, _BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)


@dataclasses.dataclass(frozen=True)
class Grams:
  """n-grams of B texts.

  Attributes:
    uni_M, bi_M: int64 buckets of unit m, and of units m and m + 1. The last unit of a text begins no bigram; its entry
      is `buckets`, one past the last bucket.
    first_B: int64 [B + 1], the first unit of each text, and the number of units.
    buckets: number of buckets.
  """

  uni_M: np.ndarray
  bi_M: np.ndarray
  first_B: np.ndarray
  buckets: int

  @property
  def size_B(self) -> np.ndarray:
    """Number of n-grams of each text."""
    units_B = np.diff(self.first_B)
    return 2 * units_B - (units_B > 0)

  def counts(self) -> np.ndarray:
    """Count of each bucket in all texts: int64 [buckets]."""
    both = sum(np.bincount(x, minlength=self.buckets + 1) for x in (self.uni_M, self.bi_M))
    return np.asarray(both)[: self.buckets]

  def sums(self, weight: np.ndarray) -> np.ndarray:
    """Sum of the weights of each text's n-grams, by bucket: float64 [B]."""
    padded = np.append(weight, 0).astype(np.float32)
    unit_M = padded[self.uni_M] + padded[self.bi_M]
    units_B = np.diff(self.first_B)
    if len(units_B) and units_B.min() == units_B.max() > 0:
      return unit_M.reshape(len(units_B), -1).sum(axis=1, dtype=np.float64)
    sum_B = np.zeros(len(units_B))
    some = units_B > 0
    if some.any():
      sum_B[some] = np.add.reduceat(unit_M.astype(np.float64), self.first_B[:-1][some])
    return sum_B

  def matrix(self) -> scipy.sparse.csr_matrix:
    """Counts as a sparse matrix [B, buckets], float32."""
    columns = np.stack([self.uni_M, self.bi_M], axis=1).reshape(-1)
    ones = np.ones(len(columns), np.float32)
    counts = scipy.sparse.csr_matrix((ones, columns, 2 * self.first_B), (len(self.first_B) - 1, self.buckets + 1))
    counts.sum_duplicates()
    return counts[:, : self.buckets]

  def units(self) -> scipy.sparse.csr_matrix:
    """Counts without bigrams: sparse [B, buckets], float32."""
    ones = np.ones(len(self.uni_M), np.float32)
    counts = scipy.sparse.csr_matrix((ones, self.uni_M, self.first_B), (len(self.first_B) - 1, self.buckets))
    counts.sum_duplicates()
    return counts


def mix(x: np.ndarray) -> np.ndarray:
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  return x ^ (x >> np.uint64(27))


def _bucket(hash_M: np.ndarray, buckets: int) -> np.ndarray:
  # Scale the high half to [0, buckets): without a division, for any number of buckets.
  return (((hash_M >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def _grams(unit_M: np.ndarray, first_B: np.ndarray, buckets: int) -> Grams:
  bi_M = np.full(len(unit_M), buckets, np.int64)
  if len(unit_M):
    bi_M[:-1] = _bucket(mix(unit_M[:-1] * ODD + unit_M[1:]), buckets)
    ends = first_B[1:][np.diff(first_B) > 0] - 1
    bi_M[ends] = buckets
  return Grams(_bucket(unit_M, buckets), bi_M, first_B, buckets)


@functools.cache
def _kinds(codes: int) -> np.ndarray:
  """The kind of each code point below `codes`: 0 white space, 1 letter, digit or underscore, 2 other; uint8."""
  kinds = np.full(codes, 2, np.uint8)
  for code in range(codes):
    character = chr(code)
    if character.isalnum() or character == '_':
      kinds[code] = 1
    elif character.isspace():
      kinds[code] = 0
  return kinds


@functools.lru_cache(maxsize=1)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Powers 0…size of an odd number, and of its inverse, modulo 2⁶⁴."""
  powers, inverses = np.full(size + 1, _BASE), np.full(size + 1, np.uint64(pow(int(_BASE), -1, 2**64)))
  powers[0] = inverses[0] = 1
  return np.cumprod(powers), np.cumprod(inverses)


def of_texts(texts: Sequence[str], buckets: int) -> Grams:
  """n-grams of lower-cased words: runs of letters and digits, or of other characters except white space.

  The published DSIR splits text in this way. A word's hash is Σ value(character) · base^place modulo 2⁶⁴, computed from
  differences of one running sum over all characters, so that words are never Python objects.
  """
  lowered = [text.lower() for text in texts]
  start_B = np.cumsum([0, *(len(text) + 1 for text in lowered)])
  code_P = np.frombuffer('\n'.join([*lowered, '']).encode('utf-32-le', 'surrogatepass'), np.uint32)
  basic = not len(code_P) or code_P.max() < _BASIC  # true for most text, and needs a table of a sixteenth of the size
  kind_P = _kinds(_BASIC if basic else sys.maxunicode + 1)[code_P]
  bound_M = np.concatenate([[0], np.flatnonzero(kind_P[1:] != kind_P[:-1]) + 1, [len(kind_P)]])
  begin_M, end_M = bound_M[:-1], bound_M[1:]
  is_word_M = kind_P[np.minimum(begin_M, len(kind_P) - 1)] > 0
  begin_M, end_M = begin_M[is_word_M], end_M[is_word_M]
  powers, inverses = _powers(1 << max(16, len(code_P).bit_length()))
  value_P = mix((code_P.astype(np.uint64) + np.uint64(1)) * ODD) * powers[: len(code_P)]
  total_P = np.concatenate([np.zeros(1, np.uint64), np.cumsum(value_P)])
  unit_M = mix((total_P[end_M] - total_P[begin_M]) * inverses[begin_M] * ODD)
  return _grams(unit_M, np.searchsorted(begin_M, start_B).astype(np.int64), buckets)


def of_sequences(sequences: Sequence[np.ndarray], buckets: int) -> Grams:
  """n-grams of token ids of sequences of any lengths."""
  first_B = np.concatenate([[0], np.cumsum([len(s) for s in sequences], dtype=np.int64)])
  flat = np.concatenate([np.zeros(0, np.int64), *sequences]).astype(np.uint64)
  return _grams(mix((flat + np.uint64(1)) * ODD), first_B, buckets)


def of_rows(tokens_BL: np.ndarray, buckets: int) -> Grams:
  """n-grams of token ids of rows of the same length."""
  first_B = np.arange(len(tokens_BL) + 1, dtype=np.int64) * tokens_BL.shape[1]
  return _grams(mix((tokens_BL.reshape(-1).astype(np.uint64) + np.uint64(1)) * ODD), first_B, buckets)


class PoolGrams:
  """n-grams of a pool, block by block, and of target examples.

  Args:
    pool: has the rows.
    kind: 'words', of the decoded text of a row, or 'tokens', its ids.
    buckets: number of hash buckets.
  """

  def __init__(self, pool: Pool, kind: str, buckets: int):
    self.pool, self.kind, self.buckets = pool, kind, buckets

  def rows(self, rows: np.ndarray) -> Grams:
    """n-grams of these rows, in their order."""
    if self.kind == 'tokens':
      return self._of_ids(self.pool.tokens(rows), rows)
    return of_texts(self.pool.encoder.decode_batch(self.pool.tokens(rows)), self.buckets)

  def _of_ids(self, tokens_BL: np.ndarray, rows: np.ndarray) -> Grams:
    if self.pool.packed:
      return of_rows(tokens_BL, self.buckets)
    sizes = self.pool.sizes(rows)  # padding is no text; words have none, as it decodes to nothing
    return of_sequences([row_L[:size] for row_L, size in zip(tokens_BL, sizes, strict=True)], self.buckets)

  def each(self, rows: np.ndarray) -> Iterator[Grams]:
    """As `rows`, block by block, so that only a few blocks are in memory."""
    return (grams for _, _, grams in self._over(rows))

  def examples(self, target: Target, task: str) -> Grams:
    """n-grams of each target example: its words, or the ids of the sequence that models see."""
    if self.kind == 'tokens':
      return of_sequences(target.sequences(task), self.buckets)
    return of_texts(target.texts(task), self.buckets)

  def __iter__(self) -> Iterator[tuple[int, int, Grams]]:
    yield from self._over(np.arange(self.pool.num_rows))

  def _over(self, rows: np.ndarray) -> Iterator[tuple[int, int, Grams]]:
    """(start, stop, n-grams) of each block of `rows`; a thread decodes the next text while one is split and hashed."""
    blocks = self._blocks(rows)
    if self.kind == 'tokens':
      for start, tokens_BL in blocks:
        stop = start + len(tokens_BL)
        yield start, stop, self._of_ids(tokens_BL, rows[start:stop])
      return
    waiting: collections.deque[tuple[int, Future[list[str]]]] = collections.deque()
    with ThreadPoolExecutor(1) as ahead:
      for start, tokens_BL in blocks:
        waiting.append((start, ahead.submit(self.pool.encoder.decode_batch, tokens_BL)))
        if len(waiting) > 2:
          yield self._decoded(*waiting.popleft())
      while waiting:
        yield self._decoded(*waiting.popleft())

  def _blocks(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    size = max(1, _BLOCK_TOKENS // self.pool.length)
    for first in range(0, len(rows), BLOCK):
      tokens_BL = self.pool.tokens(rows[first : first + BLOCK])
      for start in range(0, len(tokens_BL), size):
        yield first + start, tokens_BL[start : start + size]

  def _decoded(self, start: int, decoded: Future[list[str]]) -> tuple[int, int, Grams]:
    texts = decoded.result()
    return start, start + len(texts), of_texts(texts, self.buckets)

  def sample(self) -> Iterator[Grams]:
    """n-grams of at most 65,536 evenly spaced rows of the pool, which is enough for counts."""
    rows = np.arange(0, self.pool.num_rows, -(-self.pool.num_rows // _SAMPLE))
    return self.each(rows)

  def counts(self) -> np.ndarray:
    """Count of each bucket in the pool's `sample`: float64 [buckets]. Not cached here: see `Candidates.once`."""
    return sum((grams.counts() for grams in self.sample()), np.zeros(self.buckets))

  def frequencies(self) -> tuple[int, int, np.ndarray]:
    """(rows, units, number of rows that have each bucket as a unit) of the pool's `sample`; float64 [buckets]."""
    rows, units, holds = 0, 0, np.zeros(self.buckets)
    for block in self.sample():
      rows += len(block.size_B)
      units += len(block.uni_M)
      holds += np.bincount(block.units().indices, minlength=self.buckets)
    return rows, units, holds

  def scores(self, score: Callable[[Grams], np.ndarray]) -> np.ndarray:
    """`score`, block by block, of every row: float32 [N]."""
    score_N = np.empty(self.pool.num_rows, np.float32)
    for start, stop, grams in self:
      score_N[start:stop] = score(grams)
    return score_N

  def sums(self, weight: np.ndarray, mean: bool) -> np.ndarray:
    """Sum or mean of the weights of each row's n-grams: float32 [N]."""
    return self.scores(lambda grams: grams.sums(weight) / (np.maximum(grams.size_B, 1) if mean else 1))


def of_pool(pool: Candidates, buckets: int) -> PoolGrams:
  """n-grams by `selection.ngrams`, shared by arms; `buckets` unless `selection.ngram_buckets` has another number."""
  options = pool.options
  buckets = options.ngram_buckets or buckets
  return pool.once(('n-grams', buckets), lambda: PoolGrams(pool.pool, options.ngrams, buckets))


def nearest(rows_BV: scipy.sparse.csr_matrix, queries_VT: scipy.sparse.csr_matrix) -> np.ndarray:
  """Largest inner product of each row with a query, at least 0; float32 [B]."""
  return (rows_BV @ queries_VT).max(axis=1).toarray().reshape(-1).astype(np.float32)

"""BM25: rows that a search for the target examples returns (Robertson and Zaragoza 2009, eq. 3.15; k₁ = 1.2, b = 0.75).

Terms are hashed words or token ids, without bigrams. idf is Lucene's log(1 + (N − n + ½)/(n + ½)), which is never
negative.
"""

import numpy as np
import scipy.sparse

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ngrams, ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target

_K1, _B = 1.2, 0.75


def bm25(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest mean BM25 score over the target examples, each used as a query."""
  del seed
  grams = ngrams.of_pool(pool)
  idf, mean_units = pool.once('bm25', lambda: _statistics(grams))

  def score(task: str) -> np.ndarray:
    query = grams.examples(target, task).units()
    return _scores(grams, np.asarray(query.mean(axis=0)).reshape(-1) * idf, mean_units, pool.num_rows)

  return ranking.ranked(target.mixed(score), pool, budget.examples)


def _statistics(grams: ngrams.PoolGrams) -> tuple[np.ndarray, float]:
  """idf of each bucket, and the mean number of units of a row, both over a sample of the pool's rows."""
  holds, units, rows = np.zeros(grams.buckets), 0, 0
  for block in grams.sample():
    rows += len(block.size_B)
    holds += np.bincount(block.units().indices, minlength=grams.buckets)
    units += len(block.uni_M)
  return np.log1p((rows - holds + 0.5) / (holds + 0.5)), units / rows


def _scores(grams: ngrams.PoolGrams, weight: np.ndarray, mean_units: float, rows: int) -> np.ndarray:
  score_N = np.empty(rows, np.float32)
  for start, stop, block in grams:
    score_N[start:stop] = saturated(block.units(), np.diff(block.first_B), mean_units) @ weight
  return score_N


def saturated(counts: scipy.sparse.csr_matrix, units_B: np.ndarray, mean_units: float) -> scipy.sparse.csr_matrix:
  """tf (k₁ + 1) / (tf + k₁ (1 − b + b · length / mean length)) in place of each count."""
  length = np.repeat(units_B / mean_units, np.diff(counts.indptr))
  tf = counts.data.astype(np.float64)
  data = tf * (_K1 + 1) / (tf + _K1 * (1 - _B + _B * length))
  return scipy.sparse.csr_matrix((data, counts.indices, counts.indptr), counts.shape)

"""BM25: rows that a search for the target examples returns (Robertson and Zaragoza 2009, eq. 3.15; k₁ = 1.2, b = 0.75).

Terms are hashed words or token ids, without bigrams. idf is Lucene's log(1 + (N − n + ½)/(n + ½)), which is never
negative. The mean over queries prefers rows that answer many of them a little; the maximum, as a search engine would,
rows that answer one.
"""

from collections.abc import Callable

import numpy as np
import scipy.sparse

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ngrams, ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target

_K1, _B = 1.2, 0.75


def bm25(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest mean BM25 score over the target examples, each used as a query."""
  del seed
  return _best(pool, target, budget, lambda query: scipy.sparse.csr_matrix(query.mean(axis=0)))


def bm25_max(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest BM25 score for any target example."""
  del seed
  return _best(pool, target, budget, lambda query: query)


def _best(
  pool: Candidates,
  target: Target,
  budget: Budget,
  queries: Callable[[scipy.sparse.csr_matrix], scipy.sparse.csr_matrix],
) -> Selection:
  grams = ngrams.of_pool(pool, ngrams.TERMS)
  rows, units, holds = pool.once('frequencies', grams.frequencies)
  idf, mean_units = np.log1p((rows - holds + 0.5) / (holds + 0.5)), units / rows

  def score(task: str) -> np.ndarray:
    weight_VT = queries(grams.examples(target, task).units()).multiply(idf).T.tocsr()
    return grams.scores(lambda rows: ngrams.nearest(saturated(rows, mean_units), weight_VT))

  return ranking.ranked(target.mixed(score), pool, budget.examples)


def saturated(rows: ngrams.Grams, mean_units: float) -> scipy.sparse.csr_matrix:
  """tf (k₁ + 1) / (tf + k₁ (1 − b + b · length / mean length)) in place of each count."""
  counts = rows.units()
  length = np.repeat(np.diff(rows.first_B) / (mean_units or 1), np.diff(counts.indptr))
  tf = counts.data.astype(np.float64)
  data = tf * (_K1 + 1) / (tf + _K1 * (1 - _B + _B * length))
  return scipy.sparse.csr_matrix((data, counts.indices, counts.indptr), counts.shape)

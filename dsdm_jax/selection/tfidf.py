"""TF-IDF nearest target: cosine of word counts, weighted by rarity (Salton and Buckley 1988).

The weight of a term is tf · (1 + ln((1 + N) / (1 + n))), with n of N rows that have it, and vectors have length one:
the defaults of scikit-learn's `TfidfVectorizer`. Terms are hashed words or token ids, without bigrams.
"""

import numpy as np
import scipy.sparse

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ngrams, ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target


def tfidf(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest cosine to their nearest target example."""
  del seed
  grams, idf = weighting(pool)

  def score(task: str) -> np.ndarray:
    target_VT = vectors(grams.examples(target, task), idf).T.tocsr()
    return grams.scores(lambda rows: ngrams.nearest(vectors(rows, idf), target_VT))

  return ranking.ranked(target.mixed(score), pool, budget.examples)


def weighting(pool: Candidates) -> tuple[ngrams.PoolGrams, np.ndarray]:
  """The pool's terms, and the inverse document frequency of each bucket, float32, over a sample of the rows."""
  grams = ngrams.of_pool(pool, ngrams.TERMS)
  rows, _, holds = pool.once('frequencies', grams.frequencies)
  return grams, (1 + np.log((1 + rows) / (1 + holds))).astype(np.float32)


def vectors(texts: ngrams.Grams, idf: np.ndarray) -> scipy.sparse.csr_matrix:
  """TF-IDF vectors of length one, sparse float32 [B, buckets]; a text without terms has the zero vector."""
  counts = texts.units()
  counts.data *= idf[counts.indices]
  square_B = np.asarray(counts.multiply(counts).sum(axis=1)).reshape(-1)
  counts.data /= np.repeat(np.sqrt(square_B), np.diff(counts.indptr))
  return counts

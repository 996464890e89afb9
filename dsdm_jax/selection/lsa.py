"""LSA nearest target: latent semantic analysis (Deerwester et al. 1990), and the cosine to the nearest target example.

TF-IDF vectors (`tfidf.py`) of a sample of the pool's rows have a truncated SVD X ≈ U S Vᵀ with 128 dimensions. A text x
is compared by x V, so that texts are close that share no word but words of the same topic. The SVD is that of
scikit-learn's `TruncatedSVD`.

Fitting takes about 2 · 128 · nnz(X) operations for each of some ten passes over X, and memory for X and a few matrices
[V', 128], where V' terms are in at least two rows of the sample. A row then takes 128 operations a term.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.sparse

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ngrams, ranking, tfidf
from dsdm_jax.selection.candidates import Budget, Candidates, Target

_DIMENSIONS = 128
_PASSES = 5  # of the power iteration
_MORE = 10  # dimensions that the iteration has and the result has not, scikit-learn's default


def lsa(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest cosine to their nearest target example, in 128 dimensions."""
  del seed
  return ranking.ranked(nearest(pool, target), pool, budget.examples)


def nearest(pool: Candidates, target: Target) -> np.ndarray:
  """Cosine of each row to its nearest target example, mixed over tasks; float32 [N]."""
  grams, idf = tfidf.weighting(pool)
  space = pool.once('lsa', lambda: fit(grams, idf, add_flop=pool.add_flop))

  def score(task: str) -> np.ndarray:
    target_TD = space.unit(tfidf.vectors(grams.examples(target, task), idf))

    def cosine(rows: ngrams.Grams) -> np.ndarray:
      x_BV = tfidf.vectors(rows, idf)
      pool.add_flop(2.0 * target_TD.shape[1] * (x_BV.nnz + x_BV.shape[0] * len(target_TD)))
      return (space.unit(x_BV) @ target_TD.T).max(axis=1)

    return grams.scores(cosine)

  return target.mixed(lambda task: pool.once(('lsa', task), lambda: score(task)))


@dataclasses.dataclass(frozen=True)
class Space:
  """Attributes: terms, buckets that it uses [V']; basis, float32 [V', D]."""

  terms: np.ndarray
  basis_VD: np.ndarray

  def unit(self, x_BV: scipy.sparse.csr_matrix) -> np.ndarray:
    """Coordinates of TF-IDF vectors, of length one or zero: float32 [B, D]."""
    x_BD = x_BV[:, self.terms] @ self.basis_VD
    norm_B = np.linalg.norm(x_BD, axis=1, keepdims=True)
    return x_BD / np.where(norm_B > 0, norm_B, 1)


def fit(
  grams: ngrams.PoolGrams,
  idf: np.ndarray,
  dimensions: int = _DIMENSIONS,
  add_flop: Callable[[float], None] = lambda _: None,
) -> Space:
  """The space of a sample of the pool's rows, with fewer dimensions where the sample has a lower rank.

  `add_flop` is called with the operations of the products with the sample: two in each of the passes, and two more.
  """
  from sklearn.utils.extmath import randomized_svd
  from threadpoolctl import threadpool_limits

  sample_MV = scipy.sparse.vstack([tfidf.vectors(rows, idf) for rows in grams.sample()]).tocsr()
  terms = np.flatnonzero(np.bincount(sample_MV.indices, minlength=grams.buckets) > 1)
  size = min(dimensions, sample_MV.shape[0], len(terms))
  if not size:
    return Space(terms, np.zeros((len(terms), 1), np.float32))
  state = int(prng.numpy_stream(0, 'selection', 'lsa').integers(2**31))
  with threadpool_limits(1):  # more threads would add floating-point numbers in another order
    basis_DV = randomized_svd(sample_MV[:, terms], size, n_iter=_PASSES, random_state=state)[2]
  add_flop(2.0 * (size + _MORE) * sample_MV.nnz * (2 * _PASSES + 2))
  return Space(terms, np.ascontiguousarray(basis_DV.T, np.float32))

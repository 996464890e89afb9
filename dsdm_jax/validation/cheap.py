"""Predictors without gradients: a datamodel must beat them to be worth its cost."""

from collections.abc import Callable, Mapping

import numpy as np
import scipy.sparse

from dsdm_jax.data.targets.targets import text_mask

_BINS = 10_000  # of hashed pairs of tokens, as many as DSIR's default
_DIMENSIONS = 128  # of latent semantic analysis
_K1, _B = 1.2, 0.75  # of BM25


def count(tokens_NL: np.ndarray, weights_NL: np.ndarray, size: int, pairs: bool) -> scipy.sparse.csr_array:
  """Counts of each token, or of each hashed pair of adjacent tokens, in each row; [N, `size`].

  Args:
    tokens_NL: int.
    weights_NL: a token of weight 0, and pairs with it, are not counted.
    size: number of columns; for pairs, of hash bins.
    pairs: count pairs.
  """
  tokens_NL, counted_NL = tokens_NL.astype(np.int64), weights_NL > 0
  if pairs:
    tokens_NL = (tokens_NL[:, :-1] * 1_000_003 + tokens_NL[:, 1:]) * 2_654_435_761 % 2**32 % size
    counted_NL = counted_NL[:, :-1] & counted_NL[:, 1:]
  row, _ = np.nonzero(counted_NL)
  ones = np.ones(len(row), np.float32)
  return scipy.sparse.coo_array((ones, (row, tokens_NL[counted_NL])), (len(tokens_NL), size)).tocsr()


def bm25(count_NV: scipy.sparse.csr_array, count_TV: scipy.sparse.csr_array) -> np.ndarray:
  """score_NT of rows as documents for target examples as queries (Robertson and Zaragoza, 2009, eq. 3.15)."""
  length_N = np.asarray(count_NV.sum(axis=1)).ravel()
  documents_V = np.asarray((count_NV > 0).sum(axis=0)).ravel()
  inverse_V = np.log1p((count_NV.shape[0] - documents_V + 0.5) / (documents_V + 0.5))
  weight = count_NV.tocoo()
  norm_N = _K1 * (1 - _B + _B * length_N / length_N.mean())
  value = weight.data * (_K1 + 1) / (weight.data + norm_N[weight.row]) * inverse_V[weight.col]
  weight_NV = scipy.sparse.coo_array((value, (weight.row, weight.col)), weight.shape).tocsr()
  return (weight_NV @ count_TV.T).toarray().astype(np.float32)


def log_ratio(count_NV: scipy.sparse.csr_array, count_TV: scipy.sparse.csr_array, task_T: np.ndarray) -> np.ndarray:
  """score_NT: mean over a row's n-grams of log p(n-gram | task) − log p(n-gram | pool), as in DSIR
  (arXiv 2302.03169, section 4); the same for all examples of a task. Counts are smoothed by one.
  """
  pool_V = np.asarray(count_NV.sum(axis=0)).ravel() + 1
  score_NT = np.empty((count_NV.shape[0], len(task_T)), np.float32)
  grams_N = np.maximum(np.asarray(count_NV.sum(axis=1)).ravel(), 1)
  for task in np.unique(task_T):
    task_V = np.asarray(count_TV[task_T == task].sum(axis=0)).ravel() + 1
    ratio_V = np.log(task_V / task_V.sum()) - np.log(pool_V / pool_V.sum())
    score_NT[:, task_T == task] = (count_NV @ ratio_V / grams_N)[:, None]
  return score_NT


def latent(count_NV: scipy.sparse.csr_array, count_TV: scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
  """Latent semantic analysis (Deerwester et al. 1990): TF-IDF vectors in the first 128 right singular vectors of those
  of the rows; float32 [N, D], [T, D]. Weights of terms are those of `selection/tfidf.py`.
  """
  from sklearn.feature_extraction.text import TfidfTransformer
  from sklearn.utils.extmath import randomized_svd

  weighting = TfidfTransformer().fit(count_NV)
  weight_NV, weight_TV = weighting.transform(count_NV), weighting.transform(count_TV)
  size = min(_DIMENSIONS, min(weight_NV.shape) - 1)
  basis_VD = randomized_svd(weight_NV, size, n_iter=5, random_state=0)[2].T
  return weight_NV @ basis_VD, weight_TV @ basis_VD


def cosine(embedding_ND: np.ndarray, embedding_TD: np.ndarray, centre: bool) -> np.ndarray:
  """score_NT: cosine of embeddings. `centre` subtracts the mean of the rows from both."""
  mean_D = embedding_ND.mean(axis=0) if centre else 0
  unit_ND, unit_TD = (
    (x - mean_D) / np.maximum(np.linalg.norm(x - mean_D, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    for x in (embedding_ND, embedding_TD)
  )
  return unit_ND @ unit_TD.T


def predictors(
  tokens_NL: np.ndarray,
  filled_NL: np.ndarray,
  tokens_TL: np.ndarray,
  weights_TL: np.ndarray,
  task_T: np.ndarray,
  vocab_size: int,
  loss_N: Callable[[], np.ndarray],
  embeddings: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> Mapping[str, Callable[[], np.ndarray]]:
  """Name → function that returns score_NT; higher is better.

  Args:
    tokens_NL, tokens_TL: of rows and of target examples; padding is ignored.
    filled_NL: False for the padding of a row.
    weights_TL: above 0 for predicted tokens of a target example; what follows the last of these is padding.
    task_T: task of each target example.
    vocab_size: V.
    loss_N: nats per token of each row under the proxies.
    embeddings: of rows and of target examples.
  """
  filled_TL = text_mask(weights_TL)

  def counts(size: int, pairs: bool) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    return count(tokens_NL, filled_NL, size, pairs), count(tokens_TL, filled_TL, size, pairs)

  def same_for_all(score_N: np.ndarray) -> np.ndarray:
    return np.repeat(score_N[:, None], len(task_T), axis=1)

  def ratio() -> np.ndarray:
    both = zip(counts(vocab_size, False), counts(_BINS, True), strict=True)
    rows, targets = (scipy.sparse.hstack(pair).tocsr() for pair in both)
    return log_ratio(rows, targets, task_T)

  return {
    'BM25': lambda: bm25(*counts(vocab_size, False)),
    'n-gram ratio (DSIR)': ratio,
    'LSA': lambda: cosine(*latent(*counts(vocab_size, False)), centre=False),
    'embedding similarity': lambda: cosine(*embeddings(), centre=True),
    'low loss': lambda: same_for_all(-loss_N()),
    'high loss': lambda: same_for_all(loss_N()),
  }

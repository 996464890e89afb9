"""SemDeDup: drops near duplicates in embedding space, then draws rows at random (arXiv 2303.09540, section 3).

Embeddings are those of the first proxy (`Proxies.embeddings`). Rows are compared within `selection.clusters` clusters
of k-means, each with earlier rows of its cluster; rows far from the centre come first and so stay, as in the paper. The
share `selection.duplicate_keep` of rows with the lowest largest cosine is kept: a fifth, as in the DsDm paper, or as
many as give the arm all its unmasked rows or documents. With 0, a row is dropped if that cosine is above
`selection.duplicate_similarity`.
"""

import bisect
import math

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target
from dsdm_jax.selection.controls import drawn, holds

FIT_ROWS = 65_536  # k-means is fitted to a sample of a larger pool
_BLOCK = 2_048  # rows of a cluster that are compared at once
_CHUNK = 8_192  # rows that are assigned to clusters at once


def semdedup(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """k random rows of those that are left."""
  del target
  return _drawn(pool, 'semdedup', budget.examples, seed)


def semdedup_one_epoch(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """As many such rows as the budget has examples, each seen once, as in the DsDm paper.

  Raises:
    UserError: fewer rows are left.
  """
  del target
  return _drawn(pool, 'semdedup_one_epoch', budget.total, seed)


def _drawn(pool: Candidates, name: str, count: int, seed: int) -> Selection:
  options = pool.options

  def compare() -> np.ndarray:
    return nearest_earlier(pool.once('embeddings', pool.proxies.embeddings), options.clusters)

  near_N = pool.once('semdedup', compare)
  if options.duplicate_keep:
    left = _least(near_N, pool, count)
  else:
    left = np.flatnonzero(near_N <= options.duplicate_similarity)
  similarity = float(near_N[left].max(initial=-1))
  return drawn(pool, name, count, seed, among=left, dropped=pool.num_rows - len(left), similarity=similarity)


def _least(near_N: np.ndarray, pool: Candidates, count: int) -> np.ndarray:
  """The rows with the lowest cosines, ascending: the share to keep, or the fewest from which an arm can be drawn.

  Masked rows count in the share, so that a mask changes the rows that are kept only where an arm needs more.
  """
  best_first = ranking.top(-near_N, pool.num_rows)
  share = math.ceil(pool.options.duplicate_keep * pool.num_rows)

  def enough(keep: int) -> bool:
    return holds(pool, count, best_first[:keep])

  keep = share + bisect.bisect_left(range(share, pool.num_rows), True, key=enough)  # all rows, if fewer never do
  return np.sort(best_first[:keep])


def nearest_earlier(x_ND: np.ndarray, count: int) -> np.ndarray:
  """Largest cosine of each row to an earlier row of its cluster, −1 for the first: float32 [N].

  Args:
    x_ND: embeddings of length one, float32.
    count: number of clusters; 0 takes the square root of the number of rows.
  """
  centres_KD = kmeans(x_ND, count, prng.numpy_stream(0, 'selection', 'semdedup'))
  cluster_N = nearest_centre(x_ND, centres_KD)
  near_N = np.empty(len(x_ND), np.float32)
  order = np.argsort(cluster_N, kind='stable')
  for rows in np.split(order, np.flatnonzero(np.diff(cluster_N[order])) + 1):
    nearness = x_ND[rows] @ centres_KD[cluster_N[rows[0]]]
    rows = rows[np.argsort(nearness, kind='stable')]
    near_N[rows] = _to_earlier(x_ND[rows])
  return near_N


def _to_earlier(x_MD: np.ndarray) -> np.ndarray:
  """A row's largest cosine to any earlier row, dropped or not; −1 for the first: float32 [M]."""
  near_M = np.full(len(x_MD), -1, np.float32)
  for start in range(0, len(x_MD), _BLOCK):
    block_BD = x_MD[start : start + _BLOCK]
    for first in range(0, start + 1, _BLOCK):
      cosine_BM = block_BD @ x_MD[first : first + _BLOCK].T
      if first == start:
        cosine_BM[~np.tri(len(block_BD), k=-1, dtype=bool)] = -1
      near_B = near_M[start : start + len(block_BD)]
      np.maximum(near_B, cosine_BM.max(axis=1), out=near_B)
  return near_M


def kmeans(x_ND: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  """At most `count` centres of unit length (0: the square root of the number of rows), float32 [count, D]."""
  from sklearn.cluster import KMeans
  from threadpoolctl import threadpool_limits

  count = min(count or round(len(x_ND) ** 0.5), len(x_ND))
  sample = x_ND if len(x_ND) <= FIT_ROWS else x_ND[np.sort(rng.choice(len(x_ND), FIT_ROWS, replace=False))]
  with threadpool_limits(1):  # more threads would add floating-point numbers in another order
    fit = KMeans(count, n_init=1, max_iter=20, random_state=int(rng.integers(2**31))).fit(sample)
  centres_KD = fit.cluster_centers_.astype(np.float32)
  norm_K = np.linalg.norm(centres_KD, axis=1, keepdims=True)
  return centres_KD / np.where(norm_K > 0, norm_K, 1)


def nearest_centre(x_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
  """The centre of largest cosine to each row: int64 [N]."""
  parts = [np.argmax(x_ND[i : i + _CHUNK] @ centres_KD.T, axis=1) for i in range(0, len(x_ND), _CHUNK)]
  return np.concatenate(parts)

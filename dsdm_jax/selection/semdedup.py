"""SemDeDup: near duplicates in embedding space are dropped, then rows are drawn at random (arXiv 2303.09540, sec. 3).

Embeddings are the first proxy's (see `proxies.Proxies.embeddings`); `selection.clusters` of k-means keep the comparison
within neighbourhoods. A row is dropped if its cosine to a row that comes before it in its cluster is above
`selection.duplicate_similarity`; rows far from the centre come first and so are kept, as in the paper.
"""

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import clusters
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.random import draw
from dsdm_jax.selection.registry import Budget, selector

_BLOCK = 2_048  # rows of a cluster that are compared at once


@selector('semdedup', targeted=False, seeded=True)
def semdedup(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """k random rows among those that are nobody's near duplicate."""
  del target
  return _drawn(pool, 'semdedup', budget.examples, seed)


@selector('semdedup_one_epoch', targeted=False, seeded=True)
def semdedup_one_epoch(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """As many such rows as the budget holds, each seen once, as in the DsDm paper.

  Raises:
    UserError: fewer are left.
  """
  del target
  return _drawn(pool, 'semdedup_one_epoch', budget.total, seed)


def _drawn(pool: Candidates, name: str, count: int, seed: int) -> Selection:
  options = pool.options

  def survivors() -> np.ndarray:
    embedding_ND = pool.once('embeddings', pool.proxies.embeddings)
    return np.flatnonzero(keep(embedding_ND, options.clusters, options.duplicate_similarity))

  kept = pool.once('semdedup', survivors)
  rows = draw(pool.num_rows, name, count, seed, among=kept)
  return Selection.of(rows, dropped=pool.num_rows - len(kept), similarity=options.duplicate_similarity)


def keep(x_ND: np.ndarray, count: int, similarity: float) -> np.ndarray:
  """Which rows stay: bool [N].

  Args:
    x_ND: embeddings of length one, float32.
    count: clusters; 0 takes the square root of the rows.
    similarity: the cosine above which two rows are duplicates.
  """
  centres_KD = clusters.centres(x_ND, count, prng.numpy_stream(0, 'selection', 'semdedup'))
  cluster_N = clusters.assign(x_ND, centres_KD)
  keep_N = np.ones(len(x_ND), bool)
  order = np.argsort(cluster_N, kind='stable')
  for rows in np.split(order, np.flatnonzero(np.diff(cluster_N[order])) + 1):
    nearness = x_ND[rows] @ centres_KD[cluster_N[rows[0]]]
    rows = rows[np.argsort(nearness, kind='stable')]
    keep_N[rows] = ~_near_an_earlier(x_ND[rows], similarity)
  return keep_N


def _near_an_earlier(x_MD: np.ndarray, similarity: float) -> np.ndarray:
  """Whether a row's cosine to any row before it, dropped or not, is above `similarity`: bool [M]."""
  found_M = np.zeros(len(x_MD), bool)
  for start in range(0, len(x_MD), _BLOCK):
    block_BD = x_MD[start : start + _BLOCK]
    for first in range(0, start + 1, _BLOCK):
      near_BM = block_BD @ x_MD[first : first + _BLOCK].T > similarity
      if first == start:
        near_BM &= np.tri(len(block_BD), k=-1, dtype=bool)
      found_M[start : start + len(block_BD)] |= near_BM.any(axis=1)
  return found_M

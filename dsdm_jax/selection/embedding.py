"""Rows that the proxy embeds close to a target example, after BETR (benchmark-targeted ranking, arXiv 2507.12466).

score(n) = max over target examples t of e(n) · e(t), with e of length one. The paper scores a sample like this and fits
a classifier for the rest of the pool; here every row is embedded.
"""

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import BLOCK, Budget, Candidates, Target


def embedding(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest cosine to their nearest target example, in the first proxy's embedding."""
  del seed
  return ranking.ranked(nearest(pool, target), pool, budget.examples)


def nearest(pool: Candidates, target: Target) -> np.ndarray:
  """Cosine of each row to its nearest target example, mixed over tasks; float32 [N]."""
  embedding_ND = pool.once('embeddings', pool.proxies.embeddings)

  def score(task: str) -> np.ndarray:
    target_TD = pool.once(('target embeddings', task), lambda: pool.proxies.embeddings_of(target.sequences(task)))
    pool.add_flop(2.0 * len(embedding_ND) * target_TD.size)
    parts = [(embedding_ND[i : i + BLOCK] @ target_TD.T).max(axis=1) for i in range(0, len(embedding_ND), BLOCK)]
    return np.concatenate(parts)

  return target.mixed(score)

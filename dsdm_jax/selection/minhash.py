"""MinHash: drops rows whose text overlaps an earlier one, then draws rows at random (Broder 1997; FineWeb's settings).

A row is the set of its runs of five words or token ids. The least value of a hash function over a set is equal for two
sets with probability J, their Jaccard similarity. Rows are duplicates if all eight values of one of 14 bands agree, so
with probability 1 − (1 − J⁸)¹⁴: 0.77 at J = 0.75, 0.05 at 0.5 (arXiv 2406.17557). Of each set of rows that duplicates
connect, the lowest stays.

Takes 112 operations for each word and memory of 112 bytes for each row, twice while duplicates are connected.
"""

import numpy as np
import scipy.sparse.csgraph

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ngrams
from dsdm_jax.selection.candidates import Budget, Candidates, Target
from dsdm_jax.selection.controls import drawn

_RUN, _BANDS, _EACH = 5, 14, 8


def minhash(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """k random rows of those that are left.

  Raises:
    UserError: fewer rows are left.
  """
  del target
  left = pool.once('minhash', lambda: np.flatnonzero(~duplicates(ngrams.of_pool(pool, 1 << 31))))
  return drawn(pool, 'minhash', budget.examples, seed, among=left, dropped=pool.num_rows - len(left))


def duplicates(grams: ngrams.PoolGrams) -> np.ndarray:
  """Whether each row is connected with an earlier one: bool [N]."""
  rows = grams.pool.num_rows
  band_NK, pairs = np.empty((rows, _BANDS), np.uint64), [np.zeros((2, 0), np.int64)]
  for start, stop, block in grams:
    band_NK[start:stop] = bands(block)
  without_N = (band_NK == 0).all(axis=1)
  for band_N in band_NK.T:
    order = np.argsort(band_N, kind='stable')
    same = (band_N[order[1:]] == band_N[order[:-1]]) & ~without_N[order[1:]]
    pairs.append(np.stack([order[:-1][same], order[1:][same]]))
  at_2E = np.concatenate(pairs, axis=1)
  graph = scipy.sparse.coo_matrix((np.ones(at_2E.shape[1], bool), tuple(at_2E)), (rows, rows))
  component_N = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
  left = np.ones(rows, bool)
  left[np.unique(component_N, return_index=True)[1]] = False
  return left


def bands(texts: ngrams.Grams) -> np.ndarray:
  """A hash of each band of each text: uint64 [B, 14]; all 0 for a text without words.

  A text of fewer than five words is one run.
  """
  units_B, unit_M = np.diff(texts.first_B), texts.uni_M.astype(np.uint64) + np.uint64(1)
  place_M = np.arange(len(unit_M)) - np.repeat(texts.first_B[:-1], units_B)
  left_M = np.repeat(units_B, units_B) - place_M  # words from here to the end of the text
  hash_M = np.zeros(len(unit_M), np.uint64)
  for step in range(_RUN):
    ahead_M = np.zeros_like(unit_M)
    ahead_M[: max(0, len(unit_M) - step)] = unit_M[step:]
    hash_M = ngrams.mix(hash_M * ngrams.ODD + np.where(left_M > step, ahead_M, 0))
  hash_R = hash_M[(left_M >= _RUN) | (place_M == 0)]
  runs_B = np.maximum(units_B - _RUN + 1, np.minimum(units_B, 1))
  some = runs_B > 0
  first = (np.cumsum(runs_B) - runs_B)[some]
  band_BK = np.zeros((len(units_B), _BANDS), np.uint64)
  if not len(first):
    return band_BK
  rng = prng.numpy_stream(0, 'selection', 'minhash')
  factor_K, shift_K = rng.integers(2**64, size=(2, _BANDS * _EACH), dtype=np.uint64)
  for k in range(_BANDS * _EACH):
    least = np.minimum.reduceat(hash_R * (factor_K[k] | np.uint64(1)) + shift_K[k], first)
    band = band_BK[some, k // _EACH]
    band_BK[some, k // _EACH] = ngrams.mix(band * ngrams.ODD + least)
  return band_BK

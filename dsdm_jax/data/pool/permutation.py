"""The order of documents and rows: a seeded permutation of any size, looked up by index."""

import numpy as np

from dsdm_jax.data.order.schedule import permute

STORED = 2**24  # up to this size the permutation is drawn and kept, above it is computed


class Shuffle:
  """A permutation of [0, size).

  Args:
    size: at least 0.
    rng: what it is drawn from.
  """

  def __init__(self, size: int, rng: np.random.Generator):
    self.size = size
    self.stored = size <= STORED
    if self.stored:
      self._order = rng.permutation(size)
      self._place = np.empty(size, np.int64)
      self._place[self._order] = np.arange(size)
    else:
      self._key = rng.integers(0, 2**64, 8, np.uint64)

  def place(self, index_B: np.ndarray) -> np.ndarray:
    """Where the things numbered `index_B` come to stand: int64 [B]."""
    return self._place[index_B] if self.stored else permute(index_B, self.size, self._key)

  def at(self, place_B: np.ndarray) -> np.ndarray:
    """What comes to stand at `place_B`: int64 [B]; only where the permutation is `stored`."""
    return self._order[place_B]

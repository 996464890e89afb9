"""Seeded permutations that are looked up by index: the order of documents, of rows, and of training examples."""

import numpy as np

STORED = 2**24  # permutations up to this size are drawn and stored; larger ones are computed
ROUNDS = 8  # of the Feistel network


def permute(index_B: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
  """Image of `index_B` (int64, each in [0, size)) under the permutation of [0, size) that `key` names.

  An alternating Feistel network on pairs (a, b) with a·b just above `size`; what falls outside goes through again.

  Args:
    index_B: where to look.
    size: of the permutation, at least 1.
    key: uint64 [8].
  """
  high = np.uint64(int(np.ceil(np.sqrt(size))))
  low = np.uint64(-(-size // int(high)))
  image_B = np.asarray(index_B).astype(np.uint64)
  todo = np.arange(len(image_B))
  while len(todo):
    a, b = np.divmod(image_B[todo], low)
    for round in range(0, ROUNDS, 2):
      a = (a + _mix(b, key[round])) % high
      b = (b + _mix(a, key[round + 1])) % low
    image_B[todo] = a * low + b
    todo = todo[image_B[todo] >= size]
  return image_B.astype(np.int64)


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
  """The finalizer of SplitMix64 over x + key; below 2⁶³, so that a sum does not wrap."""
  x = x + key
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


class Shuffle:
  """A seeded permutation of [0, size).

  Args:
    size: at least 0.
    rng: source of randomness.
  """

  def __init__(self, size: int, rng: np.random.Generator):
    self.size = size
    self.stored = size <= STORED
    if self.stored:
      self._order = rng.permutation(size)
      self._place = np.empty(size, np.int64)
      self._place[self._order] = np.arange(size)
    else:
      self._key = rng.integers(0, 2**64, ROUNDS, np.uint64)

  def place(self, index_B: np.ndarray) -> np.ndarray:
    """New positions of the items `index_B`: int64 [B]."""
    return self._place[index_B] if self.stored else permute(index_B, self.size, self._key)

  def at(self, place_B: np.ndarray) -> np.ndarray:
    """Items at the new positions `place_B`: int64 [B]; only if the permutation is `stored`."""
    return self._order[place_B]

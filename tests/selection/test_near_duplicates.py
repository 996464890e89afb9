"""What the bench of near duplicates takes for the truth: counted by hand."""

import numpy as np
import pytest

from dsdm_jax.bench import near_duplicates
from dsdm_jax.selection import summaries


def words(first: int, count: int) -> str:
  return ' '.join(f'w{i}' for i in range(first, first + count))


def test_copies_find_their_originals():
  originals = [words(0, 40), words(100, 40), words(200, 5)]
  copies = [words(100, 40), words(10, 20) + ' ' + words(300, 20), words(400, 30), 'too short']
  found = near_duplicates._originals(copies, originals)
  assert [at for at, _ in found[:2]] == [1, 0]
  # 33 runs of eight in forty words; the second copy shares those of its first twenty.
  assert [share for _, share in found] == pytest.approx([1, 13 / 33, 0, 0])


def test_shared_runs_are_counted_once():
  tokens_KL = np.array(
    [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 0, 2, 3, 4, 5, 6, 7, 8, 9], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]]
  )
  runs = [np.unique(row) for row in summaries.run_hashes(tokens_KL)]
  assert near_duplicates._matrix(runs, runs).toarray().tolist() == [[3, 1, 0], [1, 3, 0], [0, 0, 1]]

"""Cutting documents into rows loses no token and doubles none, and remembers where each came from."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.data import rows

DOCUMENTS = st.lists(st.tuples(st.lists(st.integers(3, 999), max_size=30), st.integers(0, 2)), min_size=1, max_size=20)


@given(DOCUMENTS, st.integers(1, 17))
def test_rows_are_the_stream(documents: list[tuple[list[int], int]], length: int):
  ids, sources = zip(*documents, strict=True)
  stream = [t for document in ids for t in (*document, 1)]
  owner = [(d, offset) for d, document in enumerate(ids) for offset in range(len(document) + 1)]
  made = rows.cut(ids, sources, length, np.dtype(np.uint16))
  count = len(stream) // length
  assert made.tokens_NL.shape == (count, length)
  assert made.tokens_NL.ravel().tolist() == stream[: count * length]
  for n in range(count):
    assert (made.document_N[n], made.offset_N[n]) == owner[n * length]
    in_row = [sources[d] for d, _ in owner[n * length : (n + 1) * length]]
    assert in_row.count(made.source_N[n]) == max(map(in_row.count, in_row))
  assert (made.planted_N == -1).all()
  assert [a.dtype for a in (made.document_N, made.offset_N, made.source_N, made.planted_N)] == [
    np.int32, np.int32, np.int8, np.int32,
  ]  # fmt: skip


def test_by_hand():
  made = rows.cut([[5, 6, 7], [8], [9, 9, 9, 9]], [0, 1, 1], 4, np.dtype(np.uint16))
  assert made.tokens_NL.tolist() == [[5, 6, 7, 1], [8, 1, 9, 9]]  # 9 9 1 is left over
  assert made.document_N.tolist() == [0, 1]
  assert made.offset_N.tolist() == [0, 0]
  assert made.source_N.tolist() == [0, 1]


def test_planted_rows_hold_nothing_else():
  pool = rows.cut([[5, 6, 7, 8, 9]], [0], 3, np.dtype(np.uint16))
  made = rows.plant(pool, [[1, 50, 51], [1, 60]], document=1, source=1)
  assert made.tokens_NL.tolist() == [[5, 6, 7], [8, 9, 1], [1, 50, 51], [1, 60, 1]]
  assert made.tokens_NL.dtype == np.uint16
  assert made.planted_N.tolist() == [-1, -1, 0, 1]
  assert made.document_N.tolist() == [0, 0, 1, 2]
  assert made.source_N.tolist() == [0, 0, 1, 1]
  assert made.offset_N.tolist() == [0, 3, 0, 0]

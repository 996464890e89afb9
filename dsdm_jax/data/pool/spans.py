"""The tokens of each document among the rows of a pool, and sums of the rows' values over them."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Rows(Protocol):
  """What `Spans` reads of a pool."""

  num_rows: int
  length: int

  @property
  def document_N(self) -> np.ndarray: ...
  @property
  def offset_N(self) -> np.ndarray: ...


class Spans:
  """Documents and rows in the order of the stream: rows laid end to end before they were shuffled.

  Args:
    size_D: tokens of each document, with its end mark.
    rows: of the pool.
    planted: number of documents at the end that fill one row each.
    packed: whether documents follow each other in rows. Otherwise each has a row of its own, in which it is cut or
      padded, and all of the row counts as the document's.

  Attributes:
    row_S: row of the pool at each place of the stream.
    begin_D, end_D: the tokens of each document in the stream, as far as they are in a row.
    whole_D: whether all tokens of a document are in a row.
    own_D: tokens of each document that are in a row, without padding.
  """

  def __init__(self, size_D: np.ndarray, rows: Rows, planted: int = 0, packed: bool = True):
    stream, self.length = rows.num_rows - planted, rows.length
    size_D = np.append(size_D[: len(size_D) - planted], np.full(planted, self.length))
    place_D = (size_D if packed else np.full(len(size_D), self.length))[: len(size_D) - planted]
    edge_D = np.concatenate([[0], np.cumsum(place_D)])
    edge_D = np.append(np.minimum(edge_D, stream * self.length), np.arange(stream + 1, rows.num_rows + 1) * self.length)
    self.begin_D, self.end_D = edge_D[:-1], edge_D[1:]
    self.own_D = np.minimum(self.tokens_D, size_D)
    self.whole_D = self.own_D == size_D
    # A planted document begins in the row that it fills, at offset 0.
    place_N = (self.begin_D[rows.document_N] + rows.offset_N) // self.length
    self.row_S = np.empty(rows.num_rows, np.int64)
    self.row_S[place_N] = np.arange(rows.num_rows)

  @property
  def tokens_D(self) -> np.ndarray:
    """Places of rows that are each document's, with end mark and padding: int64 [D]."""
    return self.end_D - self.begin_D

  def sums(self, value_N: np.ndarray) -> np.ndarray:
    """Σ over rows of value · (share of the row's tokens that are the document's): float64 [D].

    Values of a row are spread evenly over its tokens, so sums over all documents are sums over all rows. Documents with
    a token in a row whose value is NaN have NaN.
    """
    missing_N = np.isnan(value_N)
    if missing_N.any():
      sum_D = self.sums(np.where(missing_N, 0, value_N))
      sum_D[self.sums(missing_N.astype(np.float64)) > 0] = np.nan
      return sum_D
    value_S = np.append(value_N[self.row_S].astype(np.float64), 0)
    before_S = np.concatenate([[0], np.cumsum(value_S[:-1])])

    def until(token_D: np.ndarray) -> np.ndarray:
      row_D, column_D = np.divmod(token_D, self.length)
      return before_S[row_D] + value_S[row_D] * (column_D / self.length)

    return until(self.end_D) - until(self.begin_D)

  def means(self, value_N: np.ndarray) -> np.ndarray:
    """Mean over a document's tokens of the values of their rows; 0 for one without tokens in a row: float64 [D]."""
    return self.sums(value_N) * self.length / np.maximum(self.tokens_D, 1)

  def shares(self, documents: np.ndarray) -> np.ndarray:
    """The share of each row's tokens that are of these documents: float64 [N]."""
    chosen_D = np.zeros(len(self.begin_D), np.int64)
    chosen_D[documents] = 1
    before_D = np.concatenate([[0], np.cumsum(chosen_D * self.tokens_D)])
    edge_S = np.arange(len(self.row_S) + 1) * self.length
    document_S = np.searchsorted(self.begin_D, edge_S, side='right') - 1
    until_S = before_D[document_S] + chosen_D[document_S] * np.minimum(edge_S, self.end_D[document_S])
    until_S -= chosen_D[document_S] * self.begin_D[document_S]
    share_N = np.empty(len(self.row_S))
    share_N[self.row_S] = np.diff(until_S) / self.length
    return share_N

  def rows_of(self, documents: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that hold tokens of documents, in their order: (place in `documents`, row), int64 [R] each."""
    document_M = np.asarray(documents, np.int64)
    first_M = self.begin_D[document_M] // self.length
    count_M = np.where(self.tokens_D[document_M] > 0, -(-self.end_D[document_M] // self.length) - first_M, 0)
    place_R = np.repeat(np.arange(len(document_M)), count_M)
    nth_R = np.arange(len(place_R)) - np.repeat(np.cumsum(count_M) - count_M, count_M)
    return place_R, self.row_S[first_M[place_R] + nth_R]

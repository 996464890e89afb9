"""The tokens of each document among the rows of a pool, and sums of the rows' values over them."""

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

  Attributes:
    row_S: row of the pool at each place of the stream.
    begin_D, end_D: the tokens of each document in the stream, as far as they are in a row.
  """

  def __init__(self, size_D: np.ndarray, rows: Rows, planted: int = 0):
    stream, self.length = rows.num_rows - planted, rows.length
    edge_D = np.concatenate([[0], np.cumsum(size_D[: len(size_D) - planted])])
    edge_D = np.append(np.minimum(edge_D, stream * self.length), np.arange(stream + 1, rows.num_rows + 1) * self.length)
    self.begin_D, self.end_D = edge_D[:-1], edge_D[1:]
    # A planted document begins in the row that it fills, at offset 0.
    place_N = (self.begin_D[rows.document_N] + rows.offset_N) // self.length
    self.row_S = np.empty(rows.num_rows, np.int64)
    self.row_S[place_N] = np.arange(rows.num_rows)

  @property
  def tokens_D(self) -> np.ndarray:
    """Tokens of each document that are in a row, with its end mark: int64 [D]."""
    return self.end_D - self.begin_D

  def sums(self, value_N: np.ndarray) -> np.ndarray:
    """Σ over rows of value · (share of the row's tokens that are the document's): float64 [D].

    Values of a row are spread evenly over its tokens, so sums over all documents are sums over all rows.
    """
    value_S = np.append(value_N[self.row_S].astype(np.float64), 0)
    before_S = np.concatenate([[0], np.cumsum(value_S[:-1])])

    def until(token_D: np.ndarray) -> np.ndarray:
      row_D, column_D = np.divmod(token_D, self.length)
      return before_S[row_D] + value_S[row_D] * (column_D / self.length)

    return until(self.end_D) - until(self.begin_D)

  def rows_of(self, document: int) -> np.ndarray:
    """Rows that hold tokens of a document, in its order."""
    first, last = self.begin_D[document] // self.length, -(-self.end_D[document] // self.length)
    return self.row_S[first:last]

"""Documents to rows: token streams cut into exactly L tokens, with a note of where each row came from."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsdm_jax.data.vocabulary import EOS


@dataclasses.dataclass(frozen=True)
class Rows:
  """N rows and their origin.

  Attributes:
    tokens_NL: uint16 or int32.
    document_N: int32, index of the document that holds the row's first token.
    offset_N: int32, place of that token inside its document.
    source_N: int8, index of the source that gave most of the row's tokens; the lowest index of equals.
    planted_N: int32, index of the planted target example that fills the row, −1 elsewhere.
  """

  tokens_NL: np.ndarray
  document_N: np.ndarray
  offset_N: np.ndarray
  source_N: np.ndarray
  planted_N: np.ndarray


def cut(documents: Sequence[Sequence[int]], sources: Sequence[int], length: int, dtype: np.dtype) -> Rows:
  """Joins documents, an end mark after each, and cuts the stream; what is left over at the end is dropped.

  Args:
    documents: token ids of each document, without end marks.
    sources: for each document the index of its source, below 128.
    length: L.
    dtype: of the tokens.
  """
  size_M = np.array([len(ids) + 1 for ids in documents], np.int64)
  start_M = np.concatenate([[0], np.cumsum(size_M)])
  count = int(start_M[-1]) // length
  stream = np.empty(int(start_M[-1]), dtype)
  for start, ids in zip(start_M, documents, strict=False):
    stream[start : start + len(ids)] = ids
    stream[start + len(ids)] = EOS
  first_N = np.arange(count, dtype=np.int64) * length
  document_N = np.searchsorted(start_M, first_N, side='right') - 1
  source_NL = np.repeat(np.asarray(sources, np.int8), size_M)[: count * length].reshape(count, length)
  share_SN = np.stack([(source_NL == s).sum(axis=1) for s in range(max(sources, default=0) + 1)])
  return Rows(
    tokens_NL=stream[: count * length].reshape(count, length),
    document_N=document_N.astype(np.int32),
    offset_N=(first_N - start_M[document_N]).astype(np.int32),
    source_N=share_SN.argmax(axis=0).astype(np.int8),
    planted_N=np.full(count, -1, np.int32),
  )


def shuffle(rows: Rows, rng: np.random.Generator) -> Rows:
  """The same rows in random order: any range of rows is then a sample of the pool, and an index off by one shows."""
  order_N = rng.permutation(len(rows.tokens_NL))
  return Rows(**{field.name: getattr(rows, field.name)[order_N] for field in dataclasses.fields(Rows)})


def plant(rows: Rows, sequences: Sequence[Sequence[int]], document: int, source: int) -> Rows:
  """Appends a row for each sequence: it is repeated until the row is full, so the row holds nothing else.

  Args:
    rows: the pool so far.
    sequences: token ids of target examples, each beginning with the end mark, at most L of them, without padding.
    document: index of the first of them as a document.
    source: index of their source.
  """
  length = rows.tokens_NL.shape[1]
  count = len(sequences)
  tokens_PL = np.stack([np.resize(np.asarray(s, rows.tokens_NL.dtype), length) for s in sequences])
  return Rows(
    tokens_NL=np.concatenate([rows.tokens_NL, tokens_PL]),
    document_N=np.concatenate([rows.document_N, np.arange(document, document + count, dtype=np.int32)]),
    offset_N=np.concatenate([rows.offset_N, np.zeros(count, np.int32)]),
    source_N=np.concatenate([rows.source_N, np.full(count, source, np.int8)]),
    planted_N=np.concatenate([rows.planted_N, np.arange(count, dtype=np.int32)]),
  )

"""Selections of whole documents (`selection.unit = document`): as many as fit into the tokens of the rows asked for.

Documents are ranked by the mean over their tokens of what the method gives to rows. An arm trains on the rows that hold
selected documents; the weight of a row is the share of its tokens that are theirs. Documents that are not whole in the
rows of the pool are not selected.
"""

from typing import Any

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.layout import fitting
from dsdm_jax.data.pool.spans import Spans
from dsdm_jax.errors import UserError
from dsdm_jax.selection import ranking
from dsdm_jax.selection.candidates import Candidates


def best(score_N: np.ndarray, pool: Candidates, count: int, **provenance: Any) -> Selection:
  """The documents with the highest mean score per token; ties go to the earlier document."""
  ranking.check_finite(score_N)
  spans = pool.pool.spans
  mean_D = spans.means(score_N).astype(np.float32)
  return _selection(np.argsort(-mean_D, kind='stable'), mean_D, pool, count, provenance)


def drawn(pool: Candidates, name: str, count: int, seed: int, among: np.ndarray | None, **provenance: Any) -> Selection:
  """Random documents, of which most tokens are in the rows `among`."""
  spans = pool.pool.spans
  order = prng.numpy_stream(seed, 'selection', name).permutation(len(spans.tokens_D))
  if among is not None:
    order = order[_mostly_in(pool, among)[order]]
  return _selection(order, None, pool, count, provenance)


def holds(pool: Candidates, count: int, among: np.ndarray) -> bool:
  """Whether the documents that `drawn` takes have the tokens of `count` rows, without caps of sources."""
  spans, budget = pool.pool.spans, count * pool.pool.length
  open_D = _open(pool) & _mostly_in(pool, among) & (spans.tokens_D <= budget)
  return int(spans.tokens_D[open_D].sum()) >= budget


def of_rows(rows: Selection, pool: Candidates) -> Selection:
  """Documents by the share of their tokens in the rows that a method selected; of equal shares, those in its best rows.

  For methods that select row by row and have no score for the others.
  """
  spans, size = pool.pool.spans, rows.size
  inside_N, place_N = np.zeros(pool.num_rows), np.zeros(pool.num_rows)
  inside_N[rows.rows] = 1
  np.maximum.at(place_N, rows.rows, 1 - np.arange(size) / size)
  share_D, place_D = spans.means(inside_N), spans.means(place_N)
  order = np.lexsort((-place_D, -share_D.round(6)))
  return _selection(order[share_D[order] > 0], share_D.astype(np.float32), pool, size, rows.provenance)


def _selection(
  order_D: np.ndarray, score_D: np.ndarray | None, pool: Candidates, count: int, provenance: dict[str, Any]
) -> Selection:
  """The first of `order_D` that fit into the tokens of `count` rows and into the caps of their sources."""
  spans, budget = pool.pool.spans, count * pool.pool.length
  order_D = order_D[_open(pool)[order_D]]
  if pool.options.source_cap < 1:
    source_D = pool.pool.documents.column('source')[order_D]
    limit = ranking.rows_of_share(pool.options.source_cap, budget)
    kept = [(at := np.flatnonzero(source_D == s))[_fit(order_D[at], spans, limit)] for s in np.unique(source_D)]
    order_D = order_D[np.sort(np.concatenate([np.empty(0, np.int64), *kept]))]
  documents = order_D[_fit(order_D, spans, budget)]
  if not len(documents):
    raise UserError(
      f'no whole document fits into selection.examples = {count} rows of {pool.pool.length} tokens; raise it, or set '
      '--config.selection.unit=row'
    )
  share_N = spans.shares(documents)
  rows = np.flatnonzero(share_N)
  best_N = np.full(pool.num_rows, len(documents))  # place of the best document in each row
  place_R, row_R = spans.rows_of(documents)
  np.minimum.at(best_N, row_R, place_R)
  rows = rows[np.argsort(best_N[rows], kind='stable')]
  tokens = int(spans.own_D[documents].sum())
  facts = {**provenance, 'unit': 'document', 'documents': len(documents), 'tokens': tokens}
  score_M = None if score_D is None else score_D[documents]
  return Selection('', rows, share_N[rows].astype(np.float32), facts, documents=documents, document_scores=score_M)


def _open(pool: Candidates) -> np.ndarray:
  """Whether a document may be selected, bool [D]: it is whole in the rows, and none of its rows is masked."""
  spans = pool.pool.spans
  return spans.whole_D & ~(spans.means(pool.masked_N.astype(np.float64)) > 0)


def _mostly_in(pool: Candidates, rows: np.ndarray) -> np.ndarray:
  """Whether most tokens of a document are in these rows, bool [D]."""
  inside_N = np.zeros(pool.num_rows)
  inside_N[rows] = 1
  return pool.pool.spans.means(inside_N) > 0.5


def _fit(documents: np.ndarray, spans: Spans, tokens: int) -> np.ndarray:
  return fitting(spans.tokens_D[documents], tokens, len(documents))

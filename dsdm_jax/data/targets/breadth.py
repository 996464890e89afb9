"""Breadth: the pool itself as one more target, so that rows chosen for tasks serve what nobody asked for too.

Random documents of the pool are held out: no selection takes a row with a token of theirs. They are the task `breadth`,
which has the weight `targets.breadth` beside the other tasks, whose weight is one. Half of the documents are target
examples, half are the holdout that models are evaluated on (`targets.holdout_share`). Documents with text of a target
or benchmark are not among them.
"""

from typing import Any

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.pool.layout import fitting
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.pool.vocabulary import unmarked
from dsdm_jax.errors import UserError

SHARE, MOST = 0.05, 2_048  # of the pool's rows, and in rows: how much text is held out, about
_FEWEST = 4  # documents


def draw(pool: Pool, masked_N: np.ndarray, seed: int) -> np.ndarray:
  """Documents to hold out, in random order: int64.

  Args:
    masked_N: rows of whose documents none is drawn.
    seed: `targets.seed`.

  Raises:
    UserError: the pool has too few documents.
  """
  spans = pool.spans
  free_D = (spans.means(masked_N.astype(np.float64)) == 0) & (spans.tokens_D > 1)
  free_D[len(free_D) - len(pool.planted) :] = False
  order = np.flatnonzero(free_D)[prng.numpy_stream(seed, 'breadth').permutation(int(free_D.sum()))]
  limit = int(min(SHARE * pool.num_rows, MOST) * pool.length)
  documents = order[fitting(spans.tokens_D[order], limit, len(order))]
  if len(documents) < _FEWEST:
    raise UserError(
      f'targets.breadth holds out {SHARE:.0%} of the pool, and this holds {len(documents)} documents, fewer than '
      f'{_FEWEST}; give the pool more or shorter documents (pool.max_document_bytes), or set targets.breadth=0'
    )
  return documents


def pieces(
  pool: Pool, documents: np.ndarray, holdout_share: float
) -> tuple[dict[str, list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]], int]:
  """(tokens_L, weights_L, record) of each piece of the held-out documents by split, as in `targets.Examples`.

  A piece has at most L − 1 tokens after the mark that begins a text. The last of a document is left out if it has less
  than a quarter, and so are pieces of whose tokens the loss counts none.

  Args:
    pool: of the documents.
    documents: as `draw` returns them. The first are the holdout.
    holdout_share: share of the documents.

  Returns:
    Split → pieces, and the number of short ones that are left out.
  """
  room, encoder = pool.length - 1, pool.encoder
  held = min(max(1, round(holdout_share * len(documents))), len(documents) - 1)
  result: dict[str, list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]] = {'target': [], 'holdout': []}
  short = 0
  texts = zip(pool.document_tokens(documents), pool.document_weights(documents), strict=True)
  for place, (tokens, counted) in enumerate(texts):
    name = pool.documents[int(documents[place])]['id']
    first = tokens[:1].tolist()
    marks = len(first) - len(unmarked(encoder, first))  # begin marks of the document: each piece gets its own
    tokens, counted = tokens[marks:], counted[marks:]
    for number, start in enumerate(range(0, len(tokens), room)):
      part, weight = tokens[start : start + room], counted[start : start + room]
      if not weight.any():
        continue
      if start and len(part) < room // 4:
        short += 1
        continue
      tokens_L, weights_L = np.full(pool.length, encoder.pad, np.int32), np.zeros(pool.length, np.float32)
      tokens_L[0] = encoder.begin
      tokens_L[1 : 1 + len(part)], weights_L[1 : 1 + len(part)] = part, weight
      record = {'id': f'{name}#{number}', 'context': '', 'answer': pool.text_of(part), 'document': name}
      record |= {'starts': [0], 'shots_dropped': 0, 'tokens_cut': 0}
      result['holdout' if place < held else 'target'].append((tokens_L, weights_L, record))
  return result, short

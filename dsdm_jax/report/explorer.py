"""Packs the rows of the explorer into the page: columns and text as two gzipped blocks that the browser unpacks.

`columns` is four bytes with the length of the header, the header as JSON, then one array for each of the header's
`columns`, of its type and with one entry per row; all little-endian. `text` is the text of the rows in UTF-8, separated
by NUL. `templates/explorer.js` reads both.
"""

import base64
import dataclasses
import gzip
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsdm_jax.report import figures, formatting, tables
from dsdm_jax.report.report_data import Evidence

_EXTREMES = 1_000  # best rows of each target that are always packed, and as many worst rows
_QUANTILES = 513  # quantiles of the pool's scores, for percentiles
_CODES = 254  # lengths of intervals in a byte, from the largest to a thousandth of it in steps of 2.8 %
_SHRINKS = 6  # characters per byte in the page, at most
_LEAST_CHARACTERS = 40  # of a row's text, for any number of rows


@dataclasses.dataclass(frozen=True)
class Packed:
  """The data of the explorer.

  Attributes:
    columns, text: base64 of gzip.
    row_N: the rows, in the page's order.
    characters: length at which their text is cut, or None if it is complete.
  """

  columns: str
  text: str
  row_N: np.ndarray
  characters: int | None


def pack(shown: Evidence, most_rows: int, most_bytes: int) -> Packed:
  """Packs the rows of `choose`, with scores, arms and text.

  Args:
    shown: what was read from the artifacts.
    most_rows: maximum number of rows.
    most_bytes: of text in the page. If there is more, all texts are cut at the same number of characters.
  """
  row_N = choose(shown, most_rows)
  # A pool can have many documents, so only those of these rows are looked up.
  document_D, inverse_N = np.unique(shown.document_N[row_N], return_inverse=True)
  names = [str(shown.documents[d]['id']) for d in document_D]
  # Rows of one document, and documents with similar names, are neighbours, so that gzip compresses them well.
  rank_D = np.empty(len(names), np.int64)
  rank_D[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
  order_N = np.lexsort((row_N, shown.offset_N[row_N], rank_D[inverse_N]))
  row_N, inverse_N = row_N[order_N], inverse_N[order_N]
  text, characters = _fitting([shown.text(int(n)).replace('\0', '\u2400') for n in row_N], most_bytes)
  return Packed(_encoded(_columns(shown, row_N, inverse_N, names, characters)), text, row_N, characters)


def choose(shown: Evidence, most: int) -> np.ndarray:
  """At most `most` rows of the pool, ascending: all, or else by priority.

  First the rows of target examples, then the best and worst rows of each target, then rows that arms selected (in
  turns, in the order of each selection), then evenly spaced rows.
  """
  count = len(shown.source_N)
  if count <= most:
    return np.arange(count)
  orders = [np.argsort(-score_N, kind='stable') for score_N in shown.scores.values()]
  reach = min(_EXTREMES, most // (4 * max(1, len(orders))))
  picked = [e.rows_M for examples in shown.examples.values() for e in examples]
  picked += [end for order_N in orders for end in (order_N[:reach], order_N[::-1][:reach])]
  selected = [np.asarray(s.rows)[: most + 1] for s in shown.selected]
  if selected:
    place = np.concatenate([np.arange(len(rows)) for rows in selected])
    picked.append(np.concatenate(selected)[np.argsort(place, kind='stable')])
  picked.append(np.linspace(0, count - 1, most).astype(np.int64))
  row_M = np.concatenate(picked)
  _, first = np.unique(row_M, return_index=True)
  return np.sort(row_M[np.sort(first)[:most]])


def _columns(
  shown: Evidence, row_N: np.ndarray, document_N: np.ndarray, names: Sequence[str], characters: int | None
) -> bytes:
  """The bytes of `columns`; `document_N` are indices into `names`."""
  columns: list[tuple[str, np.ndarray]] = [('row', _narrowed(row_N)), ('document', _narrowed(document_N))]
  described: list[dict[str, Any]] = []
  for name in tables.targets(shown):
    z_N = figures.standardised(shown.scores[name])
    z_N = np.where(np.isnan(z_N), np.nanmin(z_N), z_N)  # the page says that rows without a score have the lowest
    step = max(float(np.abs(z_N).max()), 1e-9) / 32_767
    columns.append((f'score {name}', np.rint(z_N[row_N] / step).astype('<i2')))
    quantiles = _rounded(np.quantile(z_N, np.linspace(0, 1, _QUANTILES)))
    title = formatting.task_heading(name)
    described.append({'id': name, 'name': title, 'step': step, 'quantiles': quantiles})
  for target in described:
    if target['id'] in shown.reach:
      spread = float(np.nanstd(shown.scores[target['id']], dtype=np.float64)) or 1.0
      code_N, target['reach'] = _lengths(np.nan_to_num(shown.reach[target['id']][row_N] / spread))
      columns.append((f'reach {target["id"]}', code_N))
  columns += [('source', _narrowed(shown.source_N[row_N])), ('planted', _narrowed(shown.planted_N[row_N] >= 0))]
  arms: list[dict[str, Any]] = []
  for arm, label in tables.arms(shown).items():
    draws, times_N = tables.draws(shown, arm), np.zeros(len(shown.source_N), np.int64)
    for drawn in draws:
      times_N[drawn] += 1
    columns.append((f'arm {len(arms)}', _narrowed(times_N[row_N])))
    arms.append({'name': label, 'selections': len(draws), 'rows': int((times_N > 0).sum())})
  columns.sort(
    key=lambda column: -column[1].itemsize
  )  # the widest first, so that each begins at a multiple of its width
  groups = tables.groups(shown, len(figures.SOURCE_COLOURS))
  header = {
    'rows': len(row_N),
    'pool': len(shown.source_N),
    'characters': characters,
    'documents': names,
    'sources': [{'name': name, 'group': int(g)} for name, g in zip(shown.sources, groups.group_S, strict=True)],
    'groups': [
      {'name': name, 'colour': colour}
      for name, colour in zip(groups.names, figures.source_colours(len(groups.names)), strict=True)
    ],
    'pool_sources': np.bincount(shown.source_N, minlength=len(shown.sources)).tolist(),
    'targets': described,
    'arms': arms,
    'examples': [
      {'target': t, 'context': e.context, 'answer': e.answer, 'rows': e.rows_M.tolist(), 'scores': _rounded(e.score_M)}
      for t, examples in shown.examples.items()
      for e in examples
    ],
    'columns': [[name, array.dtype.kind + str(array.dtype.itemsize)] for name, array in columns],
  }
  head = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
  head += b' ' * (-(len(head) + 4) % 8)
  return len(head).to_bytes(4, 'little') + head + b''.join(array.tobytes() for _, array in columns)


def _narrowed(values_N: np.ndarray) -> np.ndarray:
  """Counts or indices in the narrowest type of `explorer.js` that holds all of them: 1, 2 or 4 bytes, or float64."""
  largest = int(values_N.max(initial=0))
  assert int(values_N.min(initial=0)) >= 0 and largest <= 2**53
  return values_N.astype(next((f'<u{width}' for width in (1, 2, 4) if largest < 256**width), '<f8'))


def _lengths(length_N: np.ndarray) -> tuple[np.ndarray, float]:
  """Codes, uint8, and the largest length: code c > 0 means largest · 1000^((c − 255) / 254), 0 means no interval."""
  largest = max(float(length_N.max(initial=0)), 1e-9)
  part_N = np.maximum(length_N / largest, 1e-3)
  code_N = 1 + np.rint(_CODES * (1 + np.log10(part_N) / 3))
  return np.where(length_N > 0, code_N, 0).astype('u1'), largest


def _rounded(values: np.ndarray) -> list[float]:
  return [float(f'{v:.4g}') for v in values]


def _fitting(texts: Sequence[str], most_bytes: int) -> tuple[str, int | None]:
  """(base64 of the gzipped texts, the length at which they are cut); at most `most_bytes` unless too little is left."""
  longest = max(map(len, texts), default=0)
  # Text hardly ever compresses by a larger factor, so longer cuts need not be tried.
  characters = min(longest, max(_LEAST_CHARACTERS, _SHRINKS * most_bytes // max(1, len(texts))))
  while True:
    packed = _encoded('\0'.join(text[:characters] for text in texts).encode('utf-8', 'replace'))
    if len(packed) <= most_bytes or characters <= _LEAST_CHARACTERS:
      return packed, characters if characters < longest else None
    # The beginnings of rows compress best, so this approaches the limit from above and takes a few rounds.
    characters = max(_LEAST_CHARACTERS, min(characters - 1, int(characters * most_bytes / len(packed) * 0.98)))


def _encoded(data: bytes) -> str:
  # Without a date, so that equal rows give an equal page.
  return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()

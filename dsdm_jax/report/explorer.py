"""Packs the explorable rows into the page: columns and text as two gzipped blocks that the browser opens by itself.

`columns` is a header, four bytes that give its length first (little-endian, as all that follows), then arrays in the
order of the header's `columns`, each of its type and of one entry for each row (or as many as the header says). `text`
is the rows' text in UTF-8, set apart by NUL. `templates/explorer.js` is the other side of this.
"""

import base64
import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.report import figures, formatting, tables
from dsdm_jax.report.report_data import Evidence

_EXTREMES = 1_000  # best and as many worst rows of each target that are always there
_QUANTILES = 513  # points at which the pool's scores are told, for percentiles
_CODES = 254  # lengths of intervals that a byte tells apart, from the largest to a thousandth of it: in steps of 2.8 %
_SHRINKS = 6  # characters for each byte in the page, at most
_LEAST_CHARACTERS = 40  # of a row's text, however many rows there are


@dataclasses.dataclass(frozen=True)
class Packed:
  """What stands in the page.

  Attributes:
    columns, text: base64 of gzip.
    row_N: the rows, in the page's order.
    characters: where their text is cut, or None where all of it is there.
  """

  columns: str
  text: str
  row_N: np.ndarray
  characters: int | None


def pack(shown: Evidence, most_rows: int, most_bytes: int) -> Packed:
  """The rows that `choose` takes, with scores, arms and text.

  Args:
    shown: what was read from the artifacts.
    most_rows: at most so many rows.
    most_bytes: of text in the page. Where it would be more, each row's text is cut at the same number of characters.
  """
  row_N = choose(shown, most_rows)
  # Of a large pool only the documents of these rows are looked up.
  document_D, inverse_N = np.unique(shown.document_N[row_N], return_inverse=True)
  names = [str(shown.documents[d]['id']) for d in document_D]
  # Rows of one document side by side, then documents of like names: gzip sees what they have in common.
  rank_D = np.empty(len(names), np.int64)
  rank_D[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
  order_N = np.lexsort((row_N, shown.offset_N[row_N], rank_D[inverse_N]))
  row_N, inverse_N = row_N[order_N], inverse_N[order_N]
  text, characters = _fitting([shown.text(int(n)).replace('\0', '\u2400') for n in row_N], most_bytes)
  return Packed(_encoded(_columns(shown, row_N, inverse_N, names, characters)), text, row_N, characters)


def choose(shown: Evidence, most: int) -> np.ndarray:
  """At most `most` rows of the pool: all, or else, in this order, what target examples point at, the best and the worst
  of each target, what arms selected (by turns, in the order of each selection), and rows at even distances.
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
  """`document_N` are indices into `names`."""
  columns: list[tuple[str, np.ndarray]] = [
    ('row', row_N.astype('<u4')),
    ('document', document_N.astype('<u4')),
  ]
  targets = sorted(shown.scores, key=lambda name: name != 'mix')
  described: list[dict[str, Any]] = []
  for target in targets:
    z_N = figures.standardised(shown.scores[target])
    step = max(float(np.abs(z_N).max()), 1e-9) / 32_767
    columns.append((f'score {target}', np.rint(z_N[row_N] / step).astype('<i2')))
    quantiles = np.quantile(z_N, np.linspace(0, 1, _QUANTILES))
    described.append(
      {
        'id': target,
        'name': formatting.heading(formatting.task_name(target)),
        'step': step,
        'quantiles': _rounded(quantiles),
      }
    )
  for found in described:
    if found['id'] in shown.reach:
      spread = float(np.std(shown.scores[found['id']], dtype=np.float64)) or 1.0
      code_N, found['reach'] = _lengths(shown.reach[found['id']][row_N] / spread)
      columns.append((f'reach {found["id"]}', code_N))
  columns += [('source', shown.source_N[row_N].astype('u1')), ('planted', (shown.planted_N[row_N] >= 0).astype('u1'))]
  arms: list[dict[str, Any]] = []
  for arm, label in tables.arms(shown).items():
    draws = tables.draws(shown, arm)
    columns.append((f'arm {len(arms)}', _times_selected(draws, len(shown.source_N))[row_N]))
    arms.append({
      'name': formatting.heading(label), 'selections': len(draws), 'rows': len(np.unique(np.concatenate(draws)))
    })  # fmt: skip
  header = {
    'rows': len(row_N),
    'pool': len(shown.source_N),
    'characters': characters,
    'documents': names,
    'sources': [
      {'name': name, 'colour': figures.SOURCE_COLOURS[i % len(figures.SOURCE_COLOURS)]}
      for i, name in enumerate(shown.sources)
    ],
    'pool_sources': np.bincount(shown.source_N, minlength=len(shown.sources)).tolist(),
    'targets': described,
    'arms': arms,
    'examples': _examples(shown),
    'columns': [[name, array.dtype.kind + str(array.dtype.itemsize)] for name, array in columns],
  }
  head = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
  head += b' ' * (-(len(head) + 4) % 4)  # arrays of four bytes an entry come first, so all are aligned
  return len(head).to_bytes(4, 'little') + head + b''.join(array.tobytes() for _, array in columns)


def _lengths(length_N: np.ndarray) -> tuple[np.ndarray, float]:
  """Codes, uint8, and the largest length: code c > 0 stands for largest · 1000^((c − 255) / 254), 0 for none."""
  largest = max(float(length_N.max(initial=0)), 1e-9)
  part_N = np.maximum(length_N / largest, 1e-3)
  code_N = 1 + np.rint(_CODES * (1 + np.log10(part_N) / 3))
  return np.where(length_N > 0, code_N, 0).astype('u1'), largest


def _rounded(values: np.ndarray) -> list[float]:
  return [float(f'{v:.4g}') for v in values]


def _times_selected(draws: list[np.ndarray], rows: int) -> np.ndarray:
  """How many of an arm's selections hold each row, uint8 [N]; 255 stands for more."""
  times_N = np.zeros(rows, np.int64)
  for drawn in draws:
    times_N[drawn] += 1
  return np.minimum(times_N, 255).astype('u1')


def _examples(shown: Evidence) -> list[Mapping[str, Any]]:
  return [
    {
      'target': task,
      'context': e.context,
      'answer': e.answer,
      'rows': e.rows_M.tolist(),
      'scores': _rounded(e.score_M),
    }
    for task, examples in shown.examples.items()
    for e in examples
  ]


def _fitting(texts: Sequence[str], most_bytes: int) -> tuple[str, int | None]:
  """Base64 of the gzipped texts, in at most `most_bytes` where some text is left at that; and where they were cut."""
  longest = max(map(len, texts), default=0)
  # No text of many kinds shrinks more than this: what is longer need not be tried.
  characters = min(longest, max(_LEAST_CHARACTERS, _SHRINKS * most_bytes // max(1, len(texts))))
  while True:
    packed = _encoded('\0'.join(text[:characters] for text in texts).encode('utf-8', 'replace'))
    if len(packed) <= most_bytes or characters <= _LEAST_CHARACTERS:
      return packed, characters if characters < longest else None
    # The beginnings of rows compress best, so this comes near the limit from above and takes a few rounds.
    characters = max(_LEAST_CHARACTERS, min(characters - 1, int(characters * most_bytes / len(packed) * 0.98)))


def _encoded(data: bytes) -> str:
  # No date inside: equal rows give an equal page.
  return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()

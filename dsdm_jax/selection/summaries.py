"""Summaries of the selections: sizes, sources, overlap with other arms, duplicates."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import visible

if TYPE_CHECKING:
  from rich.table import Table

_SAMPLE = 65_536  # rows of a selection that are searched for duplicates
_GRAM = 8  # consecutive tokens that count as the same text
_EVERY = 8  # one of so many runs is compared
_COLUMNS = 20  # arms in the columns of a table
_ODD = np.uint64(0x9E3779B97F4A7C15)


def summarize(arms: Sequence[Selection], pool: Pool) -> list[dict[str, Any]]:
  """The summary of each arm: its provenance and these keys.

  - distinct: number of distinct rows; tokens, documents: of these.
  - sources: share of each source in its rows.
  - overlap: share of its distinct rows that each other arm also has.
  - duplicates: share of its distinct rows with at least half of their runs of 8 tokens in an earlier row of the arm.
  """
  distinct = {arm.name: np.unique(arm.rows) for arm in arms}
  summary = []
  for arm in arms:
    rows = distinct[arm.name]
    counts = np.bincount(pool.source_N[arm.rows], minlength=len(pool.sources))
    overlap = {}
    for other in arms:
      if other is not arm:
        common = np.intersect1d(rows, distinct[other.name], assume_unique=True)
        overlap[other.name] = round(len(common) / len(rows), 4)
    sample = rows[:: -(-len(rows) // _SAMPLE)]
    summary.append(
      {
        **arm.provenance,
        'name': arm.name,
        'distinct': len(rows),
        'tokens': arm.provenance.get('tokens', len(rows) * pool.length),
        'documents': len(np.unique(pool.document_N[rows])) if arm.documents is None else len(arm.documents),
        'sources': {n: round(float(c) / arm.size, 4) for n, c in zip(pool.sources, counts, strict=True)},
        'overlap': overlap,
        'duplicates': round(float(duplicates(pool.tokens(sample), pool.sizes(sample)).mean()), 4),
      }
    )
  return summary


def duplicates(tokens_KL: np.ndarray, size_K: np.ndarray | None = None) -> np.ndarray:
  """Whether at least half of a row's runs of 8 tokens occur in an earlier row: bool [K].

  Only runs whose hash is a multiple of 8 are compared, so that rows with shifted text are compared by the same runs. A
  row without such a run is compared as a whole.

  Args:
    tokens_KL: rows.
    size_K: tokens of each before its padding; None for rows without.
  """
  hash_KR = run_hashes(tokens_KL)
  compared_KR = hash_KR % np.uint64(_EVERY) == 0
  if size_K is not None:
    compared_KR &= np.arange(hash_KR.shape[1]) <= np.maximum(size_K - _GRAM, 0)[:, None]
  without = ~compared_KR.any(axis=1)
  compared_KR[without, 0] = True
  hash_KR[without, 0] = np.bitwise_xor.reduce(hash_KR[without], axis=1)
  row, _ = np.nonzero(compared_KR)
  _, first, inverse = np.unique(hash_KR[compared_KR], return_index=True, return_inverse=True)
  before = row[first][inverse] < row  # sorted by row, so the first occurrence of a hash is in the first row
  return 2 * np.bincount(row, before, len(tokens_KL)) >= np.bincount(row, minlength=len(tokens_KL))


def run_hashes(tokens_KL: np.ndarray) -> np.ndarray:
  """A hash of each run of 8 tokens of each row: uint64 [K, R], R = L − 7; of a shorter row, one hash of the row."""
  runs = np.lib.stride_tricks.sliding_window_view(tokens_KL, min(_GRAM, tokens_KL.shape[1]), axis=1)
  hash_KR = np.zeros(runs.shape[:2], np.uint64)
  for place in range(runs.shape[2]):
    hash_KR = (hash_KR ^ (runs[:, :, place].astype(np.uint64) + np.uint64(1))) * _ODD
    hash_KR ^= hash_KR >> np.uint64(29)
  return hash_KR


def text_tables(cards: Sequence[Mapping[str, Any]], width: int = 160) -> str:
  """Plain-text tables: the contents of each arm, and the share of its rows that each other arm also has."""
  from rich import box
  from rich.console import Console
  from rich.table import Table

  sources = [s for s in cards[0]['sources'] if any(card['sources'][s] >= 0.005 for card in cards)]
  contents = Table(box=box.SIMPLE)
  for column in ('', 'arm', 'for', 'rows', 'passes', 'tokens', 'documents', 'duplicates', *sources):
    is_name = column in ('arm', 'for')
    contents.add_column(visible(column), no_wrap=is_name, justify='left' if is_name else 'right')
  for number, card in enumerate(cards, 1):
    names = str(number), card['method'], card['target']
    counts = f'{card["distinct"]:,}', f'{card["epochs"]:.3g}', f'{card["tokens"]:,}', f'{card["documents"]:,}'
    contents.add_row(*names, *counts, f'{card["duplicates"]:.1%}', *(f'{card["sources"][s]:.0%}' for s in sources))
  console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False, markup=False)
  with console.capture() as captured:
    console.print(contents)
    if len(cards) > 1:
      console.print('Share of its rows that the other arm also has (models of the first seed)')
      for start in range(0, len(cards), _COLUMNS):
        console.print(_overlaps(cards, range(start, min(start + _COLUMNS, len(cards)))))
  return '\n'.join(line.rstrip() for line in captured.get().splitlines() if line.strip())


def _overlaps(cards: Sequence[Mapping[str, Any]], columns: range) -> 'Table':
  from rich import box
  from rich.table import Table

  shared = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
  for name in ('', 'arm', *(str(i + 1) for i in columns)):
    shared.add_column(name, no_wrap=True, justify='left' if name == 'arm' else 'right')
  for number, card in enumerate(cards, 1):
    others = (cards[i] for i in columns)
    cells = ['·' if other is card else f'{card["overlap"][other["name"]]:.0%}' for other in others]
    shared.add_row(str(number), f'{card["method"]} ({card["target"]})', *cells)
  return shared

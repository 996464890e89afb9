"""What each arm was given, side by side: sizes, sources, overlap with the others, duplicates."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool

if TYPE_CHECKING:
  from rich.table import Table

_SAMPLE = 65_536  # rows of a selection among which duplicates are looked for
_GRAM = 8  # tokens in a row that count as the same text
_KEPT = 8  # one in so many of them is looked at
_ACROSS = 20  # arms in a table's columns
_ODD = np.uint64(0x9E3779B97F4A7C15)


def make(arms: Sequence[Selection], pool: Pool) -> list[dict[str, Any]]:
  """A card for each arm: provenance, `tokens` (of its rows, repeats not counted), `documents` (distinct), `sources`
  (share of its rows), `overlap` (share of its distinct rows that each other arm has), `duplicates` (share of its
  distinct rows, at least half of whose runs of 8 tokens stand in an earlier row of the pool that it holds too).
  """
  distinct = {arm.name: np.unique(arm.rows) for arm in arms}
  found = []
  for arm in arms:
    rows = distinct[arm.name]
    counts = np.bincount(pool.source_N[arm.rows], minlength=len(pool.sources))
    found.append({
      **arm.provenance, 'name': arm.name, 'distinct': len(rows), 'tokens': len(rows) * pool.length,
      'documents': len(np.unique(pool.document_N[rows])),
      'sources': {n: round(float(c) / arm.size, 4) for n, c in zip(pool.sources, counts, strict=True)},
      'overlap': {
        other.name: round(len(np.intersect1d(rows, distinct[other.name], assume_unique=True)) / len(rows), 4)
        for other in arms if other is not arm
      },
      'duplicates': round(float(duplicates(pool.tokens(rows[:: -(-len(rows) // _SAMPLE)])).mean()), 4),
    })  # fmt: skip
  return found


def duplicates(tokens_KL: np.ndarray) -> np.ndarray:
  """Whether at least half of a row's runs of 8 tokens occur in a row before it: bool [K].

  A run is looked at where its hash is a multiple of 8, so that rows whose text is shifted are compared by the same
  runs. A row with none of these is compared whole.
  """
  hash_KR = run_hashes(tokens_KL)
  looked_KR = hash_KR % np.uint64(_KEPT) == 0
  bare = ~looked_KR.any(axis=1)
  looked_KR[bare, 0] = True
  hash_KR[bare, 0] = np.bitwise_xor.reduce(hash_KR[bare], axis=1)
  row, _ = np.nonzero(looked_KR)
  _, first, inverse = np.unique(hash_KR[looked_KR], return_index=True, return_inverse=True)
  before = row[first][inverse] < row  # entries are in order of rows, so the first of a hash is in the first row
  return 2 * np.bincount(row, before, len(tokens_KL)) >= np.bincount(row, minlength=len(tokens_KL))


def run_hashes(tokens_KL: np.ndarray) -> np.ndarray:
  """A hash of each run of 8 tokens of each row: uint64 [K, R], R = L − 7 (of a shorter row, one of the whole)."""
  runs = np.lib.stride_tricks.sliding_window_view(tokens_KL, min(_GRAM, tokens_KL.shape[1]), axis=1)
  hash_KR = np.zeros(runs.shape[:2], np.uint64)
  for place in range(runs.shape[2]):
    hash_KR = (hash_KR ^ (runs[:, :, place].astype(np.uint64) + np.uint64(1))) * _ODD
    hash_KR ^= hash_KR >> np.uint64(29)
  return hash_KR


def table(cards: Sequence[Mapping[str, Any]], width: int = 160) -> str:
  """Two plain-text tables: what is in each arm, and the share of its rows that each other arm has too."""
  from rich import box
  from rich.console import Console
  from rich.table import Table

  sources = [s for s in cards[0]['sources'] if any(card['sources'][s] >= 0.005 for card in cards)]
  contents = Table(box=box.SIMPLE)
  for column in ('', 'arm', 'for', 'rows', 'passes', 'tokens', 'documents', 'duplicates', *sources):
    contents.add_column(
      column, no_wrap=column in ('arm', 'for'), justify='left' if column in ('arm', 'for') else 'right'
    )
  for number, card in enumerate(cards, 1):
    contents.add_row(
      str(number), card['method'], card['target'], f'{card["distinct"]:,}', f'{card["epochs"]:.3g}',
      f'{card["tokens"]:,}', f'{card["documents"]:,}', f'{card["duplicates"]:.1%}',
      *(f'{card["sources"][s]:.0%}' for s in sources),
    )  # fmt: skip
  console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
  with console.capture() as captured:
    console.print(contents)
    if len(cards) > 1:
      console.print('Share of its rows that the other arm has too (models of the first seed)')
      for start in range(0, len(cards), _ACROSS):
        console.print(_shared(cards, range(start, min(start + _ACROSS, len(cards)))))
  return '\n'.join(line.rstrip() for line in captured.get().splitlines() if line.strip())


def _shared(cards: Sequence[Mapping[str, Any]], columns: range) -> 'Table':
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

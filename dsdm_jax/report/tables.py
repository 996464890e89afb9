"""The tables of the report, and the same data as CSV files."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dsdm_jax.core import storage
from dsdm_jax.report import formatting
from dsdm_jax.report.report_data import Evidence, Selected


class Chosen(Protocol):
  """The part of `Evidence` that has the sources of selected rows."""

  @property
  def sources(self) -> Sequence[str]: ...

  @property
  def source_N(self) -> np.ndarray: ...

  @property
  def selected(self) -> Sequence[Selected]: ...


Arm = tuple[str, str]  # method and target mix
POOL = 'whole pool'


def arms(shown: Chosen) -> dict[Arm, str]:
  """Every arm and its name, in the order of the selections."""
  selected = list(dict.fromkeys((s.method, s.target_mix) for s in shown.selected))
  several = formatting.several_targets(target for _, target in selected)
  return {arm: formatting.arm_name(*arm, several) for arm in selected}


def targets(shown: Evidence) -> list[str]:
  """Targets that have scores, the mix first."""
  return sorted(shown.scores, key=lambda name: name != 'mix')


def draws(shown: Chosen, arm: Arm) -> list[np.ndarray]:
  """The distinct rows of each selection of an arm; seeds that share a selection count once."""
  rows = {s.name: s.rows for s in shown.selected if (s.method, s.target_mix) == arm}
  return [np.unique(drawn) for drawn in rows.values()]


def sources(shown: Chosen) -> dict[str, np.ndarray]:
  """Label → share of each source, of the pool and of what each arm selected (mean over its selections)."""
  count = len(shown.sources)
  shares = {POOL: _shares(shown.source_N, count)}
  for arm, label in arms(shown).items():
    shares[label] = np.mean([_shares(shown.source_N[rows], count) for rows in draws(shown, arm)], axis=0)
  return shares


@dataclasses.dataclass(frozen=True)
class Groups:
  """Sources as figures show them: the largest of the pool one by one, and the rest together.

  Attributes:
    names: of the groups, largest first.
    group_S: the group of each source.
  """

  names: tuple[str, ...]
  group_S: np.ndarray

  def summed(self, share_S: np.ndarray) -> np.ndarray:
    """Of each group the sum of its sources' values."""
    return np.bincount(self.group_S, weights=share_S, minlength=len(self.names))


def groups(shown: Chosen, most: int) -> Groups:
  """At most `most` sources with a group of their own, by their share of the pool; ties in the order of sources."""
  names, count_S = list(shown.sources), np.bincount(shown.source_N, minlength=len(shown.sources))
  order_S = np.argsort(-count_S, kind='stable')
  group_S = np.empty(len(names), np.int64)
  group_S[order_S] = np.minimum(np.arange(len(names)), most)
  own, rest = ([names[s] for s in part] for part in np.split(order_S, [most]))
  return Groups((*own, *(rest if len(rest) < 2 else [f'{len(rest)} others'])), group_S)


def _shares(source_K: np.ndarray, count: int) -> np.ndarray:
  return np.bincount(source_K, minlength=count) / max(1, len(source_K))


@dataclasses.dataclass(frozen=True)
class Overlap:
  """The share of arm A's rows that arm B also selected, and that share by chance.

  Means over pairs of selections; for an arm with itself over pairs of different ones, NaN if it has only one.
  """

  labels: tuple[str, ...]
  share_AB: np.ndarray
  chance_AB: np.ndarray


def overlap(shown: Chosen) -> Overlap:
  named = arms(shown)
  drawn = [draws(shown, arm) for arm in named]
  share_AB = np.full((len(drawn), len(drawn)), np.nan)
  chance_AB = np.full_like(share_AB, np.nan)
  member_N = np.zeros(len(shown.source_N), bool)
  for b, those in enumerate(drawn):
    for second in those:
      member_N[second] = True
      for a, these in enumerate(drawn):
        pairs = [float(member_N[first].mean()) for first in these if first is not second]
        if pairs:
          share_AB[a, b] = np.nansum([share_AB[a, b], sum(pairs)])
      member_N[second] = False
    for a, these in enumerate(drawn):
      pairs_count = len(these) * len(those) - (len(these) if a == b else 0)
      if pairs_count:
        share_AB[a, b] /= pairs_count
      chance_AB[a, b] = np.mean([len(rows) for rows in those]) / max(1, len(member_N))
  return Overlap(tuple(named.values()), share_AB, chance_AB)


def csv_files(shown: Evidence, row_N: np.ndarray) -> Iterator[tuple[str, str]]:
  """(file name, content) of each table; `rows.csv` lists the rows `row_N` of the pool."""
  for name in ('summary', 'comparisons', 'accuracy_comparisons', 'arms'):
    yield f'{name}.csv', _records(shown.results[name])
  for name in ('summary', 'comparisons'):
    yield f'mean_{name}.csv', _records(shown.results['means'][name])
  if shown.results.get('lines'):
    yield 'lines.csv', _records(shown.results['lines'])
  if shown.multiplier is not None:
    yield 'multiplier.csv', _records(multipliers(shown.multiplier))
    yield 'ladder.csv', _records(ladder(shown.multiplier))
  if shown.lds is not None:
    yield 'lds.csv', _records([{'level': k, **_flat(row)} for k, rows in shown.lds.items() for row in rows])
  losses = (
    (curve.method, curve.target_mix, seed, int(step), float(loss))
    for curve in shown.curves
    for seed, loss_P in enumerate(curve.loss_SP)
    for step, loss in zip(curve.step_P, loss_P, strict=True)
  )
  yield 'losses.csv', storage.csv_text(('method', 'target_mix', 'seed', 'step', 'loss'), losses)
  shares = (
    (label, source, float(share))
    for label, share_S in sources(shown).items()
    for source, share in zip(shown.sources, share_S, strict=True)
  )
  yield 'sources.csv', storage.csv_text(('selection', 'source', 'share'), shares)
  shared = overlap(shown)
  pairs = (
    (a, b, *('' if np.isnan(x[i, j]) else float(x[i, j]) for x in (shared.share_AB, shared.chance_AB)))
    for i, a in enumerate(shared.labels)
    for j, b in enumerate(shared.labels)
  )
  yield 'overlap.csv', storage.csv_text(('of', 'also_in', 'share', 'by_chance'), pairs)
  yield 'cost.csv', _records([{'stage': stage, **spent} for stage, spent in shown.cost.items()])
  yield 'rows.csv', _rows(shown, row_N)


def multipliers(multiplier: Mapping[str, Any]) -> list[dict[str, Any]]:
  """A flat record for each arm, task and split of `multiplier.json`: 'gross estimate', 'gross low' and so on."""
  return [_flat(row) for row in multiplier['arms']]


def ladder(multiplier: Mapping[str, Any]) -> list[dict[str, Any]]:
  """A flat record for each task, split and rung of `multiplier.json`."""
  curves = multiplier['curves']
  return [{**{k: v for k, v in c.items() if k != 'points'}, **point} for c in curves for point in c['points']]


def _rows(shown: Evidence, row_N: np.ndarray) -> str:
  """A line per row: its origin, its scores, half the lengths of their intervals, and how many selections of each arm
  contain it.
  """
  columns: list[tuple[str, np.ndarray]] = [(f'score {target}', score_N) for target, score_N in shown.scores.items()]
  columns += [(f'reach {target}', reach_N) for target, reach_N in shown.reach.items()]
  for arm, label in arms(shown).items():
    times_N = np.zeros(len(shown.source_N), np.int64)
    for rows in draws(shown, arm):
      times_N[rows] += 1
    columns.append((f'selections of {label}', times_N))
  lists = [column[row_N].tolist() for _, column in columns]
  lines = (
    (n, shown.sources[shown.source_N[n]], shown.documents[shown.document_N[n]]['id'], int(shown.offset_N[n]), *values)
    for n, *values in zip(row_N.tolist(), *lists, strict=True)
  )
  return storage.csv_text(('row', 'source', 'document', 'offset', *(name for name, _ in columns)), lines)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
  """Replaces records inside a record by keys such as 'gross estimate'."""
  flat: dict[str, Any] = {}
  for key, value in record.items():
    flat |= {f'{key} {k}': v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
  return flat


def _records(records: Sequence[Mapping[str, Any]]) -> str:
  keys = list(dict.fromkeys(key for record in records for key in record))
  return storage.csv_text(keys, ([record.get(key, '') for key in keys] for record in records))

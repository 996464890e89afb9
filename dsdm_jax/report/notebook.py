"""Tables and summaries as a terminal and a notebook print them. Tables are pandas' where pandas is installed."""

import abc
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import escape

from dsdm_jax.core import storage
from dsdm_jax.errors import visible

_LINES = 20  # that a table prints; of a longer one the first and the last
_CELL = 60  # characters of one cell
_WIDTH = 96  # of a summary's lines


class Table:
  """Columns of one length, for an environment without pandas; a small part of `pandas.DataFrame`.

  `table['score']` is a column as an array, `table.columns` has the names, `table.index` a label for each line,
  `table.head(n)` the first lines, `table.to_dict('records')` a dict for each line, and `to_csv` writes it.
  """

  def __init__(self, columns: Mapping[str, Any], index: Sequence[Any] | np.ndarray | None = None, name: str = ''):
    self._columns = {key: _array(values) for key, values in columns.items()}
    length = len(next(iter(self._columns.values()))) if self._columns else 0
    self.index = np.arange(length) if index is None else _array(index)
    self.index_name = name
    self.attrs: dict[str, Any] = {}  # facts about the whole table

  @property
  def columns(self) -> list[str]:
    return list(self._columns)

  def __getitem__(self, column: str) -> np.ndarray:
    if column not in self._columns:
      raise KeyError(f'no column {column!r}, only {", ".join(self._columns)}')
    return self._columns[column]

  def __iter__(self) -> Iterator[str]:
    return iter(self._columns)

  def __len__(self) -> int:
    return len(self.index)

  def head(self, count: int = 5) -> 'Table':
    """The first lines."""
    return Table({key: x[:count] for key, x in self._columns.items()}, self.index[:count], self.index_name)

  def to_dict(self, orient: str = 'records') -> list[dict[str, Any]]:
    """A dict for each line."""
    if orient != 'records':
      raise ValueError(f"orient={orient!r}: a table without pandas has 'records' only")
    lists = [x.tolist() for x in self._columns.values()]
    return [dict(zip(self._columns, line, strict=True)) for line in zip(*lists, strict=True)]

  def to_csv(self, path: str | os.PathLike | None = None) -> str | None:
    """The table as CSV, labels of lines first: written to `path`, or returned."""
    lists = [self.index.tolist(), *(x.tolist() for x in self._columns.values())]
    text = storage.csv_text((self.index_name, *self._columns), zip(*lists, strict=True))
    if path is None:
      return text
    storage.write_text(path, text)
    return None

  def _printed(self) -> tuple[list[str], list[list[str]]]:
    """Head and lines in words; a line of dots where lines are left out."""
    places = list(range(len(self)))
    cut = _LINES // 2
    if len(places) > _LINES:
      places = [*places[:cut], -1, *places[-cut:]]
    columns = [self.index, *self._columns.values()]
    lines = [['…'] * len(columns) if place < 0 else [_words(x[place]) for x in columns] for place in places]
    return [self.index_name, *self._columns], lines

  def __repr__(self) -> str:
    head, lines = self._printed()
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    printed = [
      '  '.join(f'{cell:>{width}}' for cell, width in zip(line, widths, strict=True)) for line in (head, *lines)
    ]
    return '\n'.join([*printed, f'[{len(self):,} lines × {len(self._columns)} columns]'])

  def _repr_html_(self) -> str:
    head, lines = self._printed()
    rows = [''.join(f'<th>{escape(cell)}</th>' for cell in head)]
    rows += [''.join(f'<td>{escape(cell)}</td>' for cell in line) for line in lines]
    body = ''.join(f'<tr>{row}</tr>' for row in rows)
    return f'<table>{body}</table><p>{len(self):,} lines × {len(self._columns)} columns</p>'


def frame(
  data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
  index: Sequence[Any] | np.ndarray | None = None,
  index_name: str = '',
) -> Any:
  """A pandas DataFrame, or a `Table` where pandas is not installed.

  Args:
    data: columns, or a record for each line; a key that a record lacks is None there.
    index: a label for each line; by default their numbers.
    index_name: what the labels are.
  """
  if not isinstance(data, Mapping):
    keys = dict.fromkeys(key for record in data for key in record)
    data = {key: [record.get(key) for record in data] for key in keys}
  try:
    import pandas
  except ImportError:
    return Table(data, index, index_name)
  return pandas.DataFrame(dict(data), index=index).rename_axis(index_name or None)


class View(abc.ABC):
  """Prints itself as its `facts`: in a terminal as lines, in a notebook as a table."""

  @abc.abstractmethod
  def facts(self) -> Iterator[tuple[str, str]]:
    """Names and values, in words."""

  def __repr__(self) -> str:
    pairs = list(self.facts())
    width = max((len(name) for name, _ in pairs), default=0)
    lines = [type(self).__name__.removesuffix('View').lower()]
    for name, value in pairs:
      first, *more = textwrap.wrap(visible(value), max(40, _WIDTH - width)) or ['']
      lines += [f'  {name:<{width}}  {first}', *(' ' * (width + 4) + line for line in more)]
    return '\n'.join(lines)

  def _repr_html_(self) -> str:
    cells = ''.join(
      f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
      for name, value in self.facts()
    )
    return f'<table>{cells}</table>'


def _array(values: Any) -> np.ndarray:
  """Numbers as an array of numbers; anything else, None among them, as it is."""
  if isinstance(values, np.ndarray):
    return values
  values = list(values)
  if values and all(isinstance(value, bool | int | float | np.generic) for value in values):
    return np.asarray(values)
  kept = np.empty(len(values), object)
  kept[:] = values
  return kept


def _words(value: Any) -> str:
  if isinstance(value, float | np.floating):
    return f'{value:.4g}'
  text = visible(str(value))
  return text if len(text) <= _CELL else text[: _CELL - 1] + '…'

"""Draws from any file of scores, without a run.

    dsdm sample --scores documents.parquet --column score_docs --method gumbel --count 10000 --out drawn.parquet

Methods, with z the score in standard deviations and T the temperature:
  top: the highest scores.
  gumbel: drawn without replacement by exp(z/T).
  boltzmann: drawn with replacement by exp(z/T), each at most --cap times.

The file is .npy, .pt (one number per row) or Parquet; of Parquet, entries without a score are left out. The output is
Parquet, best first: row (of the file, from 0), id (if the file has that column), score, and count, the times it was
drawn.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdm_jax.attribution import score_files
from dsdm_jax.core import storage
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import UserError, visible
from dsdm_jax.selection import dsdm_sampled, export, ranking

if TYPE_CHECKING:
  import pyarrow

METHODS = ('top', 'gumbel', 'boltzmann')
# What a file of scores means that does not say so itself.
_ABOUT = {'sign': 'a higher score is better', 'scale': 'that of the file of scores'}


def sample(
  score_N: np.ndarray,
  method: str,
  count: int,
  temperature: float = 1.0,
  cap: int = 1,
  seed: int = 0,
  group_N: np.ndarray | None = None,
  group_cap: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """(entries, best first, int64; how often each was drawn, int32).

  Args:
    score_N: finite.
    method: one of `METHODS`.
    count: draws in all.
    temperature: in standard deviations of the scores.
    cap: draws of one entry by 'boltzmann'.
    seed: of the draws.
    group_N: group of each entry, for 'top' and 'gumbel'.
    group_cap: most entries of one group.

  Raises:
    UserError: the caps leave fewer than `count`.
  """
  score_N = np.asarray(score_N, np.float32)
  key_N = ranking.standardised(score_N) / np.float32(temperature)
  if method == 'boltzmann':
    if count > cap * len(score_N):
      raise UserError(f'{len(score_N)} scores of at most {cap} draws do not give {count}; raise --cap or lower --count')
    count_N = dsdm_sampled.draw(key_N, count, cap, seed)
    entries = np.flatnonzero(count_N)
    entries = entries[np.argsort(-score_N[entries], kind='stable')]
    return entries, count_N[entries]
  if method == 'gumbel':
    key_N += ranking.gumbel(len(key_N), seed, 'sample')
  entries = ranking.top(key_N, len(key_N) if group_cap else min(count, len(key_N)))
  if group_cap and group_N is not None:
    entries = entries[ranking.rank_in_group(group_N[entries]) < group_cap]
  if len(entries) < count:
    raise UserError(f'{len(entries)} of {len(score_N)} scores can be drawn, fewer than {count}; lower --count')
  return entries[:count], np.ones(count, np.int32)


def _read(path: Path, column: str, group: str) -> tuple[np.ndarray, dict[str, Any], np.ndarray | None, dict[str, Any]]:
  """(scores, columns row and id of the entries that have one, groups, what the file says about its scores)."""
  if path.suffix != '.parquet':
    if group:
      raise UserError(f'--group={group}: {path} has no columns; pass a Parquet file')
    score_N = score_files.read(path)
    if not len(score_N):
      raise UserError(f'{path} has no scores')
    return score_N, {'row': np.arange(len(score_N))}, None, _ABOUT
  from pyarrow import ArrowInvalid, parquet, types

  try:
    with parquet.ParquetFile(path) as file:
      schema = file.schema_arrow
      for name in (column, *([group] if group else [])):
        if name not in schema.names:
          raise UserError(f'{path} has no column {name!r}; it has {", ".join(schema.names)[:300]}')
      if not types.is_floating(schema.field(column).type):
        raise UserError(f'{path}: column {column!r} holds {schema.field(column).type}; name one of numbers by --column')
      names = dict.fromkeys((column, *(['id'] if 'id' in schema.names else []), *([group] if group else [])))
      table = file.read(columns=list(names))
  except (ArrowInvalid, OSError) as error:
    raise UserError(f'{path} cannot be read ({" ".join(str(error).split())[:200]}); pass a complete file') from error
  score_N = table[column].to_numpy().astype(np.float32)
  rows = np.flatnonzero(np.isfinite(score_N))
  if not len(rows):
    raise UserError(f'{path}: column {column!r} has no scores')
  columns: dict[str, Any] = {'row': rows} | ({'id': table['id'].take(rows)} if 'id' in names else {})
  groups = None
  if group:  # a null is a value like others
    values = table[group].take(rows)
    values = values.cast(values.type.value_type) if types.is_dictionary(values.type) else values
    groups = values.combine_chunks().dictionary_encode('encode').indices.to_numpy()
  try:
    about = _ABOUT | dict(json.loads((schema.metadata or {})[export.METADATA]))
  except (KeyError, ValueError, TypeError):  # a file of others
    about = _ABOUT
  return score_N[rows], columns, groups, about


def write(path: Path, out: Location, column: str = 'score', group: str = '', **options: Any) -> str:
  """Draws from a file of scores into the Parquet file `out`, and returns a message.

  Args:
    path: of the scores.
    out: new file.
    column: of a Parquet file.
    group: its column with the groups.
    options: of `sample`.

  Raises:
    UserError: as `sample`; the file cannot be read; or `out` exists or is no Parquet file.
  """
  import pyarrow as pa
  from pyarrow import parquet

  if out.suffix != '.parquet':
    raise UserError(f'--out={out} must end in .parquet')
  if storage.exists(out):
    raise UserError(f'--out={out} exists; name a new file')
  score_N, columns, group_N, about = _read(path, column, group)
  entries, count_M = sample(score_N, group_N=group_N, **options)
  chosen: dict[str, Any] = {
    name: pa.chunked_array(values).take(entries) if name == 'id' else values[entries]
    for name, values in columns.items()
  }
  about = {**about, 'scores': path.name, 'column': column, 'group': group, **options}
  table: pyarrow.Table = pa.table(chosen | {'score': score_N[entries], 'count': count_M})
  sink = pa.BufferOutputStream()
  parquet.write_table(table.replace_schema_metadata({export.METADATA: json.dumps(about).encode()}), sink)
  storage.write_bytes(out, sink.getvalue().to_pybytes())
  return f'{int(count_M.sum()):,} draws of {len(entries):,} among {len(score_N):,} scores in {out}'


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(
    prog='dsdm sample', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--scores', type=Path, required=True, help='.npy, .pt or .parquet; higher is better')
  parser.add_argument('--column', default='score', help='of a Parquet file (default: score)')
  parser.add_argument('--method', choices=METHODS, required=True)
  parser.add_argument('--count', type=_at_least_one, required=True, help='draws in all')
  parser.add_argument('--temperature', type=_positive, default=1.0, help='in standard deviations of the scores')
  parser.add_argument('--cap', type=_at_least_one, default=1, help='boltzmann: draws of one entry (default: 1)')
  parser.add_argument('--group', default='', help='top, gumbel: column of a Parquet file whose values have a cap')
  parser.add_argument('--group-cap', type=_at_least_one, help='most entries with the same value in --group')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=storage.locate, required=True, help='new Parquet file, or its address')
  flags = parser.parse_args(argv)
  try:
    if bool(flags.group) != (flags.group_cap is not None):
      raise UserError('--group and --group-cap belong together; give both or none')
    if flags.group and flags.method == 'boltzmann':
      raise UserError('--group has no meaning for --method=boltzmann; choose gumbel, or leave it out')
    options = {name: getattr(flags, name) for name in ('method', 'count', 'temperature', 'cap', 'seed')}
    done = write(flags.scores, flags.out, flags.column, flags.group, group_cap=flags.group_cap or 0, **options)
  except UserError as error:
    sys.stderr.write(f'dsdm_jax: {error}\n')
    return 2
  sys.stdout.write(visible(done) + '\n')
  return 0


def _at_least_one(text: str) -> int:
  if not 1 <= (number := int(text)) < 2**31:
    raise ValueError
  return number


def _positive(text: str) -> float:
  if not 1e-9 < (number := float(text)) < 1e9:
    raise ValueError
  return number

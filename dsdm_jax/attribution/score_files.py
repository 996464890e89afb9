"""Scores from files, and how far two sets of scores agree: `python -m dsdm_jax.attribution.score_files A B`.

A and B are workdirs, finished datamodel folders, or files of one score per row: `.npy`, Parquet, or PyTorch's `.pt`, in
which the authors of DsDm released theirs. For each target that both have, the command prints Spearman's correlation and
the share of the top rows in common.
"""

import argparse
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats

from dsdm_jax.core import artifacts
from dsdm_jax.errors import UserError, visible_lines

# Storage classes that a .pt file may name → NumPy dtype.
_STORAGES = {'DoubleStorage': '<f8', 'FloatStorage': '<f4', 'HalfStorage': '<f2'}
_LARGEST_PICKLE = 1 << 20  # bytes; the pickle of one vector has about 400
_LARGEST_MEMBER = 16  # bytes of a member that names the byte order
_LARGEST_COMPRESSED = 1 << 30  # bytes of a compressed vector, which is read into memory
_LOCAL_HEADER = struct.Struct('<26xHH')  # of a zip member: lengths of its name and extra field


def read(path: str | os.PathLike, rows: int | None = None, column: str = 'score') -> np.ndarray:
  """One score for each row of a pool, in the order of the rows; higher is better, as everywhere here.

  Args:
    path: ends in .npy, .parquet or .pt. Vectors of .npy and .pt are memory-mapped.
    rows: expected number; None accepts any.
    column: of a Parquet file. If the file also has a column `row`, scores go to these rows, each of which occurs once.

  Raises:
    UserError: unreadable, not one vector of floating-point numbers, of another length, or not finite.
  """
  path = Path(path)
  readers = {'.npy': _read_npy, '.pt': _read_pt, '.parquet': lambda p: _read_parquet(p, column, rows)}
  if path.suffix not in readers:
    raise UserError(f'{path} must end in one of {", ".join(readers)}; save the scores in one of these formats')
  try:
    score_N = readers[path.suffix](path)
  except UserError:
    raise
  except Exception as error:  # three packages' readers raise anything on a damaged file
    raise UserError(f'{path} cannot be read ({" ".join(str(error).split())[:200]}); pass a complete file') from error
  if score_N.ndim != 1 or score_N.dtype.kind != 'f':
    raise UserError(f'{path} holds {score_N.dtype} of shape {score_N.shape}; pass one floating-point number per row')
  if rows is not None and len(score_N) != rows:
    raise UserError(f'{path} has {len(score_N)} scores and the pool {rows} rows; pass the scores of this pool')
  for start in range(0, len(score_N), 1 << 24):
    bad = np.flatnonzero(~np.isfinite(score_N[start : start + (1 << 24)]))
    if len(bad):
      raise UserError(f'{path}: the score of row {start + int(bad[0])} is not a number; every row needs a score')
  return score_N


def _read_npy(path: Path) -> np.ndarray:
  return np.load(path, mmap_mode='r', allow_pickle=False)  # noqa: TID251  mapped


def _read_parquet(path: Path, column: str, rows: int | None) -> np.ndarray:
  from pyarrow import ArrowInvalid, parquet, types

  try:
    with parquet.ParquetFile(path) as file:
      schema, count = file.schema_arrow, file.metadata.num_rows
      names = schema.names
      if column not in names:
        raise UserError(f'{path} has no column {column!r}; it has {", ".join(names)[:200]}')
      if not types.is_floating(schema.field(column).type):  # before a text of any length is read
        raise UserError(f'{path} holds {schema.field(column).type}; pass one floating-point number per row')
      if rows is not None and count != rows:
        raise UserError(f'{path} has {count} scores and the pool {rows} rows; pass the scores of this pool')
      if 'row' in names and not types.is_integer(schema.field('row').type):
        raise UserError(f'{path}: column row must name each of the {count} rows once; correct it or remove it')
      table = file.read(columns=[column, *(['row'] if 'row' in names else [])])
  except ArrowInvalid as error:
    raise ValueError(str(error)) from error
  score_N = table[column].to_numpy()
  if 'row' not in names:
    return score_N
  row_N = table['row'].to_numpy()
  if not np.array_equal(np.sort(row_N), np.arange(len(row_N))):
    raise UserError(f'{path}: column row must name each of the {len(row_N)} rows once; correct it or remove it')
  ordered_N = np.empty_like(score_N)
  ordered_N[row_N] = score_N
  return ordered_N


def _read_pt(path: Path) -> np.ndarray:
  """The single tensor of a file by `torch.save`, mapped from its raw storage. Nothing is unpickled, so no code runs."""
  with zipfile.ZipFile(path) as archive:
    members = {info.filename.partition('/')[2]: info for info in archive.infolist()}
    storages = [name for name in members if name.startswith('data/')]
    if 'data.pkl' not in members or len(storages) != 1:
      raise UserError(f'{path} holds {len(storages)} tensors; save a single vector')
    if members['data.pkl'].file_size > _LARGEST_PICKLE:
      raise UserError(f'{path} holds more than a vector; save a single vector')
    order = members.get('byteorder')
    if order is not None and (order.file_size > _LARGEST_MEMBER or archive.read(order) != b'little'):
      raise UserError(f'{path} is not little-endian; save it on a little-endian machine')
    dtype, length = _dtype_and_length(archive.read(members['data.pkl']), path)
    info, size = members[storages[0]], length * np.dtype(dtype).itemsize
    if not 0 <= size <= info.file_size:
      raise UserError(f'{path} declares {length} numbers and holds fewer: it is truncated; download it again')
    if info.compress_type != zipfile.ZIP_STORED:
      if size > _LARGEST_COMPRESSED:
        raise UserError(f'{path} decompresses to {size:,} bytes; save it with torch.save, which does not compress')
      with archive.open(info) as member:
        return np.frombuffer(member.read(size), dtype)
  with open(path, 'rb') as file:
    file.seek(info.header_offset)
    name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
  offset = info.header_offset + _LOCAL_HEADER.size + name + extra
  return np.memmap(path, dtype, mode='r', offset=offset, shape=(length,))


def _dtype_and_length(pickled: bytes, path: Path) -> tuple[str, int]:
  """Type and length of a contiguous vector, from the opcodes of its pickle, which are not run."""
  classes: list[str] = []
  texts: list[str] = []
  numbers: list[int] = []
  tuples: list[int] = []
  for opcode, argument, _ in pickletools.genops(pickled):
    if opcode.name == 'GLOBAL':
      classes += str(argument).split()[-1:]
    elif opcode.name == 'STACK_GLOBAL':
      classes += texts[-1:]
    elif 'UNICODE' in opcode.name:
      texts.append(str(argument))
    elif opcode.name in ('BININT', 'BININT1', 'BININT2', 'LONG1'):
      numbers.append(int(str(argument)))
    elif opcode.name == 'TUPLE1':  # the tensor's size, then its stride
      tuples += numbers[-1:]
    elif opcode.name in ('TUPLE2', 'TUPLE3'):
      raise UserError(f'{path} holds a tensor of more than one axis; save a vector')
  storages = [name for name in classes if name.endswith('Storage')]
  if len(storages) != 1 or storages[0] not in _STORAGES:
    raise UserError(f'{path} holds {", ".join(storages) or "no storage"}; save one float16, float32 or float64 vector')
  # The storage's own length, then offset, size and stride of the view: see torch._utils._rebuild_tensor_v2.
  if len(tuples) < 2 or tuples[1] != 1 or len(numbers) < 4 or numbers[1] != 0:
    raise UserError(f'{path} holds a view, not a contiguous vector; save it with .clone()')
  return _STORAGES[storages[0]], tuples[0]


def load(path: Path, target: str) -> dict[str, np.ndarray]:
  """Target → score_N of a workdir or a datamodel folder; a file holds the scores of `target`.

  Raises:
    UserError: there are no scores at `path`, or they are damaged.
  """
  from dsdm_jax.attribution.scores import Scores  # imports JAX, which a reader of files does without

  if path.is_file():
    return {target: read(path)}
  for folder in (path / 'datamodel', path):
    artifact = artifacts.open_folder(folder)
    if artifact is not None and artifact.identity['stage'] == 'datamodel':
      artifact.verify()
      scores = Scores(artifact)
      return {name: scores.score_N(name) for name in (*scores.tasks, 'mix')}
  raise UserError(
    f'{path} is neither a file of scores nor a finished datamodel folder, nor a workdir with one; pass one of these'
  )


def compare(a_N: np.ndarray, b_N: np.ndarray) -> dict[str, float]:
  """`spearman`, and for each share of the rows the overlap of the highest; the share itself is what chance gives.

  Rows that a prefilter left out of either have NaN, and are not compared.

  Raises:
    UserError: the two have different numbers of rows.
  """
  from dsdm_jax.attribution.scores import SHARES, overlap

  if len(a_N) != len(b_N):
    raise UserError(f'cannot compare {len(a_N)} scores with {len(b_N)}; both must be of one pool')
  scored_N = ~(np.isnan(a_N) | np.isnan(b_N))
  a_N, b_N = a_N[scored_N], b_N[scored_N]
  counts = {f'{share:g}': round(share * len(a_N)) for share in SHARES}
  overlaps = {share: overlap(a_N, b_N, count) for share, count in counts.items() if count}
  return {'spearman': float(scipy.stats.spearmanr(a_N, b_N).statistic), **overlaps}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
  """Plain text: a line for each target."""
  shares = list(dict.fromkeys(key for row in rows.values() for key in row if key != 'spearman'))
  lines = [['target', 'Spearman', *(f'top {float(share):.0%}' for share in shares)]]
  lines += [[name, f'{row["spearman"]:+.3f}', *(f'{row[s]:.0%}' for s in shares)] for name, row in rows.items()]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.attribution.score_files', description=__doc__)
  parser.add_argument('a', type=Path)
  parser.add_argument('b', type=Path)
  parser.add_argument('--target', default='mix', help='target whose scores a file holds (default: mix)')
  flags = parser.parse_args(argv)
  try:
    a, b = load(flags.a, flags.target), load(flags.b, flags.target)
    common = [name for name in a if name in b]
    if not common:
      raise UserError(f'{flags.a} has scores for {", ".join(a)} and {flags.b} for {", ".join(b)}; set --target')
    rows = {name: compare(a[name], b[name]) for name in common}
  except UserError as error:
    sys.stderr.write(f'dsdm_jax: {error}\n')
    return 2
  sys.stdout.write(f'{visible_lines(table(rows))}\nShare of the top rows in common; chance gives the share itself.\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())

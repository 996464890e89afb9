"""Scores made elsewhere: `.npy`, Parquet, and PyTorch's `.pt` as the authors of DsDm released theirs."""

import hashlib
import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.errors import UserError

# Storage classes that a .pt file may name, and what they hold.
_STORAGES = {'DoubleStorage': '<f8', 'FloatStorage': '<f4', 'HalfStorage': '<f2'}
_LARGEST_PICKLE = 1 << 20  # bytes; that of one vector has about 400
_LARGEST_PACKED = 1 << 30  # bytes of a packed vector, which is read whole
_LOCAL_HEADER = struct.Struct('<26xHH')  # of a zip member: lengths of its name and of its extra field


def read(path: str | os.PathLike, rows: int | None = None, column: str = 'score') -> np.ndarray:
  """One score for each row of a pool, in the order of the rows; higher is better, as everywhere here.

  Args:
    path: ends in .npy, .parquet or .pt. Vectors of .npy and .pt are mapped from disk and not read whole.
    rows: how many there must be; None takes what is there.
    column: of a Parquet file. Where the file also has a column `row`, scores go to these rows, each named once.

  Raises:
    UserError: unreadable, not one vector of floating-point numbers, of another length, or not finite.
  """
  path = Path(path)
  readers = {'.npy': _read_npy, '.pt': _read_pt, '.parquet': lambda p: _read_parquet(p, column)}
  if path.suffix not in readers:
    raise UserError(f'{path} must end in one of {", ".join(readers)}; save its scores in one of these forms')
  try:
    score_N = readers[path.suffix](path)
  except UserError:
    raise
  except Exception as error:  # what a torn or made-up file does to three packages' readers is as good as any
    raise UserError(f'{path} cannot be read ({" ".join(str(error).split())[:200]}); give a whole file') from error
  if score_N.ndim != 1 or score_N.dtype.kind != 'f':
    raise UserError(f'{path} holds {score_N.dtype} of shape {score_N.shape}; give one floating-point number a row')
  if rows is not None and len(score_N) != rows:
    raise UserError(f'{path} has {len(score_N)} scores and the pool {rows} rows; give the scores of this pool')
  for start in range(0, len(score_N), 1 << 24):
    bad = np.flatnonzero(~np.isfinite(score_N[start : start + (1 << 24)]))
    if len(bad):
      raise UserError(f'{path}: the score of row {start + int(bad[0])} is not a number; leave no row without a score')
  return score_N


def _read_npy(path: Path) -> np.ndarray:
  return np.load(path, mmap_mode='r', allow_pickle=False)


def _read_parquet(path: Path, column: str) -> np.ndarray:
  from pyarrow import ArrowInvalid, parquet

  try:
    names = parquet.read_schema(path).names
    if column not in names:
      raise UserError(f'{path} has no column {column!r}; it has {", ".join(names)}')
    table = parquet.read_table(path, columns=[column, *(['row'] if 'row' in names else [])])
  except ArrowInvalid as error:
    raise ValueError(str(error)) from error
  score_N = table[column].to_numpy()
  if 'row' not in names:
    return score_N
  row_N = table['row'].to_numpy()
  if not np.array_equal(np.sort(row_N), np.arange(len(row_N))):
    raise UserError(f'{path}: column row must name each of the {len(row_N)} rows once; mend it, or leave it out')
  ordered_N = np.empty_like(score_N)
  ordered_N[row_N] = score_N
  return ordered_N


def _read_pt(path: Path) -> np.ndarray:
  """The one tensor of a file by `torch.save`, mapped from its raw storage. Nothing is unpickled, so nothing is run."""
  with zipfile.ZipFile(path) as archive:
    members = {info.filename.partition('/')[2]: info for info in archive.infolist()}
    storages = [name for name in members if name.startswith('data/')]
    if 'data.pkl' not in members or len(storages) != 1:
      raise UserError(f'{path} holds {len(storages)} tensors; save one vector alone')
    if 'data.pkl' in members and members['data.pkl'].file_size > _LARGEST_PICKLE:
      raise UserError(f'{path} holds more than a vector; save one vector alone')
    if 'byteorder' in members and archive.read(members['byteorder']) != b'little':
      raise UserError(f'{path} is not little-endian; save it anew on a usual machine')
    dtype, length = _described(archive.read(members['data.pkl']), path)
    info = members[storages[0]]
    if info.compress_type != zipfile.ZIP_STORED:
      if info.file_size > _LARGEST_PACKED:
        raise UserError(f'{path} unpacks to {info.file_size:,} bytes; save it as torch.save does, which packs nothing')
      return np.frombuffer(archive.read(info), dtype)[:length]
  with open(path, 'rb') as file:
    file.seek(info.header_offset)
    name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
  offset = info.header_offset + _LOCAL_HEADER.size + name + extra
  if length * np.dtype(dtype).itemsize > info.file_size:
    raise UserError(f'{path} names {length} numbers and holds fewer; it is cut short: fetch it again')
  return np.memmap(path, dtype, mode='r', offset=offset, shape=(length,))


def _described(pickled: bytes, path: Path) -> tuple[str, int]:
  """Type and length of a contiguous vector, read off the opcodes of its pickle without running them."""
  found: list[str] = []
  texts: list[str] = []
  numbers: list[int] = []
  tuples: list[int] = []
  for opcode, argument, _ in pickletools.genops(pickled):
    if opcode.name == 'GLOBAL':
      found += str(argument).split()[-1:]
    elif opcode.name == 'STACK_GLOBAL':
      found += texts[-1:]
    elif 'UNICODE' in opcode.name:
      texts.append(str(argument))
    elif opcode.name in ('BININT', 'BININT1', 'BININT2', 'LONG1'):
      numbers.append(int(str(argument)))
    elif opcode.name == 'TUPLE1':  # the tensor's size, then its stride
      tuples += numbers[-1:]
    elif opcode.name in ('TUPLE2', 'TUPLE3'):
      raise UserError(f'{path} holds a tensor of more than one axis; save one vector')
  storages = [name for name in found if name.endswith('Storage')]
  if len(storages) != 1 or storages[0] not in _STORAGES:
    raise UserError(f'{path} holds {", ".join(storages) or "no storage"}; save one float16, float32 or float64 vector')
  # The storage's own length, then offset, size and stride of the view: see torch._utils._rebuild_tensor_v2.
  if len(tuples) < 2 or tuples[1] != 1 or len(numbers) < 4 or numbers[1] != 0:
    raise UserError(f'{path} holds a view and no plain vector; save it with .clone()')
  return _STORAGES[storages[0]], tuples[0]


def fingerprint(
  selected: Mapping[str, Any], settings: Mapping[str, Any], previous: Mapping[str, Any]
) -> dict[str, Any]:
  """Checksum of the file that `selection.imported` names, for `Stage.fingerprint`.

  Raises:
    UserError: the file does not exist.
  """
  del settings, previous
  if not selected['selection.imported']:
    return {}
  file = Path(selected['selection.imported'])
  if not file.is_file():
    raise UserError(f'selection.imported = {str(file)!r} is not a file; give a file with one score per row')
  with open(file, 'rb') as opened:
    return {f'SHA-256 of {file}': hashlib.file_digest(opened, 'sha256').hexdigest()}

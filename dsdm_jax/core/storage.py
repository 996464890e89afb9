"""Files of artifacts: written whole, created once, listed, copied and deleted.

An object store can do all of it: no rename of folders, no append, and no state that several machines share but files.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TEMPORARY = re.compile(r'\..+\.[a-z0-9_]{8}')  # as tempfile names a file that is being written
# How formulas begin; spreadsheets take full-width signs for the same, and some skip white space before them.
_FORMULA = re.compile(r'\s*[=+\-@＝＋－＠]|[\t\r\n]')
_MOST_CHECKSUMS = 65_536
_TICK_NS = 50_000_000  # times of change are no finer than this on some file systems
# (device, inode, bytes, time of change) → SHA-256, of files that this process wrote or read whole.
_checksums: dict[tuple[int, int, int, int], str] = {}


def read_bytes(path: str | os.PathLike) -> bytes | None:
  """The content of a file; None if it does not exist."""
  try:
    return Path(path).read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file whole: after a kill it has the old content or the new. Missing folders are created."""
  with _written(path, data) as temporary:
    os.replace(temporary, path)


def create(path: str | os.PathLike, data: bytes) -> bool:
  """Writes a file whole unless it exists; of several writers one succeeds. Returns whether this one did."""
  with _written(path, data) as temporary:
    try:
      os.link(temporary, path)
    except FileExistsError:
      return False
    return True


def replace(path: str | os.PathLike, data: bytes, known: bytes | None) -> bool:
  """Writes a file whole if its content is `known` (None: if it does not exist). Returns whether it did.

  Of several writers that know no file, one succeeds. To replace a known one, hold the lock of the workdir.
  """
  if known is None:
    return create(path, data)
  if read_bytes(path) != known:
    return False
  write_bytes(path, data)
  return True


@contextlib.contextmanager
def _written(path: str | os.PathLike, data: bytes) -> Iterator[str]:
  """A synced temporary file beside `path` that holds `data`; deleted at the end if it is still there."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
      _note(os.fstat(file.fileno()), hashlib.sha256(data).hexdigest())
    os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is readable by its owner only
    yield temporary
  finally:
    Path(temporary).unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def copy(source: Path, target: Path) -> None:
  """Gives a file that is not written to any more a second name; copies it where the disk has no hard links."""
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = target.with_name(f'.{target.name}.00000000')
  temporary.unlink(missing_ok=True)
  try:
    os.link(source, temporary)
  except OSError:
    shutil.copy2(source, temporary)
  os.replace(temporary, target)
  temporary.unlink(missing_ok=True)  # the rename of a link over the same file does nothing


def delete(path: Path) -> None:
  """Deletes a file, or a folder with all that it holds, if it exists."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def files(folder: Path) -> list[str]:
  """Relative POSIX paths of all files below `folder`, sorted."""
  return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def delete_temporary(folder: Path, pattern: str) -> None:
  """Deletes files in `folder` that a kill left half-written. No other process may be writing there."""
  for path in folder.glob(pattern):
    if path.is_file() and _TEMPORARY.fullmatch(path.name):
      path.unlink()


def sha256(path: Path) -> str:
  """SHA-256 of a file, read from disk."""
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    state = os.fstat(file.fileno())
  if time.time_ns() - state.st_mtime_ns > _TICK_NS:  # a change right after this could not be seen
    _note(state, digest)
  return digest


def checksum(path: Path) -> str:
  """SHA-256 of a file; not read again if this process knows the file in this size and time of change."""
  return _checksums.get(_key(path.stat())) or sha256(path)


def _note(state: os.stat_result, digest: str) -> None:
  if len(_checksums) >= _MOST_CHECKSUMS:
    _checksums.clear()
  _checksums[_key(state)] = digest


def _key(state: os.stat_result) -> tuple[int, int, int, int]:
  return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def write_text(path: str | os.PathLike, text: str) -> None:
  write_bytes(path, text.encode())


def as_json(value: Any) -> bytes:
  """Canonical JSON: sorted keys, so that equal values are equal bytes; NaN is an error."""
  return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + '\n').encode()


def write_json(path: str | os.PathLike, value: Any) -> None:
  write_bytes(path, as_json(value))


def csv_text(header: Sequence[str], lines: Iterable[Iterable[Any]]) -> str:
  """A CSV table. Text that begins as a formula and is no number gets an apostrophe, so that no spreadsheet runs it."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator='\n')
  writer.writerows([_plain(cell) for cell in line] for line in (header, *lines))
  return buffer.getvalue()


def _plain(cell: Any) -> Any:
  if not isinstance(cell, str):
    return cell
  is_formula = _FORMULA.match(cell)
  cell = cell.replace('\r', r'\r')  # CR ends a line for others, and csv does not quote it
  try:
    is_number = cell.isascii() and cell == cell.strip() and np.isfinite(float(cell))
  except ValueError:
    is_number = False
  return f"'{cell}" if is_formula and not is_number else cell


def save_npy(path: str | os.PathLike, array: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  write_bytes(path, buffer.getvalue())


def save_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
  """An uncompressed npz; NumPy gives its members a constant date, so equal arrays are equal bytes."""
  write_bytes(path, _npz(arrays))


def save_first_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
  """As `save_npz`, unless the file exists."""
  create(path, _npz(arrays))


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  return buffer.getvalue()

"""Files of artifacts: written whole, created once, listed, copied and deleted.

An object store can do all of it: no rename of folders, no append, and no state that several machines share but files.
"""

import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from dsdm_jax.errors import UserError

_T = TypeVar('_T')
_STALE_SECONDS = (0.05, 0.2, 0.8)  # between tries to read a stale file
_PART = '.dsdm'  # ending of a file that is being written: no other program uses it
# Such files, and those that TensorStore, Orbax and NFS name while they write or delete.
_TEMPORARY = re.compile(r'\..+\.[a-z0-9_]{8}\.dsdm|.*\.__lock|.*\.orbax-checkpoint-tmp.*|\.nfs[0-9a-f]+')
_MARK = '.sha256'  # ending of the note that a file is complete
# How formulas begin; spreadsheets take full-width signs for the same, and some skip white space before them.
_FORMULA = re.compile(r'\s*[=+\-@＝＋－＠]|[\t\r\n]')
_MOST_CHECKSUMS = 65_536
_LONGEST_NAME, _LONGEST_PATH = 255, 3_072  # bytes; Linux allows 255 and 4,095, and files in the folder have names too
_TICK_NS = 50_000_000  # times of change are no finer than this on some file systems
# (device, inode, bytes, time of change) → SHA-256, of files that this process wrote or read whole.
_checksums: dict[tuple[int, int, int, int], str] = {}


def check_folder(path: str | os.PathLike, name: str) -> Path:
  r"""The absolute path of a folder for models and results, if all packages that open files in it can do so.

  Args:
    path: to check; it need not exist.
    name: of the flag or key that holds it, for the message.

  Raises:
    UserError: it is an address (`gs://…`); a part of the path is too long, or has a character that a package takes for
      something else. Orbax finds no files in `v[1]`, and TensorStore writes those of `a\b` to `a/b`.
  """
  if '://' in os.fspath(path):
    raise UserError(
      f'{name} = {os.fspath(path)!a} is an address; give a folder of a disk, or of a share that all machines '
      'mount (NFS, Filestore)'
    )
  folder = Path(os.path.abspath(path))
  wrong = [sign for sign in str(folder) if sign in '*?[\\' or not sign.isprintable()]
  if wrong:
    raise UserError(
      f'{name} = {str(folder)!a} contains {wrong[0]!a}; use a folder whose path has no *, ?, [, backslash or control '
      'character'
    )
  if len(os.fsencode(folder)) > _LONGEST_PATH or max(map(len, map(os.fsencode, folder.parts))) > _LONGEST_NAME:
    raise UserError(
      f'{name} = {str(folder)[:200]}… is too long; use a path of at most {_LONGEST_PATH:,} bytes, whose parts have at '
      f'most {_LONGEST_NAME}'
    )
  return folder


def read_bytes(path: str | os.PathLike) -> bytes | None:
  """The content of a file; None if it does not exist."""
  try:
    return retried(Path(path).read_bytes)
  except (FileNotFoundError, NotADirectoryError):
    return None


def retried(read: Callable[[], _T]) -> _T:
  """`read()`, again after a moment where a shared disk says that its handle of a file is stale (ESTALE).

  A network file system does when another machine has replaced the file; the next open finds the new one.
  """
  for seconds in _STALE_SECONDS:
    try:
      return read()
    except OSError as error:
      if error.errno != errno.ESTALE:
        raise
      time.sleep(seconds)
  return read()


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

  Of several writers one succeeds. For a known file this takes a file system with locks, or the lock of the workdir.
  """
  if known is None:
    return create(path, data)
  with guarded(Path(path).parent):
    if read_bytes(path) != known:
      return False
    write_bytes(path, data)
    return True


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
  """Lets one process at a time into the block, where the file system has locks."""
  try:
    import fcntl
  except ImportError:  # not POSIX
    yield
    return
  handle = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


@contextlib.contextmanager
def _written(path: str | os.PathLike, data: bytes) -> Iterator[str]:
  """A synced temporary file beside `path` that holds `data`; deleted at the end if it is still there."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix=_PART)
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
  temporary = target.with_name(f'.{target.name}.00000000{_PART}')
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
  """Relative POSIX paths of all files below `folder`, sorted; a link to a folder counts as a file."""
  result = []
  for root, folders, names in os.walk(folder):
    links = [name for name in folders if os.path.islink(os.path.join(root, name))]
    result += [Path(root, name).relative_to(folder).as_posix() for name in (*names, *links)]
  return sorted(result)


def is_temporary(name: str) -> bool:
  """Whether a relative path is of a file that is being written, or that a kill left half-written."""
  return any(_TEMPORARY.fullmatch(part) for part in name.split('/'))


def delete_temporary(folder: Path, below: bool = False) -> None:
  """Deletes what a kill left half-written in `folder`, and below it. No other process may be writing there."""
  for name in files(folder) if below else os.listdir(folder) if folder.is_dir() else ():
    if is_temporary(name) and (folder / name).is_file():
      (folder / name).unlink()


def mark(file: Path, *more: Path) -> None:
  """Notes in `<file>.sha256` that `file`, and `more` files that belong to it, are complete; sha256sum reads it."""
  names = [os.path.relpath(each, file.parent) for each in (file, *more)]
  lines = [f'{checksum(file.parent / name)}  {name}\n' for name in names]
  write_text(f'{file}{_MARK}', ''.join(lines) + _count(len(lines)))


def is_marked(file: Path) -> bool:
  """Whether `file` and what belongs to it are as they were when `mark` noted that they are complete.

  Raises:
    OSError: one cannot be read, which says nothing about it.
  """
  try:
    *lines, last = (read_bytes(f'{file}{_MARK}') or b'').decode().splitlines(keepends=True)
    noted = [line.removesuffix('\n').partition('  ')[::2] for line in lines]
    return (
      noted[0][1] == file.name
      and last == _count(len(noted))
      and all(checksum(file.parent / name) == digest for digest, name in noted)
    )
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, IndexError):
    return False


def _count(files: int) -> str:
  return f'# {files} files\n'  # so that a note that is cut short is none


def marked(file: Path) -> bool:
  """Whether there is a note on `file`, right or wrong."""
  return Path(f'{file}{_MARK}').is_file()


def unmark(file: Path) -> None:
  """Deletes a file and the note on it, if they exist."""
  for path in (Path(f'{file}{_MARK}'), file):
    path.unlink(missing_ok=True)


def mark_of(name: str) -> str:
  """The name of the note that `mark` writes for a file."""
  return f'{name}{_MARK}'


def is_mark(name: str) -> bool:
  return name.endswith(_MARK)


def sha256(path: Path) -> str:
  """SHA-256 of a file, read from disk."""
  return retried(lambda: _sha256(path))


def _sha256(path: Path) -> str:
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


class _Object(dict):
  """An object of a JSON file; a missing key is an error that names the file."""

  def __init__(self, content: dict[str, Any], path: str | os.PathLike):
    super().__init__(content)
    self._path = path

  def __missing__(self, key: str) -> Any:
    raise UserError(f'{self._path} has no {key!r}; it is damaged, or another program wrote it')


def read_json(path: str | os.PathLike, kind: type = object) -> Any:
  """The content of a JSON file of an artifact.

  Args:
    kind: dict or list; by default any.

  Raises:
    UserError: it is no JSON, or of another kind. An object of it raises one for a missing key.
  """
  try:
    content = json.loads(retried(Path(path).read_bytes), object_hook=lambda content: _Object(content, path))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is damaged, or another program wrote it ({" ".join(str(error).split())[:200]})') from error
  if not isinstance(content, kind):
    raise UserError(f'{path} holds no {kind.__name__}; it is damaged, or another program wrote it')
  return content


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


def load(path: str | os.PathLike) -> Any:
  """`numpy.load` for a file by `save_npy` or `save_npz`; it takes no more memory than the file has bytes.

  Raises:
    UserError: its members are compressed, overlap, hold objects, or are shorter than their headers say.
    OSError: it cannot be read.
  """
  return retried(lambda: _load(Path(path)))


def _load(path: Path) -> Any:
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      if path.suffix == '.npy':
        _check_array(file, size)
      else:
        with zipfile.ZipFile(file) as archive:
          members = archive.infolist()
          if sum(info.file_size for info in members) > size:
            raise ValueError('it unpacks to more than its size')
          for info in members:
            with archive.open(info) as member:
              _check_array(member, info.file_size)
    return np.load(path, allow_pickle=False)  # noqa: TID251  checked above
  # zipfile raises the last two for kinds of compression and encryption that it does not know.
  except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
    if isinstance(error.__context__, OSError):  # zipfile takes a disk that fails for a file that is no archive
      raise error.__context__ from None
    reason = ' '.join(str(error).split())[:200]
    raise UserError(f'{path} is damaged, or dsdm_jax did not write it ({reason}); delete it') from error


def _check_array(file: IO[bytes], size: int) -> None:
  version = np.lib.format.read_magic(file)
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, _, dtype = read(file)
  if dtype.hasobject or math.prod(shape) * dtype.itemsize != size - file.tell():
    raise ValueError('its header and its size do not agree')


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

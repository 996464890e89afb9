"""Files of artifacts: written whole, created once, listed, copied and deleted; on a disk or in an object store.

A *location* is a `Path`, or the `Address` of an object store (gs://, s3://, any address of fsspec). Every file of a
workdir is read and written through this module, which does with both what an object store can do: no rename of
folders, no append, and no state that several machines share but files. Libraries that need a path get one from `local`
and `uploading`; TensorStore and Orbax open the location themselves (`kvstore`, `url`).
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
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from dsdm_jax.core import object_store
from dsdm_jax.core.object_store import Address
from dsdm_jax.errors import UserError

Location = Path | Address
Named = Location | str | os.PathLike[str]  # what `locate` takes
_T = TypeVar('_T')
_STALE_SECONDS = (0.05, 0.2, 0.8)  # between tries to read a stale file
_PART = '.dsdm'  # ending of a file that is being written: no other program uses it
# Such files, and those that TensorStore, Orbax and NFS name while they write or delete.
_TEMPORARY = re.compile(r'\..+\.[a-z0-9_]{8}\.dsdm|.*\.__lock|.*\.orbax-checkpoint-tmp.*|\.nfs[0-9a-f]+')
_MARK = '.sha256'  # ending of the note that a file is complete
# How formulas begin; spreadsheets take full-width signs for the same, and some skip white space before them.
_FORMULA = re.compile(r'\s*[=+\-@＝＋－＠]|[\t\r\n]')
_SLIP = re.compile(r'(gs|gcs|s3):/?([^/].*)')  # a path that was meant as an address
_IN_MEMORY = 2**31  # bytes of an array by `empty`
_MOST_CHECKSUMS = 65_536
_ROOM_SECONDS = 60.0  # for which the room that was found in the cache of objects counts
_LONGEST_NAME, _LONGEST_PATH = 255, 3_072  # bytes; Linux allows 255 and 4,095, and files in the folder have names too
_TICK_NS = 50_000_000  # times of change are no finer than this on some file systems
# (device, inode, bytes, times of writing and of change) → SHA-256, of files that this process wrote or read whole.
_checksums: dict[tuple[int, int, int, int, int], str] = {}
_stack = contextlib.ExitStack()  # locks that this process has until it ends
_room = [0.0, 0.0]  # bytes that the cache of objects has left, and until when that counts


def check_folder(path: str | os.PathLike, name: str) -> Path:
  r"""The absolute path of a folder for models and results, if all packages that open files in it can do so.

  Args:
    path: to check; it need not exist.
    name: of the flag or key that holds it, for the message.

  Raises:
    UserError: it is an address (`gs://…`), or was meant as one (`gs:/…`); a part of the path is too long, or has a
      character that a package takes for something else. Orbax finds no files in `v[1]`, and TensorStore writes those of
      `a\b` to `a/b`.
  """
  if meant := _SLIP.fullmatch(os.fspath(path)):
    raise UserError(f'{name} = {os.fspath(path)!a} is no address; write {meant[1]}://{meant[2]}')
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


def check_location(text: Named, name: str) -> Location:
  """The location of a workdir: a folder as `check_folder` has it, or an address that can be listed.

  Raises:
    UserError: the folder or address cannot be used, or the package for the address is missing.
    StoreError: the store refuses to list it, or does not answer.
  """
  if isinstance(text, Address) or '://' in os.fspath(text):
    location = locate(text)
    if isinstance(location, Address):
      wrong = [sign for sign in str(location) if sign in '*?[\\#' or not sign.isprintable()]
      wrong += re.findall(r'::|(?<=/)\.\.(?=/|$)', str(location))
      if wrong:
        raise UserError(f'{name} = {str(location)!a} contains {wrong[0]!a}; use a plain address')
      object_store.check(location)
      return location
    text = location
  return check_folder(text, name)


def locate(text: Named) -> Location:
  """The location that a text names: an address if it has ://, else a path, which may be relative.

  Raises:
    UserError: it is an address without a bucket, or of a file of another machine.
  """
  if isinstance(text, Address):
    return text
  text = os.fspath(text)
  scheme, is_address, rest = text.partition('://')
  if not is_address:
    return Path(text)
  if scheme.lower() in ('file', 'local'):
    if not rest.startswith('/'):
      raise UserError(f'{text!a} names a machine; write {scheme}:///{rest}')
    return Path(rest)
  os.environ.setdefault('EPATH_USE_TF', 'false')  # else Orbax imports TensorFlow for gs://, if it looks before this
  return Address(text)


def absolute(location: Location) -> Location:
  return location if isinstance(location, Address) else location.absolute()


def relative(location: Location, folder: Location) -> str:
  """The POSIX name of a location below `folder`."""
  return str(location).removeprefix(str(folder)).lstrip('/')


def read_bytes(path: Named) -> bytes | None:
  """The content of a file; None if it does not exist."""
  path = locate(path)
  if isinstance(path, Address):
    return object_store.read(path)
  try:
    return retried(path.read_bytes)
  except (FileNotFoundError, NotADirectoryError):
    return None


def read(path: Named) -> bytes:
  """The content of a file.

  Raises:
    FileNotFoundError: there is no such file.
  """
  path = locate(path)
  if isinstance(path, Path):
    return retried(path.read_bytes)
  data = object_store.read(path)
  if data is None:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
  return data


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


def write_bytes(path: Named, data: bytes) -> None:
  """Writes a file whole: after a kill it has the old content or the new. Missing folders are created."""
  path = locate(path)
  if isinstance(path, Address):
    object_store.write(path, data)
    return
  with _written(path, data) as temporary:
    os.replace(temporary, path)


def create(path: Named, data: bytes) -> bool:
  """Writes a file whole unless it exists; of several writers one succeeds. Returns whether this one did.

  In an object store, writers of the same bytes all succeed.
  """
  path = locate(path)
  if isinstance(path, Address):
    return object_store.create(path, data)
  with _written(path, data) as temporary:
    try:
      os.link(temporary, path)
    except FileExistsError:
      return False
    return True


def replace(path: Named, data: bytes, known: bytes | None) -> bool:
  """Writes a file whole if its content is `known` (None: if it does not exist). Returns whether it did.

  Of several writers one succeeds. For a known file this takes a file system with locks, a store with conditional
  writes (gs://, s3://), or the lock of the workdir.
  """
  path = locate(path)
  if known is None:
    return create(path, data)
  if isinstance(path, Address):
    return object_store.replace(path, data, known)
  with guarded(path.parent):
    if read_bytes(path) != known:
      return False
    write_bytes(path, data)
    return True


@contextlib.contextmanager
def guarded(folder: Path, wait: bool = True) -> Iterator[None]:
  """Lets one process at a time into the block, where the file system has locks.

  Raises:
    OSError: another process is in it, and this one does not `wait`.
  """
  try:
    import fcntl
  except ImportError:  # not POSIX
    yield
    return
  handle = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError) if wait else contextlib.nullcontext():
      fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(handle)


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[str]:
  """A synced temporary file beside `path` that holds `data`; deleted at the end if it is still there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix=_PART)
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
      written = os.fstat(file.fileno()).st_ino
    os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is readable by its owner only
    yield temporary
  finally:
    Path(temporary).unlink(missing_ok=True)
  with contextlib.suppress(OSError):  # another process has deleted it
    if (state := path.stat()).st_ino == written:
      _note(state, hashlib.sha256(data).hexdigest())


@functools.cache
def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def copy(source: Location, target: Location) -> None:
  """Gives a file that is not written to any more a second name; copies it where there are no hard links.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if isinstance(source, Address):
    if isinstance(target, Address):
      object_store.copy(source, target)
    else:
      target.parent.mkdir(parents=True, exist_ok=True)
      _fetch(source, {'': target}, {'': _existing(source)})
    return
  if isinstance(target, Address):
    object_store.upload({target.name: source}, target.parent)
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = target.with_name(f'.{target.name}.00000000{_PART}')
  temporary.unlink(missing_ok=True)
  known = _checksums.get(_key(source.stat()))
  try:
    os.link(source, temporary)
  except OSError:
    shutil.copy2(source, temporary)
    known = None
  os.replace(temporary, target)
  temporary.unlink(missing_ok=True)  # the rename of a link over the same file does nothing
  if known:  # a link has changed the time of change
    _note(target.stat(), known)


def delete(path: Location) -> None:
  """Deletes a file, or a folder with all that it holds, if it exists."""
  if isinstance(path, Address):
    object_store.delete(path)
  elif path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def unlink(file: Location) -> None:
  """Deletes a file if it exists."""
  if isinstance(file, Address):
    object_store.unlink(file)
  else:
    file.unlink(missing_ok=True)


def make_folder(folder: Location) -> None:
  """Creates a folder and those above it; an object store has none."""
  if isinstance(folder, Path):
    folder.mkdir(parents=True, exist_ok=True)


def delete_empty_folder(folder: Location) -> None:
  """Deletes a folder if it is empty and no link."""
  if isinstance(folder, Path):
    with contextlib.suppress(OSError):
      folder.rmdir()


def exists(location: Location) -> bool:
  """Whether there is a file or a folder; in an object store, a folder is there if it holds anything."""
  return object_store.exists(location) if isinstance(location, Address) else location.exists()


def is_file(location: Location) -> bool:
  return object_store.stat(location) is not None if isinstance(location, Address) else location.is_file()


def is_folder(location: Location) -> bool:
  return bool(object_store.children(location)) if isinstance(location, Address) else location.is_dir()


def children(folder: Location) -> list[Location]:
  """The files and folders directly in `folder`, sorted by name; none if there is no such folder."""
  if isinstance(folder, Address):
    return [folder / name for name in object_store.children(folder)]
  return sorted(folder.iterdir()) if folder.is_dir() else []


def subfolders(folder: Location) -> list[Location]:
  """The folders directly in `folder`, sorted by name; none if there is no such folder."""
  if isinstance(folder, Address):
    return [folder / name for name, is_folder in object_store.children(folder).items() if is_folder]
  return [path for path in children(folder) if isinstance(path, Path) and path.is_dir()]


def files(folder: Location) -> list[str]:
  """Relative POSIX paths of all files below `folder`, sorted; a link to a folder counts as a file."""
  if isinstance(folder, Address):
    return list(object_store.find(folder))
  result = []
  for root, folders, names in os.walk(folder):
    links = [name for name in folders if os.path.islink(os.path.join(root, name))]
    result += [Path(root, name).relative_to(folder).as_posix() for name in (*names, *links)]
  return sorted(result)


def is_temporary(name: str) -> bool:
  """Whether a relative path is of a file that is being written, or that a kill left half-written."""
  return any(_TEMPORARY.fullmatch(part) for part in name.split('/'))


def delete_temporary(folder: Location, below: bool = False) -> None:
  """Deletes what a kill left half-written in `folder`, and below it. No other process may be writing there."""
  for name in files(folder) if below else [path.name for path in children(folder)]:
    if is_temporary(name) and is_file(folder / name):
      unlink(folder / name)


def mark(file: Location, *more: Location) -> None:
  """Notes in `<file>.sha256` that `file`, and `more` files that belong to it, are complete.

  sha256sum reads it; in an object store it has the store's own checksums, and `more` are below the folder of `file`.
  """
  names = [_beside(file, each) for each in (file, *more)]
  lines = [f'{checksum(file.parent / name)}  {name}\n' for name in names]
  write_text(_mark_beside(file), ''.join(lines) + _count(len(lines)))


def _beside(file: Location, other: Location) -> str:
  if isinstance(file, Address):
    return str(other.relative_to(file.parent)) if isinstance(other, Address) else ''
  return os.path.relpath(str(other), file.parent)


def _mark_beside(file: Location) -> Location:
  return file.with_name(mark_of(file.name))


def is_marked(file: Location) -> bool:
  """Whether `file` and what belongs to it are as they were when `mark` noted that they are complete.

  Raises:
    OSError: one cannot be read, which says nothing about it.
  """
  try:
    *lines, last = (read_bytes(_mark_beside(file)) or b'').decode().splitlines(keepends=True)
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


def marked(file: Location) -> bool:
  """Whether there is a note on `file`, right or wrong."""
  return is_file(_mark_beside(file))


def unmark(file: Location) -> None:
  """Deletes a file and the note on it, if they exist."""
  for path in (_mark_beside(file), file):
    unlink(path)


def mark_of(name: str) -> str:
  """The name of the note that `mark` writes for a file."""
  return f'{name}{_MARK}'


def is_mark(name: str) -> bool:
  return name.endswith(_MARK)


def sha256(path: Location) -> str:
  """SHA-256 of a file, whose bytes are read."""
  if isinstance(path, Address):
    data = object_store.read(path)
    if data is None:
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return hashlib.sha256(data).hexdigest()
  return retried(lambda: _sha256(path))


def _sha256(path: Path) -> str:
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    state = os.fstat(file.fileno())
  if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _TICK_NS:  # a later change has another time
    _note(state, digest)
  return digest


def checksum(path: Location) -> str:
  """SHA-256 of a file; not read again if this process knows the file in this size and these times.

  Of an object it is 'crc32c:…' or 'etag:…' as its store says, and SHA-256 where the store says nothing.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if isinstance(path, Address):
    return _existing(path).checksum or sha256(path)
  return _checksums.get(_key(path.stat())) or sha256(path)


def _existing(address: Address) -> object_store.Stat:
  stat = object_store.stat(address)
  if stat is None:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(address))
  return stat


def size(path: Location) -> int:
  """Bytes of a file.

  Raises:
    FileNotFoundError: there is no such file.
  """
  return _existing(path).size if isinstance(path, Address) else path.stat().st_size


def remember(path: Location, checksum: str) -> None:
  """Takes `checksum` as that of a file in its present size and time of change, so that it is not read again."""
  if isinstance(path, Path):
    _note(path.stat(), checksum)


def _note(state: os.stat_result, digest: str) -> None:
  if len(_checksums) >= _MOST_CHECKSUMS:
    _checksums.clear()
  _checksums[_key(state)] = digest


def _key(state: os.stat_result) -> tuple[int, int, int, int, int]:
  # A copy may have the inode of a deleted file, and the time of writing of its original, but not its time of change.
  return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def write_text(path: Named, text: str) -> None:
  write_bytes(path, text.encode())


def as_json(value: Any) -> bytes:
  """Canonical JSON: sorted keys, so that equal values are equal bytes; NaN is an error."""
  return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + '\n').encode()


def write_json(path: Named, value: Any) -> None:
  write_bytes(path, as_json(value))


class _Object(dict):
  """An object of a JSON file; a missing key is an error that names the file."""

  def __init__(self, content: dict[str, Any], path: Named):
    super().__init__(content)
    self._path = path

  def __missing__(self, key: str) -> Any:
    raise UserError(f'{self._path} has no {key!r}; it is damaged, or another program wrote it')


def read_json(path: Named, kind: type = object) -> Any:
  """The content of a JSON file of an artifact.

  Args:
    kind: dict or list; by default any.

  Raises:
    UserError: it is no JSON, or of another kind. An object of it raises one for a missing key.
  """
  try:
    content = json.loads(read(path), object_hook=lambda content: _Object(content, path))
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


def load(path: Named) -> Any:
  """`numpy.load` for a file by `save_npy` or `save_npz`; it takes no more memory than the file has bytes.

  Raises:
    UserError: its members are compressed, overlap, hold objects, or are shorter than their headers say.
    OSError: it cannot be read.
  """
  return retried(lambda: _load(locate(path)))


def _load(path: Location) -> Any:
  data = read(path) if isinstance(path, Address) else None
  try:
    with open(str(path), 'rb') if data is None else io.BytesIO(data) as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(0)
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
    source = str(path) if data is None else io.BytesIO(data)
    return np.load(source, allow_pickle=False)  # noqa: TID251  checked above
  # zipfile raises a RuntimeError, or one of its kinds, for compression and encryption that it does not know.
  except (ValueError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
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


def save_npy(path: Named, array: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  write_bytes(path, buffer.getvalue())


def save_npz(path: Named, **arrays: np.ndarray) -> None:
  """An uncompressed npz; NumPy gives its members a constant date, so equal arrays are equal bytes."""
  write_bytes(path, _npz(arrays))


def save_first_npz(path: Named, **arrays: np.ndarray) -> None:
  """As `save_npz`, unless the file exists."""
  create(path, _npz(arrays))


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  return buffer.getvalue()


def opened(path: Location) -> IO[bytes]:
  """A file, opened to read parts of it.

  Raises:
    FileNotFoundError: there is no such file.
  """
  return object_store.opened(path) if isinstance(path, Address) else open(path, 'rb')


def url(location: Location) -> str:
  """The name by which Orbax and epath open a location."""
  return str(absolute(location))


def uri(location: Location) -> str:
  """The address of a file for a browser or a program that takes addresses."""
  return str(location) if isinstance(location, Address) else location.absolute().as_uri()


def kvstore(location: Location) -> dict[str, Any]:
  """TensorStore's spec of a folder.

  Raises:
    UserError: TensorStore does not write to this kind of address.
  """
  if isinstance(location, Address):
    return object_store.kvstore(location)
  return {'driver': 'file', 'path': f'{location.absolute()}/'}


@contextlib.contextmanager
def uploading(folder: Location) -> Iterator[Path]:
  """A local folder to write in; at the end, its files are in `folder`. For libraries that write to disks only.

  A local `folder` is given itself. For an address it is a temporary one, and after an error nothing is uploaded.
  """
  if isinstance(folder, Path):
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    return
  with scratch() as temporary:
    yield temporary
    object_store.upload({name: temporary / name for name in files(temporary)}, folder)


def local(location: Location) -> Path:
  """A local file or folder with the content of `location`, for libraries that need a path or map memory. Only read it.

  A local location is given itself. An address is downloaded into a cache of this user, unless it is there already, and
  what was downloaded is compared with the store's checksums. The cache takes up to half of the space that its disk has
  for it; what was not used for longest goes first, but nothing that a process which lives has asked for.

  Raises:
    FileNotFoundError: there is nothing at this address.
    UserError: the disk has no room for it, or what arrives is not what the store says.
  """
  if isinstance(location, Path):
    return location
  single = object_store.stat(location)
  states = {'': single} if single is not None else object_store.find(location)
  if not states:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(location))
  state = [str(location), *((name, stat.size, stat.checksum) for name, stat in states.items())]
  cache = _cache() / 'copies'
  entry = cache / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
  cache.mkdir(parents=True, exist_ok=True)
  with _turn(entry):
    return _copied(location, states, entry) / location.name


@functools.lru_cache(maxsize=4_096)
def _turn(entry: Path) -> threading.Lock:
  """Lets threads that want the same copy make it once."""
  del entry
  return threading.Lock()


def _copied(location: Address, states: Mapping[str, object_store.Stat], entry: Path) -> Path:
  """The entry of the cache of objects with the content of `location`, which is downloaded if it is not there."""
  known = all(stat.checksum for stat in states.values())  # else nothing tells whether it has changed
  if _hold(entry) and known:
    os.utime(entry)
    return entry
  _make_room(entry.parent, sum(stat.size for stat in states.values()), location)
  with tempfile.TemporaryDirectory(dir=entry.parent, prefix='.') as text:
    _hold(Path(text))
    new = Path(text) / 'new'
    _fetch(location, {name: new / location.name / name if name else new / location.name for name in states}, states)
    if not known and entry.is_dir():
      os.replace(entry, Path(text) / 'old')
    with contextlib.suppress(OSError):  # another process has put it there at this moment
      os.replace(new, entry)
  return entry


def _hold(entry: Path) -> bool:
  """Keeps an entry of the cache from deletion as long as this process lives. Returns whether it is there."""
  with guarded(entry.parent):  # nothing is deleted in between
    (_holds(entry.parent.with_name('held'), os.getpid()) / entry.name).touch()
    return entry.is_dir()


@functools.cache
def _holds(folder: Path, process: int) -> Path:
  """A folder whose files name what this process holds. It is locked, so that others see that its process lives."""
  del process  # a fork needs its own
  folder.mkdir(parents=True, exist_ok=True)
  own = Path(tempfile.mkdtemp(dir=folder))
  _stack.enter_context(guarded(own, wait=False))
  return own


def _held(folder: Path) -> set[str]:
  """Names of what processes hold that live; deletes the folders of others."""
  names = set[str]()
  for own in folder.iterdir():
    try:
      with guarded(own, wait=False):
        shutil.rmtree(own, ignore_errors=True)
    except OSError:  # its process lives
      names |= set(os.listdir(own))
  return names


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
  """A local folder that is deleted at the end; what a killed process left there is deleted by the next."""
  folder = _cache() / 'scratch'
  folder.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    with guarded(folder):  # else another process could take the new one for an old one
      for old in folder.iterdir():
        with contextlib.suppress(OSError), guarded(old, wait=False):  # an OSError: its process lives
          shutil.rmtree(old, ignore_errors=True)
      new = Path(tempfile.mkdtemp(dir=folder))
      stack.enter_context(guarded(new, wait=False))
    try:
      yield new
    finally:
      shutil.rmtree(new, ignore_errors=True)


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An array to be filled. A large one is in a file of this user's cache, so that it need not fit in memory.

  The file has no name and ends with the array.

  Raises:
    OSError: the disk has no room for it.
  """
  size = math.prod(shape) * dtype.itemsize
  if size <= _IN_MEMORY:
    return np.empty(shape, dtype)
  folder = _cache() / 'scratch'
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder) as file:
    try:
      os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full later would end the process
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(folder)) from error
    return np.asarray(np.memmap(file, dtype, 'r+', shape=tuple(shape)))


def _cache() -> Path:
  return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dsdm_jax' / 'objects'


def _make_room(cache: Path, needed: int, location: Address) -> None:
  """Deletes what no process holds, the oldest first, until `needed` bytes fit in the cache's half of the disk.

  Raises:
    UserError: they do not.
  """
  _room[0] -= needed
  if _room[0] > 0 and time.monotonic() < _room[1]:
    return
  entries = []
  for path in cache.iterdir():
    with contextlib.suppress(OSError):  # another process deletes it
      entries.append((path.stat().st_mtime, path, sum((path / name).stat().st_size for name in files(path))))
  held, free = sum(size for _, _, size in entries), shutil.disk_usage(cache).free
  limit = (held + free) // 2
  with guarded(cache):
    in_use, gone = _held(cache.with_name('held')), []
    for _, path, size in sorted(entries):
      if held + needed > limit and path.name not in in_use and path.is_dir():
        gone.append(path.with_name(f'.{path.name}.{os.getpid()}'))
        os.replace(path, gone[-1])  # a kill may leave a part of it
        held -= size
  for path in gone:
    shutil.rmtree(path, ignore_errors=True)
  _room[:] = limit - held - needed, time.monotonic() + _ROOM_SECONDS
  if needed > shutil.disk_usage(cache).free * 9 // 10:
    raise UserError(
      f'{location} has {needed / 1e9:,.1f} GB, and {cache} has no room for a copy; free space there, or set '
      'XDG_CACHE_HOME to a folder of a larger disk'
    )


def _fetch(address: Address, targets: Mapping[str, Path], states: Mapping[str, object_store.Stat]) -> None:
  """Downloads objects below `address` (name relative to it, or '' for itself) and checks what arrives.

  Raises:
    UserError: it is not what the store says.
  """
  object_store.download(address, targets)
  for name, file in targets.items():
    stat = states[name]
    if file.stat().st_size != stat.size or (stat.checksum and not agrees(file, stat.checksum)):
      raise UserError(f'{address / name if name else address} arrived damaged; start the same command again')


def agrees(file: Location, noted: str, state: object_store.Stat | None = None) -> bool:
  """Whether a file has a checksum that was noted: SHA-256, or that of an object store ('crc32c:…', 'etag:…').

  What another store noted is compared with the bytes. An ETag with a - is of an object that was uploaded in parts, and
  says nothing of its bytes: it agrees with every other ETag.

  Args:
    state: of an object, where a listing has it.

  Raises:
    FileNotFoundError: there is no such file.
  """
  kind, _, value = noted.rpartition(':')
  if isinstance(file, Address):
    known = (state or _existing(file)).checksum or ''
    if known == noted:
      return True
    if known.rpartition(':')[0] == kind:
      return kind == 'etag' and '-' in known + noted
    return bool(_digest_of(io.BytesIO(read(file)), kind, file) in (value, None))
  if not kind:
    return checksum(file) == noted
  with open(file, 'rb') as opened:
    return _digest_of(opened, kind, file) in (value, None) or '-' in noted


def _digest_of(opened: IO[bytes], kind: str, name: Location) -> str | None:
  """The checksum of bytes; None for an ETag that is no MD5."""
  if kind == 'crc32c':
    return object_store.crc32c(opened, name)
  return hashlib.file_digest(opened, 'md5' if kind == 'etag' else 'sha256').hexdigest()  # type: ignore[arg-type]


def upload(files: Mapping[str, Path], folder: Address) -> None:
  """Copies local files to names below `folder`; an error leaves some of them there."""
  object_store.upload(files, folder)


def states(folder: Address) -> dict[str, object_store.Stat]:
  """Name relative to `folder` → size and checksum of all objects below it, by one listing."""
  return object_store.find(folder)


def read_jsonl(path: Location) -> list[Any]:
  """The values of a file with one JSON value per line. Only a newline ends a line: text may hold U+2028 and the like.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: a line is no JSON.
  """
  try:
    return [json.loads(line) for line in read(path).split(b'\n') if line]
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is damaged, or another program wrote it ({" ".join(str(error).split())[:200]})') from error


def mapped(path: Location) -> np.ndarray:
  """The array of an .npy file, mapped into memory: only the pages that are read take memory."""
  return np.load(local(path), mmap_mode='r')  # noqa: TID251  mapped


def parquet_writer(file: Any, schema: Any, **options: Any) -> Any:
  """A `pyarrow.parquet.ParquetWriter` whose file stays as it is if it is not closed, as after an error.

  pyarrow's own closes it once more when it is collected, and then prints what the full disk says.
  """
  return _parquet_writer()(file, schema, **options)


@functools.cache
def _parquet_writer() -> Any:
  import pyarrow.parquet as pq

  return type('ParquetWriter', (pq.ParquetWriter,), {'__del__': lambda self: None})


def open_parquet(path: Location) -> Any:
  """A `pyarrow.parquet.ParquetFile`, of which only the groups and columns that are read are fetched."""
  import pyarrow.parquet as pq

  return pq.ParquetFile(path if isinstance(path, Path) else opened(path))

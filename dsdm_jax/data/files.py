"""Input files that a user names: patterns, local paths and fsspec URLs (gs://, s3://, hf://, …), compression, JSON.

Pools, targets, benchmarks, vocabularies and tokenizers are all read through this module.
"""

import bz2
import contextlib
import errno
import fnmatch
import functools
import glob as local
import hashlib
import io
import json
import lzma
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dsdm_jax.core import storage
from dsdm_jax.errors import UserError

LONGEST_LINE = 64 * 2**20  # bytes; a document of `readers.LARGEST` bytes takes 48 MiB if all but ASCII is escaped
READ_ERRORS = (OSError, EOFError)  # what reading an opened file may raise
BOM = b'\xef\xbb\xbf'  # a byte order mark in UTF-8
_MOST_VALUES = 4 * 2**20  # JSON values in a line; each takes up to 64 bytes of memory
_BUFFER = 2**20
_READ_REMOTE = 2**28  # bytes of remote files that are read for a digest
_REMEMBERED_BYTES, _MOST_REMEMBERED = 2**20, 200_000  # size and number of files whose digest is kept for later runs
_TICK_NS = 50_000_000  # times of change are no finer than this on some file systems
_PACKAGES = {'gs': 'gcsfs', 'gcs': 'gcsfs', 's3': 's3fs', 'hf': 'huggingface_hub', 'az': 'adlfs'}
# What fsspec's systems report: checksums of the content, then what only changes with it.
_MARKS = ('md5Hash', 'crc32c', 'sha256', 'blob_id', 'etag', 'ETag', 'mtime', 'updated', 'created')
# (state of a file) → SHA-256, of this process; and those that are not in the user's cache folder yet.
_digests: dict[str, str] = {}
_new: dict[str, str] = {}


def is_remote(path: str) -> bool:
  """Whether `path` is a URL for fsspec rather than a local path."""
  return '://' in path


def one_line(error: Exception) -> str:
  """Type and message of an error on one line of at most 300 characters."""
  return ' '.join(f'{type(error).__name__} {error}'.split())[:300]


def _remote(url: str) -> tuple[Any, str]:
  """fsspec's file system for a URL and the path inside it."""
  import fsspec

  try:
    return fsspec.core.url_to_fs(url)
  except ImportError as error:
    scheme = url.partition('://')[0]
    package = _PACKAGES.get(scheme, f'the package that fsspec names for it ({one_line(error)})')
    raise UserError(f'paths that begin with {scheme}:// need {package}; pip install it') from error
  except Exception as error:  # fsspec's systems raise errors of many types: no credentials, unknown protocol
    raise UserError(f'{url} cannot be reached ({one_line(error)}); check address, network and credentials') from error


def _call(function: Any, *arguments: Any) -> Any:
  """Calls a function of an fsspec system, which may raise errors of any type, and raises only OSErrors."""
  try:
    return function(*arguments)
  except OSError:
    raise
  except Exception as error:
    raise OSError(one_line(error)) from error


def _wildcards(pattern: str) -> str:
  return '*[' if pattern.startswith(('http://', 'https://')) else '*?['  # a query follows the ? of an address


def _has_wildcard(pattern: str) -> bool:
  return any(sign in pattern for sign in _wildcards(pattern))


def natural_order(path: str) -> list[str | int]:
  """Sorting key: numbers in names count by value, so that part-2 is before part-10."""
  return [int(part) if index % 2 else part for index, part in enumerate(re.split('([0-9]+)', path))]


def glob(pattern: str, kind: Literal['file', 'directory'] = 'file') -> list[str]:
  """Paths that match `pattern` as in `glob.glob(pattern, recursive=True)`, also behind an address, in natural order.

  Hidden names match only a pattern that begins with a dot, and symbolic links are followed. A link to a missing file is
  in the result, so that reading it fails. A pattern without wildcards is returned as it is, whether it exists or not.

  Raises:
    UserError: a URL cannot be listed, because a package, the network or credentials are missing.
  """
  if not _has_wildcard(pattern):
    return [pattern]
  if not is_remote(pattern):
    return _local_glob(pattern, kind)
  system, inside = _remote(pattern)
  if pattern.endswith('/') and kind == 'file':  # fsspec drops the slash, after which there are only folders
    return []
  if 'file' in system.protocol:
    return [system.unstrip_protocol(path) for path in _local_glob(inside, kind)]
  # In fsspec, unlike in Python, ** may only be a whole part of a path, and * matches hidden names.
  parts = [part if part == '**' else re.sub(r'\*+', '*', part) for part in inside.split('/')]
  try:
    found = system.glob('/'.join(parts), detail=True).items()
  except Exception as error:  # as in `_remote`
    raise UserError(
      f'{pattern} cannot be listed ({one_line(error)}); check address, network and credentials'
    ) from error
  paths = [path for path, info in found if info['type'] == kind and _matches(path.split('/'), parts)]
  return [system.unstrip_protocol(path) for path in sorted(paths, key=lambda path: (natural_order(path), path))]


def escaped(pattern: str) -> str | None:
  """`pattern` with wildcards escaped in those of its leading parts that are names of files or folders; None without."""
  parts, changed = pattern.split('/'), False
  for index in range(len(parts) if not is_remote(pattern) else 0):
    if not os.path.lexists('/'.join(pattern.split('/')[: index + 1]) or '/'):
      break
    parts[index], before = local.escape(parts[index]), parts[index]
    changed |= parts[index] != before
  return '/'.join(parts) if changed else None


def _local_glob(pattern: str, kind: str) -> list[str]:
  wanted = os.path.isdir if kind == 'directory' else lambda path: os.path.isfile(path) or not os.path.exists(path)
  paths = {path for path in local.glob(pattern, recursive=True) if wanted(path)}
  return sorted(paths, key=lambda path: (natural_order(path), path))


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
  """Whether the parts of a path match those of a pattern, with Python's rules."""
  if not pattern or not path:
    return not path and all(part == '**' for part in pattern)
  if pattern[0] == '**':
    hidden = path[0].startswith('.')
    return _matches(path, pattern[1:]) or (not hidden and _matches(path[1:], pattern))
  hidden = path[0].startswith('.') and not pattern[0].startswith('.') and local.has_magic(pattern[0])
  same = fnmatch.fnmatchcase(path[0], pattern[0]) if local.has_magic(pattern[0]) else path[0] == pattern[0]
  return same and not hidden and _matches(path[1:], pattern[1:])


def below(path: str, pattern: str) -> str:
  """`path` from the part of `pattern` on that has the first wildcard; without one, the file's name."""
  # fsspec may write an address with more slashes than the user.
  path, pattern = (re.sub('^[^:/]*://+', '', x) if is_remote(x) else x for x in (path, pattern))
  parts = pattern.split('/')
  first = next((i for i, part in enumerate(parts) if _has_wildcard(part)), len(parts) - 1)
  fixed = '/'.join([*parts[:first], ''])
  return path.removeprefix(fixed).lstrip('/')


def is_file(path: str) -> bool:
  """Whether there is a file at `path`."""
  if not is_remote(path):
    return Path(path).is_file()
  system, inside = _remote(path)
  return _call(system.isfile, inside)


class _RemoteFile(io.RawIOBase):
  """A file that fsspec opened. Its errors are OSErrors, like those of a local file."""

  def __init__(self, url: str):
    system, inside = _remote(url)
    self._file = _call(system.open, inside, 'rb')

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = _call(self._file.read, len(buffer))
    buffer[: len(data)] = data
    return len(data)

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    return _call(self._file.seek, offset, whence)

  def tell(self) -> int:
    return _call(self._file.tell)

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def _zstd() -> Any:
  import zstandard

  return zstandard.ZstdDecompressor().decompressobj()


# What unpacks one stream; a file may hold several. Windows above 128 MiB are refused, for xz above 256 MiB.
_STREAMS: Mapping[str, Callable[[], Any]] = {
  '.gz': lambda: zlib.decompressobj(wbits=31),
  '.bz2': bz2.BZ2Decompressor,
  '.xz': lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**28),
  '.zst': _zstd,
}


class _Unpacked(io.RawIOBase):
  """The content of a packed file, in bounded memory, by one rule for all formats.

  Streams follow each other without a gap. Zero bytes after a stream are padding. A stream that ends early raises
  EOFError, and anything else that is no stream OSError: the readers of gzip, bz2, lzma, zstandard and fsspec differ in
  which of these they pass over in silence.
  """

  _CHUNK = 2**12  # packed bytes; zstd unpacks them to at most 128 MiB, zlib to 4 MiB
  _PIECE = 2**20  # unpacked bytes at once where the decompressor takes a limit

  def __init__(self, file: BinaryIO, start: Callable[[], Any]):
    self._file = file
    self._start = start
    self._stream: Any = start()  # None between streams
    self._packed = b''
    self._data = memoryview(b'')

  def readable(self) -> bool:
    return True

  def _unpack(self) -> bytes | None:
    """The next piece, which may be empty; None at the end of the file."""
    waiting = self._stream is not None and not getattr(self._stream, 'needs_input', True)
    if not waiting:
      self._packed = self._packed or self._file.read(self._CHUNK)
      if not self._packed:
        if self._stream is not None:
          raise EOFError('the last stream is truncated')
        return None
    if self._stream is None:
      self._packed = self._packed.lstrip(b'\0')
      if not self._packed:
        return b''
      self._stream = self._start()
    limit = (self._PIECE,) if hasattr(self._stream, 'needs_input') else ()
    try:
      data = self._stream.decompress(self._packed, *limit)
    except (OSError, MemoryError):
      raise
    except Exception as error:  # each package has its own
      raise OSError(str(error)) from error
    self._packed = b''
    if self._stream.eof:
      self._packed, self._stream = self._stream.unused_data, None
    return data

  def readinto(self, buffer: Any) -> int:
    while not self._data:
      data = self._unpack()
      if data is None:
        return 0
      self._data = memoryview(data)
    count = min(len(buffer), len(self._data))
    buffer[:count] = self._data[:count]
    self._data = self._data[count:]
    return count


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
  """Opens a file for reading, decompressed if its name ends in .gz, .bz2, .xz or .zst.

  Raises:
    OSError: the file cannot be opened. Reading raises one of `READ_ERRORS`, also if a compressed file is truncated.
    UserError: a package that the URL needs is missing.
  """
  with contextlib.ExitStack() as stack:
    raw = _RemoteFile(path) if is_remote(path) else io.FileIO(path)
    file: Any = stack.enter_context(io.BufferedReader(raw, _BUFFER))
    name = path.partition('?')[0] if is_remote(path) else path
    start = _STREAMS.get(os.path.splitext(name)[1].lower())
    yield stack.enter_context(io.BufferedReader(_Unpacked(file, start), _BUFFER)) if start else file


def read_bytes(path: str) -> bytes:
  """The whole file; arguments and errors as `open_bytes`."""
  with open_bytes(path) as file:
    return file.read()


def describe(error: Exception) -> str:
  """What one of `READ_ERRORS` says about a file, for messages."""
  if isinstance(error, EOFError):
    return 'the compressed file is truncated; copy it again'
  message = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:200]
  return f'cannot be read ({message or type(error).__name__})'


def digests(paths: Sequence[str]) -> list[str]:
  """SHA-256 of the bytes of each file; nothing else makes a digest of what a user names.

  A local file is read once: its digest is remembered with device, inode, size and both times, and for files of 1 MiB
  and more also for later runs, in the user's cache folder. Remote files are read if all of them have at most 256 MiB.
  Otherwise the checksum counts that the server reports, or its ETag or time, by which a copy differs from its original.

  Raises:
    OSError: a file cannot be read.
    UserError: a package that a URL needs is missing.
  """
  remote = {path: _remote_state(path) for path in paths if is_remote(path)}
  read = sum(size for size, _ in remote.values()) <= _READ_REMOTE

  def one(path: str) -> str:
    if not is_remote(path):
      return _local_digest(path)
    size, mark = remote[path]
    if mark and not read:
      return hashlib.sha256(f'{size}\x1f{mark}'.encode()).hexdigest()
    key = f'{path}\x1f{size}\x1f{mark}'
    if not mark or key not in _digests:
      with io.BufferedReader(_RemoteFile(path), _BUFFER) as file:
        _digests[key] = hashlib.file_digest(file, 'sha256').hexdigest()
    return _digests[key]

  with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:  # hashing releases the GIL
    result = list(threads.map(one, paths))
  _remember()
  return result


def digest(path: str, patterns: Sequence[str] = ('*',)) -> str:
  """SHA-256 of a file; of a folder, of the relative paths and digests of all files below whose name fits a pattern.

  Raises:
    OSError: there is no such file, or no such file in the folder.
    UserError: as `digests`.
  """
  if is_file(path):
    return digests([path])[0]
  names = [name for name in _tree(path) if any(fnmatch.fnmatchcase(name.rpartition('/')[2], p) for p in patterns)]
  if not names:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
  found = zip(digests([f'{path.rstrip("/")}/{name}' for name in names]), names, strict=True)
  return hashlib.sha256('\n'.join(f'{sha256}  {name}' for sha256, name in found).encode()).hexdigest()


def _tree(folder: str) -> list[str]:
  """Relative POSIX paths of all files below a folder, through symbolic links too, sorted."""
  if is_remote(folder):
    system, inside = _remote(folder)
    inside = inside.rstrip('/')
    return sorted(path[len(inside) + 1 :] for path in _call(system.find, inside))
  names, entered = [], set()
  for at, folders, here in os.walk(folder, followlinks=True):
    names += [os.path.relpath(os.path.join(at, name), folder) for name in here]
    entered.add(os.path.realpath(at))
    folders[:] = [name for name in folders if os.path.realpath(os.path.join(at, name)) not in entered]
  return sorted(names)


def _remote_state(url: str) -> tuple[int, str]:
  system, inside = _remote(url)
  info = _call(system.info, inside)
  return int(info.get('size') or 0), next((str(info[key]) for key in _MARKS if info.get(key)), '')


def _local_digest(path: str) -> str:
  with open(path, 'rb') as file:
    state, now = os.fstat(file.fileno()), time.time_ns()
    # Programs can set the time of the content, but not that of the inode.
    key = f'{state.st_dev}:{state.st_ino}:{state.st_size}:{state.st_mtime_ns}:{state.st_ctime_ns}'
    large = state.st_size >= _REMEMBERED_BYTES
    known = _digests.get(key) or (_remembered().get(key) if large else None)
    if known is None:
      known = hashlib.file_digest(file, 'sha256').hexdigest()
      if now - max(state.st_mtime_ns, state.st_ctime_ns) > _TICK_NS:  # a later change will have another time
        _digests[key] = known
        if large:
          _new[key] = known
    return known


def _cache() -> Path:
  return Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'dsdm_jax' / 'digests.json'


@functools.cache
def _remembered() -> dict[str, str]:
  """The digests of earlier runs; none if the file is missing or damaged."""
  try:
    checksum, _, data = _cache().read_bytes().partition(b'\n')
    return json.loads(data) if hashlib.sha256(data).hexdigest().encode() == checksum else {}
  except OSError:
    return {}


def _remember() -> None:
  """Writes digests of large files for later runs, if the cache folder can be written."""
  if not _new:
    return
  _remembered.cache_clear()  # another run may have added some
  latest = list((_remembered() | _new).items())[-_MOST_REMEMBERED:]
  _new.clear()
  _remembered.cache_clear()
  data = json.dumps(dict(latest)).encode()
  with contextlib.suppress(OSError):
    storage.write_bytes(_cache(), hashlib.sha256(data).hexdigest().encode() + b'\n' + data)


class BadLineError(ValueError):
  """Why a line holds no JSON object, in a few words."""


def sized_lines(file: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
  """(number from 1, line, its bytes) for every line; lines longer than `LONGEST_LINE` are cut one byte after it.

  A byte order mark is removed at the beginning of any line, since files may have been concatenated.
  """
  number = 0
  while line := file.readline(LONGEST_LINE + 1):
    number += 1
    whole, size = line.removeprefix(BOM), len(line)
    # A compressed file of a few MB may hold one line of many GB.
    while len(line) > LONGEST_LINE and not line.endswith(b'\n'):
      line = file.readline(LONGEST_LINE + 1)
      size += len(line)
    yield number, whole, size


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
  """`sized_lines` without the sizes."""
  return ((number, line) for number, line, _ in sized_lines(file))


def parse_line(line: bytes) -> dict[str, Any]:
  """The JSON object on a line.

  Raises:
    BadLineError: the line holds none.
  """
  if len(line) > LONGEST_LINE:
    raise BadLineError(f'a line of more than {LONGEST_LINE:,} bytes')
  if len(line) > _MOST_VALUES and sum(map(line.count, (b',', b'[', b'{'))) > _MOST_VALUES:
    raise BadLineError(f'a line with more than {_MOST_VALUES:,} commas and brackets')
  try:
    record = json.loads(line.decode())
    if b'\\ud' in line.lower():  # a lone surrogate is no text and cannot be written
      json.dumps(record, ensure_ascii=False).encode()
  except UnicodeDecodeError as error:
    raise BadLineError(f'not UTF-8 ({error.reason} at byte {error.start})') from error
  except UnicodeEncodeError as error:
    raise BadLineError(f'not valid Unicode (a lone surrogate {error.object[error.start]!a})') from error
  except json.JSONDecodeError as error:
    raise BadLineError(f'not JSON ({error.msg} at column {error.colno})') from error
  except RecursionError as error:
    raise BadLineError('not readable as JSON (brackets are nested too deeply)') from error
  except ValueError as error:  # an integer with thousands of digits
    raise BadLineError(f'not readable as JSON ({str(error).partition(";")[0]})') from error
  if not isinstance(record, dict):
    raise BadLineError(f'must be a JSON object, not {type(record).__name__}')
  return record

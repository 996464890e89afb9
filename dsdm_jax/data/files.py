"""Files by glob, on this machine or wherever fsspec finds them (gs://, hf://, s3://, …), opened for reading bytes."""

import gzip
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dsdm_jax.errors import UserError

_BUFFER = 2**20
_READ_WHOLE = 2**28  # bytes of files whose content is looked at at each start: 0.2 s where the kernel has them cached
_PACKAGES = {'gs': 'gcsfs', 'gcs': 'gcsfs', 's3': 's3fs', 'hf': 'huggingface_hub', 'az': 'adlfs'}


def is_remote(path: str) -> bool:
  """Whether `path` is a URL, which fsspec opens, and not a path of this machine."""
  return '://' in path


def _system(path: str) -> tuple[Any, str]:
  """fsspec's file system of a URL, and the path within it."""
  import fsspec

  try:
    return fsspec.core.url_to_fs(path)
  except ImportError as error:
    scheme = path.partition('://')[0]
    package = _PACKAGES.get(scheme, f'the package that fsspec names for it ({_line(error)})')
    raise UserError(f'paths that begin with {scheme}:// need {package}; pip install it') from error
  except Exception as error:  # each of fsspec's systems raises errors of its own: no credentials, no such protocol
    raise UserError(f'{path} cannot be reached ({_line(error)}); check its address, network and credentials') from error


def _line(error: Exception) -> str:
  return ' '.join(f'{type(error).__name__} {error}'.split())[:300]


def matches(pattern: str) -> list[str]:
  """Files that `pattern` names, sorted; a pattern without wildcards names itself, whether there or not.

  Raises:
    UserError: the place of a URL cannot be listed: a package, network or credentials are missing.
  """
  if not any(sign in pattern for sign in '*?['):
    return [pattern]
  if is_remote(pattern):
    system, inside = _system(pattern)
    try:
      found = [path for path, info in system.glob(inside, detail=True).items() if info['type'] == 'file']
    except Exception as error:  # as above
      raise UserError(
        f'{pattern} cannot be listed ({_line(error)}); check its address, network and credentials'
      ) from error
    return sorted(system.unstrip_protocol(path) for path in found)
  # The part before the first wildcard is a folder, the rest a pattern below it.
  parts = pattern.split('/')
  first = next(i for i, part in enumerate(parts) if any(sign in part for sign in '*?['))
  root = Path('/'.join(parts[:first]) or ('/' if pattern.startswith('/') else '.'))
  return sorted(str(path) for path in root.glob('/'.join(parts[first:])) if path.is_file())


class _Remote(io.RawIOBase):
  """A file that fsspec opened, whose errors are OSErrors, as those of a file on a disk."""

  def __init__(self, path: str):
    system, inside = _system(path)
    self._file = self._said(system.open, inside, 'rb')

  def _said(self, function: Any, *arguments: Any) -> Any:
    try:
      return function(*arguments)
    except OSError:
      raise
    except Exception as error:  # each of fsspec's systems raises errors of its own
      raise OSError(_line(error)) from error

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._said(self._file.read, len(buffer))
    buffer[: len(data)] = data
    return len(data)

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    return self._said(self._file.seek, offset, whence)

  def tell(self) -> int:
    return self._said(self._file.tell)

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def open_bytes(path: str) -> BinaryIO:
  """The file's bytes, unpacked where its name ends in .gz or .zst.

  Raises:
    OSError: it cannot be opened.
    UserError: a package is missing to reach it.
  """
  raw: Any = io.BufferedReader(_Remote(path) if is_remote(path) else io.FileIO(path), _BUFFER)
  if path.endswith('.gz'):
    unpacked = gzip.GzipFile(fileobj=raw)
    unpacked.myfileobj = raw  # closed with it
    return io.BufferedReader(unpacked, _BUFFER)
  if path.endswith('.zst'):
    import zstandard

    stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=True)
    return io.BufferedReader(stream, _BUFFER)
  return raw


def versions(paths: Sequence[str]) -> list[str]:
  """For each file what tells one state of it from another: its size, with its content, time of change or checksum.

  The content (a SHA-256 of it) where all of them together have at most 256 MiB on this machine: the same text, copied
  or unpacked again, is the same state. Else the time, which costs no reading; of a URL what its server says.

  Raises:
    OSError: there is no such file.
  """
  local = [path for path in paths if not is_remote(path)]
  read = sum(Path(path).stat().st_size for path in local) <= _READ_WHOLE
  return [_remote_version(path) if is_remote(path) else _local_version(path, read) for path in paths]


def _local_version(path: str, read: bool) -> str:
  with Path(path).open('rb') as file:
    stat = os.fstat(file.fileno())
    mark = hashlib.file_digest(file, 'sha256').hexdigest() if read else f'changed {stat.st_mtime_ns}'
  return f'{stat.st_size} bytes, {mark}'


def _remote_version(path: str) -> str:
  system, inside = _system(path)
  try:
    info = system.info(inside)
  except OSError:
    raise
  except Exception as error:  # as above
    raise OSError(_line(error)) from error
  marks = [info[key] for key in ('etag', 'ETag', 'md5Hash', 'blob_id', 'mtime', 'updated', 'created') if info.get(key)]
  return f'{info["size"]} bytes, {marks[0]}' if marks else f'{info["size"]} bytes'

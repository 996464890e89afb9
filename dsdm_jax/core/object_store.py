"""Objects of a store that fsspec knows (gs://, s3://, …): read, written whole, compared and set, listed, deleted.

Objects are written whole. The program never renames one or appends to it. A store has no folders; here a folder is
the objects whose names begin with its name. The store checksums what it holds, so nothing is read for a checksum.
Nothing here is imported by a run on a local disk.
"""

import base64
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from dsdm_jax.errors import StoreError, UserError

_T = TypeVar('_T')
PACKAGES = {'gs': 'gcsfs', 's3': 's3fs', 'az': 'adlfs', 'abfs': 'adlfs', 'hf': 'huggingface_hub'}
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)
_ABSENT = (FileNotFoundError, NotADirectoryError)
_SAME = {'gcs': 'gs', 's3a': 's3', 's3n': 's3'}  # other names of a scheme
_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*')
_REGIONS = ('AWS_REGION', 'AWS_DEFAULT_REGION')
_CONDITIONAL = ('gs', 's3')  # stores whose conditional writes are used
_one = threading.Lock()  # in the place of conditional writes


@functools.total_ordering
class Address:
  """The name of an object in a store, or of all below it: gs://bucket/run/pool.

  It joins and compares like a PurePosixPath, and has nothing that opens it, so that code for local files alone fails.
  The functions of `core/storage.py` read and write it.

  Args:
    text: scheme://bucket/name; an empty part or '.' is left out.

  Attributes:
    parts: ('scheme://bucket', 'name', …).

  Raises:
    UserError: it has no bucket.
  """

  __slots__ = ('parts',)
  parts: tuple[str, ...]

  def __init__(self, text: str):
    scheme, _, rest = text.partition('://')
    names = [name for name in rest.split('/') if name not in ('', '.')]
    if not _SCHEME.fullmatch(scheme) or not names:
      raise UserError(f'{text!a} is no address; give one such as gs://bucket/run')
    scheme = _SAME.get(scheme.lower(), scheme.lower())
    object.__setattr__(self, 'parts', (f'{scheme}://{names[0]}', *names[1:]))

  def __setattr__(self, name: str, value: Any) -> None:
    raise AttributeError('an Address does not change')

  def _of(self, parts: Sequence[str]) -> 'Address':
    return Address('/'.join(parts))

  @property
  def scheme(self) -> str:
    return self.parts[0].partition('://')[0]

  @property
  def bucket(self) -> str:
    return self.parts[0].partition('://')[2]

  @property
  def key(self) -> str:
    """The name within the bucket."""
    return '/'.join(self.parts[1:])

  @property
  def name(self) -> str:
    return self.parts[-1] if len(self.parts) > 1 else ''

  @property
  def suffix(self) -> str:
    return PurePosixPath(self.name).suffix

  @property
  def stem(self) -> str:
    return PurePosixPath(self.name).stem

  @property
  def parent(self) -> 'Address':
    return self._of(self.parts[:-1]) if len(self.parts) > 1 else self

  @property
  def parents(self) -> tuple['Address', ...]:
    return tuple(self._of(self.parts[:n]) for n in range(len(self.parts) - 1, 0, -1))

  def __truediv__(self, name: str | PurePosixPath) -> 'Address':
    return Address(f'{self}/{name}')

  def with_name(self, name: str) -> 'Address':
    return self.parent / name

  def with_suffix(self, suffix: str) -> 'Address':
    return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

  def is_relative_to(self, other: 'Address | PurePosixPath') -> bool:
    return isinstance(other, Address) and self.parts[: len(other.parts)] == other.parts

  def relative_to(self, other: 'Address') -> PurePosixPath:
    if not self.is_relative_to(other):
      raise ValueError(f'{self} is not below {other}')
    return PurePosixPath(*self.parts[len(other.parts) :])

  def __str__(self) -> str:
    return '/'.join(self.parts)

  def __repr__(self) -> str:
    return f'Address({str(self)!r})'

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Address) and self.parts == other.parts

  def __lt__(self, other: 'Address') -> bool:
    return self.parts < other.parts

  def __hash__(self) -> int:
    return hash(self.parts)

  def __reduce__(self) -> tuple[type, tuple[str]]:
    return Address, (str(self),)


@dataclasses.dataclass(frozen=True)
class Stat:
  """Size in bytes and what the store says of the content: 'crc32c:…', 'etag:…', or None where it says nothing."""

  size: int
  checksum: str | None


@contextlib.contextmanager
def _alone(address: Address) -> Iterator[None]:
  """Lets one thread at a time write, where the store cannot compare and set itself."""
  with contextlib.nullcontext() if address.scheme in _CONDITIONAL else _one:
    yield


@functools.cache
def _system_of(scheme: str, process: int) -> Any:
  import fsspec

  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs pages about what it raises too
  try:
    # Another process may write at any time, so no listing is remembered.
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=scheme != 'memory')
  except ImportError as error:
    package = PACKAGES.get(scheme)
    advice = f'{package}; pip install {package}' if package else f'another package ({_reason(error)})'
    raise UserError(f'addresses that begin with {scheme}:// need {advice}') from error
  except ValueError as error:
    raise UserError(f'{scheme}:// is no address that fsspec knows ({_reason(error)}); use gs:// or s3://') from error
  except Exception as error:  # no credentials: each system has its own errors
    raise UserError(f'{scheme}:// cannot be used ({_reason(error)}); check the network and the credentials') from error


def _system(address: Address) -> Any:
  return _system_of(address.scheme, os.getpid())


def _reason(error: BaseException) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def _call(address: Address, function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
  """Calls a function of an fsspec system, which may raise errors of any type.

  Raises:
    FileNotFoundError, NotADirectoryError, FileExistsError: as the function does.
    OSError: the local disk is full, or too many files are open.
    StoreError: anything else.
  """
  try:
    return function(*arguments, **options)
  except (*_ABSENT, FileExistsError, UserError):
    raise
  except Exception as error:
    if isinstance(error, OSError) and error.errno in _OF_DISK:
      raise
    raise StoreError(
      f'{address} cannot be used ({_reason(error)}); check the address, the network, the credentials and their '
      'rights, and start the same command again: finished work is kept'
    ) from error


def _put(address: Address, function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
  """`_call` for what writes: what does not exist then is the bucket."""
  try:
    return _call(address, function, *arguments, **options)
  except _ABSENT as error:
    raise UserError(f'{address.parts[0]} does not exist; create that bucket, or correct the address') from error


def check(address: Address) -> None:
  """Checks that the address can be listed.

  Raises:
    UserError: its package is missing, its bucket does not exist, or it may not be used.
  """
  system = _system(address)
  try:
    if address.scheme == 's3':
      _call(address, system.call_s3, 'list_objects_v2', Bucket=address.bucket, Prefix=address.key, MaxKeys=1)
    elif address.scheme == 'gs':
      _call(address, system.call, 'GET', 'b/{}/o', address.bucket, prefix=address.key, maxResults=1, json_out=True)
  except _ABSENT as error:
    raise UserError(f'{address.parts[0]} does not exist; create that bucket, or correct the address') from error


def _stat(info: Mapping[str, Any]) -> Stat:
  if crc := info.get('crc32c'):
    checksum = f'crc32c:{crc}'
  elif tag := info.get('ETag') or info.get('etag'):
    checksum = 'etag:' + str(tag).strip('"')
  else:
    checksum = None
  return Stat(int(info['size'] or 0), checksum)


def stat(address: Address) -> Stat | None:
  """State of an object; None if there is none of that name."""
  info = _info(address)
  return None if info is None else _stat(info)


def _info(address: Address) -> Mapping[str, Any] | None:
  try:
    info = _call(address, _system(address).info, str(address))
  except _ABSENT:
    return None
  return info if info['type'] == 'file' else None


def find(folder: Address) -> dict[str, Stat]:
  """Name relative to `folder` → state, of all objects below it, sorted; one listing."""
  system = _system(folder)
  try:
    infos = _call(folder, system.find, str(folder), detail=True)
  except _ABSENT:
    return {}
  start = system._strip_protocol(str(folder)).rstrip('/') + '/'
  return {
    name.removeprefix(start): _stat(info)
    for name, info in sorted(infos.items())
    if name.startswith(start) and not name.endswith('/') and info['type'] == 'file'
  }


def children(folder: Address) -> dict[str, bool]:
  """Name of each object and folder directly in `folder` → whether it is a folder, sorted."""
  system = _system(folder)
  try:
    infos = _call(folder, system.ls, str(folder), detail=True)
  except _ABSENT:
    return {}
  start = system._strip_protocol(str(folder)).rstrip('/') + '/'
  names = {info['name'].rstrip('/'): info['type'] == 'directory' for info in infos}
  return {name.removeprefix(start): is_folder for name, is_folder in sorted(names.items()) if name.startswith(start)}


def exists(address: Address) -> bool:
  """Whether there is an object of that name, or one below it."""
  try:
    return bool(_call(address, _system(address).exists, str(address)))
  except _ABSENT:
    return False


def read(address: Address) -> bytes | None:
  """The content of an object; None if there is none of that name."""
  try:
    return bytes(_call(address, _system(address).cat_file, str(address)))
  except (*_ABSENT, IsADirectoryError):
    return None


def write(address: Address, data: bytes) -> None:
  _put(address, _system(address).pipe_file, str(address), data)


def create(address: Address, data: bytes) -> bool:
  """Writes an object unless there is one of that name. Returns whether it holds `data` now.

  A store that has written the object, and whose answer was lost, refuses the second try.
  """
  with _alone(address):
    try:
      _put(address, _system(address).pipe_file, str(address), data, mode='create')
      return True
    except FileExistsError:
      pass
    except StoreError as error:  # of gcsfs
      if not _is_refused(error.__cause__):
        raise
    return read(address) == data


def replace(address: Address, data: bytes, known: bytes) -> bool:
  """Writes an object if it holds `known`. Returns whether it holds `data` now; of several writers one succeeds."""
  with _alone(address):
    version = _version(address)
    if version is None or read(address) != known:
      return False
    if not _write_over(address, data, version):
      return read(address) == data
    return True


def _version(address: Address) -> str | None:
  """What the store calls the present content: its generation or ETag; None if there is no such object."""
  info = _info(address)
  return None if info is None else str(info.get('generation') or info.get('ETag') or '')


def _write_over(address: Address, data: bytes, version: str) -> bool:
  """Writes an object if its version is still `version`. Returns False if it is not."""
  system, bucket, key = _system(address), address.bucket, address.key
  try:
    if address.scheme == 's3':
      _call(address, system.call_s3, 'put_object', Bucket=bucket, Key=key, Body=data, IfMatch=version)
    elif address.scheme == 'gs':
      path = f'{system._location}/upload/storage/v1/b/{bucket}/o'
      options = {'uploadType': 'media', 'name': key, 'ifGenerationMatch': version}
      _call(
        address,
        system.call,
        'POST',
        path,
        data=data,
        headers={'Content-Type': 'application/octet-stream'},
        json_out=True,
        **options,
      )
    else:
      write(address, data)
  except (FileNotFoundError, FileExistsError):  # deleted since, or written since: gcsfs says so of its HTTP 412
    return False
  except StoreError as error:
    if _is_refused(error.__cause__):
      return False
    raise
  return True


def _is_refused(error: BaseException | None) -> bool:
  """Whether a store says that a condition of a write does not hold (HTTP 412), or that two writes met (409)."""
  codes = ('412', '409', 'PreconditionFailed', 'ConditionalRequestConflict', 'conditionNotMet')
  while error is not None:
    if str(getattr(error, 'code', '')) in codes or any(code in str(error) for code in codes):
      return True
    error = error.__cause__
  return False


def copy(source: Address, target: Address) -> None:
  """Copies an object; within a store its bytes do not leave it.

  Raises:
    FileNotFoundError: there is no such object.
  """
  if source.scheme == target.scheme:
    _call(source, _system(source).cp_file, str(source), str(target))
    return
  data = read(source)
  if data is None:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
  write(target, data)


def delete(address: Address) -> None:
  """Deletes the object of that name and all below it, if there are any."""
  names = [str(address / name) for name in find(address)]
  if names:
    with contextlib.suppress(*_ABSENT):  # another process deletes them
      _call(address, _system(address).rm, names)
  unlink(address)


def unlink(address: Address) -> None:
  """Deletes one object, if it exists."""
  with contextlib.suppress(*_ABSENT):
    _call(address, _system(address).rm_file, str(address))


def download(address: Address, files: Mapping[str, Path]) -> None:
  """Copies objects below `address` (name relative to it, or '' for itself) to local files, several at a time."""
  sources = [str(address / name) if name else str(address) for name in files]
  for file in files.values():
    file.parent.mkdir(parents=True, exist_ok=True)
  _call(address, _system(address).get, sources, [str(file) for file in files.values()])


def upload(files: Mapping[str, Path], folder: Address) -> None:
  """Copies local files to objects below `folder` (name relative to it → file), several at a time."""
  if files:
    targets = [str(folder / name) for name in files]
    _put(folder, _system(folder).put, [str(file) for file in files.values()], targets)


def opened(address: Address) -> Any:
  """An object as a file, opened to read parts of it.

  Raises:
    FileNotFoundError: there is no such object.
  """
  return _call(address, _system(address).open, str(address), 'rb')


def kvstore(address: Address) -> dict[str, Any]:
  """TensorStore's spec of what is below an address.

  For s3:// it goes to the endpoint and region that AWS's own programs read from the environment.

  Raises:
    UserError: TensorStore does not write to this kind of address.
  """
  if address.scheme == 'gs':
    return {'driver': 'gcs', 'bucket': address.bucket, 'path': f'{address.key}/' if address.key else ''}
  if address.scheme != 's3':
    raise UserError(f'{address} cannot hold a run, which TensorStore writes; use gs:// or s3://')
  spec: dict[str, Any] = {'driver': 's3', 'bucket': address.bucket, 'path': f'{address.key}/' if address.key else ''}
  if os.environ.get('AWS_ACCESS_KEY_ID'):  # else it prints lines about each file that might have credentials
    spec['aws_credentials'] = {'type': 'environment'}
  for key, names in (('endpoint', ('AWS_ENDPOINT_URL_S3', 'AWS_ENDPOINT_URL')), ('aws_region', _REGIONS)):
    if value := next((os.environ[name] for name in names if os.environ.get(name)), ''):
      spec[key] = value
  return spec


def crc32c(opened: IO[bytes], name: Any) -> str:
  """CRC-32C of bytes as Cloud Storage writes it (base64, big-endian).

  Raises:
    UserError: the package that computes it is missing.
  """
  try:
    import google_crc32c
  except ImportError as error:
    raise UserError(f'{name} has a checksum of Cloud Storage; pip install google-crc32c to compare it') from error
  total = google_crc32c.Checksum()
  while part := opened.read(2**24):
    total.update(part)
  return base64.b64encode(total.digest()).decode()

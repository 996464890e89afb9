"""Files by glob, local, in a bucket ('gs://') or on the Hugging Face Hub ('hf://'), opened for reading bytes."""

import gzip
import io
from typing import Any, BinaryIO

from etils import epath

from dsdm_jax.core.errors import UserError


def matches(pattern: str) -> list[str]:
  """Files that `pattern` names, sorted; a pattern without wildcards names itself, whether there or not."""
  if not any(sign in pattern for sign in '*?['):
    return [pattern]
  if pattern.startswith('hf://'):
    return sorted(f'hf://{path}' for path in _hub().glob(pattern))
  # The part before the first wildcard is a folder, the rest a pattern below it.
  parts = pattern.split('/')
  first = next(i for i, part in enumerate(parts) if any(sign in part for sign in '*?['))
  root = epath.Path('/'.join(parts[:first]) or ('/' if pattern.startswith('/') else '.'))
  return sorted(str(path) for path in root.glob('/'.join(parts[first:])) if path.is_file())


def open_bytes(path: str) -> BinaryIO:
  """The file's bytes, unpacked where its name ends in .gz or .zst.

  Raises:
    OSError: it cannot be opened.
    UserError: a package is missing to read it.
  """
  raw: Any = _hub().open(path, 'rb') if path.startswith('hf://') else epath.Path(path).open('rb')
  if path.endswith('.gz'):
    unpacked = gzip.GzipFile(fileobj=raw)
    unpacked.myfileobj = raw  # closed with it
    return io.BufferedReader(unpacked, 2**20)
  if path.endswith('.zst'):
    import zstandard

    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 2**20)
  return raw


def _hub() -> Any:
  try:
    from huggingface_hub import HfFileSystem
  except ImportError as error:
    raise UserError('paths that begin with hf:// need the package huggingface_hub; pip install it') from error
  return HfFileSystem()

"""Small files that are either whole or not there, whenever the process dies."""

import functools
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes a temporary file beside `path`, syncs it and renames it over `path`."""
  path = Path(path)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(handle, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.chmod(temporary, 0o666 & ~umask())  # a temporary file is for its owner alone, a result is not
    os.replace(temporary, path)
  except BaseException:
    Path(temporary).unlink(missing_ok=True)
    raise


@functools.cache
def umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def write_text(path: str | os.PathLike, text: str) -> None:
  write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Canonical JSON: sorted keys, so that equal values are equal bytes; NaN is an error."""
  write_text(path, json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + '\n')


def save_npy(path: str | os.PathLike, array: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  write_bytes(path, buffer.getvalue())


def save_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
  """An uncompressed npz; NumPy stamps its members with a constant date, so equal arrays are equal bytes."""
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  write_bytes(path, buffer.getvalue())

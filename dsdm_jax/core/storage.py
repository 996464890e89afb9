"""Small files that are either whole or not there, whenever the process dies."""

import contextlib
import functools
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_bytes(path: str | os.PathLike, data: bytes, *, first: bool = False) -> None:
  """Writes a temporary file beside `path`, syncs it and renames it over `path`.

  Args:
    first: of several writers the first one wins; what stands there is left as it is.
  """
  path = Path(path)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(handle, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.chmod(temporary, 0o666 & ~umask())  # a temporary file is for its owner alone, a result is not
    if first:
      with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
      os.unlink(temporary)
    else:
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
  write_bytes(path, _npz(arrays))


def save_first_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
  """As `save_npz`, but what another writer left there stays."""
  write_bytes(path, _npz(arrays), first=True)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  return buffer.getvalue()

"""Markers beside the files of an unfinished stage: which are finished, what run they are of, and what bytes they hold.

A file without one is not finished. A resume trusts no file that a disk has changed since, and takes none from a run of
other settings whose folder was laid over this one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsdm_jax.core import storage
from dsdm_jax.errors import UserError


def write(marker: Path, files: Sequence[Path], origin: str, **said: Any) -> None:
  """Marks `files`, which are on disk, as finished.

  Args:
    marker: the marker's own file.
    origin: names the run that they are of.
    said: what else the marker is to hold.
  """
  storage.write_json(marker, {'origin': origin, 'sha256': [storage.checksum(file) for file in files], **said})


def read(marker: Path, files: Sequence[Path], origin: str) -> dict[str, Any] | None:
  """What the marker holds; None where there is none, or `files` are not all there as they were marked.

  Args:
    origin: of the run that reads; '' takes files of any.

  Raises:
    UserError: it is of another run.
  """
  try:
    said = dict(json.loads(marker.read_bytes()))
    found, sums = str(said['origin']), list(said['sha256'])
  except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or one that says nothing
    return None
  if origin and found != origin:
    raise UserError(
      f'{files[0]} is of a run with other settings, pool, targets or proxies (so says {marker}); delete that marker to '
      'make it anew, and lay over each other only folders of copies of one workdir'
    )
  whole = len(sums) == len(files) and all(
    file.is_file() and storage.checksum(file) == sha256 for file, sha256 in zip(files, sums, strict=True)
  )
  return said if whole else None

"""Where a workdir keeps what its stages wrote."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsdm_jax.core import artifacts


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
  """A folder that the first of pytest's workers makes; the others wait for it. Copy it before changing it."""
  base = factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    base = base.parent  # of all workers
  folder, made = base / name, base / f'{name}.made'
  with open(base / f'{name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not made.exists():
      make(folder)
      made.touch()
  return folder


def files_of(workdir: Path, stage: str) -> Path:
  """Folder of a finished stage's files."""
  artifact = artifacts.open_stage(workdir, stage)
  assert artifact is not None, f'{stage} is not finished'
  return artifact.path


def attempt_of(workdir: Path, stage: str) -> Path:
  """Folder of the only unfinished attempt at a stage."""
  (attempt,) = artifacts.unfinished(workdir, stage)
  return attempt


def finished(workdir: Path, stage: str) -> bool:
  return artifacts.open_stage(workdir, stage) is not None


def unfinish(workdir: Path, stage: str) -> Path:
  """Makes a finished stage an unfinished attempt with all its files, as a kill right before the commit leaves it."""
  path = files_of(workdir, stage)
  (path.parent / artifacts.MANIFEST).unlink()
  return path


def change_manifest(workdir: Path, stage: str, change: Callable[[dict[str, Any]], None]) -> None:
  """Rewrites the manifest of a finished stage, with the right checksum of itself."""
  file = workdir / stage / artifacts.MANIFEST
  manifest = json.loads(file.read_bytes())
  del manifest['sha256']
  change(manifest)
  file.write_bytes(artifacts.seal(manifest))

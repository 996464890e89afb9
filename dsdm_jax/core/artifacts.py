"""Artifacts: what a finished stage leaves on disk, and the only way in which stages meet.

A stage writes below `DIR/<stage>.part/`; committing adds `manifest.json` and renames the folder to `DIR/<stage>/`.
So a folder without `.part` is whole. Its manifest holds the *identity* (settings that the stage depends on, digests
of the artifacts that it read, format version), a checksum of each file, package versions, cost, and the semantics of
what is inside.
"""

import dataclasses
import errno
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsdm_jax.core import storage
from dsdm_jax.errors import UserError

MANIFEST = 'manifest.json'
_BEGUN = 'begun.json'
_COST = 'cost*.json'  # one for each job that shares the stage
_IDENTITY = {'stage': str, 'format': int, 'settings': dict, 'inputs': dict}
_TEMPORARY = re.compile(r'\..+\.[a-z0-9_]{8}')  # as tempfile names what `begin` and `atomic` are about to rename
# What results depend on to the bit: work that was begun with one version of these is not gone on with by another.
_DECIDE = (
  'jax jaxlib libtpu jax-cuda12-pjrt flax optax seqio sentencepiece tokenizers tensorflow tensorflow-datasets '
  'array_record numpy ml_dtypes scipy scikit-learn'
).split()
_PACKAGES = (*_DECIDE, 'orbax-checkpoint', 'tensorstore', 'ml_collections')


@dataclasses.dataclass(frozen=True)
class Identity:
  """What makes two runs of a stage the same.

  Attributes:
    stage: name of the stage.
    format: version of what the stage writes; raised by a commit that changes it.
    settings: flat config key → JSON value, for the keys that the stage depends on.
    inputs: name of each artifact read → its digest.
  """

  stage: str
  format: int
  settings: Mapping[str, Any]
  inputs: Mapping[str, str]

  def as_json(self) -> dict[str, Any]:
    # A round trip, so that what is compared is what a file can hold (tuples are lists).
    return json.loads(json.dumps(dataclasses.asdict(self)))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """One phrase for each way in which identity `found` is not `wanted`; empty if they agree."""
  phrases = []
  if found['format'] != wanted['format']:
    phrases.append(f'format version was {found["format"]}, now {wanted["format"]}')
  old, new = found['settings'], wanted['settings']
  for key in sorted(old.keys() | new.keys()):
    if old.get(key) != new.get(key):
      was = json.dumps(old[key]) if key in old else 'absent'
      now = json.dumps(new[key]) if key in new else 'absent'
      phrases.append(f'{key} was {was}, now {now}')
  for name in sorted(found['inputs'].keys() | wanted['inputs'].keys()):
    if found['inputs'].get(name) != wanted['inputs'].get(name):
      phrases.append(f'the {name} it read is another one now')
  return phrases


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A committed stage, opened for reading."""

  path: Path
  manifest: Mapping[str, Any]

  @property
  def semantics(self) -> Mapping[str, Any]:
    return self.manifest['semantics']

  @property
  def identity(self) -> Mapping[str, Any]:
    """What it was made from, to be compared with `Identity.as_json`."""
    return self.manifest['identity']

  @property
  def settings(self) -> Mapping[str, Any]:
    return self.manifest['identity']['settings']

  @property
  def digest(self) -> str:
    """SHA-256 over identity and file checksums: changes whenever identity or content does.

    Two saves of the same weights differ in names and bytes: for a model stands the record of its training, `NAME.jsonl`
    beside its folder. Manifests from before that have no 'models', and all of their files count.
    """
    models = set(self.manifest.get('models', ()))
    files = {name: entry for name, entry in self.manifest['files'].items() if name.partition('/')[0] not in models}
    content = {'identity': self.manifest['identity'], 'files': files}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  def verify(self) -> None:
    """Reads every file back.

    Raises:
      UserError: a file is missing, has another size or other bytes, or is a link that leads out of the folder; it names
        the first such file.
    """
    for _, said in self.damaged():
      raise UserError(f'{said}; {self._repair()}')

  def damaged(self) -> Iterator[tuple[Path, str]]:
    """Files that are not as they were written, see `damaged`."""
    return damaged(self.path, self.manifest['files'])

  def _repair(self) -> str:
    return f'delete {self.path} and start again to make that stage anew'


def damaged(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Path, str]]:
  """Which of `files`, as of `checksums`, are not as they were written, and a phrase that says so; see `inside`."""
  for name, entry in files.items():
    file = inside(folder, name)
    if not file.is_file():
      yield file, f'{file} is missing'
    elif file.stat().st_size != entry['bytes']:
      yield file, f'{file} has {file.stat().st_size} bytes where {entry["bytes"]} were written'
    elif _sha256(file) != entry['sha256']:
      yield file, f'{file} has changed since it was written'


def inside(folder: Path, name: str) -> Path:
  """`folder / name`, for a name that was read from a file: links followed, it must lie below `folder`.

  Raises:
    UserError: it does not.
  """
  file = Path(folder) / name
  if '\0' in name or not file.resolve().is_relative_to(Path(folder).resolve()):
    raise UserError(
      f'{folder} names the file {name!r}, which lies outside of it; take a workdir from a source you trust'
    )
  return file


def folder(workdir: Path, stage: str) -> Path:
  return Path(workdir) / stage


def part_folder(workdir: Path, stage: str) -> Path:
  return Path(workdir) / f'{stage}.part'


def open_stage(workdir: str | os.PathLike, stage: str) -> Artifact | None:
  """The committed artifact of `stage`, or None where there is none.

  Raises:
    UserError: its manifest is unreadable.
  """
  path = folder(Path(workdir), stage)
  return _read_manifest(path) if path.is_dir() else None


def _read_manifest(path: Path) -> Artifact:
  file = path / MANIFEST
  try:
    manifest = json.loads(file.read_bytes())
    for key in ('identity', 'files', 'semantics', 'cost', 'versions'):
      if not isinstance(manifest[key], dict):
        raise TypeError(f'{key} is no object')
    if not _is_identity(manifest['identity']):
      raise ValueError('identity lacks a part')
    for key in ('seconds', 'flop'):
      manifest['cost'][key] + 0.0
    if not all(isinstance(name, str) for name in manifest.get('models', ())):
      raise TypeError('models holds what is no name')
    for name, entry in manifest['files'].items():
      if Path(name).is_absolute() or '..' in Path(name).parts or '\0' in name:
        raise ValueError(f'path {name!r} leaves the folder')
      if type(entry['bytes']) is not int or type(entry['sha256']) is not str:
        raise TypeError(f'{name} has no size or no checksum')
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(
      f'{file} is unreadable ({type(error).__name__}: {_short(error)}); delete {path} and start again to make that '
      'stage anew'
    ) from error
  return Artifact(path, manifest)


def _short(error: Exception) -> str:
  return ' '.join(str(error).split())[:200]


def _is_identity(value: Any) -> bool:
  return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in _IDENTITY.items())


def begun(workdir: Path, stage: str) -> Mapping[str, Any] | None:
  """Identity of an unfinished attempt at `stage`; None where there is none or it cannot be told."""
  note = _note(workdir, stage)
  return None if note is None else {key: note[key] for key in _IDENTITY}


def origin(workdir: Path, stage: str) -> str:
  """Digest of what an unfinished attempt at `stage` was begun from; marks all that it makes."""
  return hashlib.sha256(json.dumps(begun(workdir, stage), sort_keys=True).encode()).hexdigest()


def other_versions(workdir: Path, stage: str) -> dict[str, tuple[str, str]]:
  """Package that decides results → its version when an unfinished attempt was begun, and now, where these differ.

  A package that only is there now, or only was, gave nothing to the attempt; one that the attempt's note does not name
  is taken as it is.
  """
  noted = (_note(workdir, stage) or {}).get('versions')
  old = {k: ' '.join(v.split())[:50] for k, v in noted.items() if isinstance(v, str)} if isinstance(noted, dict) else {}
  new = versions()
  for found in (old, new):
    if 'python' in found:
      found['python'] = '.'.join(found['python'].split('.')[:2])  # what follows 3.11 mends, and changes no result
  return {n: (old[n], new[n]) for n in ('python', *_DECIDE) if n in old and n in new and old[n] != new[n]}


def check_versions(workdir: Path, identity: Identity) -> None:
  """Looks whether an unfinished attempt of `identity` can be gone on with by these packages.

  Raises:
    UserError: it holds work of others. One result would be half of each, and no run of one kind would give it again.
  """
  part, stage = part_folder(workdir, identity.stage), identity.stage
  others = other_versions(workdir, stage)
  if others and begun(workdir, stage) == identity.as_json() and holds_work(part):
    said = ', '.join(f'{name} was {old}, now {new}' for name, (old, new) in others.items())
    pins = ' '.join(f'{name}=={old}' for name, (old, _) in others.items() if name != 'python')
    back = f'install these again (pip install {pins})' if pins else 'start it with that Python'
    raise UserError(
      f'{part} was begun with other packages: {said}; {back} and start the same command to go on with it, or add '
      f'--rerun to make {stage} anew'
    )


def goes_on(workdir: Path, identity: Identity) -> bool:
  """Whether there is an unfinished attempt that `begin` goes on with."""
  return begun(workdir, identity.stage) == identity.as_json() and not other_versions(workdir, identity.stage)


def _note(workdir: Path, stage: str) -> dict[str, Any] | None:
  try:
    found = json.loads((part_folder(workdir, stage) / _BEGUN).read_bytes())
  except (OSError, ValueError, RecursionError):
    return None
  return found if _is_identity(found) else None


def begin(workdir: Path, identity: Identity) -> Path:
  """Opens the folder to write in: goes on with an unfinished attempt of the same identity, discards any other.

  One that was begun with other versions of what decides results is another. Several jobs may begin at once: the folder
  appears with its identity in it, and one of them makes it.
  """
  part = part_folder(workdir, identity.stage)
  if part.is_dir() and not goes_on(workdir, identity):
    shutil.rmtree(part)
  if not part.is_dir():
    part.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=part.parent, prefix=f'.{part.name}.'))
    made.chmod(0o777 & ~storage.umask())  # a temporary folder is for its owner alone, a stage is not
    storage.write_json(made / _BEGUN, {**identity.as_json(), 'versions': versions()})
    try:
      made.rename(part)
    except OSError as error:
      shutil.rmtree(made)
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
      if not goes_on(workdir, identity):
        raise UserError(
          f'{part} was begun at this moment with other settings or packages; start again when that run has ended'
        ) from error
  return part


def sweep(workdir: Path) -> None:
  """Deletes what a kill left half-written: folders and files that were to be renamed into place.

  Only for a run that has the workdir for itself: in the hands of others such a thing may be in the making.
  """
  for path in workdir.glob('.*.part.*'):
    if path.is_dir() and _TEMPORARY.fullmatch(path.name):
      shutil.rmtree(path)
  for part in workdir.glob('*.part'):
    for path in part.rglob('.*'):
      if path.is_file() and _TEMPORARY.fullmatch(path.name):
        path.unlink()


def holds_work(part: Path) -> bool:
  """Whether an unfinished stage left more than notes of its beginning."""
  return any(path.is_file() and not is_note(path) for path in part.rglob('*'))


def is_note(path: Path) -> bool:
  """Whether a file of an unfinished stage's folder is a note on the attempt and no part of the work."""
  return path.name == _BEGUN or fnmatch.fnmatch(path.name, _COST)


class Cost:
  """Seconds and floating-point operations spent on a stage, over all attempts at it.

  Args:
    part: folder of the unfinished stage.
    job: which of several that work on the stage at once; each keeps an account of its own.
    enabled: False on every process of a job but the first: each counts the FLOP of all.
  """

  def __init__(self, part: Path, job: int = 0, enabled: bool = True):
    self._enabled = enabled
    self._file = part / _COST.replace('*', f'_{job}' if job else '')
    spent = _spent(self._file)
    self.seconds: float = spent['seconds']
    self.flop: float = spent['flop']

  def of_all_jobs(self) -> dict[str, float]:
    accounts = [_spent(file) for file in sorted(self._file.parent.glob(_COST)) if file != self._file]
    accounts.append({'seconds': self.seconds, 'flop': self.flop})
    return {key: sum(account[key] for account in accounts) for key in ('seconds', 'flop')}

  def add(self, *, seconds: float = 0.0, flop: float = 0.0) -> None:
    self.seconds += seconds
    self.flop += flop
    if self._enabled:
      storage.write_json(self._file, {'seconds': self.seconds, 'flop': self.flop})


def _spent(file: Path) -> dict[str, float]:
  try:
    found = json.loads(file.read_bytes())
    return {key: float(found[key]) for key in ('seconds', 'flop')}
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return {'seconds': 0.0, 'flop': 0.0}


def commit(workdir: Path, identity: Identity, semantics: Mapping[str, Any], cost: Cost) -> Artifact:
  """Writes the manifest, syncs it and puts the folder in place, over an older one of that stage."""
  part = part_folder(workdir, identity.stage)
  spent = cost.of_all_jobs()
  files = {name: entry for name, entry in checksums(part).items() if not is_note(Path(name))}
  folders = {name.partition('/')[0] for name in files if '/' in name}
  manifest = {
    'identity': identity.as_json(),
    'files': files,
    'models': sorted(folder for folder in folders if f'{folder}.jsonl' in files),
    'semantics': dict(semantics),
    'cost': {'seconds': round(spent['seconds'], 3), 'flop': spent['flop']},
    'versions': versions(),
  }
  try:
    storage.write_json(part / MANIFEST, manifest)
    return finish_commit(workdir, identity.stage)
  except FileNotFoundError:
    # Of two jobs that commit at once, one renames the folder; the other finds the same artifact.
    artifact = open_stage(workdir, identity.stage)
    if artifact is None or artifact.identity != identity.as_json():
      raise
    return artifact


def finish_commit(workdir: Path, stage: str) -> Artifact:
  part, final = part_folder(workdir, stage), folder(workdir, stage)
  # Not before the manifest stands: without its notes, what a kill left would be taken for another run's work.
  for path in [path for path in part.iterdir() if is_note(path)]:
    path.unlink(missing_ok=True)
  if final.is_dir():
    # Renamed first: a kill in the middle of the deletion must not leave half an artifact in its place.
    old = final.with_name(f'{stage}.old')
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    part.rename(final)
    shutil.rmtree(old)
  else:
    part.rename(final)
  return _read_manifest(final)


def reopen(workdir: Path, artifact: Artifact) -> list[str]:
  """Makes a finished stage an unfinished one that lacks its damaged files; for stages that make what is missing.

  Returns:
    A phrase for each damaged file; nothing was done where there is none.
  """
  damaged = list(artifact.damaged())
  if damaged:
    identity, part = artifact.manifest['identity'], part_folder(workdir, artifact.path.name)
    # Until the manifest is gone, a kill leaves a finished stage that lacks files, and this begins again.
    storage.write_json(artifact.path / _BEGUN, {**identity, 'versions': artifact.manifest['versions']})
    storage.write_json(artifact.path / _COST.replace('*', ''), artifact.manifest['cost'])
    for file, _ in damaged:
      file.unlink(missing_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    artifact.path.rename(part)
    (part / MANIFEST).unlink()
  return [said for _, said in damaged]


def pending_commit(workdir: Path, identity: Identity) -> bool:
  """Whether a kill fell between the manifest and the rename, so that only the rename is left to do."""
  part = part_folder(workdir, identity.stage)
  if not (part / MANIFEST).is_file():
    return False
  return _read_manifest(part).identity == identity.as_json()


def checksums(path: Path) -> dict[str, dict[str, Any]]:
  """Relative POSIX path of every file below `path`, but for the manifest → size in bytes and SHA-256."""
  files = sorted(p for p in path.rglob('*') if p.is_file() and p != path / MANIFEST)
  return {p.relative_to(path).as_posix(): {'bytes': p.stat().st_size, 'sha256': _sha256(p)} for p in files}


def _sha256(path: Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that a result depends on."""
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found

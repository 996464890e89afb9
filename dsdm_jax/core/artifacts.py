"""Artifacts: what a finished stage leaves on disk, and the only way in which stages exchange data.

A stage writes below `WORKDIR/<stage>/<attempt>/`. One small file, `WORKDIR/<stage>/manifest.json`, makes an attempt the
finished stage: it names the attempt, the *identity* (settings that the stage depends on, digests of the artifacts that
it read, format version), a checksum of each file, package versions, cost and what the data means (`semantics`).

An attempt is named after the digest of its identity, so that jobs which share a stage agree on it. Its note
`begun.json` has the identity and the package versions; an attempt with that note can be resumed. A rerun writes another
attempt, replaces the manifest, then deletes the old attempt. So a kill at any moment leaves a stage that is finished or
an attempt that can be resumed.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsdm_jax.core import storage
from dsdm_jax.errors import UserError

MANIFEST = 'manifest.json'
_BEGUN = 'begun.json'
_COST = 'cost*.json'  # one for each job that shares the stage
_ATTEMPT = re.compile(r'[0-9a-f]{12}-\d+')
_IDENTITY = {'stage': str, 'format': int, 'settings': dict, 'inputs': dict}
# Packages that can change results bit for bit. A stage that was started under one version cannot be resumed under
# another.
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
    format: version of what the stage writes; a commit that changes it raises the number.
    settings: flat config key → JSON value, for the keys that the stage depends on.
    inputs: name of each artifact that it reads → digest.
  """

  stage: str
  format: int
  settings: Mapping[str, Any]
  inputs: Mapping[str, str]

  def as_json(self) -> dict[str, Any]:
    # A round trip, so that both sides of a comparison are what a file can hold (tuples become lists).
    return json.loads(json.dumps(dataclasses.asdict(self)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """One phrase for each difference between two identities; empty if they agree."""
  phrases = []
  if old['format'] != new['format']:
    phrases.append(f'format version was {old["format"]}, now {new["format"]}')
  before, after = old['settings'], new['settings']
  for key in sorted(before.keys() | after.keys()):
    if before.get(key) != after.get(key):
      was, now = (json.dumps(settings[key]) if key in settings else 'absent' for settings in (before, after))
      phrases.append(f'{key} was {was}, now {now}')
  for name in sorted(old['inputs'].keys() | new['inputs'].keys()):
    if old['inputs'].get(name) != new['inputs'].get(name):
      phrases.append(f'its input {name} has changed')
  return phrases


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A finished stage, opened for reading.

  Attributes:
    path: folder of its files.
  """

  path: Path
  manifest: Mapping[str, Any]

  @property
  def semantics(self) -> Mapping[str, Any]:
    return self.manifest['semantics']

  @property
  def identity(self) -> Mapping[str, Any]:
    """What it was computed from, as `Identity.as_json`."""
    return self.manifest['identity']

  @property
  def settings(self) -> Mapping[str, Any]:
    return self.identity['settings']

  @property
  def given(self) -> Mapping[str, Any]:
    """The settings that named files as they were given; `settings` has digests in their place."""
    given = self.semantics.get('given')
    return given if isinstance(given, dict) else {}

  @property
  def config(self) -> dict[str, Any]:
    """The settings as they were given."""
    return {**self.settings, **self.given}

  @property
  def digest(self) -> str:
    """SHA-256 over identity and file checksums: changes whenever identity or content does.

    Two checkpoints of the same weights differ in names and bytes. A model counts by the record of its training, the
    file `NAME.jsonl` beside its folder.
    """
    models = set(self.manifest['models'])
    files = {name: entry for name, entry in self.manifest['files'].items() if name.partition('/')[0] not in models}
    return _digest({'identity': self.identity, 'files': files})

  def verify(self) -> None:
    """Reads every file back.

    Raises:
      UserError: a file is missing, has another size or other bytes, or is a link that leads out of the folder; the
        message names the first such file.
    """
    for _, phrase in self.damaged():
      raise UserError(f'{phrase}; delete {self.path.parent} and start again to run that stage again')

  def damaged(self) -> Iterator[tuple[Path, str]]:
    """Files that are not as they were written, see `damaged`."""
    return damaged(self.path, self.manifest['files'])


def damaged(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Path, str]]:
  """The `files` of `checksums` that are not as they were written, each with a phrase that says how; see `inside`."""
  for name, entry in files.items():
    file = inside(folder, name)
    if not file.is_file():
      yield file, f'{file} is missing'
    elif file.stat().st_size != entry['bytes']:
      yield file, f'{file} has {file.stat().st_size} bytes where {entry["bytes"]} were written'
    elif storage.sha256(file) != entry['sha256']:
      yield file, f'{file} has changed since it was written'


def inside(folder: Path, name: str) -> Path:
  """`folder / name`, for a name from a file: with links followed, it must be below `folder`.

  Raises:
    UserError: it is not.
  """
  file = Path(folder) / name
  if '\0' in name or not file.resolve().is_relative_to(Path(folder).resolve()):
    raise UserError(f'{folder} names the file {name!r}, which is outside it; use a workdir from a source you trust')
  return file


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
  """Relative POSIX path of every file below `folder`, without notes on the attempt → size in bytes and SHA-256."""
  result = {}
  for name in storage.files(folder):
    if not _is_note(name):
      file = folder / name
      result[name] = {'bytes': file.stat().st_size, 'sha256': storage.checksum(file)}
  return result


def open_stage(workdir: str | os.PathLike, stage: str) -> Artifact | None:
  """The finished artifact of `stage`; None if it is not finished.

  Raises:
    UserError: its manifest is unreadable, damaged or of an older version.
  """
  file = Path(workdir) / stage / MANIFEST
  try:
    data = storage.read_bytes(file)
    if data is None:
      return None
    manifest = json.loads(data)
    if 'attempt' not in manifest and 'identity' in manifest:
      raise UserError(f'{file.parent} was written by an older version of dsdm_jax; use another --workdir')
    if manifest.pop('sha256') != _digest(manifest):
      raise ValueError('its checksum is wrong')
    for key in ('identity', 'files', 'semantics', 'cost', 'versions'):
      if not isinstance(manifest[key], dict):
        raise TypeError(f'{key} is not an object')
    if not _ATTEMPT.fullmatch(manifest['attempt']) or not _is_identity(manifest['identity']):
      raise ValueError('attempt or identity is incomplete')
    for key in ('seconds', 'flop'):
      manifest['cost'][key] + 0.0
    if not all(isinstance(name, str) for name in manifest['models']):
      raise TypeError('models has an entry that is not a name')
    for name, entry in manifest['files'].items():
      if Path(name).is_absolute() or '..' in Path(name).parts or '\0' in name:
        raise ValueError(f'path {name!r} leaves the folder')
      if type(entry['bytes']) is not int or type(entry['sha256']) is not str:
        raise TypeError(f'{name} has no size or no checksum')
  except UserError:
    raise
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'{file} is unreadable ({type(error).__name__}: {reason}); delete {file.parent} and start again to run that '
      'stage again'
    ) from error
  return Artifact(file.parent / manifest['attempt'], manifest)


def open_folder(folder: Path) -> Artifact | None:
  """The artifact in `WORKDIR/<stage>`; None if that is not a finished stage."""
  folder = Path(folder).absolute()
  return open_stage(folder.parent, folder.name)


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(manifest: Mapping[str, Any]) -> bytes:
  """The manifest as it is written, with a checksum of itself."""
  manifest = json.loads(json.dumps(manifest))  # so that the checksum is of what is read back
  return storage.as_json({**manifest, 'sha256': _digest(manifest)})


def _is_identity(value: Any) -> bool:
  return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in _IDENTITY.items())


def _note(attempt: Path) -> dict[str, Any] | None:
  try:
    note = json.loads(storage.read_bytes(attempt / _BEGUN) or b'')
  except (OSError, ValueError, RecursionError):
    return None
  return note if _is_identity(note) else None


def _attempts(workdir: Path, stage: str) -> list[Path]:
  """All attempts at a stage but the finished one."""
  folder = Path(workdir) / stage
  paths = sorted(folder.iterdir()) if folder.is_dir() else []
  finished = open_stage(workdir, stage)
  return [path for path in paths if _ATTEMPT.fullmatch(path.name) and (finished is None or path != finished.path)]


def unfinished(workdir: Path, stage: str) -> list[Path]:
  """Attempts at a stage that can be resumed, with the right settings and packages."""
  return [attempt for attempt in _attempts(workdir, stage) if _note(attempt) is not None]


def begun(workdir: Path, stage: str) -> Mapping[str, Any] | None:
  """Identity of an unfinished attempt at `stage`; None if there is none."""
  notes = [_note(attempt) for attempt in unfinished(workdir, stage)]
  return {key: notes[-1][key] for key in _IDENTITY} if notes and notes[-1] is not None else None


def origin(attempt: Path) -> str:
  """Digest of what an attempt is computed from; it marks the files that jobs write."""
  note = _note(attempt)
  return _digest(None if note is None else {key: note[key] for key in _IDENTITY})


def other_versions(attempt: Path) -> dict[str, tuple[str, str]]:
  """Package that decides results → its version when the attempt was begun, and now, for those that differ.

  A package that is installed only now, or only was then, had no part in the attempt; one that the note does not name
  is not compared.
  """
  noted = (_note(attempt) or {}).get('versions')
  old = {k: ' '.join(v.split())[:50] for k, v in noted.items() if isinstance(v, str)} if isinstance(noted, dict) else {}
  new = versions()
  for version in (old, new):
    if 'python' in version:
      version['python'] = '.'.join(version['python'].split('.')[:2])  # a patch release changes no result
  return {n: (old[n], new[n]) for n in ('python', *_DECIDE) if n in old and n in new and old[n] != new[n]}


def _is_of(attempt: Path, identity: Identity) -> bool:
  note = _note(attempt)
  return note is not None and {key: note[key] for key in _IDENTITY} == identity.as_json()


def check_versions(workdir: Path, identity: Identity) -> None:
  """Checks that the unfinished attempts of `identity` can be resumed with the installed packages.

  Raises:
    UserError: one holds work of other packages. Half of each would be a result that no single run reproduces.
  """
  for attempt in unfinished(workdir, identity.stage):
    others = other_versions(attempt)
    if others and _is_of(attempt, identity) and holds_work(attempt):
      changes = ', '.join(f'{name} was {old}, now {new}' for name, (old, new) in others.items())
      pins = ' '.join(f'{name}=={old}' for name, (old, _) in others.items() if name != 'python')
      back = f'install these again (pip install {pins})' if pins else 'use that Python'
      raise UserError(
        f'{attempt} was begun with other packages: {changes}; {back} and start the same command to resume it, or add '
        f'--rerun to run {identity.stage} again'
      )


def resumable(workdir: Path, identity: Identity) -> bool:
  """Whether there is an unfinished attempt that `begin` resumes."""
  return any(_is_of(a, identity) and not other_versions(a) for a in unfinished(workdir, identity.stage))


def begin(workdir: Path, identity: Identity, shared: bool = False) -> Path:
  """The folder to write in: an attempt of the same identity and packages to resume, or a new one.

  Args:
    shared: other jobs may begin at the same time: they get the same folder, and no other attempt is deleted. If one of
      them has finished the stage already, its folder is returned.
  """
  finished = open_stage(workdir, identity.stage)
  if shared and finished is not None and finished.identity == identity.as_json():
    return finished.path
  resumed = [a for a in unfinished(workdir, identity.stage) if _is_of(a, identity) and not other_versions(a)]
  if not shared:
    for attempt in _attempts(workdir, identity.stage):
      if attempt not in resumed[:1]:
        discard(attempt)
  if resumed:
    return resumed[0]
  prefix, note = _digest(identity.as_json())[:12], storage.as_json({**identity.as_json(), 'versions': versions()})
  for number in itertools.count():
    attempt = Path(workdir) / identity.stage / f'{prefix}-{number}'
    if finished is not None and attempt == finished.path:
      continue
    if storage.create(attempt / _BEGUN, note) or (_is_of(attempt, identity) and not other_versions(attempt)):
      return attempt
  raise AssertionError('unreachable')


def discard(attempt: Path) -> None:
  """Deletes an attempt; after a kill in the middle, what is left is not resumed."""
  storage.write_bytes(attempt / _BEGUN, b'{}')
  for path in attempt.iterdir():
    if path.name != _BEGUN:
      storage.delete(path)
  storage.delete(attempt)
  with contextlib.suppress(OSError):  # not empty
    attempt.parent.rmdir()


def discard_others(workdir: Path, stages: Iterable[str]) -> None:
  """Deletes all attempts at finished stages but the finished ones."""
  for stage in stages:
    for attempt in _attempts(workdir, stage):
      discard(attempt)


def sweep(workdir: Path, stages: Iterable[str]) -> None:
  """Deletes what a kill left half-written or half-deleted. Only for a run that has locked the workdir."""
  for stage in stages:
    storage.delete_temporary(Path(workdir) / stage, '.*')
    for attempt in _attempts(workdir, stage):
      if _note(attempt) is None:
        discard(attempt)
      else:
        storage.delete_temporary(attempt, '**/.*')


def holds_work(attempt: Path) -> bool:
  """Whether an attempt has more than notes."""
  return any(not _is_note(name) for name in storage.files(attempt))


def _is_note(name: str) -> bool:
  return name == _BEGUN or fnmatch.fnmatch(name, _COST)


class Cost:
  """Seconds and floating-point operations of the work that an attempt holds, whichever processes did it.

  What a kill destroyed does not count. FLOP follow from the work: a stage goes through all of it in each process, and
  adds the FLOP of what is done already too. Seconds are saved with the work: call `save` when some is on disk.

  Args:
    attempt: folder of the unfinished stage.
    job: which of several jobs on the stage; each has its own seconds.
    enabled: False on every process of a job but the first: each counts the FLOP of all.

  Attributes:
    flop: of the whole attempt, once the stage has gone through it.
    parts: name → 'seconds' or 'flop' of a part of the work, for stages that need them; saved with the seconds.
  """

  def __init__(self, attempt: Path, job: int = 0, enabled: bool = True):
    self.attempt, self._enabled = attempt, enabled
    self._file = attempt / _COST.replace('*', f'_{job}' if job else '')
    self._earlier, self.parts = _spent(self._file)
    self._began, self.flop = time.monotonic(), 0.0

  @property
  def seconds(self) -> float:
    return self._earlier + time.monotonic() - self._began

  def of_all_jobs(self) -> dict[str, float]:
    others = [_spent(file)[0] for file in sorted(self.attempt.glob(_COST)) if file != self._file]
    return {'seconds': self.seconds + sum(others), 'flop': self.flop}

  def save(self) -> None:
    if self._enabled:
      storage.write_json(self._file, {'seconds': self.seconds, 'parts': self.parts})


def _spent(file: Path) -> tuple[float, dict[str, dict[str, float]]]:
  try:
    saved = json.loads(file.read_bytes())
    parts = {name: {k: float(v) for k, v in part.items()} for name, part in saved.get('parts', {}).items()}
    if not all(
      0 <= v < math.inf for part in ({'seconds': float(saved['seconds'])}, *parts.values()) for v in part.values()
    ):
      raise ValueError('no cost')
    return float(saved['seconds']), parts
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return 0.0, {}


def commit(workdir: Path, identity: Identity, semantics: Mapping[str, Any], cost: Cost) -> Artifact:
  """Writes the manifest, which makes the attempt of `cost` the finished stage, and deletes other attempts.

  Several jobs may commit the same attempt; the first one writes the manifest.

  Raises:
    UserError: another run has finished the stage with other settings.
  """
  file, attempt = Path(workdir) / identity.stage / MANIFEST, cost.attempt
  known, finished = storage.read_bytes(file), open_stage(workdir, identity.stage)
  if finished is not None and finished.path == attempt:
    return finished
  spent, files = cost.of_all_jobs(), checksums(attempt)
  folders = {name.partition('/')[0] for name in files if '/' in name}
  manifest = {
    'attempt': attempt.name,
    'identity': identity.as_json(),
    'files': files,
    'models': sorted(folder for folder in folders if f'{folder}.jsonl' in files),
    'semantics': dict(semantics),
    'cost': {'seconds': round(spent['seconds'], 3), 'flop': spent['flop']},
    'versions': versions(),
  }
  replaced = storage.replace(file, seal(manifest), known)
  finished = open_stage(workdir, identity.stage)
  if finished is None or finished.identity != identity.as_json():
    raise UserError(f'{file} was written by another run at this moment; start again when that run has ended')
  if replaced and known is not None:
    discard_others(workdir, [identity.stage])
  return finished


def reopen(artifact: Artifact) -> list[str]:
  """Makes a finished stage an unfinished one without its damaged files; for stages that recompute what is missing.

  Returns:
    A phrase for each damaged file; without any, nothing is changed.
  """
  damage = list(artifact.damaged())
  if damage:
    # Until the manifest is deleted, a kill leaves a finished stage that lacks files, and this starts again.
    note = {**artifact.identity, 'versions': artifact.manifest['versions']}
    storage.create(artifact.path / _BEGUN, storage.as_json(note))
    if not list(artifact.path.glob(_COST)):
      storage.write_json(artifact.path / _COST.replace('*', ''), artifact.manifest['cost'])
    for file, _ in damage:
      storage.delete(file)
    storage.delete(artifact.path.parent / MANIFEST)
  return [phrase for _, phrase in damage]


def link(artifact: Artifact, workdir: Path) -> None:
  """Adds a finished stage to another workdir. Its files get a second name there; neither is written to any more."""
  folder = Path(workdir) / artifact.identity['stage']
  for name in artifact.manifest['files']:
    storage.copy(artifact.path / name, folder / artifact.path.name / name)
  storage.create(folder / MANIFEST, seal(artifact.manifest))


def publish(artifact: Artifact) -> None:
  """Gives the files of a finished stage a second name directly in `WORKDIR/<stage>/`, where people look for them."""
  folder, files = artifact.path.parent, artifact.manifest['files']
  for name in files:
    storage.copy(artifact.path / name, folder / name)
  for name in storage.files(folder):
    if name != MANIFEST and name not in files and not _ATTEMPT.fullmatch(name.partition('/')[0]):
      storage.delete(folder / name)


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that a result depends on."""
  result = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      result[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return result

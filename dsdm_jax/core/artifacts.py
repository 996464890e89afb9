"""Artifacts: what a finished stage leaves in the workdir, and the only way in which stages exchange data.

A stage writes below `WORKDIR/<stage>/<attempt>/`. One small file, `WORKDIR/<stage>/manifest.json`, makes an attempt the
finished stage: it names the attempt, the *identity* (settings that the stage depends on, digests of the artifacts that
it read, format version), a checksum of each file, package versions, cost and what the data means (`semantics`).

An attempt is named after the digest of its identity, so that jobs which share a stage agree on it. Its note
`begun.json` has the identity and the package versions; an attempt with that note can be resumed. A rerun writes another
attempt, replaces the manifest, then deletes the old attempt. So a kill at any moment leaves a stage that is finished or
an attempt that can be resumed. A workdir may be a folder or the address of an object store, where the manifest is one
conditional write.

Manifest and note carry a digest of themselves. Only attempts with a sound note are deleted; a note that cannot be read
is an error. `read` opens artifacts for all readers outside of a run: it compares the digests of inputs and the
checksums of files.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, overload

from dsdm_jax.core import storage
from dsdm_jax.core.storage import Address, Location, Named
from dsdm_jax.errors import UserError

# Names of the pipeline's stages: these folders of a workdir are its own.
STAGES = (
  *('pool', 'leakage', 'targets', 'prefilter', 'proxies', 'features', 'target_features', 'datamodel', 'validation'),
  *('selection', 'pretraining', 'ladder', 'evaluation', 'report'),
)
MANIFEST = 'manifest.json'
_BEGUN = 'begun.json'
_COST = re.compile(r'cost(_\d+)?\.json')  # one for each job that shares the stage
PLACING = 'placing.json'  # note of the units whose files are being taken over, see `core/units.py`
_PUBLISHED = 'published.json'  # names that `publish` wrote in the folder of a stage
# Chunks of a store and files of a pool, whose own checksums each read checks.
_SELF_CHECKED = re.compile(r'.*\.zarr/c/.*|dataset/.*\.array_record-.*')
_ATTEMPT = re.compile(r'[0-9a-f]{12}-\d+')
LARGE = 2**30  # bytes of such files in a stage, above which opening it compares only their sizes
# What reading a damaged or foreign manifest or note raises. An OSError says nothing about its content.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
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

  path: Location
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
    """Compares every file with its checksum. A file that this process knows is not read again until it changes.

    Raises:
      UserError: a file is missing, has another size or other bytes, or is a link that leads out of the folder; the
        message names the first such file.
    """
    for _, phrase in self.damaged():
      raise UserError(f'{phrase}; delete {self.path.parent} and start again to run that stage again')

  def damaged(self, all_bytes: bool = False) -> Iterator[tuple[Location, str]]:
    """Files that are not as they were written, see `damaged`.

    Args:
      all_bytes: also read large stores whose chunks are checked at each read.
    """
    files: Mapping[str, Mapping[str, Any]] = self.manifest['files']
    chunks = {name for name in files if _SELF_CHECKED.fullmatch(name)}
    large = not all_bytes and sum(files[name]['bytes'] for name in chunks) > LARGE
    return damaged(self.path, files, sizes_only=chunks if large else ())

  def file(self, name: str) -> Location | None:
    """Path of a file that the manifest lists; None if it lists no such file, whatever else is in the folder."""
    return self.path / name if name in self.manifest['files'] else None

  def checksum(self, name: str) -> str:
    """The checksum of a file that the manifest lists: SHA-256, or that of the object store that holds the file."""
    return _checksum(self.manifest['files'][name])

  def last_step(self, model: str) -> int | None:
    """Number of the last checkpoint of `model` that the manifest lists; None if it lists none."""
    parts = (name.split('/') for name in self.manifest.get('files', ()))
    return max((int(p[1]) for p in parts if p[0] == model and len(p) > 2 and p[1].isdecimal()), default=None)


def _entry(size: int, checksum: str) -> dict[str, Any]:
  return {'bytes': size, 'checksum' if ':' in checksum else 'sha256': checksum}


def _checksum(entry: Mapping[str, Any]) -> str:
  return str(entry['checksum'] if 'checksum' in entry else entry['sha256'])


def damaged(
  folder: Location, files: Mapping[str, Mapping[str, Any]], sizes_only: Collection[str] = ()
) -> Iterator[tuple[Location, str]]:
  """The `files` of `checksums` that are not as they were written, each with a phrase that says how; see `inside`.

  In an object store this takes one listing.
  """
  there = storage.states(folder) if isinstance(folder, Address) else {}
  for name, entry in files.items():
    file = inside(folder, name)
    if isinstance(file, Path):
      size = file.stat().st_size if file.is_file() else None
    else:
      size = there[name].size if name in there else None
    if size is None:
      yield file, f'{file} is missing'
    elif size != entry['bytes']:
      yield file, f'{file} has {size} bytes where {entry["bytes"]} were written'
    elif name not in sizes_only and not storage.agrees(file, _checksum(entry), there.get(name)):
      yield file, f'{file} has changed since it was written'


@overload
def inside(folder: Path, name: str) -> Path: ...
@overload
def inside(folder: Location, name: str) -> Location: ...
def inside(folder: Location, name: str) -> Location:
  """`folder / name`, for a name from a file: with links followed, it must be below `folder`.

  Raises:
    UserError: it is not.
  """
  file = folder / name
  if isinstance(file, Path):
    leaves = '\0' in name or not file.resolve().is_relative_to(Path(str(folder)).resolve())
  else:
    leaves = '\0' in name or '..' in file.parts
  if leaves:
    raise UserError(f'{folder} names the file {name!r}, which is outside it; use a workdir from a source you trust')
  return file


def checksums(folder: Location) -> dict[str, dict[str, Any]]:
  """Relative POSIX path of every file below `folder`, without notes and temporary files → size in bytes and checksum.

  The checksum is SHA-256, or in an object store what the store says of the object.

  Raises:
    UserError: a file is a link that leads out of the folder, or to a folder.
  """
  if isinstance(folder, Address):
    states = storage.states(folder).items()
    return {
      name: _entry(state.size, state.checksum or storage.sha256(folder / name))
      for name, state in states
      if not _is_note(name) and not storage.is_temporary(name)
    }
  result = {}
  for name in storage.files(folder):
    if not _is_note(name) and not storage.is_temporary(name):
      file = folder / name
      if file.is_symlink() and storage.is_folder(inside(folder, name)):
        raise UserError(f'{file} is a link to a folder; make the folder of the whole stage a link instead')
      result[name] = _entry(file.stat().st_size, storage.checksum(file))
  return result


def open_stage(workdir: Named, stage: str) -> Artifact | None:
  """The finished artifact of `stage`; None if it is not finished.

  Raises:
    UserError: its manifest is unreadable, damaged or of an older version, or its folder is a link that leads nowhere.
  """
  file = storage.locate(workdir) / stage / MANIFEST
  if isinstance(file, Path) and file.parent.is_symlink() and not file.parent.exists():
    raise UserError(f'{file.parent} is a link to {os.readlink(file.parent)}, which does not exist; mount that disk')
  try:
    data = storage.read_bytes(file)
    if data is None:
      return None
    keys = json.loads(data).keys()
    manifest = None if 'identity' in keys and not {'attempt', 'sha256'} & keys else unseal(data)
    if manifest is None or ('identity' in manifest and 'units' not in manifest):
      raise UserError(f'{file.parent} was written by an older version of dsdm_jax; use another --workdir')
    for key in ('identity', 'files', 'units', 'semantics', 'cost', 'versions'):
      if not isinstance(manifest[key], dict):
        raise TypeError(f'{key} is not an object')
    if not _ATTEMPT.fullmatch(manifest['attempt']) or not _is_identity(manifest['identity']):
      raise ValueError('attempt or identity is incomplete')
    if manifest['identity']['stage'] != stage:
      raise ValueError(f'it is of the stage {manifest["identity"]["stage"]!r}')
    for key in ('seconds', 'flop'):
      manifest['cost'][key] + 0.0
    if not all(isinstance(name, str) for name in manifest['models']):
      raise TypeError('models has an entry that is not a name')
    for unit in manifest['units'].values():
      if type(unit['of']) is not str or not set(unit['files']) <= manifest['files'].keys():
        raise ValueError('a unit has no digest, or names a file that is not listed')
      sum(unit['parts'].values()) + 0.0
    for name, entry in manifest['files'].items():
      if PurePosixPath(name).is_absolute() or '..' in PurePosixPath(name).parts or '\0' in name:
        raise ValueError(f'path {name!r} leaves the folder')
      if type(entry['bytes']) is not int or type(entry['checksum' if 'checksum' in entry else 'sha256']) is not str:
        raise TypeError(f'{name} has no size or no checksum')
  except UserError:
    raise
  except _UNREADABLE as error:
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'{file} is unreadable ({type(error).__name__}: {reason}); delete {file.parent} and start again to run that '
      'stage again'
    ) from error
  return Artifact(file.parent / manifest['attempt'], manifest)


def open_folder(folder: Named) -> Artifact | None:
  """The artifact in `WORKDIR/<stage>`, or `WORKDIR/<stage>/<attempt>`; None if that is not a finished stage."""
  folder = storage.absolute(storage.locate(folder))
  artifact = open_stage(folder.parent, folder.name)
  if artifact is None and _ATTEMPT.fullmatch(folder.name):
    artifact = open_stage(folder.parent.parent, folder.parent.name)
    return artifact if artifact is not None and artifact.path == folder else None
  return artifact


def read(
  workdir: Named, *stages: str, known: Mapping[str, Artifact] | None = None, verify: bool = True
) -> dict[str, Artifact]:
  """Opens finished stages that are read together.

  Args:
    known: stages of this workdir that are open already.
    verify: compare the files with their checksums.

  Raises:
    UserError: a stage is not finished or damaged, or it was computed from another input than the one in the workdir.
  """
  opened = {stage: open_stage(workdir, stage) for stage in stages}
  if missing := [stage for stage, artifact in opened.items() if artifact is None]:
    raise UserError(f'{workdir} has no finished {", ".join(missing)}; run these stages first')
  result = {stage: artifact for stage, artifact in opened.items() if artifact is not None}
  for phrase in mismatches(workdir, {**(known or {}), **result}):
    raise UserError(f'{phrase}; start the run again with --rerun before reading it')
  if verify:
    for artifact in result.values():
      artifact.verify()
  return result


def mismatches(workdir: Named, opened: Mapping[str, Artifact]) -> Iterator[str]:
  """A phrase for each of `opened` that was computed from another input than the one in `opened` or in the workdir."""
  there = dict(opened)
  for stage, artifact in opened.items():
    for name, digest in artifact.identity['inputs'].items():
      if name not in there:
        found = open_stage(workdir, name)
        if found is None:
          continue
        there[name] = found
      if there[name].digest != digest:
        yield f'{stage} of {workdir} was computed from another {name} than the one that is there now'


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of(value: Any) -> str:
  """SHA-256 of a JSON value."""
  return _digest(value)


def read_placing(file: Location) -> list[str]:
  """The units of a note `placing.json`; none if there is no note, or one that is damaged."""
  try:
    return [str(name) for name in unseal(storage.read_bytes(file) or b'{}')['units']]
  except _UNREADABLE:
    return []


def seal(content: Mapping[str, Any]) -> bytes:
  """A manifest or note as it is written, with a checksum of itself."""
  content = json.loads(json.dumps(content))  # so that the checksum is of what is read back
  return storage.as_json({**content, 'sha256': _digest(content)})


def unseal(data: bytes) -> dict[str, Any]:
  """The content of `seal`.

  Raises:
    ValueError, KeyError, TypeError, AttributeError, RecursionError: the checksum is wrong, or there is none.
  """
  content = json.loads(data)
  if content.pop('sha256') != _digest(content):
    raise ValueError('its checksum is wrong')
  return dict(content)


def _is_identity(value: Any) -> bool:
  return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in _IDENTITY.items())


def _note(attempt: Location) -> dict[str, Any] | None:
  """The note of an attempt; None if the folder is empty, or is being created or deleted.

  Raises:
    UserError: the note is damaged, cannot be read, or is missing although the folder has files.
  """
  file = attempt / _BEGUN
  way_out = f'nothing was deleted; restore it, or delete {attempt} to lose that unfinished work'
  try:
    data = storage.read_bytes(file)
    if data is None:
      names = [name for name in storage.files(attempt) if not storage.is_temporary(name)]
      if _BEGUN in names:  # another job has written it at this moment
        return _note(attempt)
      if names:
        raise UserError(f'{file} is missing; {way_out}')
      return None
    note = unseal(data)
    if not note.get('discarded') and not _is_identity(note):
      raise ValueError('it has no identity')
  except UserError:
    raise
  except (*_UNREADABLE, OSError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise UserError(f'{file} is unreadable ({type(error).__name__}: {reason}); {way_out}') from error
  return None if note.get('discarded') else note


def _attempts(workdir: Location, stage: str) -> list[Location]:
  """All attempts at a stage but the finished one."""
  finished = open_stage(workdir, stage)
  paths = [path for path in storage.subfolders(workdir / stage) if _ATTEMPT.fullmatch(path.name)]
  return [path for path in paths if finished is None or path != finished.path]


def unfinished(workdir: Location, stage: str) -> list[Location]:
  """Attempts at a stage that can be resumed, with the right settings and packages."""
  return [attempt for attempt in _attempts(workdir, stage) if _note(attempt) is not None]


def begun(workdir: Location, stage: str) -> Mapping[str, Any] | None:
  """Identity of an unfinished attempt at `stage`; None if there is none."""
  notes = [_note(attempt) for attempt in unfinished(workdir, stage)]
  return {key: notes[-1][key] for key in _IDENTITY} if notes and notes[-1] is not None else None


def origin(attempt: Location) -> str:
  """Digest of what an attempt is computed from; it marks the files that jobs write."""
  note = _note(attempt)
  return _digest(None if note is None else {key: note[key] for key in _IDENTITY})


def settings_of(attempt: Location, without: Collection[str] = ()) -> dict[str, Any]:
  """The settings in the identity of an attempt, files by content, without some keys; none where it has no note."""
  note = _note(attempt) if storage.is_file(attempt / _BEGUN) else None
  return {key: value for key, value in (note or {'settings': {}})['settings'].items() if key not in without}


def other_versions(attempt: Location) -> dict[str, tuple[str, str]]:
  """Package that decides results → its version when the attempt was begun, and now, for those that differ.

  A package that is installed only now, or only was then, had no part in the attempt; one that the note does not name
  is not compared.
  """
  return _other_versions((_note(attempt) or {}).get('versions'))


def same_packages(artifact: Artifact) -> bool:
  """Whether a finished stage was computed with the installed packages, as far as they decide results."""
  return not _other_versions(artifact.manifest['versions'])


def _other_versions(noted: Any) -> dict[str, tuple[str, str]]:
  old = {k: ' '.join(v.split())[:50] for k, v in noted.items() if isinstance(v, str)} if isinstance(noted, dict) else {}
  new = versions()
  for version in (old, new):
    if 'python' in version:
      version['python'] = '.'.join(version['python'].split('.')[:2])  # a patch release changes no result
  return {n: (old[n], new[n]) for n in ('python', *_DECIDE) if n in old and n in new and old[n] != new[n]}


def _is_of(attempt: Location, identity: Identity) -> bool:
  note = _note(attempt)
  return note is not None and {key: note[key] for key in _IDENTITY} == identity.as_json()


def check_versions(workdir: Location, identity: Identity) -> None:
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


def resumable(workdir: Location, identity: Identity) -> bool:
  """Whether there is an unfinished attempt that `begin` resumes."""
  return any(_is_of(a, identity) and not other_versions(a) for a in unfinished(workdir, identity.stage))


def begin(workdir: Location, identity: Identity, shared: bool = False) -> Location:
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
  prefix, note = _digest(identity.as_json())[:12], seal({**identity.as_json(), 'versions': versions()})
  for number in itertools.count():
    attempt = workdir / identity.stage / f'{prefix}-{number}'
    if finished is not None and attempt == finished.path:
      continue
    if storage.create(attempt / _BEGUN, note) or (_is_of(attempt, identity) and not other_versions(attempt)):
      return attempt
  raise AssertionError('unreachable')


def discard(attempt: Location) -> None:
  """Deletes an attempt; after a kill in the middle, its note says that the rest is to be deleted."""
  storage.write_bytes(attempt / _BEGUN, seal({'discarded': True}))
  for path in storage.children(attempt):
    if path.name != _BEGUN:
      storage.delete(path)
  storage.unlink(attempt / _BEGUN)
  for folder in (attempt, attempt.parent):
    storage.delete_empty_folder(folder)


def discard_others(workdir: Location, stages: Iterable[str]) -> None:
  """Deletes all attempts at finished stages but the finished ones.

  Raises:
    UserError: the note of one cannot be read.
  """
  for stage in stages:
    for attempt in _attempts(workdir, stage):
      _note(attempt)
      discard(attempt)


def sweep(workdir: Location, stages: Iterable[str]) -> None:
  """Deletes what a kill left half-written or half-deleted. Only for a run that has locked the workdir.

  Raises:
    UserError: the note of an attempt cannot be read; nothing of that stage is deleted.
  """
  storage.delete_temporary(workdir)
  for stage in stages:
    notes = {attempt: _note(attempt) for attempt in _attempts(workdir, stage)}
    for attempt, note in notes.items():
      if note is None:
        discard(attempt)
      else:
        storage.delete_temporary(attempt, below=True)
    storage.delete_temporary(workdir / stage)
    finished = open_stage(workdir, stage)
    if finished is not None:
      storage.delete_temporary(finished.path, below=True)


def holds_work(attempt: Location) -> bool:
  """Whether an attempt has more than notes."""
  return any(not _is_note(name) and not storage.is_temporary(name) for name in storage.files(attempt))


def _is_note(name: str) -> bool:
  return name in (_BEGUN, PLACING) or _COST.fullmatch(name) is not None or storage.is_mark(name)


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
    parts: name → seconds or FLOP of a part of the work, for stages that need them; saved with the seconds.

  Raises:
    UserError: what was saved is damaged or cannot be read.
  """

  def __init__(self, attempt: Location, job: int = 0, enabled: bool = True):
    self.attempt, self._enabled = attempt, enabled
    self._file = attempt / (f'cost_{job}.json' if job else 'cost.json')
    self._earlier, self.parts = _spent(self._file)
    self._began, self.flop = time.monotonic(), 0.0

  @property
  def seconds(self) -> float:
    return self._earlier + time.monotonic() - self._began

  def resume(self, seconds: float) -> None:
    """Counts work on disk that had taken `seconds` in all, although a kill came before they were saved."""
    self._earlier = max(self._earlier, seconds)

  def add(self, seconds: float) -> None:
    """Counts work that another attempt did."""
    self._earlier += seconds

  def of_all_jobs(self) -> dict[str, float]:
    others = [_spent(file)[0] for file in _costs(self.attempt) if file != self._file]
    return {'seconds': self.seconds + sum(others), 'flop': self.flop}

  def save(self) -> None:
    if self._enabled:
      storage.write_bytes(self._file, seal({'seconds': self.seconds, 'parts': self.parts}))


def _costs(attempt: Location) -> list[Location]:
  return [path for path in storage.children(attempt) if _COST.fullmatch(path.name)]


def _spent(file: Location) -> tuple[float, dict[str, float]]:
  try:
    data = storage.read_bytes(file)
    if data is None:
      return 0.0, {}
    saved = unseal(data)
    parts = {name: float(value) for name, value in saved['parts'].items()}
    if not all(0 <= value < math.inf for value in (saved['seconds'], *parts.values())):
      raise ValueError('it has no cost')
    return float(saved['seconds']), parts
  except (*_UNREADABLE, OSError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'{file} is unreadable ({type(error).__name__}: {reason}); restore it, or delete it: then {file.parent.parent} '
      'resumes without the seconds that were spent there'
    ) from error


def commit(
  workdir: Location,
  identity: Identity,
  semantics: Mapping[str, Any],
  cost: Cost,
  units: Mapping[str, Any] | None = None,
) -> Artifact:
  """Writes the manifest, which makes the attempt of `cost` the finished stage, and deletes the one that was finished.

  Several jobs may commit the same attempt; the first one writes the manifest.

  Args:
    workdir, identity, semantics: of the stage.
    cost: of the attempt.
    units: `Units.as_json`.

  Raises:
    UserError: another run has finished the stage with other settings.
  """
  file, attempt = workdir / identity.stage / MANIFEST, cost.attempt
  known, before = storage.read_bytes(file), open_stage(workdir, identity.stage)
  if before is not None and before.path == attempt:
    return before
  spent, files = cost.of_all_jobs(), checksums(attempt)
  folders = {name.partition('/')[0] for name in files if '/' in name}
  manifest = {
    'attempt': attempt.name,
    'identity': identity.as_json(),
    'files': files,
    'models': sorted(folder for folder in folders if f'{folder}.jsonl' in files),
    'units': dict(units or {}),
    'semantics': dict(semantics),
    'cost': {'seconds': round(spent['seconds'], 3), 'flop': spent['flop']},
    'versions': versions(),
  }
  replaced = storage.replace(file, seal(manifest), known)
  finished = open_stage(workdir, identity.stage)
  if finished is None or finished.identity != identity.as_json():
    raise UserError(f'{file} was written by another run at this moment; start again when that run has ended')
  if replaced and before is not None:
    discard(before.path)
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
    storage.write_bytes(artifact.path / _BEGUN, seal(note))  # no manifest vouches for the one that is there
    if not _costs(artifact.path):
      spent = {'seconds': artifact.manifest['cost']['seconds'], 'parts': {}}
      storage.write_bytes(artifact.path / 'cost.json', seal(spent))
    for file, _ in damage:
      storage.delete(file)
    storage.unlink(artifact.path.parent / MANIFEST)
  return [phrase for _, phrase in damage]


def link(artifact: Artifact, workdir: Location) -> None:
  """Adds a finished stage to another workdir. Its files get a second name there; neither is written to any more."""
  folder = workdir / artifact.identity['stage']
  note = seal({**artifact.identity, 'versions': artifact.manifest['versions']})
  storage.create(folder / artifact.path.name / _BEGUN, note)
  # After a kill the attempt is resumed: what is noted as complete has its cost.
  notes = [name for name in storage.files(artifact.path) if _is_note(name) and name != _BEGUN]
  for name in (*artifact.manifest['files'], *sorted(notes, key=storage.is_mark)):
    storage.copy(artifact.path / name, folder / artifact.path.name / name)
  storage.create(folder / MANIFEST, seal(artifact.manifest))


def publish(artifact: Artifact) -> None:
  """Gives the files of a finished stage a second name directly in `WORKDIR/<stage>/`, where people look for them.

  In an object store they are copied, once.
  Files that an earlier call wrote and that the stage no longer has are deleted, unless somebody has changed them.
  """
  folder, files = artifact.path.parent, artifact.manifest['files']
  before = _published(folder)
  now = {name: artifact.checksum(name) for name in files}
  if before == now and isinstance(folder, Address) and now.keys() <= storage.states(folder).keys():
    return
  if before != now:
    storage.write_bytes(folder / _PUBLISHED, seal({'files': {**before, **now}}))
  for name in files:
    storage.copy(artifact.path / name, folder / name)
  for name, digest in before.items():
    file = inside(folder, name)
    if name not in files and storage.is_file(file) and storage.agrees(file, digest):
      storage.delete(file)
  if before != now:
    storage.write_bytes(folder / _PUBLISHED, seal({'files': now}))


def stage_around(path: Location) -> Location | None:
  """The folder of a stage that `path` is or is in, also of a stage that has not begun; None if there is none."""
  for folder in (path, *path.parents):
    others = [folder.parent / name for name in STAGES]
    if folder.name in STAGES and any(storage.is_file(o / MANIFEST) or _has_attempt(o) for o in others):
      return folder
  return None


def _has_attempt(stage: Location) -> bool:
  return any(storage.is_file(attempt / _BEGUN) for attempt in storage.subfolders(stage))


def _published(folder: Location) -> dict[str, str]:
  """Name → SHA-256 of what `publish` wrote in the folder of a stage."""
  try:
    return dict(unseal(storage.read_bytes(folder / _PUBLISHED) or b'{}')['files'])
  except _UNREADABLE:
    return {}  # nothing is known of other files, so they stay


@dataclasses.dataclass(frozen=True)
class Finding:
  """What `inspect` says of one stage or path.

  Attributes:
    kind: 'whole', 'unfinished', 'damaged', 'superfluous' or 'foreign'.
  """

  kind: str
  path: Location
  text: str


def inspect(workdir: Location) -> Iterator[Finding]:
  """Compares everything in the stages of a workdir with manifests and notes, whose bytes are all read; writes nothing.

  Stages are *whole*, *unfinished*, or *damaged*: another file or input than their manifest lists. Files are
  *superfluous* if this program wrote them and nothing needs them, and *foreign* if it did not.
  """
  links = [path for path in storage.children(workdir) if isinstance(path, Path) and path.is_symlink()]
  for folder in sorted({*storage.subfolders(workdir), *links}, key=str):
    stage = folder.name
    attempts = [path for path in storage.subfolders(folder) if _ATTEMPT.fullmatch(path.name)]
    try:
      finished = open_stage(workdir, stage)
      if finished is None and not attempts:
        continue
      if finished is not None:
        yield from _inspect_finished(finished, stage)
    except UserError as error:
      yield Finding('damaged', folder / MANIFEST, str(error))
      continue
    for attempt in attempts:
      if finished is None or attempt != finished.path:
        yield _inspect_attempt(attempt, finished)
    published = _published(folder)
    current = {} if finished is None else finished.manifest['files']
    for name in storage.files(folder):
      file = folder / name
      if name in (MANIFEST, _PUBLISHED) or any(name.startswith(f'{a.name}/') for a in attempts):
        continue
      if storage.is_temporary(name):
        yield Finding('superfluous', file, 'a kill left it half-written; the next run deletes it')
      elif name not in published:
        yield Finding('foreign', file, 'this program did not write it')
      elif not storage.agrees(file, published[name]):
        yield Finding('foreign', file, 'it was changed after it was published')
      elif name not in current:
        yield Finding('superfluous', file, 'it is of a stage that was replaced')


def _inspect_finished(artifact: Artifact, stage: str) -> Iterator[Finding]:
  files, bad = artifact.manifest['files'], False
  for phrase in mismatches(artifact.path.parent.parent, {stage: artifact}):
    bad = True
    yield Finding('damaged', artifact.path, phrase)
  for file, phrase in artifact.damaged(all_bytes=True):
    bad = True
    yield Finding('damaged', file, phrase)
  for name in storage.files(artifact.path):
    if name not in files and not _is_note(name):
      temporary = storage.is_temporary(name)
      kind, text = ('superfluous', 'a kill left it half-written') if temporary else ('foreign', 'no manifest lists it')
      yield Finding(kind, artifact.path / name, text)
  if not bad:
    size = sum(entry['bytes'] for entry in files.values())
    yield Finding('whole', artifact.path, f'{len(files):,} files, {size / 1e6:,.1f} MB')


def _inspect_attempt(attempt: Location, finished: Artifact | None) -> Finding:
  try:
    note = _note(attempt)
  except UserError as error:
    return Finding('damaged', attempt / _BEGUN, str(error))
  again = finished is not None and note is not None and {key: note[key] for key in _IDENTITY} != finished.identity
  if note is None or (finished is not None and not (again and holds_work(attempt))):
    return Finding('superfluous', attempt, 'an attempt that is no longer needed; the next run deletes it')
  marks = [attempt / name for name in storage.files(attempt) if storage.is_mark(name)]
  for file in _costs(attempt):
    try:
      _spent(file)
    except UserError as error:
      return Finding('damaged', file, str(error))
  torn = [mark.name for mark in marks if not storage.is_marked(mark.with_suffix(''))]
  lost = f'; damaged and computed again: {", ".join(torn[:3])}' if torn else ''
  deleted = '; a run with the settings of the finished stage deletes it' if again else ''
  return Finding('unfinished', attempt, f'the same command resumes it{deleted}{lost}')


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that a result depends on."""
  return dict(_versions())


@functools.cache  # a look at all packages takes a tenth of a second
def _versions() -> tuple[tuple[str, str], ...]:
  result = [('python', platform.python_version())]
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      result.append((name, importlib.metadata.version(name)))
  return tuple(result)

"""Where the text of the candidate pool comes from: `config.pool.sources`, one line a source.

A source is 'kind:target', with options behind bars: 'jsonl:/data/wiki-*.jsonl.gz | text=content | max_bytes=1e9'.
Every source is cut into units that can be read apart from each other (files, row ranges); documents are numbered in
the order of sources, units and records, which depends on nothing but the settings and the files.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dsdm_jax.config import bounds
from dsdm_jax.config.validate import load_callable, select
from dsdm_jax.data import files
from dsdm_jax.data.pool.documents import Document
from dsdm_jax.data.pool.installed_packages import installed_packages
from dsdm_jax.errors import UserError

Source = Callable[[ConfigDict, int], Iterator[Document]]
FILES = ('text', 'jsonl', 'parquet', 'hf')
KINDS = (*FILES, 'tfds', 'seqio', 'tokens')
SIZED = ('installed_packages', 'function')
_TEXT_FILES = 256  # small files that are read as one unit
_TFDS_ROWS = 65_536  # rows of a unit
_MOST = {
  'weight': bounds.KINDS['factor'][0],
  'max_bytes': bounds.KINDS['bytes'][0],
  'max_documents': bounds.KINDS['rows'][0],
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One source.

  Attributes:
    kind: one of `KINDS`, 'installed_packages', or 'function' for 'package.module:function'.
    target: glob, name of a dataset or task, or function.
    name: what documents are counted under that do not say it themselves.
    text, id, source: fields of a record; `id` and `source` may be missing in it.
    split: of a TFDS dataset, seqio task or dataset dict.
    weight: share of pool.max_bytes, relative to the other sources; above 0.
    max_bytes, max_documents: caps; 0 for none.
    module: imported first, where it registers a seqio task.
  """

  kind: str
  target: str
  name: str
  text: str = 'text'
  id: str = 'id'
  source: str = 'source'
  split: str = 'train'
  weight: float = 1.0
  max_bytes: int = 0
  max_documents: int = 0
  module: str = ''

  @property
  def generated(self) -> bool:
    """Whether it can only be read from beginning to end, by this process."""
    return self.kind in ('seqio', *SIZED)

  @property
  def sized(self) -> bool:
    """Whether it is told pool.max_bytes and yields about as much by itself."""
    return self.kind in SIZED


@dataclasses.dataclass(frozen=True)
class Unit:
  """Part of a source: `paths`, and of a TFDS dataset the rows `first` to `stop` − 1."""

  entry: Entry
  paths: tuple[str, ...]
  first: int = 0
  stop: int = 0


_OPTIONS: Mapping[str, Callable[[str], Any]] = {
  'name': str, 'text': str, 'id': str, 'source': str, 'split': str, 'module': str, 'weight': float,
  'max_bytes': lambda v: int(float(v)), 'max_documents': lambda v: int(float(v)),
}  # fmt: skip


def parse(line: str) -> Entry:
  """The source that a line of `pool.sources` describes.

  Raises:
    UserError: an unknown kind or option, or a value that does not fit.
  """
  said = f'pool.sources holds {line!r}'
  head, *rest = (part.strip() for part in line.split(' | '))
  kind, colon, target = head.partition(':')
  if head == 'installed_packages':
    kind, target = head, head
  elif kind not in KINDS:
    if not colon or '/' in head:
      raise UserError(f'{said}, whose kind is none of installed_packages, {", ".join(KINDS)}, package.module:function')
    kind, target = 'function', head
  if not target:
    raise UserError(f'{said}: nothing behind {kind}:; give a glob or a name')
  options: dict[str, Any] = {'name': _name(kind, target)}
  for part in rest:
    key, equals, value = (x.strip() for x in part.partition('='))
    if key not in _OPTIONS or not equals:
      raise UserError(f'{said}: option {part!r} is none of {", ".join(f"{key}=" for key in _OPTIONS)}')
    try:
      options[key] = _OPTIONS[key](value)
    except (ValueError, OverflowError) as error:  # the latter of 1e999
      raise UserError(f'{said}: {key}={value} is no number') from error
  entry = Entry(kind, target, **options)
  if not entry.name:
    raise UserError(f'{said}: name= is empty; give one or leave it out')
  for key, most in _MOST.items():
    number = getattr(entry, key)
    if not 0 <= number <= most or (key == 'weight' and not number):
      least = 'above' if key == 'weight' else 'at least'
      raise UserError(f'{said}: {key} must be {least} 0 and at most {most:,}; give another')
  return entry


def _name(kind: str, target: str) -> str:
  if kind == 'tfds' and is_folder(target):  # .../c4/en/3.1.0 goes by what stands before its version
    parts = [part for part in target.split('/')[1:] if part and not re.fullmatch(r'\d+\.\d+\.\d+', part)]
    return parts[-1] if parts else kind
  return target.partition('/')[0].partition(':')[0] if kind in ('tfds', 'seqio') else kind


def is_folder(target: str) -> bool:
  """Whether the target of a tfds: source is the folder of a dataset and not its name."""
  return target.startswith(('/', 'gs://'))


def units(entry: Entry) -> list[Unit]:
  """The units of a source that is not `generated`; empty where a glob matches nothing."""
  if entry.kind == 'tfds':
    return _tfds_units(entry)
  found = _files(entry)
  step = _TEXT_FILES if entry.kind == 'text' else 1
  return [Unit(entry, tuple(found[i : i + step])) for i in range(0, len(found), step)]


def _files(entry: Entry) -> list[str]:
  return _hf_files(entry) if entry.kind == 'hf' else files.matches(entry.target)


def states(lines: Iterable[str]) -> dict[str, str]:
  """For each line whose source is files: how many they are now and a digest of their names and states.

  '' where none is there, or where they cannot be listed: whether they have changed is then not known.
  """
  found = {}
  for entry in map(parse, lines):
    if entry.kind in (*FILES, 'tokens'):
      try:
        paths = _files(entry)
        noted = [f'{path}\x1f{version}' for path, version in zip(paths, files.versions(paths), strict=True)]
      except (OSError, UserError):  # a finished pool serves without its files; one that needs them says what is missing
        noted = []
      digest = hashlib.blake2b('\x1e'.join(noted).encode(), digest_size=8).hexdigest()
      found[f'{entry.kind}:{entry.target}'] = f'{len(noted)} files, state {digest}' if noted else ''
  return found


def fingerprint(
  selected: Mapping[str, Any], settings: Mapping[str, Any], previous: Mapping[str, Any]
) -> dict[str, Any]:
  """State of the source files, for `Stage.fingerprint`; that of the finished pool where files are gone.

  With planted targets, also the settings that decide which examples are in the target split.
  """
  result = {f'pool.files of {source}': state for source, state in states(selected['pool.sources']).items()}
  result = {key: state or previous.get(key, '') for key, state in result.items()}
  if selected['pool.plant_targets']:
    result |= select(settings, ('targets.holdout_share', 'targets.max_examples'))
  return result


def _tfds_units(entry: Entry) -> list[Unit]:
  from dsdm_jax.data.pool import readers

  splits = readers.tfds_builder(entry.target).info.splits
  if entry.split not in splits:
    raise readers.no_split(entry, splits)
  rows = splits[entry.split].num_examples
  return [Unit(entry, (), i, min(i + _TFDS_ROWS, rows)) for i in range(0, rows, _TFDS_ROWS)]


def _hf_files(entry: Entry) -> list[str]:
  """Arrow files of folders that `datasets` saved: a dataset's own, or those of one split of a dict of datasets."""
  found: list[str] = []
  for folder in files.matches(entry.target) if '*' not in entry.target else _folders(entry.target):
    root = epath.Path(folder)
    if (root / 'dataset_dict.json').is_file():
      root = root / entry.split
    if not (root / 'state.json').is_file():
      raise UserError(f'{root} is no folder that save_to_disk of datasets wrote: it has no state.json')
    found += sorted(str(path) for path in root.glob('data-*.arrow'))
  return found


def _folders(pattern: str) -> list[str]:
  parent, _, last = pattern.rstrip('/').rpartition('/')
  return sorted(str(path) for path in epath.Path(parent or '.').glob(last) if path.is_dir())


def generate(entry: Entry, config: ConfigDict, seed: int) -> Iterator[Document]:
  """Documents of a `sized` source, in an order that depends on nothing but settings and text.

  Args:
    entry: the source; a cap of its own stands in the place of `config.max_bytes`.
    config: the `pool` part of the config.
    seed: the root seed; sources draw their order from it.

  Raises:
    UserError: no such function.
  """
  if entry.max_bytes:
    config = config.copy_and_resolve_references()
    config.max_bytes = entry.max_bytes
  function: Source = installed_packages
  if entry.kind == 'function':
    function = load_callable(entry.target, 'pool.sources')
  yield from function(config, seed)

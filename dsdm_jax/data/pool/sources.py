"""The sources of the candidate pool, `config.pool.sources`: one line each, parsed into entries and units.

A line is 'kind:target', with options after bars: 'jsonl:/data/wiki-*.jsonl.gz | text=content | max_bytes=1e9'.
Each source is cut into units that are read independently (files, row ranges). Documents are numbered in the order of
sources, units and records, which depends only on the settings and the files.
"""

import dataclasses
import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsdm_jax.config import values
from dsdm_jax.config.validate import select
from dsdm_jax.core import tensorflow_start
from dsdm_jax.data import files
from dsdm_jax.data.targets import tfds_items
from dsdm_jax.errors import UserError

FILES = ('text', 'jsonl', 'parquet', 'hf')
KINDS = (*FILES, 'tfds', 'seqio', 'tokens')
SIZED = ('installed_packages', 'function')
_TEXT_FILES = 256  # small files per unit
_TFDS_ROWS = 65_536  # rows per unit
_LIMITS = {
  'weight': values.MAX_FACTOR,
  'max_bytes': values.MAX_BYTES,
  'max_documents': values.MAX_ROWS,
}


@dataclasses.dataclass(frozen=True)
class Document:
  """One text of the pool.

  Attributes:
    id: unique in the pool, '/'-separated, begins with the source: 'docs/numpy/numpy/random/LICENSE.md'.
    source: the class it is counted under in cards, selections and reports ('docs').
    text: valid Unicode with at least one character that is not white space.
  """

  id: str
  source: str
  text: str


def cut(data: bytes, limit: int) -> bytes:
  """At most `limit` bytes of UTF-8, cut at the end of a line, or of a character if the first line is too long."""
  if len(data) <= limit:
    return data
  end = data.rfind(b'\n', 0, limit) + 1
  if end:
    return data[:end]
  end = limit
  while end and data[end] & 0xC0 == 0x80:  # a continuation byte: its character began before the limit
    end -= 1
  return data[:end]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One source.

  Attributes:
    kind: one of `KINDS`, 'installed_packages', or 'function' for 'package.module:function'.
    target: glob, name of a dataset or task, or function.
    name: source of documents whose record names none.
    text, id, source: field names of a record; `id` and `source` may be missing from it.
    split: of a TFDS dataset, seqio task or dataset dict.
    weight: share of pool.max_bytes, relative to the other sources; positive.
    max_bytes, max_documents: caps; 0 for none.
    module: imported first, to register a seqio task.
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
    """Whether this process must read it from beginning to end, so that it has no units."""
    return self.kind in ('seqio', *SIZED)

  @property
  def sized(self) -> bool:
    """Whether the source itself stops after about pool.max_bytes."""
    return self.kind in SIZED


@dataclasses.dataclass(frozen=True)
class Unit:
  """Part of a source: `paths`, or rows `first` to `stop` − 1 of a TFDS dataset."""

  entry: Entry
  paths: tuple[str, ...]
  first: int = 0
  stop: int = 0


_OPTIONS: Mapping[str, Callable[[str], Any]] = {
  **dict.fromkeys(('name', 'text', 'id', 'source', 'split', 'module'), str),
  'weight': float,
  **dict.fromkeys(('max_bytes', 'max_documents'), lambda value: int(float(value))),
}


def parse(line: str) -> Entry:
  """Parses a line of `pool.sources`.

  Raises:
    UserError: an unknown kind or option, or an invalid value.
  """
  where = f'pool.sources has {line!r}'
  head, *rest = (part.strip() for part in line.split(' | '))
  kind, colon, target = head.partition(':')
  if head == 'installed_packages':
    kind, target = head, head
  elif kind not in KINDS:
    if not colon or '/' in head:
      raise UserError(f'{where}, whose kind is not installed_packages, {", ".join(KINDS)} or package.module:function')
    kind, target = 'function', head
  if not target:
    raise UserError(f'{where}: {kind}: needs a pattern or a name')
  options: dict[str, Any] = {'name': _name(kind, target)}
  for part in rest:
    key, equals, value = (x.strip() for x in part.partition('='))
    if key not in _OPTIONS or not equals:
      raise UserError(f'{where}: option {part!r} is none of {", ".join(f"{key}=" for key in _OPTIONS)}')
    try:
      options[key] = _OPTIONS[key](value)
    except (ValueError, OverflowError) as error:  # OverflowError: 1e999
      raise UserError(f'{where}: {key}={value} is not a number') from error
  entry = Entry(kind, target, **options)
  if not entry.name:
    raise UserError(f'{where}: name= is empty; give a name or remove it')
  for key, most in _LIMITS.items():
    number = getattr(entry, key)
    if not 0 <= number <= most or (key == 'weight' and not number):
      least = 'above' if key == 'weight' else 'at least'
      raise UserError(f'{where}: {key} must be {least} 0 and at most {most:,}')
  return entry


def _name(kind: str, target: str) -> str:
  if kind == 'tfds' and is_folder(target):  # .../c4/en/3.1.0 is named by the part before its version
    parts = [part for part in target.split('/')[1:] if part and not re.fullmatch(r'\d+\.\d+\.\d+', part)]
    return parts[-1] if parts else kind
  return target.partition('/')[0].partition(':')[0] if kind in ('tfds', 'seqio') else kind


def is_folder(target: str) -> bool:
  """Whether the target of a tfds: source is a folder and not the name of a dataset."""
  return target.startswith(('/', 'gs://'))


def units(entry: Entry) -> list[Unit]:
  """The units of a source that is not `generated`; empty if its pattern matches nothing."""
  if entry.kind == 'tfds':
    splits = tfds_builder(entry.target).info.splits
    if entry.split not in splits:
      raise no_split(entry, splits)
    rows = splits[entry.split].num_examples
    return [Unit(entry, (), i, min(i + _TFDS_ROWS, rows)) for i in range(0, rows, _TFDS_ROWS)]
  paths = _files(entry)
  step = _TEXT_FILES if entry.kind == 'text' else 1
  return [Unit(entry, tuple(paths[i : i + step])) for i in range(0, len(paths), step)]


def _files(entry: Entry) -> list[str]:
  """Files of a source; for hf: the Arrow files of folders that `save_to_disk` of `datasets` wrote."""
  if entry.kind != 'hf':
    return files.glob(entry.target)
  paths: list[str] = []
  for folder in files.glob(entry.target.rstrip('/') or '/', 'directory'):
    if files.is_file(f'{folder}/dataset_dict.json'):
      folder = f'{folder}/{entry.split}'
    if not files.is_file(f'{folder}/state.json'):
      raise UserError(f'{folder} has no state.json; hf: needs a folder written by save_to_disk of datasets')
    paths += files.glob(f'{glob.escape(folder)}/data-*.arrow')
  return paths


def states(lines: Iterable[str]) -> dict[str, str]:
  """For each source of files: the number of files and a digest of their names and versions.

  '' if there are no files or they cannot be listed, so that changes cannot be detected.
  """
  result = {}
  for entry in map(parse, lines):
    if entry.kind in (*FILES, 'tokens'):
      try:
        paths = _files(entry)
        noted = [f'{path}\x1f{version}' for path, version in zip(paths, files.versions(paths), strict=True)]
      except (OSError, UserError):  # a finished pool is usable without its files
        noted = []
      digest = hashlib.blake2b('\x1e'.join(noted).encode(), digest_size=8).hexdigest()
      result[f'{entry.kind}:{entry.target}'] = f'{len(noted)} files, state {digest}' if noted else ''
  return result


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


def tfds_builder(name: str) -> Any:
  """The builder of a prepared TFDS dataset, by 'dataset/config' or by its folder.

  Raises:
    UserError: there is none.
  """
  tensorflow_start.start()
  import tensorflow_datasets as tfds

  try:
    with tfds_items.no_foreign_classes():
      builder = tfds.builder_from_directory(name) if is_folder(name) else tfds.builder(name)
      if builder.is_prepared() or is_folder(name):
        return builder
  except (tfds.core.DatasetNotFoundError, FileNotFoundError, KeyError) as error:
    raise UserError(f'pool.sources: TFDS has no dataset {name} ({" ".join(str(error).split())[:200]})') from error
  raise UserError(
    f'pool.sources: the TFDS dataset {name} is not prepared in {builder.data_dir}; prepare it with network access: '
    f'{tfds_items.prepare_command(name)}'
  )


def no_split(entry: Entry, splits: Iterable[str]) -> UserError:
  return UserError(
    f'pool.sources: {entry.target} has no split {entry.split!r}, only {", ".join(splits) or "none"}; '
    'choose one with | split=SPLIT'
  )

"""The sources of the candidate pool, `config.pool.sources`: one line each, parsed into entries and units.

A line is 'kind:target', with options after bars: 'jsonl:/data/wiki-*.jsonl.gz | text=content | max_bytes=1e9'.
Each source is cut into units that are read independently (files, row ranges). Documents are numbered in the order of
sources, units and records, which depends only on the settings and the files.
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.config import values
from dsdm_jax.core import tensorflow_start
from dsdm_jax.data import files
from dsdm_jax.data.pool import chat as chats
from dsdm_jax.data.pool.chat import Chat, Spans
from dsdm_jax.data.targets import tfds_items
from dsdm_jax.errors import UserError

FILES = ('text', 'jsonl', 'parquet', 'hf')
KINDS = (*FILES, 'tfds', 'seqio', 'tokens')
SIZED = ('installed_packages', 'function')
LARGEST = 16 * 2**20  # bytes of UTF-8 in a document; encoding longer ones would take gigabytes
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
    id: unique in the pool.
    source: the class it is counted under in cards, selections and reports ('docs').
    text: valid Unicode with at least one character that is not white space.
    lost: bytes of UTF-8 that the source cut off the end of the text.
    spans: characters that the loss counts, as ascending (begin, end); None for all.
    templated: the text is that of a chat template, in which special pieces are special.
  """

  id: str
  source: str
  text: str
  lost: int = 0
  spans: Spans | None = None
  templated: bool = False


def cut(data: bytes, limit: int) -> bytes:
  """At most `limit` bytes of UTF-8, cut at the end of a character."""
  if len(data) <= limit:
    return data
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
    prompt, completion: field names of two texts in place of `text`; the loss counts the second.
    messages: field name of a conversation in place of `text`; the loss counts what the assistant says.
    text, id, source: field names of a record, 'meta.id' for one inside another. A record must have the fields that the
      user named. None takes the field 'id' or 'source' where there is one, '' none.
    split: of a TFDS dataset, seqio task or dataset dict.
    weight: share of pool.max_bytes, relative to the other sources; positive.
    max_bytes, max_documents: caps; 0 for none.
    module: imported first, to register a seqio task.
    chat: the template of conversations, which the pool stage sets.
  """

  kind: str
  target: str
  name: str
  text: str = 'text'
  id: str | None = None
  source: str | None = None
  split: str = 'train'
  weight: float = 1.0
  max_bytes: int = 0
  max_documents: int = 0
  module: str = ''
  prompt: str = ''
  completion: str = ''
  messages: str = ''
  chat: Chat | None = None

  @property
  def content(self) -> tuple[tuple[str, str], ...]:
    """(option, field) of all that makes the text of a document."""
    if self.messages:
      return (('messages', self.messages),)
    return (('prompt', self.prompt), ('completion', self.completion)) if self.completion else (('text', self.text),)

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
  """Part of a source: `paths`, or rows `first` to `stop` − 1 of a TFDS dataset.

  `labels` name the paths (or the split) in ids of documents that have none of their own.
  """

  entry: Entry
  paths: tuple[str, ...]
  first: int = 0
  stop: int = 0
  labels: tuple[str, ...] = ()


def _whole(value: str) -> int:
  if (number := float(value)) != int(number):
    raise ValueError
  return int(number)


_OPTIONS: Mapping[str, Callable[[str], Any]] = {
  **dict.fromkeys(('name', 'text', 'id', 'source', 'split', 'module', 'prompt', 'completion', 'messages'), str),
  'weight': float,
  **dict.fromkeys(('max_bytes', 'max_documents'), _whole),
}
_CAPS = ('weight', 'max_bytes', 'max_documents')
_FIELDS = ('text', 'id', 'source', 'name', 'prompt', 'completion', 'messages')
_OPTIONS_OF: Mapping[str, tuple[str, ...]] = {
  'installed_packages': _CAPS,
  'function': _CAPS,
  'text': ('name', *_CAPS),
  **dict.fromkeys(('jsonl', 'parquet'), (*_FIELDS, *_CAPS)),
  **dict.fromkeys(('hf', 'tfds'), (*_FIELDS, 'split', *_CAPS)),
  'seqio': (*_FIELDS, 'split', 'module', *_CAPS),
  'tokens': ('text', 'name'),
}


def parse(line: str) -> Entry:
  """Parses a line of `pool.sources`.

  Raises:
    UserError: an unknown kind or option, or an invalid value.
  """
  where = f'pool.sources has {line!r}'
  head, *rest = values.source_parts(line)
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
    usable = _OPTIONS_OF[kind]
    if key not in usable or not equals:
      raise UserError(f'{where}: option {part!r} is none of those of {kind}: {", ".join(f"{key}=" for key in usable)}')
    try:
      options[key] = _OPTIONS[key](value)
    except (ValueError, OverflowError) as error:  # OverflowError: 1e999
      kind = 'number' if key == 'weight' else 'whole number'
      raise UserError(f'{where}: {key}={value} is not a {kind}') from error
  entry = Entry(kind, target, **options)
  given = {key for key in ('text', 'prompt', 'completion', 'messages') if key in options}
  if given and given not in ({'text'}, {'prompt', 'completion'}, {'messages'}):
    raise UserError(f'{where}: give one of text=, messages=, or prompt= and completion= together')
  for key in ('name', *given):
    if not getattr(entry, key):
      raise UserError(f'{where}: {key}= is empty; give a name or remove it')
  for key, most in _LIMITS.items():
    number = getattr(entry, key)
    if not 0 <= number <= most or (key == 'weight' and not number):
      least = 'above' if key == 'weight' else 'at least'
      raise UserError(f'{where}: {key} must be {least} 0 and at most {most:,}')
  return entry


def entries(config: ConfigDict) -> list[Entry]:
  """The entries of `config.sources` (the `pool` part), those with conversations with their chat template.

  Raises:
    UserError: as `parse`; or there are conversations and no template.
  """
  result = [parse(line) for line in config.sources]
  if not any(entry.messages for entry in result):
    return result
  chat = chats.read(config.vocabulary)
  if chat is None:
    raise UserError(
      f'pool.sources has messages, and pool.vocabulary = {config.vocabulary!r} no chat template; give the '
      'tokenizer.json of a model with a chat_template.jinja beside it, or with "chat_template" in its '
      'tokenizer_config.json'
    )
  return [dataclasses.replace(entry, chat=chat) for entry in result]


def _name(kind: str, target: str) -> str:
  if kind == 'tfds' and is_folder(target):  # .../c4/en/3.1.0 is named by the part before its version
    parts = [part for part in target.split('/')[1:] if part and not re.fullmatch(r'\d+\.\d+\.\d+', part)]
    return parts[-1] if parts else kind
  return target.partition('/')[0].partition(':')[0] if kind in ('tfds', 'seqio') else kind


def is_folder(target: str) -> bool:
  """Whether the target of a tfds: source is a folder and not the name of a dataset."""
  return target.startswith('/') or files.is_remote(target) or files.is_file(f'{target}/dataset_info.json')


def units(entry: Entry) -> list[Unit]:
  """The units of a source that is not `generated`; empty if its pattern matches nothing."""
  if entry.kind == 'tfds':
    splits = tfds_builder(entry.target).info.splits
    if entry.split not in splits:
      raise no_split(entry, splits)
    rows = splits[entry.split].num_examples
    return [Unit(entry, (), i, min(i + _TFDS_ROWS, rows), (entry.split,)) for i in range(0, rows, _TFDS_ROWS)]
  paths = _files(entry)
  labels = tuple(files.below(path, entry.target) for path in paths)
  step = _TEXT_FILES if entry.kind == 'text' else 1
  return [Unit(entry, tuple(paths[i : i + step]), labels=labels[i : i + step]) for i in range(0, len(paths), step)]


def distinct(units_: Iterable[Unit]) -> list[Unit]:
  """The units; if two files have one label, all labels become paths below the folder that all files share.

  Beside files of this machine, those of another place keep their whole address.
  """
  result = list(units_)
  places = [unit.paths or (f'{unit.entry.target}/{unit.entry.split}',) for unit in result]
  of_label = collections.defaultdict(set)
  for unit, paths in zip(result, places, strict=True):
    for path, label in zip(paths, unit.labels, strict=False):
      of_label[label].add(path)
  if all(len(paths) == 1 for paths in of_label.values()):
    return result
  whole = [tuple(path if files.is_remote(path) else os.path.abspath(path) for path in paths) for paths in places]
  every = [path for unit, paths in zip(result, whole, strict=True) if unit.labels for path in paths]
  local = [path for path in every if not files.is_remote(path)]
  folders = [path.split('/')[:-1] for path in local or every]
  differing = (i for i, names in enumerate(zip(*folders, strict=False)) if len(set(names)) > 1)
  shared = next(differing, min(map(len, folders)))

  def below_shared(path: str) -> str:
    return path if local and files.is_remote(path) else '/'.join(path.split('/')[shared:])

  labels = [tuple(map(below_shared, paths)) for paths in whole]
  return [
    dataclasses.replace(unit, labels=new) if unit.labels else unit for unit, new in zip(result, labels, strict=True)
  ]


def missing_files(unit: Unit) -> list[str]:
  """Files that the index of the source lists and that do not exist."""
  if unit.entry.kind == 'hf':
    return [path for path in unit.paths if not files.is_file(path)]
  if unit.entry.kind == 'tfds' and not unit.first:
    return tfds_items.missing_files(tfds_builder(unit.entry.target), unit.entry.split)
  return []


def _files(entry: Entry) -> list[str]:
  """Files of a source; for hf: the Arrow files that the index of a folder lists."""
  if entry.kind != 'hf':
    return files.glob(entry.target)
  paths: list[str] = []
  for folder in files.glob(entry.target.rstrip('/') or '/', 'directory'):
    if files.is_file(index := f'{folder}/dataset_dict.json'):
      splits = _read_index(index, 'splits', str)
      if entry.split not in splits:
        raise no_split(entry, splits)
      folder = f'{folder}/{entry.split}'
    if not files.is_file(index := f'{folder}/state.json'):
      raise UserError(f'{folder} has no state.json; hf: needs a folder written by save_to_disk of datasets')
    names = [listed.get('filename') for listed in _read_index(index, '_data_files', dict)]
    for name in names:
      if not isinstance(name, str) or '/' in name or name in ('', '.', '..') or names.count(name) > 1:
        raise UserError(f'{index} lists {name!r}, which is no file of that folder; write it again with save_to_disk')
    paths += [f'{folder}/{name}' for name in names]
  return paths


def _read_index(path: str, key: str, kind: type) -> list:
  """The list `key` of an index file, whose entries have type `kind`.

  Raises:
    UserError: there is no such list.
  """
  try:
    listed = json.loads(files.read_bytes(path))[key]
  except files.READ_ERRORS as error:
    raise UserError(f'{path}: {files.describe(error)}') from error
  except (ValueError, KeyError, TypeError, RecursionError):
    listed = None
  if not isinstance(listed, list) or not all(isinstance(value, kind) for value in listed):
    raise UserError(f'{path} has no list {key!r}; write the folder again with save_to_disk of datasets')
  return listed


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
  except (tfds.core.DatasetNotFoundError, FileNotFoundError, KeyError, ValueError) as error:
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

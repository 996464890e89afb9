"""What a run reads, by content: settings that name files become digests before they enter the identity of a stage.

The same content under another path is then the same, and other content under the same path is not. `files.digests`
makes all digests. The name of a function stays, and the source code of its module counts beside it.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from dsdm_jax.config.relations import MODELS, OUR_FACTORY
from dsdm_jax.config.validate import select
from dsdm_jax.config.values import CALLABLE, SOURCE_KINDS, is_harness, is_jsonl, source_parts, task_name
from dsdm_jax.core import storage, tensorflow_start
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data import files
from dsdm_jax.data.pool import sources
from dsdm_jax.data.targets import benchmarks, harness
from dsdm_jax.errors import UserError


class _WildcardError(UserError):
  """A path is taken for a pattern."""


Replace = Callable[[str], str]
_PACKAGE = 'dsdm_jax'  # its own code counts by `Stage.format`
_WEIGHTS = ('config.json', '*.safetensors', '*.safetensors.index.json')  # what `lm.hugging_face` reads
# Of a tokenizer.json: they may have its end mark, its chat template and the rows of its model.
_BESIDE = ('tokenizer_config.json', 'generation_config.json', 'chat_template.jinja', 'config.json')
# What planted examples depend on; `max_examples` keeps their order.
_PLANTED = ('tasks', 'folder', 'seed', 'holdout_share', 'file_shots', 'file_delimiter', 'long_prompts')
_INSTALLED = {'site-packages', 'dist-packages'}
_NONE = 'no file matches'


def by_content(
  selected: Mapping[str, Any], settings: Mapping[str, Any], finished: Artifact | None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The settings of a stage without paths, and those that had some as they were given.

  In a text, 'content DIGEST' takes the place of a path. `code of MODULE` is added for each module outside this package
  that a setting names. A finished pool is usable without its source files: where they are gone and it was given the
  same text, the digest of then remains.

  Args:
    selected: flat settings that the stage depends on.
    settings: all flat settings.
    finished: the finished stage, if there is one.

  Raises:
    UserError: an input does not exist or cannot be read.
  """
  if selected.get('pool.plant_targets'):  # the pool then holds examples of the target split
    selected = {**selected, **select(settings, [f'targets.{key}' for key in _PLANTED])}
  result, given = dict(selected), {}
  for key, value in selected.items():
    replace = _replacement(key, settings)
    if replace is None:
      continue
    known = {}
    if finished is not None and key.startswith(('pool.', 'leakage.')):
      pairs = zip(_texts(finished.given.get(key)), _texts(finished.settings.get(key)), strict=False)
      known = {text: kept for text, kept in pairs if isinstance(text, str) and isinstance(kept, str)}
    replaced = []
    for text in _texts(value):
      try:
        replaced.append(replace(text))
      except (OSError, UserError) as error:
        if text in known:
          replaced.append(known[text])
        elif key == 'pool.sources' and not isinstance(error, _WildcardError):  # the stage reports it, or skips it
          replaced.append(f'{text.partition(":")[0]}: {_NONE}')
        elif isinstance(error, UserError):
          raise
        else:
          raise UserError(f'{key} names {text!r}, which {files.describe(error)}; correct the path') from error
    result[key] = replaced[0] if isinstance(value, str) else replaced
    if result[key] != value:
      given[key] = value
  for module in sorted({module for value in selected.values() for module in _modules(value)}):
    result[f'code of {module}'] = code(module)
  return result, given


def _texts(value: Any) -> list[Any]:
  return [value] if isinstance(value, str) else value if isinstance(value, list) else []


def _replacement(key: str, settings: Mapping[str, Any]) -> Replace | None:
  """What takes the paths out of a text of `key`; None if it has none."""
  model, _, name = key.rpartition('.')
  if model in MODELS and settings[f'{model}.factory'] != OUR_FACTORY:  # a custom model may have any keys
    return (lambda text: _custom(text, name == 'weights')) if isinstance(settings[key], str) else None
  if model in MODELS and name == 'weights':
    return lambda text: text and f'content {files.digest(text, _WEIGHTS)}'
  if key in ('targets.tasks', 'leakage.benchmarks', 'evaluation.tasks'):
    return lambda text: of_task(text, settings['targets.folder'])
  return {
    'pool.sources': _source,
    'pool.vocabulary': _vocabulary,
    'targets.folder': lambda _: '',
    'selection.imported': lambda text: text and f'content {files.digests([text])[0]}',
    'evaluation.checkpoints': _checkpoint,
  }.get(key)


def _custom(text: str, weights: bool) -> str:
  return f'content {files.digest(text)}' if (weights or os.sep in text) and os.path.exists(text) else text


def of_task(text: str, folder: str = '') -> str:
  """A task by its content: a JSONL file, the items of the harness, or a benchmark in `targets.folder`."""
  if is_jsonl(text):
    return f'{task_name(text)}.jsonl: content {files.digest(text)}'
  if is_harness(text):
    return f'{task_name(text)}: content {harness.read(text, benchmarks.harness_folders(folder)).digest}'
  known = benchmarks.BENCHMARKS.get(text)
  place = benchmarks.place(known, benchmarks.places(folder)) if known else None
  if place is None:
    return text
  if benchmarks.in_tfds(place):
    folder = _tfds(benchmarks.BENCHMARKS[text].tfds.partition(':')[0], place.partition(':')[2])
    exists = files.is_remote(folder) or os.path.isdir(folder)
    return f'{text}: content {files.digest(folder) if exists else "of TFDS"}'
  return f'{text}: content {files.digest(place)}'


def _vocabulary(text: str) -> str:
  if text in ('train', 'bytes'):
    return text
  beside = [f'{text.rpartition("/")[0] or "."}/{name}' for name in _BESIDE] if text.endswith('.json') else []
  return f'content {_joined(files.digests([text, *filter(files.is_file, beside)]))}'


def _checkpoint(text: str) -> str:
  name, _, folder = text.partition('=')
  if not storage.files(storage.check_location(folder, 'evaluation.checkpoints')):
    raise UserError(f'evaluation.checkpoints names {folder}, which is no folder; give one that holds a checkpoint')
  return f'{name}: content {files.digest(folder)}'


def _source(line: str) -> str:
  """A line of `pool.sources` in one form: what it names by content, then the options that differ from the defaults."""
  entry = sources.parse(line)
  if entry.kind == 'tfds':
    content = f'content {files.digest(_tfds(entry.target))}'
  elif entry.kind == 'seqio':
    content = f'{entry.target}, content {_joined(_seqio(entry))}'
  elif entry.kind in SOURCE_KINDS:
    paths = [path for unit in sources.units(entry) for path in unit.paths]
    if not paths and (escaped := files.escaped(entry.target)):
      raise _WildcardError(
        f'pool.sources: {entry.target} matches no file, as it is a pattern, but a file or folder of that name exists; '
        f'write {escaped}'
      )
    content = (
      f'content {_joined(files.digests(paths))} of {len(paths)} file{"s" * (len(paths) > 1)}' if paths else _NONE
    )
  else:
    content = entry.target
  defaults = dataclasses.asdict(sources.Entry(entry.kind, entry.target, entry.kind))
  options = {k: v for k, v in dataclasses.asdict(entry).items() if v != defaults[k]}
  return ' | '.join([f'{entry.kind}: {content}', *(f'{key}={value}' for key, value in options.items())])


def _tfds(name: str, data_dir: str = '') -> str:
  """The folder of a prepared TFDS dataset, 'dataset/config:version' or a folder; finding it needs no TensorFlow."""
  if sources.is_folder(name):
    return name
  root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return f'{os.path.expanduser(root)}/{name.replace(":", "/")}'


def _seqio(entry: sources.Entry) -> list[str]:
  """Digests of the files that a seqio task reads; none for a source that is a function."""
  tensorflow_start.start()
  import seqio

  try:
    if entry.module:
      importlib.import_module(entry.module)
    shards = seqio.TaskRegistry.get(entry.target).source.list_shards(entry.split)
  except Exception as error:  # a boundary: the user's module may fail in any way, and the stage says how
    raise UserError(f'pool.sources: seqio:{entry.target} cannot be opened ({files.one_line(error)})') from error
  return files.digests([shard for shard in shards if files.is_file(shard)])


def _joined(digests: Iterable[str]) -> str:
  return hashlib.sha256('\n'.join(digests).encode()).hexdigest()


def _modules(value: Any) -> set[str]:
  """Modules outside this package in texts such as 'module:function', 'module:function@mix', '… | module=MODULE'."""
  names = set()
  for text in filter(lambda text: isinstance(text, str), _texts(value)):
    head, *options = source_parts(text)
    name, _, _ = head.partition('@')
    if CALLABLE.fullmatch(name) and not is_harness(name) and name.partition(':')[0] not in SOURCE_KINDS:
      names.add(name.partition(':')[0])
    names |= {option.partition('=')[2].strip() for option in options if option.partition('=')[0].strip() == 'module'}
  return {name for name in names if name.partition('.')[0] != _PACKAGE and _spec(name) is not None}


@functools.cache  # Python keeps a module that it has imported, too
def code(module: str) -> str:
  """SHA-256 of the source of a module and of all that it imports, except packages that are installed.

  What such code reads while it runs, and what it imports by a computed name, does not count.
  """
  own, left, digests = module.partition('.')[0], [module], dict[str, str]()
  while left:
    name = left.pop()
    top, spec = name.partition('.')[0], _spec(name)
    if name in digests or top == _PACKAGE or spec is None or not spec.has_location or not spec.origin:
      continue
    if top != own and _is_installed(spec.origin):
      continue
    [digests[name]] = files.digests([spec.origin])
    left += _imported(spec) | {name.rpartition('.')[0] or name}
  return _joined(f'{name} {digest}' for name, digest in sorted(digests.items()))


def _imported(spec: ModuleSpec) -> set[str]:
  """Names of the modules, and of the members that may be modules, that a module imports."""
  package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition('.')[0]
  names = set()
  try:
    nodes = ast.walk(ast.parse(Path(str(spec.origin)).read_bytes()))
  except (SyntaxError, ValueError, RecursionError):  # a compiled module
    return set()
  for node in nodes:
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = (
        '.'.join(filter(None, [*package.split('.')[: len(package.split('.')) - node.level + 1], node.module]))
        if node.level
        else str(node.module)
      )
      names |= {base, *(f'{base}.{alias.name}' for alias in node.names)}
  return names


def _spec(name: str) -> ModuleSpec | None:
  """Where a module is; imports nothing."""
  top, *rest = name.split('.')
  try:
    spec = importlib.util.find_spec(top)
    for part in rest:
      spec = spec and PathFinder.find_spec(f'{spec.name}.{part}', spec.submodule_search_locations or [])
  except (ImportError, ValueError):
    return None
  return spec


def _is_installed(origin: str) -> bool:
  return bool(_INSTALLED & set(Path(origin).parts)) or origin.startswith(sysconfig.get_path('stdlib'))

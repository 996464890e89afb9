"""Target tasks as text, before tokenization.

A task has items (context, answer, document). `docs` has no context and is language modelling; `api_qa` and
`cs_algorithms` are questions; a benchmark of `benchmarks.TABLE` is used by its name; a path that ends in .jsonl is a
custom file in any shape of `shapes`. Items of one document, or of documents that share text, are never split between
target and holdout.
"""

import collections
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.data import files
from dsdm_jax.data.targets import benchmarks, builtin, shapes
from dsdm_jax.data.targets.leakage import TargetText, words
from dsdm_jax.errors import UserError

BUILT_IN = ('docs', 'api_qa', 'cs_algorithms')
SPLITS = ('target', 'holdout')
_LABELS = re.compile(r'(?m)^(Question|Answer|Context|Passage):|\nAnswer:')
GENERATED = 2_000  # items of cs_algorithms; BIG-bench has 1,320


@dataclasses.dataclass(frozen=True)
class RawItem:
  """One question or text of a task.

  Attributes:
    id: unique in its task.
    context: the prompt, '' for language modelling.
    answer: the text to predict. For language modelling a whole document, cut into pieces later.
    document: items of one document are in the same split.
  """

  id: str
  context: str
  answer: str
  document: str


@dataclasses.dataclass(frozen=True)
class RawTask:
  """Items of one task.

  Attributes:
    language_modelling: answers are whole documents, cut into pieces later.
    halves: the split has exact sizes, as the paper's, rather than a random side for each document.
    holdout: documents of the holdout if the source separates them, else None.
    benchmark: source of the items, whose shots are added after the split; None for other tasks.
  """

  name: str
  items: tuple[RawItem, ...]
  language_modelling: bool = False
  halves: bool = False
  holdout: frozenset[str] | None = None
  benchmark: benchmarks.Benchmark | None = None


def task_name(task: str) -> str:
  """Name of a task in files and results: for a path, the file name without folder and ending."""
  return Path(task).stem if task.endswith('.jsonl') else task


def read_jsonl(path: str) -> RawTask:
  """A custom task: one JSON object a line, in the shape of `shapes` that the first line has; "document" is optional.

  Without "document" each line is a separate document.

  Raises:
    UserError: the file does not exist, or a line is malformed; the message names the line.
  """
  return benchmark_task(benchmarks.of_file(path), None, task_name(path))


def benchmark_task(benchmark: benchmarks.Benchmark, folder: str | None, name: str) -> RawTask:
  """A benchmark as a target task: its questions and right answers, still without shots.

  Raises:
    UserError: the file is missing or malformed, see `benchmarks.read_items`.
  """
  items = _zero_shot(benchmark, benchmarks.read_items(benchmark, folder), name)
  target = _zero_shot(benchmark, benchmarks.target_items(benchmark, folder), name)
  if target:
    holdout = frozenset(item.document for item in items)
    return RawTask(name, (*target, *items), holdout=holdout, benchmark=benchmark)
  return RawTask(name, tuple(items), halves=any(benchmark.counts), benchmark=benchmark)


def _zero_shot(benchmark: benchmarks.Benchmark, items: Sequence[shapes.Item], name: str) -> list[RawItem]:
  zero_shot, result = dataclasses.replace(benchmark, shots=0), []
  for index, item in enumerate(items):
    prompt = benchmarks.prompt(zero_shot, items, index)
    document = item.document if item.document != item.id else f'{name}/{item.id}'
    result.append(RawItem(item.id, prompt.contexts[prompt.gold], item.continuation, document))
  return result


def with_shots(task: RawTask, items: Sequence[RawItem], seed: int) -> list[RawItem]:
  """Items of one split, each with solved others of them in front, as many as the task's benchmark has shots.

  Shots come from the item's own split. Otherwise prompts of target examples could contain questions and answers of the
  holdout, which the datamodel and selectors that read text are evaluated on.
  """
  if task.benchmark is None or not task.benchmark.shots:
    return list(items)
  result = []
  for index, item in enumerate(items):
    shown = [items[i] for i in benchmarks.shots(task.benchmark, len(items), index, seed)]
    preamble = ''.join(f'{other.context.rstrip()} {other.answer.strip()}\n' for other in shown)
    result.append(dataclasses.replace(item, context=preamble + item.context))
  return result


def places_of(settings: Mapping[str, Any]) -> dict[str, str]:
  """Benchmark or .jsonl path in the flat `settings` → the file, or the place of TFDS, that it is read from.

  Benchmarks that are not available are left out.
  """
  places = benchmarks.places(settings['targets.folder'])
  result = {}
  for key in ('targets.tasks', 'pool.leakage_benchmarks', 'evaluation.tasks'):
    for name in settings.get(key, ()):
      if name.endswith('.jsonl'):
        result[name] = name
      elif name in benchmarks.BENCHMARKS and (place := benchmarks.place(benchmarks.BENCHMARKS[name], places)):
        result[name] = place
  return result


def fingerprint(
  selected: Mapping[str, Any], settings: Mapping[str, Any], previous: Mapping[str, Any]
) -> dict[str, Any]:
  """Checksums of the target files in place of their folder, for `Stage.fingerprint`."""
  del settings, previous
  result = {'targets.folder': ''}
  for task, place in places_of(selected).items():
    if benchmarks.in_tfds(place):
      result[f'TFDS of {task}'] = place
    else:
      result[f'SHA-256 of {task}'] = hashlib.sha256(files.read_bytes(place)).hexdigest()
  return result


def check_files(config: ConfigDict, guarded: Iterable[str] = ()) -> None:
  """Reads every file of `config.tasks` and `guarded`, so that errors appear before anything is written.

  Args:
    config: the `targets` part of the config.
    guarded: `pool.leakage_benchmarks` if the guard is on.

  Raises:
    UserError: as `read_jsonl`.
  """
  for task in config.tasks:
    if task.endswith('.jsonl'):
      read_jsonl(task)
    elif task in benchmarks.BENCHMARKS:
      benchmarks.read_items(benchmarks.BENCHMARKS[task], config.folder or '.')
  try:
    benchmark_texts(guarded, config.folder or '.')
  except UserError as error:
    raise UserError(f'pool.leakage_benchmarks: {error}; or remove it from --config.pool.leakage_benchmarks') from error


def _docs() -> RawTask:
  prose = builtin.read_library().prose
  return RawTask('docs', tuple(RawItem(p.id, '', p.text, p.document) for p in prose), language_modelling=True)


def _api_qa() -> RawTask:
  items = []
  for entry in builtin.read_library().entries:
    question = 'What is it?' if entry.kind == 'Class' else 'What does it do?'
    context = f'Module: {entry.module}\n{entry.kind}: {entry.signature}\nQuestion: {question}\nAnswer:'
    items.append(RawItem(entry.id, context, entry.summary, entry.module))
  return RawTask('api_qa', tuple(items))


@functools.lru_cache(maxsize=2)
def _cs_algorithms(seed: int) -> RawTask:
  questions = builtin.generate_questions(GENERATED, seed)
  items = (RawItem(f'{i:06d}', q.context, q.answer, f'cs_algorithms/{i:06d}') for i, q in enumerate(questions))
  return RawTask('cs_algorithms', tuple(items))


def read_tasks(config: ConfigDict) -> list[RawTask]:
  """All tasks of `config.tasks`.

  Args:
    config: the `targets` part of the config.

  Raises:
    UserError: an unknown task, a malformed file, or two tasks with the same name.
  """
  tasks = []
  for task in config.tasks:
    if task.endswith('.jsonl'):
      tasks.append(read_jsonl(task))
    elif task in benchmarks.BENCHMARKS:
      tasks.append(benchmark_task(benchmarks.BENCHMARKS[task], config.folder or '.', task))
    elif task == 'docs':
      tasks.append(_docs())
    elif task == 'api_qa':
      tasks.append(_api_qa())
    elif task == 'cs_algorithms':
      tasks.append(_cs_algorithms(config.seed))
    else:
      raise UserError(
        f'targets.tasks has {task!r}; it must be {", ".join(BUILT_IN)}, a benchmark of docs/benchmarks.md, '
        'or a path that ends in .jsonl'
      )
  names = [task.name for task in tasks]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'targets.tasks has two tasks named {name!r}; rename one of the files')
  return tasks


def raw_texts(config: ConfigDict) -> list[TargetText]:
  """Every text of every task and both splits, also of items that are not sampled: the pool must not contain them.

  Prompts of `api_qa` are left out: a signature alone does not give the answer away.
  """
  texts = []
  for task in read_tasks(config):
    if task.name in config.tasks and task.name in benchmarks.BENCHMARKS:
      texts += benchmark_texts((task.name,), config.folder or '.')
      items = benchmarks.target_items(benchmarks.BENCHMARKS[task.name], config.folder)
      texts += [_text(task.name, item) for item in items]
      continue
    for item in task.items:
      context = '' if task.name == 'api_qa' else item.context
      texts.append(TargetText(task.name, f'{context} {item.answer}', item.id))
  return texts


def benchmark_texts(names: Iterable[str], folder: str) -> list[TargetText]:
  """Questions and right answers of benchmarks or .jsonl files, without the words of the prompt template.

  Raises:
    UserError: as `benchmarks.read_items`.
  """
  texts = []
  for name in names:
    benchmark = benchmarks.BENCHMARKS.get(name)
    items = benchmarks.read_items(benchmark, folder) if benchmark else benchmarks.read_items(benchmarks.of_file(name))
    texts += [_text(task_name(name), item) for item in items]
  return texts


def _text(task: str, item: shapes.Item) -> TargetText:
  context = item.context_options[item.gold] if item.context_options else item.context
  # Labels become spaces, so that places in the text remain.
  context = _LABELS.sub(lambda label: ' ' * len(label[0]), context)
  return TargetText(task, f'{context} {item.continuation}', item.id)


def split_documents(tasks: Sequence[RawTask], holdout_share: float, seed: int) -> dict[str, str]:
  """Document → 'target' or 'holdout', by a seeded hash of its group.

  Documents of any task that share a paragraph or answer of at least eight words are in one group: posixpath and ntpath
  document their functions alike, and sections of the language reference contain each other.
  """
  parent: dict[str, str] = {}

  def find(document: str) -> str:
    while parent[document] != document:
      parent[document] = parent[parent[document]]
      document = parent[document]
    return document

  first_owner: dict[str, str] = {}
  for task in tasks:
    for item in task.items:
      parent.setdefault(item.document, item.document)
      for paragraph in item.answer.split('\n\n'):
        key = words(paragraph)
        if len(key) >= 8:
          owner = first_owner.setdefault(' '.join(key), item.document)
          a, b = sorted((find(owner), find(item.document)))
          parent[b] = a
  limit = holdout_share * 2**64
  side = {document: 'holdout' if _draw(find(document), seed) < limit else 'target' for document in parent}
  for task in tasks:
    if task.halves:
      _split_evenly(task, side, find, holdout_share, seed)
    if task.holdout is not None:
      holdout_groups = {find(document) for document in task.holdout}
      groups = {find(item.document) for item in task.items}
      side.update((d, 'holdout' if find(d) in holdout_groups else 'target') for d in side if find(d) in groups)
  return side


def _split_evenly(
  task: RawTask, side: dict[str, str], find: Callable[[str], str], holdout_share: float, seed: int
) -> None:
  """Assigns `holdout_share` of the task's items to the holdout, except for at most one group of documents."""
  group_of = {item.document: find(item.document) for item in task.items}
  sizes = collections.Counter(group_of[item.document] for item in task.items)
  left = round(holdout_share * len(task.items))
  chosen = {}
  for group in sorted(sizes, key=lambda group: (_draw(group, seed), group)):
    chosen[group] = 'holdout' if left >= sizes[group] else 'target'
    left -= sizes[group] if chosen[group] == 'holdout' else 0
  side.update((document, chosen[find(document)]) for document in side if find(document) in chosen)


def _draw(group: str, seed: int) -> int:
  return int.from_bytes(hashlib.blake2b(f'{seed}\x1f{group}'.encode(), digest_size=8).digest(), 'little')

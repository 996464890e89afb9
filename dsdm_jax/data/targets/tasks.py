"""Target tasks as raw text: what each asks and answers, before any vocabulary.

A task gives items (context, answer, document). `docs` has no context and is language modelling; `api_qa` and
`cs_algorithms` are questions; a benchmark of the table in `benchmarks` goes by its name; a path that ends in .jsonl is
a file of the user's, of any shape that `shapes` knows. Items of one document, and of
documents that share text, always fall on the same side of the split between target and holdout.
"""

import collections
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dsdm_jax.data.targets import benchmarks, cs_algorithms, shapes, standard_library
from dsdm_jax.data.targets.leakage import TargetText, words
from dsdm_jax.errors import UserError

BUILT_IN = ('docs', 'api_qa', 'cs_algorithms')
SPLITS = ('target', 'holdout')
_LABELS = re.compile(r'(?m)^(Question|Answer|Context|Passage):|\nAnswer:')
GENERATED = 2_000  # items of cs_algorithms in all; BIG-bench has 1,320


@dataclasses.dataclass(frozen=True)
class RawItem:
  """One thing to be good at, in text.

  Attributes:
    id: unique in its task.
    context: what the model is given, '' for language modelling.
    answer: what it must predict. For language modelling a whole document, cut into pieces later.
    document: the unit of the split.
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
    halves: documents are split into halves of one size, rather than each by chance: the paper's splits.
    holdout: documents of the holdout, where the source keeps them apart; None where the split is ours.
    benchmark: that it is made of, whose shots go before each item once it is split; None for other tasks.
  """

  name: str
  items: tuple[RawItem, ...]
  language_modelling: bool = False
  halves: bool = False
  holdout: frozenset[str] | None = None
  benchmark: benchmarks.Benchmark | None = None


def task_name(task: str) -> str:
  """Name of a task in files and results: a path stands for its file without folder and ending."""
  return Path(task).stem if task.endswith('.jsonl') else task


def read_jsonl(path: str) -> RawTask:
  """A task of the user's: one JSON object a line, of a shape of `shapes` that the first line tells; maybe "document".

  Lines end at newline characters only. Without "document" each line is a document of its own.

  Raises:
    UserError: no such file, or a line is not such an object; it names the line.
  """
  return benchmark_task(benchmarks.of_file(path), None, task_name(path))


def benchmark_task(benchmark: benchmarks.Benchmark, folder: str | None, name: str) -> RawTask:
  """The target task that a benchmark makes: its questions with delimiter and right answers, without shots as yet.

  Raises:
    UserError: no file, or a bad one, see `benchmarks.read_items`.
  """
  made = _asked_alone(benchmark, benchmarks.read_items(benchmark, folder), name)
  learned = _asked_alone(benchmark, benchmarks.target_items(benchmark, folder), name)
  if learned:
    holdout = frozenset(item.document for item in made)
    return RawTask(name, (*learned, *made), holdout=holdout, benchmark=benchmark)
  return RawTask(name, tuple(made), halves=any(benchmark.counts), benchmark=benchmark)


def _asked_alone(benchmark: benchmarks.Benchmark, items: Sequence[shapes.Item], name: str) -> list[RawItem]:
  alone, made = dataclasses.replace(benchmark, shots=0), []
  for index, item in enumerate(items):
    prompt = benchmarks.prompt(alone, items, index)
    document = item.document if item.document != item.id else f'{name}/{item.id}'
    made.append(RawItem(item.id, prompt.contexts[prompt.gold], item.continuation, document))
  return made


def with_shots(task: RawTask, items: Sequence[RawItem], seed: int) -> list[RawItem]:
  """`items` of one split, each after solved others of them, as many as the task's benchmark shows.

  Shots come from the item's own split: a holdout's question and answer in the prompt of a target example would tell
  the datamodel, and selectors that read text, of what they are judged by.
  """
  if task.benchmark is None or not task.benchmark.shots:
    return list(items)
  found = []
  for index, item in enumerate(items):
    shown = [items[i] for i in benchmarks.shots(task.benchmark, len(items), index, seed)]
    preamble = ''.join(f'{other.context.rstrip()} {other.answer.strip()}\n' for other in shown)
    found.append(dataclasses.replace(item, context=preamble + item.context))
  return found


def places_of(settings: Mapping[str, Any]) -> dict[str, str]:
  """Where each benchmark and .jsonl path among the flat `settings` is read from, as far as it is there.

  That is a file, or a place of TFDS, see `benchmarks.in_tfds`.
  """
  tried = benchmarks.places(settings['targets.folder'])
  found = {}
  for name in _asked(settings):
    if name.endswith('.jsonl'):
      found[name] = name
    elif name in benchmarks.BENCHMARKS:
      held = benchmarks.place(benchmarks.BENCHMARKS[name], tried)
      found |= {name: held} if held else {}
  return found


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
      result[f'SHA-256 of {task}'] = hashlib.sha256(epath.Path(place).read_bytes()).hexdigest()
  return result


def _asked(settings: Mapping[str, Any]) -> list[str]:
  keys = ('targets.tasks', 'pool.leakage_benchmarks', 'evaluation.tasks')
  return [name for key in keys for name in settings.get(key, ())]


def check_files(config: ConfigDict, guarded: Iterable[str] = ()) -> None:
  """Reads every file that `config.tasks` or `guarded` names, so that a broken one is found before anything is written.

  Args:
    config: the `targets` part of the config.
    guarded: `pool.leakage_benchmarks`, where the guard is on.

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
    raise UserError(f'pool.leakage_benchmarks: {error}; or leave it out of --config.pool.leakage_benchmarks') from error


def _docs() -> RawTask:
  prose = standard_library.read().prose
  return RawTask('docs', tuple(RawItem(p.id, '', p.text, p.document) for p in prose), language_modelling=True)


def _api_qa() -> RawTask:
  items = []
  for entry in standard_library.read().entries:
    context = f'Module: {entry.module}\n{entry.kind}: {entry.signature}\nQuestion: What does it do?\nAnswer:'
    if entry.kind == 'Class':
      context = context.replace('What does it do?', 'What is it?')
    items.append(RawItem(entry.id, context, entry.summary, entry.module))
  return RawTask('api_qa', tuple(items))


@functools.lru_cache(maxsize=2)
def _cs_algorithms(seed: int) -> RawTask:
  items = cs_algorithms.generate(GENERATED, seed)
  return RawTask('cs_algorithms', tuple(_generated(index, item) for index, item in enumerate(items)))


def _generated(index: int, item: cs_algorithms.Item) -> RawItem:
  return RawItem(f'{index:06d}', item.context, item.answer, f'cs_algorithms/{index:06d}')


def read_tasks(config: ConfigDict) -> list[RawTask]:
  """All tasks of `config.tasks`, whole.

  Args:
    config: the `targets` part of the config.

  Raises:
    UserError: an unknown task, a bad file, or two tasks of one name.
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
        f'targets.tasks holds {task!r}; it takes {", ".join(BUILT_IN)}, the name of a benchmark of '
        'docs/benchmarks.md, or the path of a file that ends in .jsonl'
      )
  names = [task.name for task in tasks]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'targets.tasks has two tasks called {name!r}; rename one of the files')
  return tasks


def raw_texts(config: ConfigDict) -> list[TargetText]:
  """Every text of every task and both splits, also of items that sampling leaves out: what the pool must not hold.

  Prompts of `api_qa` are left away, because the whole docstrings are not: a signature alone is no answer.
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
      texts.append(TargetText(task.name, f'{context} {item.answer}'))
  return texts


def benchmark_texts(names: Iterable[str], folder: str) -> list[TargetText]:
  """Every question with its right answer of the named benchmarks or .jsonl files, without the words of the prompt.

  Raises:
    UserError: as `benchmarks.read_items`.
  """
  texts = []
  for name in names:
    known = benchmarks.BENCHMARKS.get(name)
    items = benchmarks.read_items(known, folder) if known else benchmarks.read_items(benchmarks.of_file(name))
    texts += [_text(task_name(name), item) for item in items]
  return texts


def _text(task: str, item: shapes.Item) -> TargetText:
  context = item.context_options[item.gold] if item.context_options else item.context
  return TargetText(task, f'{_LABELS.sub("", context)} {item.continuation}')


def split_documents(tasks: Sequence[RawTask], holdout_share: float, seed: int) -> dict[str, str]:
  """Document → 'target' or 'holdout', by a seeded hash of the group it is in.

  Documents with a paragraph or an answer of eight words or more in common are one group, over all tasks: posixpath
  and ntpath say the same of their functions, and sections of the language reference hold each other.
  """
  parent: dict[str, str] = {}

  def find(document: str) -> str:
    while parent[document] != document:
      parent[document] = parent[parent[document]]
      document = parent[document]
    return document

  first_holder: dict[str, str] = {}
  for task in tasks:
    for item in task.items:
      parent.setdefault(item.document, item.document)
      for paragraph in item.answer.split('\n\n'):
        key = words(paragraph)
        if len(key) >= 8:
          holder = first_holder.setdefault(' '.join(key), item.document)
          a, b = sorted((find(holder), find(item.document)))
          parent[b] = a
  side = {document: _side(find(document), holdout_share, seed) for document in parent}
  for task in tasks:
    if task.halves:
      _split_evenly(task, side, find, holdout_share, seed)
    if task.holdout is not None:
      held, all_ = ({find(document) for document in some} for some in (task.holdout, {i.document for i in task.items}))
      side.update((d, 'holdout' if find(d) in held else 'target') for d in side if find(d) in all_)
  return side


def _split_evenly(
  task: RawTask, side: dict[str, str], find: Callable[[str], str], holdout_share: float, seed: int
) -> None:
  """Gives the holdout `holdout_share` of the task's items, to within one group of documents."""
  group_of = {item.document: find(item.document) for item in task.items}
  sizes = collections.Counter(group_of[item.document] for item in task.items)
  left = round(holdout_share * len(task.items))
  chosen = {}
  for group in sorted(sizes, key=lambda group: (_draw(group, seed), group)):
    chosen[group] = 'holdout' if left >= sizes[group] else 'target'
    left -= sizes[group] if chosen[group] == 'holdout' else 0
  side.update((document, chosen[find(document)]) for document in side if find(document) in chosen)


def _side(group: str, holdout_share: float, seed: int) -> str:
  return 'holdout' if _draw(group, seed) < holdout_share * 2**64 else 'target'


def _draw(group: str, seed: int) -> int:
  return int.from_bytes(hashlib.blake2b(f'{seed}\x1f{group}'.encode(), digest_size=8).digest(), 'little')

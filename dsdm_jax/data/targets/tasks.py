"""Target tasks as text, before tokenization.

A task has items (context, answer, document). `docs` has no context and is language modelling; `api_qa` and
`cs_algorithms` are questions; `next_code` and `brackets` choose between contexts; a benchmark of `benchmarks.TABLE` is
used by its name; a path that ends in .jsonl is a custom file in any shape of `shapes`; 'lm_eval:TASK' is a task of
lm-evaluation-harness. Items of one document, or of documents that share text, are never split between target and
holdout, nor are items without a document whose texts share a passage.
"""

import collections
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config.values import TASKS, is_harness, is_jsonl, task_name
from dsdm_jax.data.pool import chat
from dsdm_jax.data.pool.chat import NO_TEMPLATE
from dsdm_jax.data.targets import benchmarks, builtin, harness, shapes
from dsdm_jax.data.targets.leakage import TargetText, words
from dsdm_jax.errors import UserError

SPLITS = ('target', 'holdout')
_LABELS = re.compile(r'(?m)^(Question|Answer|Context|Passage):|\nAnswer:')
GENERATED = 2_000  # items of cs_algorithms; BIG-bench has 1,320


@dataclasses.dataclass(frozen=True)
class RawItem:
  """One question or text of a task.

  Attributes:
    id: unique in its task.
    context: the prompt, '' for language modelling.
    answer: the text to predict, which follows the context directly: it begins with the white space between them. For
      language modelling a whole document, cut into pieces later.
    document: items of one document are in the same split.
    question: equal for items that ask the same, see `shapes.question_keys`; '' for built-in tasks.
    choices: as `shapes.Item`, for evaluation; so are the four that follow, with prompts in place of contexts.
    option_answers: the text to predict after each of `context_options`, with the white space between the two; () where
      it is `answer` after all of them.
    starts: of the shots in `context` and `context_options`, see `benchmarks.Prompt`.
    messages, description, shots, solved: as `shapes.Item`. Items whose benchmark has shots among its own items have no
      `shots`.
  """

  id: str
  context: str
  answer: str
  document: str
  question: str = ''
  choices: tuple[str, ...] = ()
  context_options: tuple[str, ...] = ()
  gold: int = -1
  aliases: tuple[str, ...] = ()
  category: str = ''
  starts: tuple[int, ...] = (0,)
  messages: str = ''
  description: str = ''
  shots: tuple[str, ...] = ()
  solved: str = ''
  option_answers: tuple[str, ...] = ()

  def without(self, shots: int) -> 'RawItem':
    """The item without its first `shots` shots."""
    start = self.starts[shots]
    return dataclasses.replace(
      self,
      context=self.context[start:],
      context_options=tuple(option[start:] for option in self.context_options),
      starts=tuple(s - start for s in self.starts[shots:]),
    )


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


def read_jsonl(path: str, shots: int = 0, delimiter: str = ' ') -> RawTask:
  """A custom task: one JSON object a line, in the shape of `shapes` that the first line has; "document" is optional.

  Lines without "document" are grouped by their text, see `near_equal`.

  Raises:
    UserError: the file does not exist, or a line is malformed; the message names the line.
  """
  return benchmark_task(benchmarks.of_file(path, shots, delimiter), None, task_name(path))


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
  for item, question in zip(items, shapes.question_keys(items), strict=True):
    question_alone = dataclasses.replace(item, description='', shots=())
    prompt = benchmarks.prompt(zero_shot, [question_alone], 0)
    document = item.document if item.document != item.id else f'{name}/{item.id}'
    options, option_answers = (prompt.contexts, prompt.answers) if item.context_options else ((), ())
    choices = prompt.answers if item.choices else ()
    context, answer = prompt.contexts[prompt.gold], prompt.answers[prompt.gold]
    more = question, choices, options, item.gold, item.aliases, item.category
    parts = item.description, item.shots if benchmark.apart else (), item.solved
    result.append(RawItem(item.id, context, answer, document, *more, (0,), item.messages, *parts, option_answers))
  alone = [index for index, item in enumerate(items) if item.document == item.id]
  first = near_equal(tuple(result[index].context or result[index].answer for index in alone))
  for index, place in zip(alone, first, strict=True):
    result[index] = dataclasses.replace(result[index], document=result[alone[place]].document)
  return result


_WINDOW = 12  # characters
_DENSE = 0x2E80  # Chinese, Japanese and Korean begin here: a character counts as two


@functools.lru_cache(maxsize=4)
def near_equal(texts: tuple[str, ...]) -> list[int]:
  """The first text of each text's group; texts of one group share a passage, or are almost the same.

  Texts are compared by their runs of 12 characters (6 of Chinese, Japanese and Korean), without white space and
  punctuation of sentences. Two are joined if they have at least 12 runs in common, half of what either has in common
  with any text, and a third of either. Runs of more than three quarters of the texts do not count, nor do those of more
  than a tenth and 30: they are a template.
  """
  runs = [_runs(shapes.content_key(text)) for text in texts]
  count = len(texts)
  owner_X = np.repeat(np.arange(count), [len(of_text) for of_text in runs])
  _, run_X, owners_R = np.unique(np.concatenate([*runs, _runs('')]), return_inverse=True, return_counts=True)
  template_R = (owners_R > max(4, 0.75 * count)) | ((owners_R > 30) & (owners_R > count / 10))
  own_T = np.bincount(owner_X[~template_R[run_X]], minlength=count)
  shared_X = ((owners_R > 1) & ~template_R)[run_X]
  owner_X, run_X = owner_X[shared_X], run_X[shared_X]
  shared_T = np.bincount(owner_X, minlength=count)
  # Pairs of each owner of a run with its first owner; all pairs would be quadratic in the questions about a passage.
  first_R = np.full(len(owners_R), count)
  np.minimum.at(first_R, run_X, owner_X)
  first_X = first_R[run_X]
  pair_Y, common_Y = np.unique((first_X * count + owner_X)[first_X != owner_X], return_counts=True)
  a_Y, b_Y = np.divmod(pair_Y, max(1, count))
  joined_Y = (
    (common_Y >= _WINDOW)
    & (2 * common_Y >= np.minimum(shared_T[a_Y], shared_T[b_Y]))
    & (3 * common_Y >= np.minimum(own_T[a_Y], own_T[b_Y]))
  )
  groups = Groups()
  for a, b in zip(a_Y[joined_Y].tolist(), b_Y[joined_Y].tolist(), strict=True):
    groups.join(a, b)
  return [groups.of(index) for index in range(count)]


def _runs(key: str) -> np.ndarray:
  """Hashes of the different runs of characters of `key`: uint64, sorted."""
  code = np.frombuffer(key.encode('utf-32-le', 'surrogatepass'), np.uint32).astype(np.uint64)
  code = np.repeat(code, 1 + (code >= _DENSE))
  if len(code) < _WINDOW:
    return np.zeros(0, np.uint64)
  code = (code + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
  code ^= code >> np.uint64(31)
  power = np.cumprod(np.full(_WINDOW, 0x9E3779B97F4A7C15, np.uint64))
  return np.unique(np.lib.stride_tricks.sliding_window_view(code, _WINDOW) @ power)


_Member = TypeVar('_Member', int, str)


class Groups(Generic[_Member]):
  """Groups of members that were joined; a group is named by its least member."""

  def __init__(self) -> None:
    self._parent: dict[_Member, _Member] = {}

  def of(self, member: _Member) -> _Member:
    """The name of the member's group."""
    parent = self._parent
    parent.setdefault(member, member)
    while parent[member] != member:
      parent[member] = member = parent[parent[member]]
    return member

  def join(self, a: _Member, b: _Member) -> None:
    low, high = sorted((self.of(a), self.of(b)))
    self._parent[high] = low


def with_shots(task: RawTask, items: Sequence[RawItem], seed: int) -> list[RawItem]:
  """Items of one split, each with solved others of them in front, as many as the task's benchmark has shots.

  Shots are those of the items, or come from the item's own split. Otherwise prompts of target examples could contain
  questions and answers of the holdout, which the datamodel and selectors that read text are evaluated on.
  """
  benchmark = task.benchmark
  if benchmark is None or not (benchmark.shots or any(item.description for item in items)):
    return list(items)
  # Equal items are found by the questions themselves, not by the prompts, whose last line may be the same in all.
  asked = [shapes.Item(i.id, i.question, i.answer, i.choices, (i.question,) * bool(i.context_options)) for i in items]
  equal, result = benchmarks.alike(asked), []
  for index, item in enumerate(items):
    parts: Sequence[str] = item.shots
    if not parts:
      shown = [items[i] for i in benchmarks.shots(benchmark, equal, index, seed)]
      parts = [other.solved or f'{other.context}{other.answer}\n' for other in shown]
    preamble, starts = benchmarks.introduction(item.description, parts)
    options, context = tuple(preamble + option for option in item.context_options), preamble + item.context
    result.append(dataclasses.replace(item, context=context, context_options=options, starts=starts))
  return result


def check_files(config: ConfigDict, vocabulary: str, guarded: Iterable[str] = ()) -> None:
  """Reads every file of `config.tasks` and `guarded`, so that errors appear before anything is written.

  Args:
    config: the `targets` part of the config.
    vocabulary: `pool.vocabulary`.
    guarded: `leakage.benchmarks` if the guard is on.

  Raises:
    UserError: as `read_jsonl` and `check_template`.
  """
  for task in config.tasks:
    if is_jsonl(task):
      check_template(read_jsonl(task).items, f'targets.tasks: {task}', vocabulary)
    elif benchmark := benchmarks.named(task, config.folder):
      benchmarks.read_items(benchmark, benchmarks.path_of(benchmark, config.folder))
  try:
    benchmark_texts(guarded, config.folder)
  except UserError as error:
    raise UserError(f'leakage.benchmarks: {error}; or remove it from --config.leakage.benchmarks') from error


def check_template(items: Sequence[RawItem] | Sequence[shapes.Item], where: str, vocabulary: str) -> None:
  """Raises UserError if there are conversations among the items, and `pool.vocabulary` has no chat template."""
  if any(item.messages for item in items) and chat.read(vocabulary) is None:
    raise UserError(f'{where}: {NO_TEMPLATE}')


def _docs() -> RawTask:
  prose, _ = builtin.documentation()
  return RawTask('docs', tuple(RawItem(p.id, '', p.text, p.document) for p in prose), language_modelling=True)


def _api_qa() -> RawTask:
  items = []
  for entry in builtin.documentation()[1]:
    question = 'What is it?' if entry.kind == 'Class' else 'What does it do?'
    context = f'Module: {entry.module}\n{entry.kind}: {entry.signature}\nQuestion: {question}\nAnswer:'
    items.append(RawItem(entry.id, context, f' {entry.summary}', entry.module))
  return RawTask('api_qa', tuple(items))


@functools.lru_cache(maxsize=2)
def _cs_algorithms(seed: int) -> RawTask:
  questions = builtin.generate_questions(GENERATED, seed)
  items = (RawItem(f'{i:06d}', q.context, f' {q.answer}', f'cs_algorithms/{i:06d}') for i, q in enumerate(questions))
  return RawTask('cs_algorithms', tuple(items))


@functools.lru_cache(maxsize=2)
def _next_code(seed: int) -> RawTask:
  passages = builtin.passages()
  items = (
    RawItem(p.id, p.text, p.after, p.module, context_options=texts, gold=gold)
    for p, (texts, gold) in zip(passages, builtin.options(passages, seed), strict=True)
  )
  return RawTask('next_code', tuple(items))


@functools.lru_cache(maxsize=2)
def _brackets(seed: int) -> RawTask:
  brackets = builtin.brackets()
  items = (
    RawItem(b.id, b.text, b.closing, b.module, context_options=texts, gold=gold)
    for b, (texts, gold) in zip(brackets, builtin.partners(brackets, seed), strict=True)
  )
  return RawTask('brackets', tuple(items))


def read_tasks(config: ConfigDict) -> list[RawTask]:
  """All tasks of `config.tasks`.

  Args:
    config: the `targets` part of the config.

  Raises:
    UserError: an unknown task, a malformed file, or two tasks with the same name.
  """
  tasks = []
  for task in config.tasks:
    if is_jsonl(task):
      tasks.append(read_jsonl(task, config.file_shots, config.file_delimiter))
    elif is_harness(task) and (theirs := harness.read(task, benchmarks.harness_folders(config.folder))).documents:
      whole = (RawItem(item.id, '', item.continuation, item.document) for item in theirs.items)
      tasks.append(RawTask(task_name(task), tuple(whole), language_modelling=True))
    elif benchmark := benchmarks.named(task, config.folder):
      tasks.append(benchmark_task(benchmark, benchmarks.path_of(benchmark, config.folder), task_name(task)))
    elif task == 'docs':
      tasks.append(_docs())
    elif task == 'api_qa':
      tasks.append(_api_qa())
    elif task == 'cs_algorithms':
      tasks.append(_cs_algorithms(config.seed))
    elif task == 'next_code':
      tasks.append(_next_code(config.seed))
    elif task == 'brackets':
      tasks.append(_brackets(config.seed))
    else:
      raise UserError(
        f'targets.tasks has {task!r}; it must be {", ".join(TASKS)}, a benchmark of docs/benchmarks.md, '
        'a path that ends in .jsonl, or lm_eval:TASK'
      )
  names = [task.name for task in tasks]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'targets.tasks has two tasks named {name!r}; rename one of the files')
  return tasks


def raw_texts(config: ConfigDict) -> list[TargetText]:
  """Every text of every task and both splits, also of items that are not sampled: the pool must not contain them.

  Prompts of `api_qa` are left out: a signature alone does not give the answer away. Shots and delimiters do not matter.
  """
  texts = []
  for task in read_tasks(config):
    if task.benchmark is None:
      prompts = [''] * len(task.items) if task.name == 'api_qa' else [item.context for item in task.items]
      pairs = zip(prompts, task.items, strict=True)
      texts += [TargetText(task.name, f'{prompt}{item.answer}', item.id) for prompt, item in pairs]
      continue
    name = next(given for given in config.tasks if task_name(given) == task.name)
    texts += benchmark_texts((name,), config.folder)
    if name in benchmarks.BENCHMARKS:
      texts += [_text(name, item) for item in benchmarks.target_items(task.benchmark, config.folder)]
  return texts


def benchmark_texts(names: Iterable[str], folder: str) -> list[TargetText]:
  """Questions and right answers of benchmarks or .jsonl files, without the words of the prompt template.

  Raises:
    UserError: as `benchmarks.read_items`.
  """
  texts = []
  for name in names:
    benchmark = benchmarks.named(name, folder)
    assert benchmark is not None, name
    items = benchmarks.read_items(benchmark, benchmarks.path_of(benchmark, folder))
    texts += [_text(task_name(name), item) for item in items]
  return texts


def _text(task: str, item: shapes.Item) -> TargetText:
  context = item.context_options[item.gold] if item.context_options else item.context
  # Labels become spaces, so that places in the text remain.
  context = _LABELS.sub(lambda label: ' ' * len(label[0]), context)
  return TargetText(task, f'{context} {item.continuation}', item.id)


def group_documents(tasks: Sequence[RawTask]) -> dict[str, str]:
  """Document → its group, which is on one side of the split.

  Documents of any task are in one group that ask the same question, or share a paragraph or answer of at least eight
  words: posixpath and ntpath document their functions alike, and sections of the language reference contain each other.
  """
  groups: Groups[str] = Groups()
  first_owner: dict[str, str] = {}
  for task in tasks:
    for item in task.items:
      paragraphs = (words(paragraph) for paragraph in item.answer.split('\n\n'))
      keys = [' '.join(key) for key in paragraphs if len(key) >= 8]
      for key in [*keys, *([f'question\n{item.question}'] if item.question else [])]:
        groups.join(first_owner.setdefault(key, item.document), item.document)
  return {item.document: groups.of(item.document) for task in tasks for item in task.items}


def split_documents(
  tasks: Sequence[RawTask], holdout_share: float, seed: int, group_of: Mapping[str, str] | None = None
) -> dict[str, str]:
  """Document → 'target' or 'holdout', by a seeded hash of its group.

  Args:
    tasks: of a run.
    holdout_share: of the groups.
    seed: of the hash.
    group_of: `group_documents(tasks)`, if it is known.
  """
  group_of = group_of or group_documents(tasks)
  limit = holdout_share * 2**64
  side = {document: 'holdout' if _draw(group, seed) < limit else 'target' for document, group in group_of.items()}
  for task in tasks:
    if task.halves:
      _split_evenly(task, side, group_of, holdout_share, seed)
    if task.holdout is not None:
      holdout_groups = {group_of[document] for document in task.holdout}
      groups = {group_of[item.document] for item in task.items}
      side.update(
        (d, 'holdout' if group in holdout_groups else 'target') for d, group in group_of.items() if group in groups
      )
  return side


def target_questions(config: ConfigDict) -> frozenset[str]:
  """Questions of the target splits of files and benchmarks, see `RawItem.question`.

  Args:
    config: the `targets` part of the config.

  Raises:
    UserError: as `read_tasks`.
  """
  if set(config.tasks) <= set(TASKS):
    return frozenset()
  tasks = read_tasks(config)
  side = split_documents(tasks, config.holdout_share, config.seed)
  return frozenset(i.question for task in tasks for i in task.items if i.question and side[i.document] == 'target')


def _split_evenly(
  task: RawTask, side: dict[str, str], group_of: Mapping[str, str], holdout_share: float, seed: int
) -> None:
  """Assigns `holdout_share` of the task's items to the holdout, except for at most one group of documents."""
  sizes = collections.Counter(group_of[item.document] for item in task.items)
  left = round(holdout_share * len(task.items))
  chosen = {}
  for group in sorted(sizes, key=lambda group: (_draw(group, seed), group)):
    chosen[group] = 'holdout' if left >= sizes[group] else 'target'
    left -= sizes[group] if chosen[group] == 'holdout' else 0
  side.update((document, chosen[group]) for document, group in group_of.items() if group in chosen)


def _draw(group: str, seed: int) -> int:
  return int.from_bytes(hashlib.blake2b(f'{seed}\x1f{group}'.encode(), digest_size=8).digest(), 'little')

"""Target tasks as raw text: what each asks and answers, before any vocabulary.

A task gives items (context, answer, document). `docs` has no context and is language modelling; `api_qa` and
`cs_algorithms` are questions; a path that ends in .jsonl is a file of the user's. Items of one document, and of
documents that share text, always fall on the same side of the split between target and holdout.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from dsdm_jax.core.errors import UserError
from dsdm_jax.data import cs_algorithms, standard_library
from dsdm_jax.data.leakage import TargetText, words

BUILT_IN = ('docs', 'api_qa', 'cs_algorithms')
SPLITS = ('target', 'holdout')
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
  name: str
  items: tuple[RawItem, ...]
  language_modelling: bool = False


def task_name(task: str) -> str:
  """Name of a task in files and results: a path stands for its file without folder and ending."""
  return Path(task).stem if task.endswith('.jsonl') else task


def read_jsonl(path: str) -> RawTask:
  """A task of the user's: one JSON object a line with "context", "answer" (or "continuation"), maybe "document".

  Lines end at newline characters only. Without "document" each line is a document of its own.

  Raises:
    UserError: no such file, or a line is not such an object; it names the line.
  """
  try:
    lines = Path(path).read_bytes().split(b'\n')
  except OSError as error:
    raise UserError(f'targets.tasks names {path}, which cannot be read: {error.strerror}') from error
  items = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      items.append(_parse_line(line, path, number))
  if not items:
    raise UserError(f'{path} holds no items; give one JSON object a line with "context" and "answer"')
  return RawTask(task_name(path), tuple(items))


def check_files(config: ConfigDict) -> None:
  """Reads every file that `config.tasks` names, so that a broken one is found before anything is written.

  Raises:
    UserError: as `read_jsonl`.
  """
  for task in config.tasks:
    if task.endswith('.jsonl'):
      read_jsonl(task)


def _parse_line(line: bytes, path: str, number: int) -> RawItem:
  where = f'{path}, line {number}'
  try:
    record = json.loads(line.decode())
  except UnicodeDecodeError as error:
    raise UserError(f'{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8') from error
  except json.JSONDecodeError as error:
    raise UserError(f'{where}: not JSON ({error.msg} at column {error.colno}); one object a line is needed') from error
  if not isinstance(record, dict):
    raise UserError(f'{where}: a JSON object is needed, found {type(record).__name__}')
  answer = 'continuation' if 'continuation' in record and 'answer' not in record else 'answer'
  for key in ('context', answer):
    if key not in record or not isinstance(record[key], str):
      raise UserError(
        f'{where}: "{key}" must be a string; each object needs "context" and "answer" (or "continuation")'
      )
  if not record[answer].strip():
    raise UserError(f'{where}: "{answer}" is empty; give the text that is to be predicted or delete the line')
  document = str(record['document']) if 'document' in record else f'{task_name(path)}/line {number}'
  return RawItem(f'line {number}', record['context'], record[answer], document)


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
    elif task == 'docs':
      tasks.append(_docs())
    elif task == 'api_qa':
      tasks.append(_api_qa())
    elif task == 'cs_algorithms':
      tasks.append(_cs_algorithms(config.seed))
    else:
      raise UserError(
        f'targets.tasks holds {task!r}; it takes {", ".join(BUILT_IN)}, or the path of a file that ends in .jsonl'
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
    for item in task.items:
      context = '' if task.name == 'api_qa' else item.context
      texts.append(TargetText(task.name, f'{context} {item.answer}'))
  return texts


def split_documents(tasks: Iterable[RawTask], holdout_share: float, seed: int) -> dict[str, str]:
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
  return {document: _side(find(document), holdout_share, seed) for document in parent}


def _side(group: str, holdout_share: float, seed: int) -> str:
  digest = hashlib.blake2b(f'{seed}\x1f{group}'.encode(), digest_size=8).digest()
  return 'holdout' if int.from_bytes(digest, 'little') < holdout_share * 2**64 else 'target'

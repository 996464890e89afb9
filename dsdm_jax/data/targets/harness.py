"""Tasks of lm-evaluation-harness as targets and benchmarks: 'lm_eval:arc_easy' or 'lm_eval:arc_easy:validation'.

Documents and prompts are the harness's: its dataset, its templates, its description, its number of shots and its draw
of them. Two prompts differ from it: an item that the harness would show its own answer has another shot there, and
targets may have other shots (`Task.apart`): theirs must be neither items of the holdout, which they could be where the
task takes its shots from their split, nor of a test split that was not named. The package lm_eval is optional and
imported when such a task is read.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from dsdm_jax.config.values import harness_parts
from dsdm_jax.data import files
from dsdm_jax.data.targets.shapes import LANGUAGE_MODELLING, MULTIPLE_CHOICE, SCHEMA, Item
from dsdm_jax.errors import UserError

_SEED = 1_234  # of the harness's draw of shots, as simple_evaluate has it
_FIELDS = {'train': 'training_split', 'validation': 'validation_split', 'test': 'test_split'}
SPLITS = tuple(_FIELDS)  # by default the first that a task has, without the last


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  Attributes:
    shape: one of `shapes.SHAPES`.
    items: of one split, in its order, without those that have no answer. Answers begin with the task's delimiter.
    shots: solved examples before a question.
    apart: shots are not among the documents of this split, nor of the test split if that is another.
    documents: items are whole documents without a prompt (`loglikelihood_rolling`).
  """

  shape: str
  items: tuple[Item, ...]
  shots: int
  apart: bool
  documents: bool

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of all that prompts and answers depend on."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=16)
def read(name: str, folders: tuple[str, ...] = ()) -> Task:
  """The task that a text such as 'lm_eval:arc_easy' names.

  Args:
    name: of the task, with a split or without.
    folders: of YAML files of tasks, which go before the harness's own.

  Raises:
    UserError: lm_eval is not installed; no such task, or one of another kind; its data cannot be loaded.
  """
  task_name, split = harness_parts(name)
  try:
    from lm_eval.tasks import TaskManager
  except ImportError as error:
    raise UserError(
      f'{name} needs lm-evaluation-harness, which is not installed ({files.one_line(error)}): pip install lm_eval'
    ) from error
  import datasets

  logger, bars = logging.getLogger('lm_eval'), datasets.are_progress_bars_disabled()
  level = logger.level
  logger.setLevel(logging.ERROR)
  datasets.disable_progress_bars()
  try:
    manager = TaskManager(include_path=list(folders) or None)
    if task_name not in manager.all_subtasks:
      group = task_name in manager.all_tasks
      raise UserError(
        f'{name}: {task_name} is a group of lm-evaluation-harness; name one of its tasks'
        if group
        else f'{name}: lm-evaluation-harness has no task {task_name!r}; put a YAML file of yours into targets.folder'
      )
    task = manager.load(task_name)['tasks'][task_name]
    return _read(task, name, split)
  except UserError:
    raise
  except Exception as error:  # a boundary: tasks may bring their own code, and datasets fails in many ways
    raise UserError(
      f'{name}: lm_eval cannot load this task ({files.one_line(error)}); its data must be local, cached, or reachable'
    ) from error
  finally:
    logger.setLevel(level)
    if not bars:
      datasets.enable_progress_bars()


def _read(task: Any, name: str, split: str) -> Task:
  docs_of = {
    'train': (task.has_training_docs, task.training_docs),
    'validation': (task.has_validation_docs, task.validation_docs),
    'test': (task.has_test_docs, task.test_docs),
  }
  there = [s for s in SPLITS if docs_of[s][0]()]
  usable = [split] if split else there
  if not usable or usable[0] not in there or (not split and usable[0] == 'test'):
    raise UserError(
      f'{name}: the task has no {split or "training or validation"} split, only {", ".join(there)}; name one'
    )
  kinds = {'multiple_choice': MULTIPLE_CHOICE} | dict.fromkeys(
    ('loglikelihood', 'loglikelihood_rolling', 'generate_until'), LANGUAGE_MODELLING
  )
  kind = task.OUTPUT_TYPE
  if kind not in kinds or getattr(task, 'MULTIMODAL', False):
    raise UserError(f'{name}: its requests are {kind} with {"images or sounds" if kind in kinds else "no text"}')
  shape = SCHEMA if getattr(task, 'multiple_input', 0) else kinds[kind]
  shots = _Shots(task, usable[0], docs_of[usable[0]][1]())
  items = tuple(_items(task, usable[0], shape, shots))
  if not items:
    raise UserError(f'{name}: no document of the split {usable[0]} has an answer; name another split')
  return Task(shape, items, shots.count, shots.apart, kind == 'loglikelihood_rolling')


class _Shots:
  """The shots that the harness draws for the documents of a split, as it does when it asks that split.

  Attributes:
    count: of a prompt.
    apart: as `Task`.
  """

  def __init__(self, task: Any, split: str, docs: Sequence[Any]):
    self._task, self.docs, self._texts = task, list(docs), dict[int, str]()
    self.count, self.apart = int(task.config.num_fewshot or 0), True
    self._of_doc: list[list[Any]] = []
    if not self.count:
      return
    pool = list(task.sampler.fewshot_docs())
    keys, theirs = {_key(doc) for doc in pool}, task.fewshot_cfg.split
    named = theirs is not None and theirs == getattr(task.config, _FIELDS[split])
    tested = theirs is not None and theirs == task.config.test_split and split != 'test'
    self.apart = not (named or tested or all(_key(doc) in keys for doc in self.docs))
    task.set_fewshot_seed(_SEED)
    for doc in self.docs:
      drawn = list(task.sampler.sample(n=self.count, eval_doc=doc if theirs == task.config.test_split else None))
      if not self.apart and doc in drawn:
        others = [other for other in pool if other != doc and other not in drawn]
        first = len(self._of_doc) % max(1, len(others))
        instead = iter(others[first:] + others[:first])
        drawn = [other if other != doc else next(instead, None) for other in drawn]
        drawn = [other for other in drawn if other is not None]
      self._of_doc.append(drawn)

  def of(self, index: int) -> tuple[str, ...]:
    """The shots of a document, each with what separates it from the next text."""
    return tuple(self.text(doc) for doc in self._of_doc[index]) if self._of_doc else ()

  def text(self, doc: Any) -> str:
    """A document with its answer, by the templates of shots."""
    if id(doc) not in self._texts:
      base, sampler = self.docs[0], self._task.sampler
      self._task.sampler = _Chosen([doc])
      try:
        parts = [self._task.fewshot_context(base, n) for n in (0, 1)]
      finally:
        self._task.sampler = sampler
      without, whole = (part[0] if isinstance(part, list) else part for part in parts)
      start = len(description(self._task, base))
      self._texts[id(doc)] = whole[start : len(whole) - len(without) + start]
    return self._texts[id(doc)]


class _Chosen:
  """Takes the place of a sampler of lm_eval and gives the documents that it is made with."""

  def __init__(self, docs: list[Any]):
    self._docs = docs

  def sample(self, n: int, **more: Any) -> list[Any]:
    del n, more
    return self._docs


def _key(doc: Any) -> str:
  return json.dumps(doc, sort_keys=True, default=str)


def description(task: Any, doc: Any) -> str:
  """The text with which each prompt begins; it may depend on the document."""
  return str(task.resolve_field(doc, task.config.description) or '')


def _items(task: Any, split: str, shape: str, shots: _Shots) -> Iterator[Item]:
  for index, doc in enumerate(shots.docs):
    id = f'{split}/{index}'
    if task.OUTPUT_TYPE == 'loglikelihood_rolling':
      yield Item(id, '', str(task.doc_to_target(doc)), document=id)
      continue
    before = description(task, doc)
    whole = task.fewshot_context(doc, 0, gen_prefix=task.doc_to_prefix(doc))
    contexts = [c.removeprefix(before) for c in (whole if isinstance(whole, list) else [whole])]
    target, delimiter = task.doc_to_target(doc), str(task.config.target_delimiter)
    item = Item(id, contexts[0], '', document=id, description=before, shots=shots.of(index))
    if shots.count and not shots.apart:
      item = dataclasses.replace(item, solved=shots.text(doc))
    if shape == LANGUAGE_MODELLING:
      first = target[0] if isinstance(target, list) and target else target
      # The delimiter precedes answers of shots and choices, but not that of `loglikelihood`.
      answer = f'{delimiter if task.OUTPUT_TYPE == "generate_until" else ""}{first}'
      if isinstance(first, int) and task.config.doc_to_choice is not None:
        answer = f'{delimiter}{task.doc_to_choice(doc)[first]}'
      if answer.strip():
        yield dataclasses.replace(item, continuation=answer)
      continue
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    gold = task.doc_to_text(doc) if shape == SCHEMA else target
    gold = gold[0] if isinstance(gold, list) and gold else gold
    gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
    if not isinstance(gold, int) or not 0 <= gold < len(choices):  # the labels of some splits are hidden
      continue
    if shape == SCHEMA:
      answer, options = f'{delimiter}{target}', tuple(contexts)
      yield dataclasses.replace(item, context='', continuation=answer, context_options=options, gold=gold)
    else:
      answers = tuple(f'{delimiter}{choice}' for choice in choices)
      yield dataclasses.replace(item, continuation=answers[gold], choices=answers, gold=gold)

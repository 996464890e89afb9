"""Tasks of lm-evaluation-harness as targets and benchmarks: 'lm_eval:arc_easy' or 'lm_eval:arc_easy:validation'.

Documents and prompts are the harness's: its dataset, its templates, its description and number of shots. Shots are
drawn here, as for all benchmarks, so that a prompt never shows its own answer or one of the other split. The package
lm_eval is optional and imported when such a task is read.
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

SPLITS = ('train', 'validation', 'test')  # by default the first that a task has, without the last


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  Attributes:
    shape: one of `shapes.SHAPES`.
    items: of one split, in its order, without those that have no answer. Answers begin with the task's delimiter.
    shots: solved examples before a question.
    shot_delimiter: after each of them.
    description: before the first of them.
    documents: items are whole documents without a prompt (`loglikelihood_rolling`).
  """

  shape: str
  items: tuple[Item, ...]
  shots: int
  shot_delimiter: str
  description: str
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
  items = tuple(_items(task, usable[0], shape, docs_of[usable[0]][1]()))
  if not items:
    raise UserError(f'{name}: no document of the split {usable[0]} has an answer; name another split')
  config = task.config
  description = str(config.description or '')
  return Task(
    shape,
    items,
    int(config.num_fewshot or 0),
    str(config.fewshot_delimiter),
    description,
    kind == 'loglikelihood_rolling',
  )


def _items(task: Any, split: str, shape: str, docs: Sequence[Any]) -> Iterator[Item]:
  description = str(task.config.description or '')
  for index, doc in enumerate(docs):
    id = f'{split}/{index}'
    if task.OUTPUT_TYPE == 'loglikelihood_rolling':
      yield Item(id, '', str(task.doc_to_target(doc)), document=id)
      continue
    whole = task.fewshot_context(doc, 0, gen_prefix=task.doc_to_prefix(doc))
    contexts = [c.removeprefix(description) for c in (whole if isinstance(whole, list) else [whole])]
    target, delimiter = task.doc_to_target(doc), str(task.config.target_delimiter)
    if shape == LANGUAGE_MODELLING:
      first = target[0] if isinstance(target, list) and target else target
      # The delimiter precedes answers of shots and choices, but not that of `loglikelihood`.
      answer = f'{delimiter if task.OUTPUT_TYPE == "generate_until" else ""}{first}'
      if isinstance(first, int) and task.config.doc_to_choice is not None:
        answer = f'{delimiter}{task.doc_to_choice(doc)[first]}'
      if answer.strip():
        yield Item(id, contexts[0], answer, document=id)
      continue
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    gold = task.doc_to_text(doc) if shape == SCHEMA else target
    gold = gold[0] if isinstance(gold, list) and gold else gold
    gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
    if not isinstance(gold, int) or not 0 <= gold < len(choices):  # the labels of some splits are hidden
      continue
    if shape == SCHEMA:
      yield Item(id, '', f'{delimiter}{target}', context_options=tuple(contexts), gold=gold, document=id)
    else:
      answers = tuple(f'{delimiter}{choice}' for choice in choices)
      yield Item(id, contexts[0], answers[gold], choices=answers, gold=gold, document=id)

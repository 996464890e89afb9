"""Benchmarks as token sequences: which are asked for, their prompts, and what of them fits into the model.

A sequence is [end mark] + context + answer. Context and answer are tokenized apart, the white space between them
belonging to the answer. What is too long loses its beginning: the context first, and of an answer that fills the
whole sequence its first tokens.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.data.targets import benchmarks
from dsdm_jax.data.targets.benchmarks import Benchmark
from dsdm_jax.data.targets.shapes import GENERATION, LANGUAGE_MODELLING
from dsdm_jax.errors import UserError

OWN = 'targets'  # the run's own target tasks, in evaluation.tasks
Encode = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Sequences:
  """How text becomes sequences: at most `length` tokens, after the end mark `eos` where `begin` says so.

  Without a context there is an end mark in any case: the answer's first token needs something before it.
  """

  encode: Encode
  length: int
  eos: int
  begin: bool = True

  def pair(self, context: str, answer: str) -> tuple[np.ndarray, int]:
    """(ids, how many of them at the end are the answer's), int32."""
    return self.joined(self.encode(context), self.encode(answer))

  def joined(self, context_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[np.ndarray, int]:
    """The same of ids."""
    answer_ids = list(answer_ids)[-(self.length - 1) :]
    front = [self.eos] if self.begin or not context_ids else []
    room = self.length - len(front) - len(answer_ids)
    ids = [*front, *(list(context_ids)[-room:] if room else []), *answer_ids]
    return np.asarray(ids, np.int32), len(answer_ids)

  def prompt(self, context: str, room: int) -> np.ndarray:
    """Ids of a context that `room` more tokens are to follow, int32."""
    return dataclasses.replace(self, length=self.length - room + 1).joined(self.encode(context), [0])[0][:-1]


@dataclasses.dataclass(frozen=True)
class Request:
  """A benchmark ready for a model: P pairs of I items.

  Attributes:
    benchmark: how it is scored.
    ids_P: sequence of each pair.
    count_P: tokens of the answer, at the end of the sequence.
    item_P: item of each pair, from 0, not decreasing.
    gold_I: the right pair of each item.
    characters_P: length of each answer without the white space in front.
    prompts_I: sequences to continue (generation), else empty.
    aliases_I: answers that count as right (generation), else empty.
    item_ids_I: id of each item.
    category_I: '' where the benchmark has none.
    document_I: items of one document are not independent.
    cut: answers that lost their beginning.
  """

  benchmark: Benchmark
  ids_P: tuple[np.ndarray, ...]
  count_P: np.ndarray
  item_P: np.ndarray
  gold_I: np.ndarray
  characters_P: np.ndarray
  prompts_I: tuple[np.ndarray, ...]
  aliases_I: tuple[tuple[str, ...], ...]
  item_ids_I: tuple[str, ...]
  category_I: tuple[str, ...]
  document_I: tuple[str, ...]
  cut: int


def chosen(config: ConfigDict) -> list[Benchmark]:
  """The benchmarks that `config.tasks` (the `evaluation` part) names, without the run's own targets.

  Raises:
    UserError: an unknown name, a file of no known shape, or two of one name.
  """
  found = []
  for task in config.tasks:
    if task == OWN:
      continue
    if task.endswith('.jsonl'):
      found.append(benchmarks.of_file(task, config.file_shots, config.file_delimiter))
    elif task in benchmarks.BENCHMARKS:
      found.append(benchmarks.BENCHMARKS[task])
    else:
      near = difflib.get_close_matches(task, [OWN, *benchmarks.BENCHMARKS], n=1)
      hint = f'is it {near[0]}?' if near else f'known are {OWN}, {", ".join(benchmarks.BENCHMARKS)}, and .jsonl files'
      raise UserError(f'evaluation.tasks holds {task!r}, which is no benchmark; {hint}')
  names = [benchmark.name for benchmark in found]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'evaluation.tasks has two benchmarks called {name!r}; rename one of the files')
  return found


def check(config: ConfigDict, folder: str, length: int) -> None:
  """Reads what `config.tasks` names, so that a broken file is found before anything is written.

  Args:
    config: the `evaluation` part.
    folder: `targets.folder`.
    length: of sequences, in tokens.

  Raises:
    UserError: as `chosen` and `benchmarks.read_items`; or generated answers leave no room for a prompt.
  """
  if config.generate_tokens >= length and any(b.shape == GENERATION for b in chosen(config)):
    raise UserError(
      f'config key evaluation.generate_tokens = {config.generate_tokens} must be less than pool.length = {length}: a '
      'prompt comes before it'
    )
  for benchmark in chosen(config):
    benchmarks.read_items(benchmark, _path(benchmark, folder))


def read(config: ConfigDict, folder: str, sequences: Sequences, seed: int) -> Iterator[Request]:
  """Every benchmark of `config.tasks`, in order; see `chosen`. `folder` and `seed` are those of targets."""
  for benchmark in chosen(config):
    limit = config.max_items or None
    items = benchmarks.read_items(benchmark, _path(benchmark, folder), limit)
    yield build(benchmark, items, sequences, config.generate_tokens, seed)


def _path(benchmark: Benchmark, folder: str) -> str | None:
  return (folder or '.') if benchmarks.BENCHMARKS.get(benchmark.name) is benchmark else None


def build(
  benchmark: Benchmark, items: Sequence[benchmarks.Item], sequences: Sequences, generate: int, seed: int
) -> Request:
  """The request of `items`.

  Args:
    benchmark: shape, shots and delimiter.
    items: all of them: shots are drawn from here.
    sequences: how text becomes tokens.
    generate: tokens that a generated answer may have.
    seed: of the shots.
  """
  ids: list[np.ndarray] = []
  counts, owners, gold, characters, prompts, cut = [], [], [], [], [], 0
  for index in range(len(items)):
    prompt = benchmarks.prompt(benchmark, items, index, seed)
    gold.append(len(ids) + prompt.gold)
    context_ids = {context: sequences.encode(context) for context in dict.fromkeys(prompt.contexts)}
    for context, answer in zip(prompt.contexts, prompt.answers, strict=True):
      answer_ids = sequences.encode(answer)
      made, count = sequences.joined(context_ids[context], answer_ids)
      if not count:
        raise UserError(f'benchmark {benchmark.name}, {items[index].id}: an answer has no tokens')
      cut += count < len(answer_ids)
      ids.append(made)
      counts.append(count)
      owners.append(index)
      characters.append(len(answer.lstrip()))
    if benchmark.shape == GENERATION:
      prompts.append(sequences.prompt(prompt.contexts[0], generate))
  return Request(
    benchmark, tuple(ids), np.asarray(counts), np.asarray(owners), np.asarray(gold), np.asarray(characters),
    tuple(prompts), tuple(item.aliases for item in items) if benchmark.shape == GENERATION else (),
    tuple(item.id for item in items), tuple(item.category if benchmark.per_category else '' for item in items),
    tuple(item.document for item in items), cut,
  )  # fmt: skip


def describe(request: Request) -> dict[str, object]:
  """What `results.json` says of a benchmark."""
  benchmark = request.benchmark
  categories = sorted(set(request.category_I) - {''})
  return {
    'task': benchmark.name, 'split': 'benchmark', 'rule': benchmark.scoring, 'shape': benchmark.shape,
    'shots': benchmark.shots, 'delimiter': benchmark.delimiter, 'n_items': len(request.item_ids_I),
    'categories': categories, 'group': benchmark.category, 'answers_cut': request.cut,
  }  # fmt: skip


def is_choice(request: Request) -> bool:
  """Whether there is something to choose."""
  return request.benchmark.shape not in (LANGUAGE_MODELLING, GENERATION)

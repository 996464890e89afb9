"""The evaluation suite: the run's own targets and the benchmarks, as token sequences ready for a model.

A sequence is [end mark] + context + answer, whose text is tokenized as a whole (`vocabulary.encode_pair`); the white
space between them belongs to the answer. A sequence that is too long is cut at its beginning: the context first, then
the first tokens of an answer that fills the whole sequence.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.vocabulary import Encoder, encode_pair, open_encoder
from dsdm_jax.data.targets import benchmarks
from dsdm_jax.data.targets.benchmarks import BENCHMARKS, Benchmark
from dsdm_jax.data.targets.shapes import GENERATION, LANGUAGE_MODELLING
from dsdm_jax.data.targets.targets import Examples, Targets
from dsdm_jax.data.targets.tasks import BUILT_IN
from dsdm_jax.errors import UserError

OWN = 'targets'  # in evaluation.tasks: the run's own target tasks
HOLDOUT, BENCHMARK = 'holdout', 'benchmark'  # splits
SPLITS = ('target', HOLDOUT)  # of the run's own targets


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Turns text into sequences of at most `length` tokens, which begin with the end mark `eos` where `begin` is set.

  A sequence without a context always begins with the end mark: the answer's first token needs something before it.
  """

  encoder: Encoder
  length: int
  eos: int
  begin: bool = True

  def pair(self, context: str, answer: str) -> tuple[np.ndarray, int]:
    """(ids, number of answer tokens at the end of them), int32."""
    return self.joined(*encode_pair(self.encoder, context, answer))

  def joined(self, context_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[np.ndarray, int]:
    """As `pair`, from token ids."""
    answer_ids = list(answer_ids)[-(self.length - 1) :]
    front = [self.eos] if self.begin or not context_ids else []
    room = self.length - len(front) - len(answer_ids)
    ids = [*front, *(list(context_ids)[-room:] if room else []), *answer_ids]
    return np.asarray(ids, np.int32), len(answer_ids)

  def prompt(self, context: str, room: int) -> np.ndarray:
    """Token ids of a context that leaves room for `room` more tokens, int32.

    Spaces at its end are left out: they are part of the first piece of what follows.
    """
    ids = self.encoder.encode(context.rstrip(' '))
    return dataclasses.replace(self, length=self.length - room + 1).joined(ids, [0])[0][:-1]


@dataclasses.dataclass(frozen=True)
class Request:
  """A benchmark ready for a model: I items with P (context, answer) pairs.

  Attributes:
    benchmark: how it is scored.
    ids_P: token ids of each pair.
    count_P: number of answer tokens, at the end of the sequence.
    item_P: item of each pair, from 0, not decreasing.
    gold_I: the right pair of each item.
    characters_P: length of each answer without its leading white space.
    prompts_I: sequences to continue (generation), else empty.
    aliases_I: answers that count as right (generation), else empty.
    item_ids_I: id of each item.
    category_I: '' where the benchmark has none.
    document_I: items of one document are not independent.
    cut: number of answers whose beginning was cut off.
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

  @property
  def is_choice(self) -> bool:
    """Whether a model chooses between answers."""
    return self.benchmark.shape not in (LANGUAGE_MODELLING, GENERATION)

  def describe(self) -> dict[str, Any]:
    """The benchmark's entry under `tasks` in `results.json`."""
    benchmark = self.benchmark
    return (
      {'task': benchmark.name, 'split': BENCHMARK, 'rule': benchmark.scoring, 'shape': benchmark.shape}
      | {'shots': benchmark.shots, 'delimiter': benchmark.delimiter, 'n_items': len(self.item_ids_I)}
      | {'categories': sorted(set(self.category_I) - {''}), 'group': benchmark.category, 'answers_cut': self.cut}
    )


@dataclasses.dataclass(frozen=True)
class Suite:
  """Everything that models are evaluated on.

  Attributes:
    examples: the run's own targets, by task and split.
    requests: benchmarks.
    encoder: of the pool's vocabulary.
    length: L.
    generate: maximum number of tokens of a generated answer.
    file_shots: of targets that are files.
  """

  examples: Mapping[tuple[str, str], Examples]
  requests: tuple[Request, ...]
  encoder: Encoder
  length: int
  generate: int
  file_shots: int = 0

  def tasks(self) -> list[dict[str, Any]]:
    """The `tasks` part of `results.json`."""
    own: list[dict[str, Any]] = []
    for (task, split), examples in self.examples.items():
      of_file = 0 if task in BUILT_IN else self.file_shots
      shots = BENCHMARKS[task].shots if task in BENCHMARKS else of_file
      facts = {'task': task, 'split': split, 'rule': 'exact_argmax', 'shots': shots}
      own.append({**facts, 'n_items': len(examples), 'categories': []})
    return own + [request.describe() for request in self.requests]

  def documents(self) -> dict[tuple[str, str], list[str]]:
    """(task, split) → the document of each item."""
    own = {key: [record['document'] for record in e.records] for key, e in self.examples.items()}
    return own | {(r.benchmark.name, BENCHMARK): list(r.document_I) for r in self.requests}

  def categories(self) -> dict[tuple[str, str], list[str]]:
    """(task, split) → the category of each item, for benchmarks that are averaged by category."""
    return {(r.benchmark.name, BENCHMARK): list(r.category_I) for r in self.requests if any(r.category_I)}


def open_suite(context: Context) -> Suite:
  """The suite of the config, from the artifacts of the pool and the targets.

  Raises:
    UserError: as `read`; or a benchmark has the name of a target task.
  """
  config, pool = context.config, context.inputs['pool']
  length = json.loads((pool.path / 'card.json').read_text())['length']
  encoder = open_encoder(pool.path)
  examples = {}
  if OWN in config.evaluation.tasks:
    targets = Targets(context.inputs['targets'])
    examples = {(task, split): targets.examples(task, split) for task in targets.tasks for split in SPLITS}
  sequences = Sequences(encoder, length, encoder.eos, config.evaluation.begin_with_end_mark)
  requests = tuple(read(config.evaluation, config.targets.folder, sequences, config.targets.seed))
  for request in requests:
    if request.benchmark.name in {task for task, _ in examples}:
      raise UserError(
        f'evaluation.tasks and targets.tasks both have a task {request.benchmark.name!r}; rename one of the files'
      )
  generate, file_shots = config.evaluation.generate_tokens, config.targets.file_shots
  return Suite(examples, requests, encoder, length, generate, file_shots)


def selected_benchmarks(config: ConfigDict) -> list[Benchmark]:
  """The benchmarks that `config.tasks` (the `evaluation` part) names, without the run's own targets.

  Raises:
    UserError: an unknown name, a file of an unknown shape, or two benchmarks with the same name.
  """
  selected = []
  for task in config.tasks:
    if task == OWN:
      continue
    if task.endswith('.jsonl'):
      selected.append(benchmarks.of_file(task, config.file_shots, config.file_delimiter))
    elif task in BENCHMARKS:
      selected.append(BENCHMARKS[task])
    else:
      near = difflib.get_close_matches(task, [OWN, *BENCHMARKS], n=1)
      hint = f'is it {near[0]}?' if near else f'known are {OWN}, {", ".join(BENCHMARKS)}, and .jsonl files'
      raise UserError(f'evaluation.tasks holds {task!r}, which is no benchmark; {hint}')
  names = [benchmark.name for benchmark in selected]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'evaluation.tasks has two benchmarks called {name!r}; rename one of the files')
  return selected


def check(config: ConfigDict, folder: str, length: int) -> None:
  """Reads the benchmarks of `config.tasks`, so that a broken file is reported before anything is written.

  Args:
    config: the `evaluation` part.
    folder: `targets.folder`.
    length: of sequences, in tokens.

  Raises:
    UserError: as `selected_benchmarks` and `benchmarks.read_items`; or generated answers leave no room for a prompt.
  """
  selected = selected_benchmarks(config)
  if config.generate_tokens >= length and any(benchmark.shape == GENERATION for benchmark in selected):
    raise UserError(
      f'config key evaluation.generate_tokens = {config.generate_tokens} must be less than pool.length = {length}: a '
      'prompt comes before it'
    )
  for benchmark in selected:
    benchmarks.read_items(benchmark, _folder(benchmark, folder))


def read(config: ConfigDict, folder: str, sequences: Sequences, seed: int) -> Iterator[Request]:
  """The request of each benchmark of `config.tasks`, in order; `folder` and `seed` are those of `targets`.

  Raises:
    UserError: as `check`.
  """
  for benchmark in selected_benchmarks(config):
    items = benchmarks.read_items(benchmark, _folder(benchmark, folder), config.max_items or None)
    yield build(benchmark, items, sequences, config.generate_tokens, seed)


def _folder(benchmark: Benchmark, folder: str) -> str | None:
  return (folder or '.') if BENCHMARKS.get(benchmark.name) is benchmark else None


def build(
  benchmark: Benchmark, items: Sequence[benchmarks.Item], sequences: Sequences, generate: int, seed: int
) -> Request:
  """The request of `items`.

  Args:
    benchmark: shape, shots and delimiter.
    items: all items of the benchmark; few-shot examples are drawn from them.
    sequences: turns text into tokens.
    generate: maximum number of tokens of a generated answer.
    seed: of the few-shot examples.

  Raises:
    UserError: an answer has no tokens.
  """
  ids: list[np.ndarray] = []
  counts, owners, gold, characters, prompts, cut = [], [], [], [], [], 0
  for index in range(len(items)):
    prompt = benchmarks.prompt(benchmark, items, index, seed)
    gold.append(len(ids) + prompt.gold)
    for context, answer in zip(prompt.contexts, prompt.answers, strict=True):
      context_ids, answer_ids = encode_pair(sequences.encoder, context, answer)
      sequence, count = sequences.joined(context_ids, answer_ids)
      if not count:
        raise UserError(f'benchmark {benchmark.name}, {items[index].id}: an answer has no tokens')
      cut += count < len(answer_ids)
      ids.append(sequence)
      counts.append(count)
      owners.append(index)
      characters.append(len(answer.lstrip()))
    if benchmark.shape == GENERATION:
      prompts.append(sequences.prompt(prompt.contexts[0], generate))
  return Request(
    benchmark=benchmark,
    ids_P=tuple(ids),
    count_P=np.asarray(counts),
    item_P=np.asarray(owners),
    gold_I=np.asarray(gold),
    characters_P=np.asarray(characters),
    prompts_I=tuple(prompts),
    aliases_I=tuple(item.aliases for item in items) if benchmark.shape == GENERATION else (),
    item_ids_I=tuple(item.id for item in items),
    category_I=tuple(item.category if benchmark.per_category else '' for item in items),
    document_I=tuple(item.document for item in items),
    cut=cut,
  )

"""The evaluation suite: the run's own targets and the benchmarks, as token sequences ready for a model.

A sequence is [begin or end mark] + context + answer, whose text is tokenized as a whole (`vocabulary.encode_pair`); the
white space between them belongs to the answer. A sequence that is too long loses whole shots, from the left. If that is
not enough, it is refused or cut at its beginning (`evaluation.long_prompts`): the context first, then the first tokens
of an answer that fills the whole sequence.
"""

import collections
import dataclasses
import difflib
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config.values import is_harness, is_jsonl
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.vocabulary import Encoder, encode_pair, open_encoder, unmarked
from dsdm_jax.data.targets import benchmarks, harness, tasks
from dsdm_jax.data.targets.benchmarks import BENCHMARKS, Benchmark, Prompt, shots_to_drop
from dsdm_jax.data.targets.shapes import GENERATION, LANGUAGE_MODELLING, MULTIPLE_CHOICE, SCHEMA, Item, question_keys
from dsdm_jax.data.targets.targets import Examples, Targets, rendered, too_long
from dsdm_jax.errors import UserError

OWN = 'targets'  # in evaluation.tasks: the run's own target tasks
HOLDOUT, BENCHMARK = 'holdout', 'benchmark'  # splits
SPLITS = ('target', HOLDOUT)  # of the run's own targets


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Turns text into sequences of at most `length` tokens, which begin with the begin mark.

  Where the vocabulary has none, they begin with an end mark if `begin_with_end_mark` is set, or if there is no context:
  an answer's first token needs something before it.
  """

  encoder: Encoder
  length: int
  begin_with_end_mark: bool = True

  def _front(self, context_ids: Sequence[int]) -> list[int]:
    mark = self.encoder.begin
    return [mark] if self.begin_with_end_mark or mark != self.encoder.eos or not context_ids else []

  def encoded(self, prompt: Prompt) -> list[tuple[list[int], list[int]]]:
    """(context ids, answer ids) of each pair of `prompt`."""
    pairs = zip(prompt.contexts, prompt.answers, strict=True)
    return [encode_pair(self.encoder, context, answer) for context, answer in pairs]

  def excess(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], room: int = 0) -> int:
    """Tokens by which the longest of `pairs` is too long; at most 0 if all fit.

    Args:
      pairs: (context ids, answer ids) of each.
      room: tokens that the contexts must leave free, at least.
    """
    return (
      max(
        len(self._front(context_ids)) + len(context_ids) + max(len(answer_ids), room)
        for context_ids, answer_ids in pairs
      )
      - self.length
    )

  def pair(self, context: str, answer: str) -> tuple[np.ndarray, int]:
    """(ids, number of answer tokens at the end of them), int32."""
    return self.joined(*encode_pair(self.encoder, context, answer))

  def joined(self, context_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[np.ndarray, int]:
    """As `pair`, from token ids."""
    answer_ids = list(answer_ids)[-(self.length - 1) :]
    front = self._front(context_ids)
    room = self.length - len(front) - len(answer_ids)
    ids = [*front, *(list(context_ids)[-room:] if room else []), *answer_ids]
    return np.asarray(ids, np.int32), len(answer_ids)

  def prompt(self, context: str, room: int) -> np.ndarray:
    """Token ids of a context that leaves room for `room` more tokens, int32.

    Spaces at its end are left out: they are part of the first piece of what follows.
    """
    ids = unmarked(self.encoder, self.encoder.encode(context.rstrip(' ')))
    return dataclasses.replace(self, length=self.length - room + 1).joined(ids, [0])[0][:-1]


@dataclasses.dataclass(frozen=True)
class Request:
  """A benchmark, or one split of a target, ready for a model: I items with P (context, answer) pairs.

  Attributes:
    benchmark: how it is scored.
    split: `BENCHMARK`, or one of `SPLITS`.
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
    shots_I: shots in the prompt of each item.
    dropped_I: shots that were left out because they did not fit.
    tokens_cut_I: tokens that were cut from the beginning of the item's longest context, after that.
    left_out: items of the source that are not here, because a target asks the same.
  """

  benchmark: Benchmark
  split: str
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
  shots_I: tuple[int, ...]
  dropped_I: tuple[int, ...]
  tokens_cut_I: tuple[int, ...]
  left_out: int = 0

  @property
  def key(self) -> tuple[str, str]:
    """(task, split)"""
    return self.benchmark.name, self.split

  @property
  def is_choice(self) -> bool:
    """Whether a model chooses between answers."""
    return self.benchmark.shape not in (LANGUAGE_MODELLING, GENERATION)

  def _chance(self) -> float:
    if self.is_choice:
      return float(np.mean(1 / np.bincount(self.item_P)))
    return (
      most_common(a[0] if a else '' for a in self.aliases_I)
      if any(self.aliases_I)
      else most_common(ids[len(ids) - count :].tobytes() for ids, count in zip(self.ids_P, self.count_P, strict=True))
    )

  def describe(self) -> dict[str, Any]:
    """The benchmark's entry under `tasks` in `results.json`."""
    benchmark = self.benchmark
    return (
      {'task': benchmark.name, 'split': self.split, 'rule': benchmark.scoring, 'shape': benchmark.shape}
      | {'shots': benchmark.shots, 'delimiter': benchmark.delimiter, 'n_items': len(self.item_ids_I)}
      | {'chance': self._chance()}
      | {'categories': sorted(set(self.category_I) - {''}), 'group': benchmark.category, 'answers_cut': self.cut}
      | {'left_out': self.left_out, 'prompts': prompts(self.shots_I, self.dropped_I, self.tokens_cut_I)}
    )


def most_common(answers: Iterable[Any]) -> float:
  """The share of items that have the most common of their right answers: what always giving that answer achieves."""
  counts = collections.Counter(answers)
  return max(counts.values()) / counts.total()


def prompts(shots_I: Sequence[int], dropped_I: Sequence[int], tokens_cut_I: Sequence[int]) -> dict[str, Any]:
  """The `prompts` entry of a task in `results.json`: what did not fit. The arguments are those of `Request`."""
  cut = [tokens for tokens in tokens_cut_I if tokens]
  return {
    'shots': {str(shots): count for shots, count in sorted(collections.Counter(shots_I).items(), reverse=True)},
    'lost_shots': sum(map(bool, dropped_I)),
    'contexts_cut': len(cut),
    'tokens_cut': sum(cut),
    'most_tokens_cut': max(cut, default=0),
    'shortened': sum(bool(dropped or tokens) for dropped, tokens in zip(dropped_I, tokens_cut_I, strict=True)),
  }


def stop_tokens(encoder: Encoder) -> np.ndarray:
  """Tokens that end a generated answer, bool [V]: the marks, padding, and every token with a newline.

  Other tokens without text of their own do not: a lone space of SentencePiece has no text until a piece follows it.
  """
  stop_V = np.array(['\n' in encoder.decode([token]) for token in range(encoder.size)])
  stop_V[[encoder.eos, encoder.begin, encoder.pad]] = True
  return stop_V


@dataclasses.dataclass(frozen=True)
class Suite:
  """Everything that models are evaluated on.

  Attributes:
    examples: the run's own targets, by task and split.
    requests: benchmarks.
    encoder: of the pool's vocabulary.
    length: L.
    generate: maximum number of tokens of a generated answer.
    shots: of each of the run's own targets, in full.
  """

  examples: Mapping[tuple[str, str], Examples]
  requests: tuple[Request, ...]
  encoder: Encoder
  length: int
  generate: int
  shots: Mapping[str, int]

  @functools.cached_property
  def stop_V(self) -> np.ndarray:
    """As `stop_tokens`."""
    return stop_tokens(self.encoder)

  @functools.cached_property
  def digests(self) -> dict[str, str]:
    """Task → SHA-256 of all that models are asked about it, in order."""
    asked: dict[str, list[Any]] = {}
    for (task, split), examples in self.examples.items():
      asked.setdefault(task, []).append([split, examples.tokens_TL, examples.weights_TL])
    for request in self.requests:
      asked.setdefault(request.key[0], []).append(request)
    return {task: _digest([self.length, self.generate, parts]) for task, parts in asked.items()}

  def tasks(self) -> list[dict[str, Any]]:
    """The `tasks` part of `results.json`."""
    own: list[dict[str, Any]] = []
    for (task, split), examples in self.examples.items():
      facts: dict[str, Any] = {'task': task, 'split': split, 'rule': 'exact_argmax', 'shots': self.shots[task]}
      facts |= {'n_items': len(examples), 'chance': most_common(record['answer'] for record in examples.records)}
      own.append({**facts, 'categories': [], 'prompts': prompts(*_shortened(examples))})
    return own + [request.describe() for request in self.requests]

  def documents(self) -> dict[tuple[str, str], list[str]]:
    """(task, split) → the document of each item."""
    own = {key: [record['document'] for record in e.records] for key, e in self.examples.items()}
    return own | {request.key: list(request.document_I) for request in self.requests}

  def categories(self) -> dict[tuple[str, str], list[str]]:
    """(task, split) → the category of each item, for benchmarks that are averaged by category."""
    return {request.key: list(request.category_I) for request in self.requests if any(request.category_I)}


def _digest(value: Any) -> str:
  """SHA-256 of arrays and texts in lists, tuples and dataclasses."""
  hashed = hashlib.sha256()

  def feed(part: Any) -> None:
    if isinstance(part, np.ndarray):
      hashed.update(f'{part.dtype.str}{part.shape}'.encode() + np.ascontiguousarray(part).tobytes())
    elif isinstance(part, list | tuple):
      hashed.update(f'[{len(part)}'.encode())
      for each in part:
        feed(each)
    elif dataclasses.is_dataclass(part):
      feed([getattr(part, field.name) for field in dataclasses.fields(part)])
    else:
      hashed.update(f'{part!r},'.encode())

  feed(value)
  return hashed.hexdigest()


def _shortened(examples: Examples) -> tuple[list[int], list[int], list[int]]:
  """Shots, dropped shots and cut tokens of each example."""
  records = examples.records
  shots = [len(record['starts']) - 1 for record in records]
  return shots, [record['shots_dropped'] for record in records], [record['tokens_cut'] for record in records]


def open_suite(context: Context) -> Suite:
  """The suite of the config, from the artifacts of the pool and the targets.

  Raises:
    UserError: as `read`; or a benchmark has the name of a target task.
  """
  config, pool = context.config, context.inputs['pool']
  length = storage.read_json(pool.path / 'card.json', dict)['length']
  encoder = open_encoder(pool.path)
  examples: dict[tuple[str, str], Examples] = {}
  requests: list[Request] = []
  if OWN in config.evaluation.tasks:
    targets = Targets(context.inputs['targets'])
    own = Sequences(encoder, length)
    for task, split in itertools.product(targets.tasks, SPLITS):
      of_split = targets.examples(task, split)
      if request := of_target(task, split, of_split, own, config):
        requests.append(request)
      else:
        examples[task, split] = of_split
  requests += read(config.evaluation, config.targets, _sequences(config, pool))
  shots = {task: _of_target(task, config.targets)[1] for task, _ in examples}
  return Suite(examples, tuple(requests), encoder, length, config.evaluation.generate_tokens, shots)


def _of_target(task: str, config: ConfigDict) -> tuple[Benchmark | None, int, str]:
  """The benchmark of a target task, its shots and its delimiter.

  A file may have the name of a benchmark or of a built-in task, and is neither. Breadth is no entry of `config.tasks`.

  Args:
    task: name of the task.
    config: the `targets` part of the config.
  """
  given = next((text for text in config.tasks if tasks.task_name(text) == task), None)
  if given is None:
    return None, 0, ''
  if is_jsonl(given):
    return None, config.file_shots, config.file_delimiter
  known = benchmarks.named(given, config.folder)
  return (known, known.shots, known.delimiter) if known else (None, 0, ' ')


def of_target(task: str, split: str, examples: Examples, sequences: Sequences, config: ConfigDict) -> Request | None:
  """The request of one split of a target task that is scored by more than its answer; None for language modelling.

  Args:
    task: name of the task.
    split: one of `SPLITS`.
    examples: of that split.
    sequences: turns text into tokens.
    config: the whole config. `evaluation.long_prompts` is for benchmarks; the stage `targets` obeys its own.

  Raises:
    UserError: an answer has no tokens.
  """
  fields = {'choices': MULTIPLE_CHOICE, 'context_options': SCHEMA, 'aliases': GENERATION}
  shape = next((shape for field, shape in fields.items() if any(field in r for r in examples.records)), None)
  if shape is None:
    return None
  known, shots, delimiter = _of_target(task, config.targets)
  benchmark = Benchmark(
    name=task,
    category=known.category if known else '',
    shape=shape,
    source='',
    shots=shots,
    delimiter=delimiter,
    scoring=benchmarks.SCORING[shape],
    per_category=known is not None and known.per_category,
  )
  items, asked = [], []
  for r in examples.records:
    choices, options, aliases = (tuple(r.get(key, ())) for key in ('choices', 'context_options', 'aliases'))
    gold, category = r.get('gold', -1), r.get('category', '')
    items.append(Item(r['id'], r['context'], r['answer'], choices, options, gold, aliases, category, r['document']))
    contexts = options or (r['context'],) * max(1, len(choices))
    answers = choices or tuple(r.get('option_answers', ())) or (r['answer'],) * len(contexts)
    asked.append(Prompt(contexts, answers, max(gold, 0), tuple(r['starts'])))
  request = _request(benchmark, split, items, asked, sequences, config.evaluation.generate_tokens, 'cut')
  before_I = [record['shots_dropped'] for record in examples.records]
  dropped_I = tuple(a + b for a, b in zip(before_I, request.dropped_I, strict=True))
  return dataclasses.replace(request, dropped_I=dropped_I)


def selected_benchmarks(config: ConfigDict, folder: str = '') -> list[Benchmark]:
  """The benchmarks that `config.tasks` (the `evaluation` part) names, without the run's own targets.

  Args:
    config: the `evaluation` part.
    folder: `targets.folder`.

  Raises:
    UserError: an unknown name, a file of an unknown shape, whole documents, or two benchmarks with the same name.
  """
  selected = []
  for task in config.tasks:
    if task == OWN:
      continue
    if is_harness(task) and harness.read(task, benchmarks.harness_folders(folder)).documents:
      raise UserError(
        f'evaluation.tasks holds {task!r}, which asks for the likelihood of whole documents; make it a target, or let '
        'lm-evaluation-harness run it (dsdm_jax.evaluation.lm_eval)'
      )
    benchmark = benchmarks.named(task, folder, config.file_shots, config.file_delimiter)
    if benchmark is None:
      near = difflib.get_close_matches(task, [OWN, *BENCHMARKS], n=1)
      others = f'known are {OWN}, {", ".join(BENCHMARKS)}, .jsonl files and lm_eval:TASK'
      hint = f'is it {near[0]}?' if near else others
      raise UserError(f'evaluation.tasks holds {task!r}, which is no benchmark; {hint}')
    selected.append(benchmark)
  names = [benchmark.name for benchmark in selected]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'evaluation.tasks has two benchmarks called {name!r}; rename one of the files')
  return selected


def check(config: ConfigDict, targets: ConfigDict, pool: ConfigDict) -> None:
  """Reads the benchmarks of `config.tasks`, so that a broken file is reported before anything is written.

  Args:
    config: the `evaluation` part.
    targets: the `targets` part.
    pool: the `pool` part.

  Raises:
    UserError: as `selected_benchmarks` and `benchmarks.read_items`; generated answers leave no room for a prompt; a
      benchmark is also a target of `config.tasks`, has fewer than two items that no target asks, or conversations
      without a chat template.
  """
  selected, own = selected_benchmarks(config, targets.folder), targets.tasks if OWN in config.tasks else ()
  shapes = {benchmark.shape for benchmark in selected}
  shapes |= {benchmark.shape for task in own if (benchmark := benchmarks.named(task, targets.folder))}
  if config.generate_tokens >= pool.length and GENERATION in shapes:
    raise UserError(
      f'config key evaluation.generate_tokens = {config.generate_tokens} must be less than pool.length = '
      f'{pool.length}: a prompt comes before it'
    )
  for benchmark in selected:
    if benchmark.name in map(tasks.task_name, own):
      raise UserError(
        f'evaluation.tasks has {OWN!r}, which evaluates the holdout of {benchmark.name!r}, and the benchmark of that '
        'name; remove one of the two from --config.evaluation.tasks, or rename one of the files'
      )
  for benchmark, items, left_out in _unasked(selected, targets):
    tasks.check_template(items, f'evaluation.tasks: {benchmark.name}', pool.vocabulary)
    if len(items) < 2:
      asked = f'{left_out} items are in the target split of targets.tasks, which leaves' if left_out else 'it has'
      raise UserError(
        f'evaluation.tasks: {benchmark.name}: {asked} {len(items)} to evaluate, and it takes two; remove it, or give '
        'it other items'
      )


def check_prompts(config: ConfigDict, pool: Artifact) -> None:
  """Raises UserError if a benchmark cannot be evaluated with the pool's vocabulary; reads pool and files only.

  So do an answer without tokens, a conversation that the template refuses, and a prompt that is too long with
  `evaluation.long_prompts=refuse`.
  """
  if selected_benchmarks(config.evaluation, config.targets.folder):
    collections.deque(read(config.evaluation, config.targets, _sequences(config, pool)), maxlen=0)


def _sequences(config: ConfigDict, pool: Artifact) -> Sequences:
  length, encoder = storage.read_json(pool.path / 'card.json', dict)['length'], open_encoder(pool.path)
  return Sequences(encoder, length, config.evaluation.begin_with_end_mark)


def _unasked(selected: Sequence[Benchmark], targets: ConfigDict) -> Iterator[tuple[Benchmark, list[Item], int]]:
  """Each benchmark, its items that are not in the target split of a target, and the number of those that are."""
  asked = tasks.target_questions(targets) if selected else frozenset()
  for benchmark in selected:
    items = benchmarks.read_items(benchmark, benchmarks.path_of(benchmark, targets.folder))
    keys = question_keys(items) if asked else [''] * len(items)
    others = [item for item, key in zip(items, keys, strict=True) if key not in asked]
    yield benchmark, others, len(items) - len(others)


def read(config: ConfigDict, targets: ConfigDict, sequences: Sequences) -> Iterator[Request]:
  """The request of each benchmark of `config.tasks`, in order, without the items of the targets' target splits.

  Args:
    config: the `evaluation` part.
    targets: the `targets` part.
    sequences: turns text into tokens.

  Raises:
    UserError: as `check` and `build`.
  """
  for benchmark, items, left_out in _unasked(selected_benchmarks(config, targets.folder), targets):
    request = build(
      benchmark,
      benchmarks.evenly(items, config.max_items or None),
      sequences,
      config.generate_tokens,
      targets.seed,
      config.long_prompts,
    )
    yield dataclasses.replace(request, left_out=left_out)


def build(
  benchmark: Benchmark,
  items: Sequence[Item],
  sequences: Sequences,
  generate: int,
  seed: int,
  long_prompts: str = 'cut',
) -> Request:
  """The request of `items`.

  Args:
    benchmark: shape, shots and delimiter.
    items: all items of the benchmark; few-shot examples are drawn from them.
    sequences: turns text into tokens.
    generate: maximum number of tokens of a generated answer.
    seed: of the few-shot examples.
    long_prompts: 'cut', or 'refuse' those that do not fit without shots.

  Raises:
    UserError: an answer has no tokens, or a prompt is refused.
  """
  if any(item.messages for item in items):
    texts = [rendered(sequences.encoder, item.messages) for item in items]
    sequences = dataclasses.replace(sequences, encoder=texts[0][2])
    items = [
      dataclasses.replace(item, context=context, continuation=answer)
      for item, (context, answer, _) in zip(items, texts, strict=True)
    ]
  equal = benchmarks.alike(items) if benchmark.shots else None
  asked = [benchmarks.prompt(benchmark, items, index, seed, equal) for index in range(len(items))]
  return _request(benchmark, BENCHMARK, items, asked, sequences, generate, long_prompts)


def _request(
  benchmark: Benchmark,
  split: str,
  items: Sequence[Item],
  asked: Sequence[Prompt],
  sequences: Sequences,
  generate: int,
  long_prompts: str,
) -> Request:
  ids: list[np.ndarray] = []
  counts, owners, gold, characters, continued, cut = [], [], [], [], [], 0
  shots, dropped, tokens_cut = [], [], []
  for index, (item, whole) in enumerate(zip(items, asked, strict=True)):
    whole = whole.from_line() if benchmark.shape == GENERATION else whole
    encoded = functools.cache(lambda count, whole=whole: sequences.encoded(whole.without(count)))
    room = 0
    try:
      if benchmark.shape == GENERATION:  # line breaks of the prompt are in the answer of a pair
        [[context_ids, _]] = encoded(0)
        room = generate + len(sequences.encoder.encode(whole.contexts[0].rstrip(' '))) - len(context_ids)
      else:
        encoded(0)
    except UserError as error:
      raise UserError(f'benchmark {benchmark.name}, {item.id}: {error}') from error
    drop = shots_to_drop(whole.starts, lambda count: sequences.excess(encoded(count), room) <= 0)  # noqa: B023
    over = max(0, sequences.excess(encoded(drop), room))
    if over and long_prompts == 'refuse':
      raise UserError(
        f'{benchmark.name} ({split}), {item.id}: {too_long(over, sequences.length, "evaluation.long_prompts")}'
      )
    prompt = whole.without(drop)
    gold.append(len(ids) + prompt.gold)
    for answer, (context_ids, answer_ids) in zip(prompt.answers, encoded(drop), strict=True):
      sequence, count = sequences.joined(context_ids, answer_ids)
      if not count:
        raise UserError(f'benchmark {benchmark.name}, {item.id}: an answer has no tokens')
      cut += count < len(answer_ids)
      ids.append(sequence)
      counts.append(count)
      owners.append(index)
      characters.append(len(answer.lstrip()))
    if benchmark.shape == GENERATION:
      continued.append(sequences.prompt(prompt.contexts[0], generate))
    shots.append(len(prompt.starts) - 1)
    dropped.append(drop)
    tokens_cut.append(over)
  return Request(
    benchmark=benchmark,
    split=split,
    ids_P=tuple(ids),
    count_P=np.asarray(counts),
    item_P=np.asarray(owners),
    gold_I=np.asarray(gold),
    characters_P=np.asarray(characters),
    prompts_I=tuple(continued),
    aliases_I=tuple(item.aliases for item in items) if benchmark.shape == GENERATION else (),
    item_ids_I=tuple(item.id for item in items),
    category_I=tuple(item.category if benchmark.per_category else '' for item in items),
    # As `tasks.benchmark_task` names those of items without a document.
    document_I=tuple(x.document if x.document != x.id else f'{benchmark.name}/{x.id}' for x in items),
    cut=cut,
    shots_I=tuple(shots),
    dropped_I=tuple(dropped),
    tokens_cut_I=tuple(tokens_cut),
  )

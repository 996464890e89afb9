"""The targets stage: tasks become token sequences with weights on the tokens to predict.

A sequence is [begin or end mark] + context tokens + answer tokens, padded to L. The padding id may equal the end mark,
so weights, not ids, mark what counts. The text of an item is context + answer, tokenized as a whole
(`vocabulary.encode_pair`); the white space between them belongs to the answer. A prompt that is too long loses whole
shots, from the left; a context that is too long without shots loses its beginning, or is refused
(`targets.long_prompts`).
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config.values import BREADTH
from dsdm_jax.core import artifacts, prng, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.progress import counted
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.chat import NO_TEMPLATE
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.pool.vocabulary import FILES, Encoder, HuggingFaceEncoder, encode_pair, open_encoder
from dsdm_jax.data.targets import breadth
from dsdm_jax.data.targets.benchmarks import shots_to_drop
from dsdm_jax.data.targets.tasks import (
  SPLITS,
  RawItem,
  RawTask,
  group_documents,
  read_tasks,
  split_documents,
  with_shots,
)
from dsdm_jax.errors import UserError

Encode = Callable[[str], list[int]]
_WEIGHTS = 'weights.json'  # of tasks whose weight is not 1; only where there are some


def rendered(encoder: Encoder, messages: str) -> tuple[str, str, Encoder]:
  """(prompt, answer, encoder for them) of a conversation, see `shapes.Item.messages`, by the chat template.

  Raises:
    UserError: the pool's vocabulary has no chat template, or the template fails.
  """
  chat = encoder.chat if isinstance(encoder, HuggingFaceEncoder) else None
  if chat is None or not isinstance(encoder, HuggingFaceEncoder):
    raise UserError(NO_TEMPLATE)
  try:
    return *chat.pair(json.loads(messages)), encoder.templated
  except ValueError as error:
    raise UserError(f'a conversation: {error}; correct the file or the template') from error


@dataclasses.dataclass(frozen=True)
class Examples:
  """Target examples of one task and split.

  Attributes:
    tokens_TL: int32, padded with the encoder's `pad`.
    weights_TL: float32, 1 for tokens to predict, else 0; column 0 is all 0.
    records: for each example {"id", "context", "answer", "document"} of its prompt as it is used, whose text is context
      + answer; "starts", the places of its shots and its question in the context; "shots_dropped", and "tokens_cut"
      from its beginning. Where an item has them also "choices", "context_options" and "gold", "option_answers" (see
      `tasks.RawItem`), "aliases" and "category", for evaluation; choices too begin with the white space after the
      context.
  """

  tokens_TL: np.ndarray
  weights_TL: np.ndarray
  records: tuple[dict[str, Any], ...]

  def __len__(self) -> int:
    return len(self.records)


def text_mask(weights_XL: np.ndarray) -> np.ndarray:
  """Bool [X, L], True up to the last positive weight of each row of float [X, L], the end of a sequence's answer.

  Token ids do not identify padding: it may be the end mark, which may begin each sequence.
  """
  return np.cumsum(weights_XL[:, ::-1] > 0, axis=1)[:, ::-1] > 0


def sequence(encoder: Encoder, context: str, answer: str, length: int) -> tuple[np.ndarray, np.ndarray] | None:
  """(tokens_L, weights_L) of the text context + answer; None if the answer has no tokens or more than L − 1."""
  context_ids, answer_ids = encode_pair(encoder, context, answer)
  if not answer.strip() or not 0 < len(answer_ids) < length:
    return None
  room = length - 1 - len(answer_ids)
  context_ids = context_ids[-room:] if room else []
  ids = [encoder.begin, *context_ids, *answer_ids]
  tokens_L = np.full(length, encoder.pad, np.int32)
  tokens_L[: len(ids)] = ids
  weights_L = np.zeros(length, np.float32)
  weights_L[1 + len(context_ids) : len(ids)] = 1
  return tokens_L, weights_L


def excess(encoder: Encoder, item: RawItem, length: int) -> int:
  """Tokens by which the longest of the item's pairs of context and answer exceeds L − 1; at most 0 if all fit."""
  contexts = item.context_options or (item.context,) * max(1, len(item.choices))
  answers = item.choices or item.option_answers or (item.answer,) * len(contexts)
  pairs = zip(contexts, answers, strict=True)
  return max(sum(map(len, encode_pair(encoder, *pair))) for pair in pairs) - (length - 1)


def pieces(encode: Encode, text: str, length: int) -> Iterator[str]:
  """Cuts prose into runs of whole lines of at most `length` tokens, preferably at a blank line in the second half.

  A line that is too long is cut at spaces, or inside a word where there are none. So is a line after less than a
  quarter of `length`, if it does not fit there. All text except white space is in a piece. The last piece of a text may
  be short, and so may a piece between blank lines.
  """
  parts = [f'{line}\n' for line in text.split('\n')]
  # The newline is a separate token, so the sizes of lines add up.
  sizes = [len(encode(part[:-1])) + 1 for part in parts]
  start, quarter = 0, max(1, length // 4)
  while start < len(parts):
    end, used = start, 0
    while end < len(parts):
      if used + sizes[end] <= length + parts[end].endswith('\n'):  # without the last newline
        used += sizes[end]
        end += 1
      elif used < quarter and len(cut := _cut(encode, parts[end], quarter)) > 1:
        parts[end : end + 1] = cut
        sizes[end : end + 1] = [len(encode(part.removesuffix('\n'))) + part.endswith('\n') for part in cut]
      else:
        break
    end = max(end, start + 1)
    if end < len(parts):
      blank = next((i for i in range(end, start, -1) if not parts[i].strip()), start)
      if sum(sizes[start:blank]) >= max(used / 2, quarter + 1):
        end = blank
    piece = _joined(parts[start:end])
    while end - start > 1 and len(encode(piece)) > length:  # tokens of a line's parts need not add up
      end -= 1
      piece = _joined(parts[start:end])
    if piece.strip():
      yield piece
    start = end


def _cut(encode: Encode, part: str, length: int) -> list[str]:
  """Parts of at most `length` tokens each, or of one character, which joined are `part`."""
  if len(part.rstrip('\n')) < 2 or len(encode(part.removesuffix('\n'))) <= length:
    return [part]
  middle, quarter = len(part) // 2, len(part) // 4
  space = part.rfind(' ', quarter, middle) + 1 or part.find(' ', middle, 3 * quarter) + 1
  place = space or middle
  return _cut(encode, part[:place], length) + _cut(encode, part[place:], length)


def _joined(parts: Sequence[str]) -> str:
  """The text of a piece, without the newlines around it or the spaces where its last line is cut."""
  text = ''.join(parts)
  return text.strip('\n') if text.endswith('\n') else text.lstrip('\n').rstrip(' ')


def _spread(items: Sequence[RawItem], rng: np.random.Generator) -> list[RawItem]:
  """A seeded order: one item of each document, then a second of each, and so on."""
  order = rng.permutation(len(items))
  taken: dict[str, int] = {}
  turns = []
  for place, index in enumerate(order):
    turn = taken[items[index].document] = taken.get(items[index].document, 0) + 1
    turns.append((turn, place, index))
  return [items[index] for _, _, index in sorted(turns)]


@dataclasses.dataclass(frozen=True)
class SplitTask:
  """A task, the side of each of its documents ('target' or 'holdout'), and how many groups of documents it has."""

  task: RawTask
  side: Mapping[str, str]
  groups: int

  def as_json(self) -> list[Any]:
    """What its examples depend on, beside settings, vocabulary and length."""
    task = dataclasses.replace(self.task, items=(), holdout=None)
    items = [(*dataclasses.astuple(item), self.side[item.document]) for item in self.task.items]
    return [repr(task), self.groups, items]


def split_tasks(config: ConfigDict) -> list[SplitTask]:
  """The tasks of `config`, the `targets` part; documents that any two of them share are on one side.

  Raises:
    UserError: a task is invalid, see `read_tasks`.
  """
  tasks = read_tasks(config)
  group_of = group_documents(tasks)
  side = split_documents(tasks, config.holdout_share, config.seed, group_of)
  result = []
  for task in tasks:
    documents = {item.document for item in task.items}
    of_task = {document: side[document] for document in sorted(documents)}
    result.append(SplitTask(task, of_task, len({group_of[document] for document in documents})))
  return result


def build(
  config: ConfigDict, encoder: Encoder, length: int, most: int | None = None
) -> tuple[dict[tuple[str, str], Examples], dict[str, Any]]:
  """Examples of every task and split, and the counts of what was left out.

  Args:
    config: the `targets` part of the config.
    encoder: of the pool.
    length: L.
    most: maximum of examples per task and split, None for `config.max_examples`. Fewer are a prefix of more.

  Returns:
    {(task, split): Examples} and {task: counts}, see `build_task`.

  Raises:
    UserError: as `split_tasks` and `build_task`.
  """
  examples: dict[tuple[str, str], Examples] = {}
  counts: dict[str, Any] = {}
  for split_task in split_tasks(config):
    name = split_task.task.name
    by_split, counts[name] = build_task(split_task, config, encoder, length, most)
    examples |= {(name, split): of_split for split, of_split in by_split.items()}
  return examples, counts


def build_task(
  split_task: SplitTask, config: ConfigDict, encoder: Encoder, length: int, most: int | None = None
) -> tuple[dict[str, Examples], dict[str, Any]]:
  """Split → examples of one task, and counts.

  The counts are {"documents", "groups", "items", "duplicates", "short", "unfit", "target", "holdout"}. "short" are
  pieces of documents with fewer tokens than a quarter of a row, which are left out; they are not among the items.

  Args:
    split_task: the task.
    config, encoder, length, most: as for `build`.

  Raises:
    UserError: a split of the task is empty, or a prompt is refused.
  """
  task, side = split_task.task, split_task.side
  examples: dict[str, Examples] = {}
  by_split: dict[str, list[RawItem]] = {split: [] for split in SPLITS}
  seen: set[tuple[str, str]] = set()
  count = {'documents': len(side), 'groups': split_task.groups, 'items': 0, 'duplicates': 0, 'short': 0, 'unfit': 0}
  items = list(task.items)
  if task.language_modelling:
    items = []
    for item in task.items:
      cut = list(pieces(encoder.encode, item.answer, length - 1))
      long = [piece for piece in cut if len(encoder.encode(piece)) >= (length - 1) // 4]
      count['short'] += len(cut) - len(long)
      items += [dataclasses.replace(item, id=f'{item.id}#{index}', answer=piece) for index, piece in enumerate(long)]
  for item in items:
    count['items'] += 1
    if (item.context, item.answer) in seen:
      count['duplicates'] += 1
      continue
    seen.add((item.context, item.answer))
    by_split[side[item.document]].append(item)
  for split, zero_shot in by_split.items():
    items = with_shots(task, zero_shot, config.seed)
    rng = prng.numpy_stream(config.seed, 'targets', task.name, split)
    try:
      of_split, unfit = _examples(
        _spread(items, rng), encoder, length, most or config.max_examples, config.long_prompts
      )
    except UserError as error:
      raise UserError(f'target task {task.name!r}, {error}') from error
    count['unfit'] += unfit
    count[split] = len(of_split)
    if len(of_split) < 2:  # an interval takes two
      short = f', {counted(count["short"], "piece")} of less than a quarter of it left out' if count['short'] else ''
      raise UserError(
        f'target task {task.name!r} has {len(of_split) or "no"} example in its {split} split, and it takes two '
        f'({len(items)} items, {unfit} do not fit into pool.length {length}{short}; {count["groups"]} groups of items '
        'that share a document, passage or question); add documents, give items a "document" of their own, or change '
        'targets.holdout_share or pool.length'
      )
    examples[split] = of_split
  return examples, count


def _examples(
  items: Sequence[RawItem], encoder: Encoder, length: int, most: int, long_prompts: str
) -> tuple[Examples, int]:
  tokens: list[np.ndarray] = []
  weights: list[np.ndarray] = []
  records: list[dict[str, Any]] = []
  unfit = 0
  for item in items:
    if len(records) == most:
      break
    its = encoder
    if item.messages:
      context, answer, its = rendered(encoder, item.messages)
      item = dataclasses.replace(item, context=context, answer=answer, messages='')
    dropped = shots_to_drop(item.starts, lambda n: excess(its, item.without(n), length) <= 0)  # noqa: B023
    used = item.without(dropped)
    arrays = sequence(its, used.context, used.answer, length)
    if arrays is None:
      unfit += 1
      continue
    cut = max(0, excess(its, used, length))
    if cut and long_prompts == 'refuse':
      raise UserError(f'{item.id}: {too_long(cut, length, "targets.long_prompts")}')
    tokens.append(arrays[0])
    weights.append(arrays[1])
    records.append(_record(used) | {'shots_dropped': dropped, 'tokens_cut': cut})
  tokens_TL = np.stack(tokens) if tokens else np.zeros((0, length), np.int32)
  weights_TL = np.stack(weights) if weights else np.zeros((0, length), np.float32)
  return Examples(tokens_TL, weights_TL, tuple(records)), unfit


def too_long(cut: int, length: int, key: str) -> str:
  """What happened to a prompt whose key `long_prompts` refuses to cut it."""
  return (
    f'prompt and answer are {cut} tokens too long for pool.length {length}, also without shots; set a larger '
    f'--config.pool.length, or --config.{key}=cut'
  )


def _record(item: RawItem) -> dict[str, Any]:
  record: dict[str, Any] = {key: getattr(item, key) for key in ('id', 'context', 'answer', 'document')}
  record['starts'] = list(item.starts)
  if item.choices or item.context_options:
    record['gold'] = item.gold
  keys = ('choices', 'context_options', 'option_answers', 'aliases', 'category')
  more = {key: getattr(item, key) for key in keys}
  return record | {key: value for key, value in more.items() if value}


def run(context: Context) -> dict[str, Any]:
  """The stage: reads the pool's vocabulary and length, writes `<task>.<split>.npz`, `.jsonl` and `tasks.json`.

  A task is a unit: another one leaves its files as they are, unless the two share documents that change sides.
  """
  pool, config = context.inputs['pool'], context.config.targets
  counts: dict[str, dict[str, int]] = {}
  length = storage.read_json(pool.path / 'card.json', dict)['length']
  encoder = open_encoder(pool.path)
  vocabulary = [storage.checksum(pool.path / name) for name in FILES if storage.is_file(pool.path / name)]
  settings = {key: config[key] for key in ('seed', 'max_examples', 'long_prompts', 'file_shots', 'file_delimiter')}
  shared = {**settings, 'length': length, 'vocabulary': vocabulary}
  split = {split_task.task.name: split_task for split_task in split_tasks(config)}
  wanted: dict[str, Any] = {name: {**shared, 'task': each.as_json()} for name, each in split.items()}
  if config.breadth:
    held_out = storage.checksum(context.inputs['leakage'].path / 'breadth.npy')
    wanted[BREADTH] = {**shared, 'pool': pool.digest, 'documents': held_out, 'holdout_share': config.holdout_share}
    storage.write_json(context.out / _WEIGHTS, {BREADTH: config.breadth})
  context.units.take(wanted, _files)
  for name in wanted:
    whole, *parts = (context.out / file for file in _files(name))
    if not storage.is_marked(whole):
      if name in split:
        examples, count = build_task(split[name], config, encoder, length)
      else:
        examples, count = _of_pool(context)
      for side, of_split in examples.items():
        stem = f'{name}.{side}'
        storage.save_npz(context.out / f'{stem}.npz', tokens_TL=of_split.tokens_TL, weights_TL=of_split.weights_TL)
        lines = [json.dumps(record, sort_keys=True) + '\n' for record in of_split.records]
        storage.write_text(context.out / f'{stem}.jsonl', ''.join(lines))
      storage.write_json(whole, count)
      storage.mark(whole, *parts)
    counts[name] = storage.read_json(whole, dict)
  storage.write_json(context.out / 'tasks.json', list(counts))
  context.log.event('targets', counts=counts)
  asked = sum(count['target'] for count in counts.values())
  context.log.describe(f'{counted(len(counts), "task")}, {counted(asked, "example")} for the datamodel')
  for task, count in counts.items():
    left_out = ''.join(
      f'; left out: {count[name]:,} {of}'
      for name, of in (
        ('duplicates', 'duplicates'),
        ('short', f'pieces of fewer than {(length - 1) // 4} tokens'),
        ('unfit', f'whose answer has no tokens, or more than {length - 1}'),
      )
      if count[name]
    )
    context.log.say(
      f'targets: {task}: {count["items"]:,} items in {count["groups"]:,} groups that share no document, passage or '
      f'question; {count["target"]:,} target examples, {count["holdout"]:,} of the holdout{left_out}'
    )
  return {
    'tasks': list(counts),
    'counts': counts,
    'length': length,
    'sequence': f'[{encoder.begin}] + context + answer, padded with {encoder.pad}; weight 1 where a token is to be '
    'predicted',
  }


def _of_pool(context: Context) -> tuple[dict[str, Examples], dict[str, Any]]:
  """As `build_task`, of the documents that are held out of the pool."""
  config, pool = context.config.targets, Pool(context.inputs['pool'])
  documents = storage.load(context.inputs['leakage'].path / 'breadth.npy')
  by_split, short = breadth.pieces(pool, documents, config.holdout_share)
  examples = {}
  count = {'documents': len(documents), 'groups': len(documents), 'items': sum(map(len, by_split.values()))}
  count |= {'duplicates': 0, 'short': short, 'unfit': 0}
  for side, found in by_split.items():
    if len(found) < 2:  # an interval takes two
      raise UserError(
        f'targets.breadth: the held-out documents of the {side} split have {counted(len(found), "piece")} of which the '
        'loss counts tokens, and it takes two; give the pool more documents, or set targets.breadth=0'
      )
    items = [RawItem(str(place), '', '', record['document']) for place, (*_, record) in enumerate(found)]
    order = _spread(items, prng.numpy_stream(config.seed, 'targets', BREADTH, side))[: config.max_examples]
    tokens, weights, records = zip(*(found[int(item.id)] for item in order), strict=True)
    examples[side] = Examples(np.stack(tokens), np.stack(weights), records)
    count[side] = len(order)
  return examples, count


def _files(task: str) -> list[str]:
  return [f'{task}.json', *(f'{task}.{split}.{kind}' for split in SPLITS for kind in ('npz', 'jsonl'))]


class Targets:
  """Reads the artifact of the targets stage."""

  def __init__(self, artifact: Artifact):
    self._path = artifact.path
    self.tasks: list[str] = storage.read_json(self._path / 'tasks.json', list)
    file = self._path / _WEIGHTS
    self._weights: dict[str, float] = storage.read_json(file, dict) if storage.is_file(file) else {}

  def weight(self, task: str) -> float:
    """The weight of a task where several are mixed: 1, and `targets.breadth` for breadth."""
    return self._weights.get(task, 1.0)

  def digest(self, task: str) -> str:
    """SHA-256 of the files of a task's target split."""
    return artifacts.digest_of([storage.checksum(self._path / f'{task}.target.{kind}') for kind in ('npz', 'jsonl')])

  def examples(self, task: str, split: str) -> Examples:
    """Raises KeyError for an unknown task or split."""
    if task not in self.tasks or split not in SPLITS:
      raise KeyError(f'no target examples {task!r}, {split!r}')
    stem = f'{task}.{split}'
    with storage.load(self._path / f'{stem}.npz') as arrays:
      tokens_TL, weights_TL = arrays['tokens_TL'], arrays['weights_TL']
    return Examples(tokens_TL, weights_TL, tuple(storage.read_jsonl(self._path / f'{stem}.jsonl')))

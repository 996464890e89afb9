"""Benchmarks: one table of their files and prompts, and their items.

Four are the paper's targets, fifteen its held-out benchmarks; three more are often reported. Items come from
LLM-Foundry's JSONL files, by name, or from TFDS. Targets have the paper's shots; the others have LLM-Foundry's, and
those that LLM-Foundry does not have use 0 (cbt) or as many as SQuAD (news_qa). Other JSONL files of these shapes can be
used as well, see `of_file`.
"""

import bisect
import collections
import dataclasses
import glob
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dsdm_jax.config.values import is_harness, is_jsonl, task_name
from dsdm_jax.core import prng
from dsdm_jax.data import files
from dsdm_jax.data.targets import harness, shapes, tfds_items
from dsdm_jax.data.targets.shapes import GENERATION, LANGUAGE_MODELLING, MULTIPLE_CHOICE, SCHEMA, Item
from dsdm_jax.errors import UserError

# Correct if the argmax is the right token at every position of the continuation.
EXACT_ARGMAX = 'exact_argmax'
# Correct if the gold choice has the lowest mean cross-entropy per token.
MEAN_CROSS_ENTROPY = 'mean_cross_entropy'
# Correct if the shared continuation has its lowest mean cross-entropy after the gold context.
SHARED_CONTINUATION = 'shared_continuation'
# Correct if the normalised greedy output begins with a normalised alias.
ALIAS_PREFIX = 'alias_prefix'
SCORING: Mapping[str, str] = {
  LANGUAGE_MODELLING: EXACT_ARGMAX,
  MULTIPLE_CHOICE: MEAN_CROSS_ENTROPY,
  SCHEMA: SHARED_CONTINUATION,
  GENERATION: ALIAS_PREFIX,
}
ANSWER = '\nAnswer: '
# Thai to Burmese and Khmer; Chinese and Japanese characters, punctuation and wide forms.
_UNSPACED = re.compile(
  '[\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]*'
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """How a benchmark is read, prompted and scored.

  Attributes:
    name: in tables and configs.
    category: one of the paper's five; '' for custom files.
    shape: one of `shapes.SHAPES`.
    source: name of its JSONL file, or 'lm_eval:TASK'.
    tfds: 'dataset/config:split' in TFDS, '' for none.
    shots: solved examples before the question.
    delimiter: between context and answer; white space at its end belongs to the answer. May be empty.
    scoring: the rule for correct answers, one of `SCORING`'s values.
    tfds_target: 'dataset/config:split' of the target's items, if TFDS separates them from the holdout's.
    role: 'target', 'held_out' or 'other'.
    per_category: averaged within each category first.
    left_out: categories of items that are dropped.
    counts: (target, holdout) items in the paper, (0, 0) if it has none.
    own_space: white space that an item has where context and answer meet replaces that of the delimiter, see `joined`.
      Otherwise it is stripped, as LLM-Foundry does.
    apart: the shots of its items are no items themselves.
  """

  name: str
  category: str
  shape: str
  source: str
  shots: int
  delimiter: str
  scoring: str
  tfds: str = ''
  tfds_target: str = ''
  role: str = 'held_out'
  per_category: bool = False
  left_out: tuple[str, ...] = ()
  counts: tuple[int, int] = (0, 0)
  own_space: bool = False
  apart: bool = False


def _row(name: str, category: str, shape: str, source: str, shots: int, delimiter: str = ' ', **more: Any) -> Benchmark:
  return Benchmark(name, category, shape, source, shots, delimiter, SCORING[shape], **more)


_COMMONSENSE, _LANGUAGE, _READING, _SYMBOLIC, _KNOWLEDGE = (
  'commonsense reasoning',
  'language understanding',
  'reading comprehension',
  'symbolic problem solving',
  'world knowledge',
)

TABLE: tuple[Benchmark, ...] = (
  # Targets of the paper.
  _row(
    'lambada', _LANGUAGE, LANGUAGE_MODELLING, 'lambada_openai.jsonl', 0, tfds='lambada:test', role='target',
    counts=(2_577, 2_570),
  ),
  _row(
    'squad', _READING, LANGUAGE_MODELLING, 'squad.jsonl', 3, tfds='squad:validation', role='target',
    counts=(23_107, 10_557), tfds_target='squad:train',
  ),
  _row(
    'jeopardy', _KNOWLEDGE, LANGUAGE_MODELLING, 'jeopardy_all.jsonl', 3, ANSWER, role='target', per_category=True,
    left_out=('word_origins',), counts=(876, 876),
  ),
  _row(
    'bigbench_cs_algorithms', _SYMBOLIC, LANGUAGE_MODELLING, 'bigbench_cs_algorithms.jsonl', 0, role='target',
    counts=(660, 660),
  ),
  # The fifteen held-out benchmarks.
  _row('copa', _COMMONSENSE, MULTIPLE_CHOICE, 'copa.jsonl', 0, tfds='super_glue/copa:validation'),
  _row('openbook_qa', _COMMONSENSE, MULTIPLE_CHOICE, 'openbook_qa.jsonl', 0, tfds='openbookqa:test'),
  _row('piqa', _COMMONSENSE, MULTIPLE_CHOICE, 'piqa.jsonl', 10, ANSWER, tfds='piqa:validation'),
  _row('cbt', _LANGUAGE, MULTIPLE_CHOICE, 'cbt.jsonl', 0),
  _row('hellaswag', _LANGUAGE, MULTIPLE_CHOICE, 'hellaswag.jsonl', 10, tfds='hellaswag:validation'),
  _row('winogrande', _LANGUAGE, SCHEMA, 'winogrande.jsonl', 0, tfds='winogrande:validation'),
  _row('boolq', _READING, MULTIPLE_CHOICE, 'boolq.jsonl', 10, ANSWER, tfds='bool_q:validation'),
  _row('coqa', _READING, LANGUAGE_MODELLING, 'coqa.jsonl', 0, tfds='coqa:validation'),
  _row('news_qa', _READING, LANGUAGE_MODELLING, 'news_qa.jsonl', 3),
  _row('bb_copy_logic', _SYMBOLIC, LANGUAGE_MODELLING, 'bigbench_repeat_copy_logic.jsonl', 10),
  _row('bb_dyck_languages', _SYMBOLIC, LANGUAGE_MODELLING, 'bigbench_dyck_languages.jsonl', 10),
  _row('bb_operators', _SYMBOLIC, LANGUAGE_MODELLING, 'bigbench_operators.jsonl', 10),
  _row('arc_easy', _KNOWLEDGE, MULTIPLE_CHOICE, 'arc_easy.jsonl', 10, ANSWER, tfds='ai2_arc/ARC-Easy:test'),
  _row('bb_qa_wikidata', _KNOWLEDGE, LANGUAGE_MODELLING, 'bigbench_qa_wikidata.jsonl', 10),
  _row(
    'trivia_qa', _KNOWLEDGE, GENERATION, 'triviaqa_sm_sub.jsonl', 3, tfds='trivia_qa/rc.nocontext:validation'
  ),
  # Not of the paper's fifteen.
  _row('winograd', _LANGUAGE, SCHEMA, 'winograd_wsc.jsonl', 0, role='other'),
  _row(
    'arc_challenge', _KNOWLEDGE, MULTIPLE_CHOICE, 'arc_challenge.jsonl', 10, ANSWER,
    tfds='ai2_arc/ARC-Challenge:test', role='other',
  ),
  # 1,190 questions of SQuAD's development split, in SQuAD's own fields.
  _row('squad_xquad', _READING, LANGUAGE_MODELLING, 'squad_xquad_en.jsonl', 3, role='other'),
)  # fmt: skip
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in TABLE}


def named(task: str, folder: str, shots: int = 0, delimiter: str = ' ') -> Benchmark | None:
  """The benchmark that an entry of a setting names; None for the run's own targets and built-in tasks.

  Args:
    task: a name of the table, the path of a JSONL file, or a task of lm-evaluation-harness.
    folder: `targets.folder`.
    shots, delimiter: of a file.

  Raises:
    UserError: as `of_file` and `harness.read`.
  """
  if is_jsonl(task):
    return of_file(task, shots, delimiter)
  if not is_harness(task):
    return BENCHMARKS.get(task)
  theirs = harness.read(task, harness_folders(folder))
  return Benchmark(
    name=task_name(task),
    category='',
    shape=theirs.shape,
    source=task,
    shots=theirs.shots,
    delimiter='',
    scoring=SCORING[theirs.shape],
    role='other',
    own_space=True,
    apart=theirs.apart,
  )


def path_of(benchmark: Benchmark, folder: str) -> str | None:
  """Where `read_items` finds a benchmark of `named`; None for a file, whose path is its source."""
  if BENCHMARKS.get(benchmark.name) is benchmark:
    return folder or '.'
  return folder if is_harness(benchmark.source) else None


def harness_folders(folder: str) -> tuple[str, ...]:
  """The places of `targets.folder` that may hold YAML files of lm-evaluation-harness."""
  return tuple(path for path in places(folder) if not in_tfds(path)) if folder else ()


def of_file(path: str, shots: int = 0, delimiter: str = ' ') -> Benchmark:
  """A custom benchmark: a JSONL file whose first record determines the shape, with the file's own white space.

  Raises:
    UserError: the file does not exist, has no records, or its fields match no shape.
  """
  for number, record in shapes.read_jsonl(path):
    shape = shapes.shape_of(record)
    if shape is None:
      raise UserError(
        f'{path}, line {number}: fields {", ".join(sorted(record))} match no shape; use "context" and "continuation", '
        '"prompt" and "completion", "messages", "query", "choices" and "gold", "context_options", "continuation" and '
        '"gold", or "context", "answer" and "aliases"'
      )
    if 'messages' in record and shots:
      raise UserError(f'{path} has conversations, which take no shots before them; set file_shots to 0')
    verbatim = 'completion' in record or 'messages' in record
    delimiter = '' if verbatim else delimiter
    return _row(PurePosixPath(path).stem, '', shape, path, shots, delimiter, role='other', own_space=True)
  raise UserError(f'{path} has no items; it needs one JSON object a line')


def places(path: str) -> tuple[str, ...]:
  """The places in a setting such as 'tfds:data/tfds | data/eval', in the order in which they are tried."""
  return tuple(part.strip() or '.' for part in path.split(' | '))


def place(benchmark: Benchmark, places: Sequence[str]) -> str | None:
  """The first of the places that has `benchmark`: its file, or 'tfds' or 'tfds:DATA_DIR'; None if none has it.

  The last place is not checked if it is TFDS: reading it reports what is missing.

  Raises:
    UserError: one of them is a file of another name, which would be read for every benchmark.
  """
  for number, path in enumerate(places, 1):
    if not in_tfds(path):
      if file := find(benchmark, path):
        if not file.endswith(benchmark.source):
          raise UserError(
            f'{benchmark.name} is looked for in {path}, which is a file and not a folder; name its folder '
            '(targets.folder, or --folder), or put the path in place of the name of the benchmark'
          )
        return file
    elif benchmark.tfds and (number == len(places) or tfds_items.is_prepared(benchmark.tfds, _data_dir(path))):
      return path
  return None


def find(benchmark: Benchmark, path: str) -> str | None:
  """The benchmark's file: `path` itself, or in that folder or one below it (LLM-Foundry sorts by category)."""
  if files.is_file(path):
    return path
  if files.is_file(f'{path}/{benchmark.source}'):
    return str(PurePosixPath(path, benchmark.source)) if not files.is_remote(path) else f'{path}/{benchmark.source}'
  return next(iter(files.glob(f'{glob.escape(path)}/*/{benchmark.source}')), None)


def target_items(benchmark: Benchmark, path: str | None) -> list[Item]:
  """As many items as the paper's target has, from TFDS's split for the target; [] if there is none."""
  source = place(benchmark, places(path)) if benchmark.tfds_target and path is not None else None
  if source is None or not in_tfds(source):
    return []
  return read_items(dataclasses.replace(benchmark, tfds=benchmark.tfds_target), source, benchmark.counts[0])


def in_tfds(path: str) -> bool:
  """Whether `path` means TFDS: 'tfds' or 'tfds:DATA_DIR'."""
  return path == 'tfds' or path.startswith('tfds:')


def _data_dir(path: str) -> str | None:
  return path.partition(':')[2] or None


def read_items(benchmark: Benchmark, path: str | None = None, limit: int | None = None) -> list[Item]:
  """Items of `benchmark`, in the order of their source, without its categories `left_out`.

  Args:
    benchmark: a row of `TABLE`, or of `of_file`.
    path: a file; a folder with the file of the table, itself or one level below; 'tfds' or 'tfds:DATA_DIR'; or several
      of these, see `places`. None uses `source` as the path. For a task of lm-evaluation-harness: `targets.folder`.
    limit: at most so many items, evenly spread over the file, because some files are sorted by category.

  Raises:
    UserError: the file or dataset does not exist, or a record is malformed; the message says where.
  """
  if is_harness(benchmark.source):
    return evenly(list(harness.read(benchmark.source, harness_folders(path or '')).items), limit)
  tried = (benchmark.source,) if path is None else places(path)
  source = place(benchmark, tried)
  if source is None:
    raise _missing(benchmark, tried)
  if in_tfds(source):
    items = list(tfds_items.read(benchmark.tfds, data_dir=_data_dir(source)))
  else:
    items = [
      shapes.parse(record, benchmark.shape, f'line {number}', f'{source}, line {number}')
      for number, record in shapes.read_jsonl(source)
    ]
  items = [item for item in items if item.category not in benchmark.left_out]
  if not items:
    raise UserError(f'benchmark {benchmark.name}: {source} has no items')
  return evenly(items, limit)


def evenly(items: list[Item], limit: int | None) -> list[Item]:
  """At most `limit` items, evenly spread; None takes all."""
  if limit is None or limit >= len(items):
    return items
  return [items[i] for i in (np.arange(limit) * len(items)) // limit]


def _missing(benchmark: Benchmark, tried: Sequence[str]) -> UserError:
  if all(map(in_tfds, tried)):
    return UserError(f'TFDS has no benchmark {benchmark.name}; use a folder with {benchmark.source}')
  also = f", or prepare TFDS's {benchmark.tfds.partition(':')[0]} and use the path 'tfds'" if benchmark.tfds else ''
  if len(tried) == 1:
    problem, there = f'{tried[0]} is not a file and has no {benchmark.source}', 'there'
  else:
    problem, there = f'none of {", ".join(tried)} has {benchmark.source}', 'into one of them'
  return UserError(
    f'benchmark {benchmark.name}: {problem}; put the file of that name (shape {benchmark.shape}, as in LLM-Foundry) '
    f'{there}{also}'
  )


@dataclasses.dataclass(frozen=True)
class Prompt:
  """The prompt of one item: pairs (contexts[i], answers[i]) to compare.

  The text of a pair is `context + answer`. The answer begins with the white space that joins them, and only its tokens
  count. Language modelling and generation have one pair, multiple choice one for each choice with the same context, a
  schema one for each context with the same answer.

  Attributes:
    gold: index of the right pair.
    starts: places in every context where its text begins if none, one, … all of the shots are left out from the left.
  """

  contexts: tuple[str, ...]
  answers: tuple[str, ...]
  gold: int = 0
  starts: tuple[int, ...] = (0,)

  def without(self, count: int) -> 'Prompt':
    """The prompt without its first `count` shots."""
    start = self.starts[count]
    contexts = tuple(context[start:] for context in self.contexts)
    return Prompt(contexts, self.answers, self.gold, tuple(s - start for s in self.starts[count:]))

  def from_line(self) -> 'Prompt':
    """The same text with line breaks before an answer in its context: a generated answer ends at a line break."""
    ends = [answer.rfind('\n', 0, len(answer) - len(answer.lstrip())) + 1 for answer in self.answers]
    contexts = [context + answer[:end] for context, answer, end in zip(self.contexts, self.answers, ends, strict=True)]
    answers = tuple(answer[end:] for answer, end in zip(self.answers, ends, strict=True))
    return dataclasses.replace(self, contexts=tuple(contexts), answers=answers)


def shots_to_drop(starts: Sequence[int], fits: Callable[[int], bool]) -> int:
  """The least number of shots to leave out so that a prompt fits; all of them if it never does.

  Args:
    starts: of the prompt.
    fits: whether the prompt fits without so many shots.
  """
  every = len(starts) - 1
  if not every or fits(0):
    return 0
  return bisect.bisect_left(range(1, every), True, key=fits) + 1


Alike = Sequence[tuple[frozenset[int], ...]]


def alike(items: Sequence[Item]) -> Alike:
  """For each item, sets of the indices of items that ask the same, and of those that have the same answer.

  Answers that label many items, such as yes and no, do not count: those that at least five items and a tenth of all
  have, and those to choose from the same choices. Nor does the answer of a schema, which its contexts share.
  """
  keys = [[f'question {key}'] for key in shapes.question_keys(items)]
  answers = [shapes.content_key(item.continuation) for item in items]
  choices = [frozenset(map(shapes.content_key, item.choices)) for item in items]
  answer_count, choices_count = collections.Counter(answers), collections.Counter(choices)
  for index, item in enumerate(items):
    label = answer_count[answers[index]] > max(4, len(items) / 10)
    if not (label or item.context_options or (item.choices and choices_count[choices[index]] > 1)):
      keys[index].append(f'answer {answers[index]}')
  owners: dict[str, list[int]] = {}
  for index, own in enumerate(keys):
    for key in own:
      owners.setdefault(key, []).append(index)
  sets = {key: frozenset(indices) for key, indices in owners.items()}
  return [tuple(sets[key] for key in own) for own in keys]


def prompt(
  benchmark: Benchmark, items: Sequence[Item], index: int, seed: int = 0, equal: Alike | None = None
) -> Prompt:
  """The prompt of `items[index]`, after `benchmark.shots` solved others.

  Args:
    benchmark: its shots and delimiter.
    items: all items. Shots are drawn from the others, where the item has none of its own; there are fewer if the items
      do not suffice.
    index: of the item.
    seed: of the draw; shots depend on the seed, benchmark, item and items.
    equal: `alike(items)`, for callers that ask for many prompts.
  """
  item = items[index]
  parts: Sequence[str] = item.shots
  if benchmark.shots and not parts:
    parts = [solved(benchmark, items[i]) for i in shots(benchmark, equal or alike(items), index, seed)]
  preamble, starts = introduction(item.description, parts)
  pairs = [
    joined(benchmark, context, answer)
    for context in item.context_options or [item.context]
    for answer in item.choices or [item.continuation]
  ]
  contexts, answers = tuple(preamble + c for c, _ in pairs), tuple(a for _, a in pairs)
  return Prompt(contexts, answers, max(item.gold, 0), starts)


def joined(benchmark: Benchmark, context: str, answer: str) -> tuple[str, str]:
  """Context and answer whose concatenation is the text; the answer begins with the white space between them.

  With `own_space`, white space at the end of the context or the beginning of the answer is the file's own (code,
  lists): both remain as they are, and a delimiter of white space is left out. It is also left out without a context,
  and between two characters of scripts without spaces. Before the text of another delimiter the context's end is
  stripped.
  """
  text = benchmark.delimiter.strip()
  before, _, after = benchmark.delimiter.partition(text) if text else ('', '', benchmark.delimiter)
  own = answer[:1].isspace() or (not text and context[-1:].isspace())
  if not benchmark.own_space:
    return context.rstrip() + before + text, after + answer.strip()
  if text:
    return context.rstrip() + before + text, answer if own else after + answer.rstrip()
  if own or not context or not benchmark.delimiter:
    return context, answer
  return context, ('' if _UNSPACED.fullmatch(context[-1] + answer[:1]) else after) + answer.rstrip()


def introduction(description: str, parts: Sequence[str]) -> tuple[str, tuple[int, ...]]:
  """What precedes the question of a prompt with the shots `parts`, and its `Prompt.starts`.

  A description goes with the first shot.
  """
  first, *rest = parts or ['']
  parts = [f'{description}{first}', *rest]
  starts = tuple(itertools.accumulate(map(len, parts), initial=0))
  return ''.join(parts), starts if first else (0,)


def shots(benchmark: Benchmark, equal: Alike, index: int, seed: int) -> list[int]:
  """Indices of the shots before item `index`: `benchmark.shots` different ones, none equal to it in content.

  Args:
    benchmark: its name and number of shots.
    equal: `alike` of all items.
    index: of the item.
    seed: of the draw.
  """
  rng = prng.numpy_stream(seed, 'shots', benchmark.name, index)
  count, excluded = len(equal), {index}.union(*equal[index])
  drawn = rng.choice(count - 1, size=min(benchmark.shots, count - 1), replace=False)
  chosen = [i for i in (int(i) + (int(i) >= index) for i in drawn) if i not in excluded]
  wanted = min(benchmark.shots, count - len(excluded))
  while len(chosen) < wanted:
    other = int(rng.integers(count))
    if other not in excluded and other not in chosen:
      chosen.append(other)
  return chosen


def solved(benchmark: Benchmark, item: Item) -> str:
  """An item with its answer, as a shot, with what separates it from the next text."""
  if item.solved:
    return item.solved
  context = item.context_options[item.gold] if item.context_options else item.context
  return ''.join(joined(benchmark, context, item.continuation)) + '\n'

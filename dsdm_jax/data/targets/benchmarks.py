"""The benchmarks of the paper in one table, their files, and their prompts.

Four of them are the paper's targets, fifteen its held-out benchmarks; three more are often reported. Sources are
LLM-Foundry's JSONL files by name, and TFDS where it has the data. The targets have the paper's shots; the others have
LLM-Foundry's, and what is not in there has 0 (cbt) or as many as SQuAD (news_qa). Any other JSONL file of these shapes
is a benchmark too, see `of_file`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dsdm_jax.core import prng
from dsdm_jax.data.targets import shapes, tfds_items
from dsdm_jax.data.targets.shapes import GENERATION, LANGUAGE_MODELLING, MULTIPLE_CHOICE, SCHEMA, Item
from dsdm_jax.errors import UserError

# Right where the argmax is the target at every token of the continuation, given all that is before it.
EXACT_ARGMAX = 'exact_argmax'
# Right where the gold choice has the lowest mean cross-entropy a token.
MEAN_CROSS_ENTROPY = 'mean_cross_entropy'
# Right where the shared continuation has its lowest mean cross-entropy after the gold context.
SHARED_CONTINUATION = 'shared_continuation'
# Right where the greedy output, normalised, begins with a normalised alias.
ALIAS_PREFIX = 'alias_prefix'
SCORING: Mapping[str, str] = {
  LANGUAGE_MODELLING: EXACT_ARGMAX,
  MULTIPLE_CHOICE: MEAN_CROSS_ENTROPY,
  SCHEMA: SHARED_CONTINUATION,
  GENERATION: ALIAS_PREFIX,
}
ANSWER = '\nAnswer: '


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """How a benchmark is read, asked and scored.

  Attributes:
    name: in tables and configs.
    category: one of the paper's five; '' for files of the user's.
    shape: one of `shapes.SHAPES`.
    source: name of its JSONL file.
    tfds: 'dataset/config:split' where TFDS has it, else ''.
    shots: solved examples before the question.
    delimiter: between context and answer; white space at its end belongs to the answer.
    scoring: the rule that decides what is right, one of `SCORING`'s values.
    tfds_target: 'dataset/config:split' of the target's items, where TFDS keeps them apart from those of the holdout.
    role: 'target', 'held_out' or 'other'.
    per_category: averaged within each item's category first.
    left_out: categories of items that are dropped.
    counts: (target, holdout) items of the paper, (0, 0) where it has none.
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


def _row(name: str, category: str, shape: str, source: str, shots: int, delimiter: str = ' ', **more: Any) -> Benchmark:
  return Benchmark(name, category, shape, source, shots, delimiter, SCORING[shape], **more)


_COMMONSENSE, _LANGUAGE, _READING, _SYMBOLIC, _KNOWLEDGE = (
  'commonsense reasoning', 'language understanding', 'reading comprehension', 'symbolic problem solving',
  'world knowledge',
)  # fmt: skip

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


def of_file(path: str, shots: int = 0, delimiter: str = ' ') -> Benchmark:
  """A benchmark of the user's: a JSONL file whose first record tells the shape.

  Raises:
    UserError: no such file, no records, or no shape known has such fields.
  """
  for number, record in shapes.read_jsonl(path):
    shape = shapes.shape_of(record)
    if shape is None:
      raise UserError(
        f'{path}, line {number}: fields {", ".join(sorted(record))} are of no shape known; give "context" and '
        '"continuation", "query", "choices" and "gold", "context_options", "continuation" and "gold", or "context", '
        '"answer" and "aliases"'
      )
    return _row(epath.Path(path).stem, '', shape, path, shots, delimiter, role='other')
  raise UserError(f'{path} holds no items; give one JSON object a line')


def places(path: str) -> tuple[str, ...]:
  """The places that a path such as 'tfds:data/tfds | data/eval' names, in the order in which they are tried."""
  return tuple(part.strip() or '.' for part in path.split(' | '))


def place(benchmark: Benchmark, tried: Sequence[str]) -> str | None:
  """The first of the places that has `benchmark`: its file, or 'tfds' or 'tfds:DATA_DIR'; None where none has it.

  Whether TFDS has prepared it is looked up only where another place is left.
  """
  for number, path in enumerate(tried, 1):
    if not in_tfds(path):
      if file := find(benchmark, path):
        return file
    elif benchmark.tfds and (number == len(tried) or tfds_items.is_prepared(benchmark.tfds, _data_dir(path))):
      return path
  return None


def find(benchmark: Benchmark, path: str) -> str | None:
  """The benchmark's file: `path`, or in that folder or one below it (LLM-Foundry sorts by category); else None."""
  root = epath.Path(path)
  if root.is_file():
    return path
  if (root / benchmark.source).is_file():
    return str(root / benchmark.source)
  below = sorted(str(file) for file in root.glob(f'*/{benchmark.source}')) if root.is_dir() else []
  return below[0] if below else None


def target_items(benchmark: Benchmark, path: str | None) -> list[Item]:
  """As many items as the paper's target has, from a split of TFDS that holds nothing else; [] where there is none."""
  held = place(benchmark, places(path)) if benchmark.tfds_target and path is not None else None
  if held is None or not in_tfds(held):
    return []
  return read_items(dataclasses.replace(benchmark, tfds=benchmark.tfds_target), held, benchmark.counts[0])


def in_tfds(path: str) -> bool:
  """Whether `path` stands for TFDS's data: 'tfds' or 'tfds:DATA_DIR'."""
  return path == 'tfds' or path.startswith('tfds:')


def _data_dir(path: str) -> str | None:
  return path.partition(':')[2] or None


def read_items(benchmark: Benchmark, path: str | None = None, limit: int | None = None) -> list[Item]:
  """Items of `benchmark`, in the order of their source, without its categories `left_out`.

  Args:
    benchmark: a row of `TABLE`, or of `of_file`.
    path: the file; or a folder that holds it, by its name in the table, itself or one folder below; or 'tfds' or
      'tfds:DATA_DIR' for TFDS; or several of these, see `places`. None takes `source` as it is.
    limit: no more than so many, evenly spread over the file, because some files are sorted by category.

  Raises:
    UserError: there is no such file or dataset, or a record is malformed; it says where, and what to get.
  """
  tried = (benchmark.source,) if path is None else places(path)
  held = place(benchmark, tried)
  if held is None:
    raise _missing(benchmark, tried)
  if in_tfds(held):
    items = list(tfds_items.read(benchmark.tfds, data_dir=_data_dir(held)))
  else:
    items = list(_items_of_file(benchmark, held))
  items = [item for item in items if item.category not in benchmark.left_out]
  if not items:
    raise UserError(f'benchmark {benchmark.name}: {held} holds no items')
  if limit is None or limit >= len(items):
    return items
  return [items[i] for i in (np.arange(limit) * len(items)) // limit]


def _missing(benchmark: Benchmark, tried: Sequence[str]) -> UserError:
  if all(map(in_tfds, tried)):
    return UserError(f'TFDS has no benchmark {benchmark.name}; give a folder that holds {benchmark.source}')
  also = f", or prepare TFDS's {benchmark.tfds.partition(':')[0]} and give the path 'tfds'" if benchmark.tfds else ''
  if len(tried) == 1:
    said, there = f'{tried[0]} is no file and holds no {benchmark.source}', 'there'
  else:
    said, there = f'none of {", ".join(tried)} holds {benchmark.source}', 'into one of them'
  return UserError(
    f'benchmark {benchmark.name}: {said}; put the file of that name (shape {benchmark.shape}, as in LLM-Foundry) '
    f'{there}{also}'
  )


def _items_of_file(benchmark: Benchmark, path: str) -> Iterator[Item]:
  for number, record in shapes.read_jsonl(path):
    yield shapes.parse(record, benchmark.shape, f'line {number}', f'{path}, line {number}')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is put to the model for one item: each pair (contexts[i], answers[i]) is a way the text may go on.

  The whole text of a pair is `context + answer`: the answer begins with the white space that joins the two, and only
  its tokens count. Language modelling and generation have one pair, multiple choice one for each choice under the
  same context, a schema one for each context with the same answer.

  Attributes:
    gold: index of the right pair.
  """

  contexts: tuple[str, ...]
  answers: tuple[str, ...]
  gold: int = 0


def prompt(benchmark: Benchmark, items: Sequence[Item], index: int, seed: int = 0) -> Prompt:
  """The prompt of `items[index]`, after `benchmark.shots` solved others.

  Args:
    benchmark: its shots and delimiter.
    items: all of them: shots are drawn from here, never the item itself; fewer where there are not so many.
    index: of the item.
    seed: of the draw; the same shots for the same seed, benchmark, item and number of items.
  """
  item = items[index]
  preamble = ''.join(f'{solved(benchmark, items[i])}\n' for i in shots(benchmark, len(items), index, seed))
  joint = benchmark.delimiter.rstrip()
  space = benchmark.delimiter[len(joint) :]
  contexts = [preamble + context.rstrip() + joint for context in item.context_options or [item.context]]
  answers = [space + answer.strip() for answer in item.choices or [item.continuation]]
  pairs = list(itertools.product(contexts, answers))
  return Prompt(tuple(c for c, _ in pairs), tuple(a for _, a in pairs), max(item.gold, 0))


def shots(benchmark: Benchmark, count: int, index: int, seed: int) -> list[int]:
  """Which of `count` items are shown before item `index`: `benchmark.shots` different ones, itself not among them."""
  rng = prng.numpy_stream(seed, 'shots', benchmark.name, index)
  chosen = rng.choice(count - 1, size=min(benchmark.shots, count - 1), replace=False)
  return [int(i) + (int(i) >= index) for i in chosen]


def solved(benchmark: Benchmark, item: Item) -> str:
  """An item with its answer, as a shot."""
  context = item.context_options[item.gold] if item.context_options else item.context
  return f'{context.rstrip()}{benchmark.delimiter}{item.continuation.strip()}'

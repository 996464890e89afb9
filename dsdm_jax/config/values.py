"""Values with a form of their own: names of functions, arguments, sources, tasks, methods, parts of a mixture."""

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from dsdm_jax.config.methods import METHODS, method_name

MAX_BYTES, MAX_ROWS, MAX_FACTOR, MAX_PASSES = 2**50, 10**12, 10**6, 10**6  # larger values are typing errors
SOURCE_KINDS = ('text', 'jsonl', 'parquet', 'hf', 'hf_hub', 'tfds', 'seqio', 'tokens')
KINDS = ('source', 'docs', 'licences', 'metadata', 'data')
TASKS = ('docs', 'api_qa', 'cs_algorithms', 'next_code', 'brackets')
# Those of dsdm_jax/data/targets/benchmarks.py (a test compares them).
BENCHMARKS = tuple(
  'lambada squad jeopardy bigbench_cs_algorithms copa openbook_qa piqa cbt hellaswag winogrande boolq coqa news_qa '
  'bb_copy_logic bb_dyck_languages bb_operators arc_easy bb_qa_wikidata trivia_qa winograd arc_challenge '
  'squad_xquad'.split()
)
EVALUATED = 'evaluated'  # in leakage.benchmarks
MIX = 'mix'  # in selection.targets
BREADTH = 'breadth'  # the task of the pool's own held-out documents
PREFILTERS = (*(name for name, m in METHODS.items() if m.targeted and m.needs == ('text',)), 'random')
LONGEST_NAME = 100  # bytes of the name of a task, a checkpoint or an arm
CALLABLE = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*')


def must(holds: Callable[[Any], bool], rule: str) -> AfterValidator:
  """A validator that reports `rule` for values where `holds` is false."""

  def check(value: Any) -> Any:
    if not holds(value):
      raise PydanticCustomError('rule', '{rule}', {'rule': rule})
    return value

  check.__doc__ = rule
  return AfterValidator(check)


def is_function_name(name: str) -> bool:
  """Whether this is 'package.module:function' and Python finds the module; imports only the packages around it."""
  try:
    return bool(CALLABLE.fullmatch(name)) and importlib.util.find_spec(name.partition(':')[0]) is not None
  except (ImportError, ValueError):
    return False


def is_optimizer_name(name: str) -> bool:
  return re.fullmatch(r'[a-z]\w*(\.[a-z]\w*)*', name) is not None or is_function_name(name)


def is_regex(value: str) -> bool:
  try:
    re.compile(value)
  except (re.error, OverflowError, RecursionError):  # 'a{9999999999}', and brackets nested too deep
    return False
  return True


def is_address(value: str) -> bool:
  match = re.fullmatch(r'[^\s/]+:([1-9]\d{0,4})', value)
  return match is not None and int(match[1]) < 2**16


def is_jsonl(value: str) -> bool:
  return value.endswith('.jsonl')


def is_harness(value: str) -> bool:
  """Whether this names a task of lm-evaluation-harness: 'lm_eval:TASK' or 'lm_eval:TASK:SPLIT'."""
  return re.fullmatch(r'lm_eval:[\w.-]+(:(train|validation|test))?', value) is not None


def harness_parts(value: str) -> tuple[str, str]:
  """(task, split) of such a text; the split may be empty."""
  _, task, *split = value.split(':')
  return task, ''.join(split)


def source_parts(line: str) -> list[str]:
  """A line of `pool.sources`: kind and target, then its options. A bar that no `key=` follows belongs to the target."""
  return [part.strip() for part in re.split(r' \|(?=\s+\w+\s*=)', line)]


def is_source(line: str) -> bool:
  head = source_parts(line)[0]
  kind, _, target = head.partition(':')
  if kind in SOURCE_KINDS:
    return bool(target)
  return head == 'installed_packages' or is_function_name(head)


def are_rungs(values: tuple[str, ...]) -> bool:
  plain = [float(x) for x in values if re.fullmatch(r'\d{0,9}\.?\d*', x) and re.search(r'[1-9]', x)]
  return len(values) != 1 and len(set(plain)) == len(values) and all(0 < x <= MAX_FACTOR for x in plain)


def arguments(text: str) -> dict[str, Any]:
  """{'b1': 0.9, 'nesterov': True} of 'b1=0.9, nesterov=True'; values are Python literals.

  Raises:
    ValueError: the text has another form.
  """
  try:
    call = ast.parse(f'f({text})', mode='eval').body
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
      raise ValueError('only keyword arguments are accepted')
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
  except (SyntaxError, RecursionError, MemoryError) as error:  # the last two come from deep nesting
    raise ValueError(str(error)) from error


def are_arguments(text: str) -> bool:
  try:
    arguments(text)
  except ValueError:
    return False
  return True


def weights_differ(lines: Iterable[str]) -> bool:
  """Whether lines of `pool.sources` have unequal weights; the pool's reader rejects weights that are not numbers."""
  weights = (re.search(r' \| *weight *= *(\d*\.?\d+(?:e[+-]?\d+)?)', line) for line in lines)
  return len({float(match.group(1)) if match else 1.0 for match in weights}) > 1


def guarded(names: Iterable[str], evaluated: Iterable[str]) -> tuple[str, ...]:
  """`leakage.benchmarks` with the benchmarks of `evaluation.tasks` in the place of 'evaluated'.

  They are sorted by their names, not their paths: the order is part of the stage's identity, and files may move.
  """
  names = set(names)
  benchmarks = (
    {n for n in evaluated if n in BENCHMARKS or is_jsonl(n) or is_harness(n)} if EVALUATED in names else set()
  )
  return tuple(sorted((names - {EVALUATED}) | benchmarks, key=lambda name: (task_name(name), name)))


def task_name(task: str) -> str:
  """The name of an entry of `targets.tasks`: the stem of a path, 'lm_eval.arc_easy', any other entry as it is."""
  if is_harness(task):
    return re.sub('_+', '_', task).replace(':', '.')
  return PurePath(task).stem if is_jsonl(task) else task


def is_short_name(name: str) -> bool:
  """Whether files may be named after this and a little more: a file system takes 255 bytes."""
  return len(task_name(name).encode(errors='replace')) <= LONGEST_NAME


def have_distinct_names(tasks: Iterable[str]) -> bool:
  names = [task_name(task) for task in tasks]
  plain = all(re.fullmatch(r'[\w.-]+', name) and '__' not in name and name != MIX for name in names)
  return plain and len(names) == len(set(names))


def are_targets(targets: Iterable[str], tasks: Iterable[str]) -> bool:
  """Whether each target is 'mix', or the names of one or more of `tasks` joined by '+'."""
  names = set(map(task_name, tasks))
  split = [target.split('+') for target in targets if target != MIX]
  return all(len(parts) == len(set(parts)) and names.issuperset(parts) for parts in split)


def is_method(method: str) -> bool:
  return method in METHODS or is_function_name(method)


def are_methods(methods: tuple[str, ...]) -> bool:
  return 0 < len(methods) == len(set(map(method_name, methods))) and all(map(is_method, methods))


@dataclasses.dataclass(frozen=True)
class MixturePart:
  """A selection that gets a fixed share of a mixture: 'dsdm@docs rate=2 epochs=4 cap=8' or 'random rows=500'.

  Attributes:
    method: as in `selection.methods`, which need not list it.
    target: as in `selection.targets`; 'mix' by default.
    rate: relative to the other parts.
    epochs: passes over its rows, which set how many rows it gets; None where `rows` is set, or for `selection.epochs`.
    rows: number of rows; None where `epochs` sets it.
    cap: maximum passes over its rows; None for `selection.repeat_cap`.
  """

  method: str
  target: str
  rate: float
  epochs: float | None
  rows: int | None
  cap: int | None

  @classmethod
  def parse(cls, text: str) -> 'MixturePart | None':
    """The part that `text` describes; None for a wrong form, a number out of range, or a repeated option."""
    match = re.fullmatch(r'([^@\s]+)(?:@(\S+))?((?: +\w+=\S+)*)', text)
    if match is None:
      return None
    options = [option.split('=', 1) for option in match[3].split()]
    numbers: dict[str, Any] = {'rate': 1.0, 'epochs': None, 'rows': None, 'cap': None}
    most = {'rate': MAX_FACTOR, 'epochs': MAX_PASSES, 'rows': MAX_ROWS, 'cap': MAX_PASSES}
    names = [name for name, _ in options]
    if len(names) != len(set(names)) or {'epochs', 'rows'} <= set(names) or not set(names) <= set(most):
      return None
    for name, value in options:
      try:
        numbers[name] = int(value) if name in ('rows', 'cap') else float(value)
      except ValueError:
        return None
      if not 0 < numbers[name] <= most[name]:  # false for NaN too
        return None
    return cls(match[1], match[2] or MIX, **numbers)


def are_parts(texts: tuple[str, ...]) -> bool:
  parts = [part for part in map(MixturePart.parse, texts) if part is not None and is_method(part.method)]
  return len({(part.method, part.target) for part in parts}) == len(texts)


@dataclasses.dataclass(frozen=True)
class Prefilter:
  """`selection.prefilter`: 'lsa 3', a method that reads text alone, or random, and rows to keep per row of an arm."""

  method: str
  factor: float

  @classmethod
  def parse(cls, text: str) -> 'Prefilter | None':
    """None for a wrong form, another method, or a number that keeps fewer rows than an arm has."""
    match = re.fullmatch(r'(\w+) +(\d+(?:\.\d*)?)', text)
    if match is None or match[1] not in PREFILTERS or not 1 <= float(match[2]) <= MAX_FACTOR:
      return None
    return cls(match[1], float(match[2]))


def is_named_folder(text: str) -> bool:
  return re.fullmatch(r'[\w.-]+=.+', text) is not None


def is_topology(text: str) -> bool:
  return re.fullmatch(r'\w+:[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}', text) is not None


def brief(value: Any) -> str:
  """The start of `repr(value)`, on one line."""
  try:
    text = ' '.join(repr(value).split())
  except ValueError:  # Python does not write integers of thousands of digits
    return f'{type(value).__name__} of thousands of digits'
  return text if len(text) <= 200 else f'{text[:200]}…'


def is_rotary_scaling(numbers: tuple[float, ...]) -> bool:
  """(), (factor,) or (factor, low, high, length), see `lm.decoder.rotate`."""
  if len(numbers) not in (1, 4):
    return not numbers
  return numbers[0] > 1 and min(numbers) > 0 and max(numbers) <= 1e30 and (len(numbers) == 1 or numbers[1] < numbers[2])


def head_size(model: Any) -> int:
  """K, of the section `model` of the model."""
  return model.head_size or model.width // model.heads


def norm_epsilon(model: Any) -> float:
  """What the norms add to the variance, by default as GPT-2 and Llama do."""
  return model.norm_epsilon or (1e-6 if model.norm == 'rmsnorm' else 1e-5)

"""What the value of one config key must be, in a form that says so to a person."""

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
  """What one key's value must be: `text` follows '<key> = <value>: '."""

  holds: Callable[[Any], bool]
  text: str


def at_least(low: float) -> Rule:
  return Rule(lambda v: v >= low, f'must be at least {low}')


def above(low: float) -> Rule:
  return Rule(lambda v: v > low, f'must be greater than {low}')


def within(low: float, high: float, ends: str = '[]') -> Rule:
  """Range from `low` to `high`; '[' and ']' take in the end, '(' and ')' leave it out."""

  def holds(v: float) -> bool:
    return (v > low if ends[0] == '(' else v >= low) and (v < high if ends[1] == ')' else v <= high)

  said = {'[]': 'both taken in', '()': 'both left out', '[)': f'{high} left out', '(]': f'{low} left out'}
  return Rule(holds, f'must lie between {low} and {high} ({said[ends]})')


def one_of(*choices: str) -> Rule:
  return Rule(lambda v: v in choices, f'must be one of {", ".join(choices)}')


def some_of(*choices: str, also: Rule | None = None) -> Rule:
  """A tuple of at least one choice (or value for which `also` holds), none of them twice."""
  text = f'must be one or more of {", ".join(choices)}' + (f' or {also.text}' if also else '') + ', each once'

  def holds(values: tuple[str, ...]) -> bool:
    known = all(v in choices or (also is not None and also.holds(v)) for v in values)
    return known and 0 < len(values) == len(set(values))

  return Rule(holds, text)


def arguments(text: str) -> dict[str, Any]:
  """{'b1': 0.9, 'nesterov': True} of 'b1=0.9, nesterov=True'; values are Python literals.

  Raises:
    ValueError: the text is nothing of the kind.
  """
  try:
    call = ast.parse(f'f({text})', mode='eval').body
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
      raise ValueError('keyword arguments are meant')
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
  except (SyntaxError, RecursionError, MemoryError) as error:  # the latter two of what is nested too deep
    raise ValueError(str(error)) from error


def are_arguments(value: str) -> bool:
  try:
    arguments(value)
  except ValueError:
    return False
  return True


def either(a: Rule, b: Rule) -> Rule:
  return Rule(lambda v: a.holds(v) or b.holds(v), f'{a.text}, or {b.text}')


CALLABLE = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*')
NAME = Rule(
  lambda v: bool(CALLABLE.fullmatch(v)) and _module_exists(v),
  "must be 'package.module:function' with a module that Python finds from here",
)


def _module_exists(name: str) -> bool:
  """Whether Python finds the module of 'package.module:function'; imports the packages around it but not the module."""
  try:
    return importlib.util.find_spec(name.partition(':')[0]) is not None
  except (ImportError, ValueError):
    return False

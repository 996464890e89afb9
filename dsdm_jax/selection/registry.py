"""What a selector is, and the selectors by name.

A selector of your own is one function in one file,

    def shortest(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
      ...
      return Selection.of(rows, why='short')

and one line of config: `selection.methods = ('dsdm', 'random', 'my_package.my_file:shortest')`. Under `@selector` it
can also say that it ignores targets, or that it draws nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from dsdm_jax.config.validate import load_callable
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection.candidates import Candidates, Target


@dataclasses.dataclass(frozen=True)
class Budget:
  """How much an arm may train on.

  Attributes:
    examples: rows of a targeted selection; epochs: passes over them.
    repeat_cap: visits of one row in a whole training, at most.
  """

  examples: int
  epochs: int
  repeat_cap: int

  @property
  def total(self) -> int:
    """Examples that every arm trains on, repeats counted."""
    return self.examples * self.epochs


Select = Callable[[Candidates, Target, Budget, int], Selection]
_F = TypeVar('_F', bound=Select)


@dataclasses.dataclass(frozen=True)
class Selector:
  """A way to choose rows.

  Attributes:
    select: (pool, target, budget, seed) → Selection, the same for the same arguments.
    targeted: it depends on the target.
    seeded: it draws, so that each seed has rows of its own.
  """

  select: Select
  targeted: bool
  seeded: bool


SELECTORS: dict[str, Selector] = {}


def selector(name: str, *, targeted: bool, seeded: bool) -> Callable[[_F], _F]:
  """Registers a selector under `name`; UserError where another function has it."""

  def register(select: _F) -> _F:
    known = SELECTORS.get(name)
    if known is not None and _place(known.select) != _place(select):
      raise UserError(f'{_place(select)} is called {name!r} as {_place(known.select)} is; rename the one that is yours')
    SELECTORS[name] = Selector(select, targeted, seeded)
    return select

  return register


def _place(select: Select) -> str:
  return f'{select.__module__}:{select.__qualname__}'


def find(method: str) -> Selector:
  """The selector of an entry of `selection.methods`; a stranger's plain function counts as targeted and seeded.

  Raises:
    UserError: the entry is 'package.module:function' and there is no such function.
  """
  if ':' not in method:
    return SELECTORS[method]
  function = load_callable(method, 'selection.methods')
  known = (known for known in SELECTORS.values() if known.select is function)
  return next(known, Selector(function, targeted=True, seeded=True))

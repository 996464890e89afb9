"""What each selection cost by itself, where several share what is made once."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_T = TypeVar('_T')


@dataclasses.dataclass
class Account:
  """Seconds and FLOP of a piece of work, without the pieces that stand in accounts of their own.

  Attributes:
    asked: keys of what was made once and used here, directly or not.
  """

  seconds: float = 0.0
  flop: float = 0.0
  asked: set[Any] = dataclasses.field(default_factory=set)

  def add(self, seconds: float, flop: float) -> None:
    self.seconds += seconds
    self.flop += flop


class Ledger:
  """Makes what is shared once, and charges it to each that asks for it, as if it had made it alone.

  Args:
    flop: operations counted so far, by whoever counts them.
  """

  def __init__(self, flop: Callable[[], float] = lambda: 0.0):
    self._flop = flop
    self._values: dict[Any, Any] = {}
    self._shared: dict[Any, Account] = {}
    self._open: list[Account] = []

  def once(self, key: Any, make: Callable[[], _T]) -> _T:
    """`make()`, kept."""
    if key not in self._values:
      with self._account() as account:
        self._values[key] = make()
      self._shared[key] = account
    if self._open:
      self._open[-1].asked |= {key, *self._shared[key].asked}
    return self._values[key]

  def charged(self, work: Callable[[], _T]) -> tuple[_T, dict[str, float]]:
    """(`work()`, its 'seconds' and 'flop' with all that it asked for, whoever had that made)."""
    with self._account() as own:
      result = work()
    parts = [own, *(self._shared[key] for key in own.asked)]
    return result, {'seconds': sum(p.seconds for p in parts), 'flop': sum(p.flop for p in parts)}

  @contextlib.contextmanager
  def _account(self) -> Iterator[Account]:
    account, began, before = Account(), time.monotonic(), self._flop()
    self._open.append(account)
    try:
      yield account
    finally:
      self._open.pop()
    seconds, flop = time.monotonic() - began, self._flop() - before
    account.add(seconds, flop)
    if self._open:  # what is charged here is not charged there
      self._open[-1].add(-seconds, -flop)

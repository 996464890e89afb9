"""What a selector is, and the selectors by name. A selector of your own is a file with one decorated function."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from dsdm_jax.core.errors import UserError


class ScoreTable(Protocol):
  def score_N(self, target: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Request:
  """What a selector may use.

  Attributes:
    num_rows: N, rows of the pool.
    target: name of a task, 'mix', or tasks joined by '+'.
    examples: rows wanted; epochs: passes over them. Their product is the budget of every arm.
    seed: of whatever the selector draws.
    scores: the datamodel's scores.
  """

  num_rows: int
  target: str
  examples: int
  epochs: int
  seed: int
  scores: ScoreTable

  @property
  def budget(self) -> int:
    return self.examples * self.epochs


Select = Callable[[Request], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Selector:
  """A way to choose rows.

  Attributes:
    select: Request → int64 rows.
    targeted: it depends on the target.
    seeded: it draws, so that each seed has rows of its own.
  """

  select: Select
  targeted: bool
  seeded: bool


SELECTORS: dict[str, Selector] = {}


def selector(name: str, *, targeted: bool, seeded: bool) -> Callable[[Select], Select]:
  """Registers a function Request → rows under `name`."""

  def register(select: Select) -> Select:
    SELECTORS[name] = Selector(select, targeted, seeded)
    return select

  return register


def top(score_N: np.ndarray, count: int) -> np.ndarray:
  """The `count` rows of highest score, best first; equal scores go to the lower row.

  Raises:
    UserError: more rows are wanted than there are, or a score is not a number.
  """
  if count > len(score_N):
    raise UserError(
      f'{count} rows are wanted and the pool has {len(score_N)}; lower selection.examples or raise pool.max_bytes'
    )
  if not np.isfinite(score_N).all():
    raise UserError(f'the score of row {int(np.argmin(np.isfinite(score_N)))} is not a number; make the datamodel anew')
  order = np.argpartition(-score_N, count - 1)[:count] if count < len(score_N) else np.arange(len(score_N))
  # argpartition cuts through ties as it likes: take all that are strictly better, then the lowest rows of the tie.
  cut = score_N[order].min()
  better = np.flatnonzero(score_N > cut)
  tied = np.flatnonzero(score_N == cut)[: count - len(better)]
  rows = np.concatenate([better, tied])
  return rows[np.lexsort((rows, -score_N[rows].astype(np.float64)))].astype(np.int64)

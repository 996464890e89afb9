"""Random selection, the baseline that counts."""

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.registry import Budget, selector


@selector('random', targeted=False, seeded=True)
def random(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """k rows at random, trained on for as many epochs as a targeted selection."""
  del target
  return Selection.of(draw(pool.num_rows, 'random', budget.examples, seed))


@selector('random_one_epoch', targeted=False, seeded=True)
def random_one_epoch(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """As many rows as the budget holds, each seen once: what pretraining without selection does.

  Raises:
    UserError: the pool has fewer rows than the budget.
  """
  del target
  return Selection.of(draw(pool.num_rows, 'random_one_epoch', budget.total, seed))


def draw(num_rows: int, name: str, count: int, seed: int, among: np.ndarray | None = None) -> np.ndarray:
  """`count` rows of the pool, or of the rows `among` it, without replacement, sorted.

  Raises:
    UserError: there are fewer.
  """
  there = num_rows if among is None else len(among)
  if count > there:
    left = f'the pool has {there}' if among is None else f'{there} are left of the {num_rows} of the pool'
    raise UserError(
      f"'{name}' needs {count} rows and {left}; lower selection.examples or selection.epochs, or raise pool.max_bytes"
    )
  rows = prng.numpy_stream(seed, 'selection', name).choice(there, count, replace=False)
  return np.sort(rows if among is None else among[rows]).astype(np.int64)

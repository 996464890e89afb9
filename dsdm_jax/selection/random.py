"""Random selection, the baseline that counts."""

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.core.errors import UserError
from dsdm_jax.selection.registry import Request, selector


@selector('random', targeted=False, seeded=True)
def random(request: Request) -> np.ndarray:
  """k rows at random, trained on for as many epochs as a targeted selection."""
  return draw(request, 'random', request.examples)


@selector('random_one_epoch', targeted=False, seeded=True)
def random_one_epoch(request: Request) -> np.ndarray:
  """As many rows as the budget holds, each seen once: what pretraining without selection does.

  Raises:
    UserError: the pool has fewer rows than the budget.
  """
  return draw(request, 'random_one_epoch', request.budget)


def draw(request: Request, name: str, count: int) -> np.ndarray:
  if count > request.num_rows:
    raise UserError(
      f"'{name}' needs {count} rows and the pool has {request.num_rows}; lower selection.examples or "
      'selection.epochs, or raise pool.max_bytes'
    )
  rows = prng.numpy_stream(request.seed, 'selection', name).choice(request.num_rows, count, replace=False)
  return np.sort(rows).astype(np.int64)

"""Controls that tell the real thing from a toy: arms that must not win."""

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.selection.random import draw
from dsdm_jax.selection.registry import Request, selector, top


@selector('dsdm_shifted', targeted=True, seeded=False)
def dsdm_shifted(request: Request) -> np.ndarray:
  """DsDm with each score given to the next row, as an index off by one would. Rows are shuffled, so the gain goes."""
  return top(np.roll(request.scores.score_N(request.target), 1), request.examples)


@selector('dsdm_permuted', targeted=True, seeded=False)
def dsdm_permuted(request: Request) -> np.ndarray:
  """DsDm with its scores permuted: the same distribution of scores and no information."""
  rng = prng.numpy_stream(request.seed, 'selection', 'permuted')
  return top(rng.permutation(request.scores.score_N(request.target)), request.examples)


@selector('random_again', targeted=False, seeded=True)
def random_again(request: Request) -> np.ndarray:
  """A second arm of random rows: a difference to `random` would be a false alarm of the statistics."""
  return draw(request, 'random_again', request.examples)

"""DsDm: the rows that the datamodel predicts to help the target most (Engstrom et al. 2024, section 3.2, eq. 5)."""

import numpy as np

from dsdm_jax.selection.registry import Request, selector, top


@selector('dsdm', targeted=True, seeded=False)
def dsdm(request: Request) -> np.ndarray:
  """The k rows of highest score: the exact minimiser of a linear datamodel over subsets of size k."""
  return top(request.scores.score_N(request.target), request.examples)


@selector('bottom', targeted=True, seeded=False)
def bottom(request: Request) -> np.ndarray:
  """Control: the k rows of lowest score. If scores mean anything, this is worse than random."""
  return top(-request.scores.score_N(request.target), request.examples)

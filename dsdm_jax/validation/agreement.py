"""How well scores predict the outcome of training: the linear datamodeling score, with intervals.

The prediction for a subset S is Σ_{n∈S} s(n, t), the truth f_t(θ_S). LDS is Spearman's correlation of the two over
subsets, averaged over target examples (Ilyas et al., arXiv 2202.00622; TRAK, arXiv 2303.14186, section 2).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.stats

from dsdm_jax.core import prng


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Attributes: LDS, and its interval over subsets and target documents."""

  lds: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.lds:.2f} [{self.low:.2f}, {self.high:.2f}]'


class Resamples:
  """Weights of subsets and of target examples in bootstrap resamples, shared by all predictors that are compared.

  Args:
    seed: of the random streams.
    subsets: S.
    document_T: document of each target example; documents are resampled, as examples of one document are correlated.
    count: number of resamples, R.
    confidence: of intervals.
  """

  def __init__(self, seed: int, subsets: int, document_T: Sequence[str], count: int, confidence: float):
    generator = prng.numpy_stream(seed, 'validation', 'bootstrap', subsets)
    self.subset_RS = generator.multinomial(subsets, np.full(subsets, 1 / subsets), size=count) / subsets
    names, index_T = np.unique(list(document_T), return_inverse=True)
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)[:, index_T]
    self.target_RT = drawn / drawn.sum(axis=1, keepdims=True)
    self._confidence = confidence

  def interval(self, value_R: np.ndarray) -> tuple[float, float]:
    tail = (1 - self._confidence) / 2
    low, high = np.quantile(value_R, [tail, 1 - tail])
    return float(low), float(high)


def lds(predicted_ST: np.ndarray, truth_ST: np.ndarray, resamples: Resamples) -> Agreement:
  """LDS of predictions, both [subsets, target examples]; a constant column counts as no correlation."""
  mean, spread_R = _lds(predicted_ST, truth_ST, resamples)
  return Agreement(mean, *resamples.interval(spread_R))


def gain(better_ST: np.ndarray, worse_ST: np.ndarray, truth_ST: np.ndarray, resamples: Resamples) -> Agreement:
  """Difference in LDS of two predictions, over the same resamples."""
  first, first_R = _lds(better_ST, truth_ST, resamples)
  second, second_R = _lds(worse_ST, truth_ST, resamples)
  return Agreement(first - second, *resamples.interval(first_R - second_R))


def ceiling(truth_RST: np.ndarray) -> float | None:
  """Highest LDS against the mean over R seeds that a perfect prediction of what the seeds share can have.

  √(R r / (1 + (R−1) r)) by Spearman and Brown, where the correlation r of single seeds follows from that of two halves
  of the seeds; 0 where the halves do not agree, r ≤ 0. None for one seed.
  """
  seeds = len(truth_RST)
  if seeds < 2:
    return None
  half = seeds // 2
  first, second = truth_RST[:half].mean(0), truth_RST[half : 2 * half].mean(0)
  x, y = (scipy.stats.rankdata(value_ST, axis=0) for value_ST in (first, second))
  r = float(np.mean(_correlation(x, y, np.full((1, len(first)), 1 / len(first)))))
  if r <= 0:  # the formula has a pole below zero, and is positive beyond it
    return 0.0
  single = r / (half - (half - 1) * r)  # Spearman and Brown, from the mean of `half` seeds to one
  return float(np.sqrt(seeds * single / (1 + (seeds - 1) * single)))


def _lds(predicted_ST: np.ndarray, truth_ST: np.ndarray, resamples: Resamples) -> tuple[float, np.ndarray]:
  x, y = (scipy.stats.rankdata(value_ST, axis=0) for value_ST in (predicted_ST, truth_ST))
  even = np.full((1, len(x)), 1 / len(x))
  by_target_RT = _correlation(x, y, resamples.subset_RS)
  return float(_correlation(x, y, even).mean()), (by_target_RT * resamples.target_RT).sum(axis=1)


def _correlation(x_ST: np.ndarray, y_ST: np.ndarray, weight_RS: np.ndarray) -> np.ndarray:
  """Weighted correlation over subsets, for each weighting and target: [R, T]."""
  x, y = x_ST - x_ST.mean(0), y_ST - y_ST.mean(0)
  mean_x, mean_y = weight_RS @ x, weight_RS @ y
  product = weight_RS @ (x * y) - mean_x * mean_y
  scale = (weight_RS @ x**2 - mean_x**2) * (weight_RS @ y**2 - mean_y**2)
  return np.where(scale > 1e-9, product / np.sqrt(np.maximum(scale, 1e-9)), 0.0)

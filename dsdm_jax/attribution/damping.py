"""Choice of λ by agreement with the measured outputs of held-out proxies.

Two proxies a and b, trained on subsets A and B, differ on a target example by f(θ_a) − f(θ_b). The datamodel of a third
proxy predicts that difference as Σ_{n∈A} s(n) − Σ_{n∈B} s(n). The choice is the relative damping whose predictions
correlate best over target examples. The pair takes no part in the scores, so nothing is fitted to itself. Agreement
between proxies alone would not do: it is largest where damping leaves only the mean gradient.

Few pairs make a noisy curve: a damping other than the fixed one is chosen only if it is better by more than a standard
error over target documents.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

# Relative to the fixed damping: from 1/100 to 100 times, half a decade apart.
FACTORS = tuple(float(10 ** (i / 2)) for i in range(-4, 5))
FIXED = len(FACTORS) // 2


@dataclasses.dataclass(frozen=True)
class Choice:
  """Attributes: the chosen damping; agreement of each candidate; the best, its gain over the fixed one, its error."""

  damping: float
  agreement: Mapping[float, float]
  best: float
  gain: float
  gain_error: float

  def as_json(self) -> dict[str, Any]:
    agreement = {f'{d:.6g}': a for d, a in self.agreement.items()}
    error = self.gain_error if np.isfinite(self.gain_error) else None  # JSON has no infinity
    return dataclasses.asdict(self) | {'agreement': agreement, 'gain_error': error}


def held_out_pairs(proxies: int, each: int = 1) -> list[tuple[int, int, int]]:
  """(scorer, a, b): a checkpoint, of `each` per proxy, and the two other proxies whose difference it predicts."""
  pairs = list(itertools.combinations(range(proxies), 2))
  return [(c, a, b) for c in range(proxies * each) for a, b in pairs if c // each not in (a, b)]


def choose(
  fixed: float,
  candidates: Sequence[float],
  predicted: Sequence[np.ndarray],
  observed: Sequence[np.ndarray],
  weight_RT: Sequence[np.ndarray],
) -> Choice:
  """The damping of best agreement, or the fixed one if none is clearly better.

  Args:
    fixed: one of the candidates, the default.
    candidates: relative dampings, K of them.
    predicted: for each task, differences in sums of scores, [K, pairs, T].
    observed: for each task, differences in outputs, [pairs, T].
    weight_RT: for each task, resampled weights of its examples; their spread is the error of the gain.

  Returns:
    The choice; agreement is the mean over tasks and pairs of the correlation of ranks over a task's examples.
  """
  ranks = [(_ranks(p), _ranks(o)) for p, o in zip(predicted, observed, strict=True)]
  even = [np.full((1, p.shape[-1]), 1 / p.shape[-1]) for p in predicted]
  agreement_K = _agreement(ranks, even)[:, 0]
  base = list(candidates).index(fixed)
  best = int(np.argmax(agreement_K))
  resampled_KR = _agreement(ranks, weight_RT)
  gain_R = resampled_KR[best] - resampled_KR[base]
  gain = float(agreement_K[best] - agreement_K[base])
  error = float(gain_R.std(ddof=1)) if gain_R.size > 1 else float('inf')
  chosen = best if gain > error else base
  agreement = {float(c): float(a) for c, a in zip(candidates, agreement_K, strict=True)}
  return Choice(float(candidates[chosen]), agreement, float(candidates[best]), gain, error)


def _ranks(values: np.ndarray) -> np.ndarray:
  return scipy.stats.rankdata(values, axis=-1)


def _agreement(ranks: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[np.ndarray]) -> np.ndarray:
  """Weighted correlation, averaged over pairs and then tasks: [K, R] for R weightings."""
  by_task = []
  for (predicted_KPT, observed_PT), weight_RT in zip(ranks, weights, strict=True):
    x, y = predicted_KPT, observed_PT
    mean_x, mean_y = np.einsum('kpt,rt->kpr', x, weight_RT), np.einsum('pt,rt->pr', y, weight_RT)
    product = np.einsum('kpt,pt,rt->kpr', x, y, weight_RT, optimize=True) - mean_x * mean_y
    var_x = np.einsum('kpt,rt->kpr', x**2, weight_RT) - mean_x**2
    var_y = np.einsum('pt,rt->pr', y**2, weight_RT) - mean_y**2
    scale = np.sqrt(np.maximum(var_x * var_y, 0))
    by_task.append(np.where(scale > 0, product / np.where(scale > 0, scale, 1), 0).mean(axis=1))
  return np.mean(by_task, axis=0)

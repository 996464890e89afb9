"""A scaling law of the ladder's held-out losses, as a check of how far its rungs are from the best. Pure functions.

    L(N, D) = E + A / N^α + B / D'^β

N is the number of parameters, D' the effective tokens. Tokens that repeat are worth less than new ones, each pass less
than the one before: with U different tokens, D' = U (1 + R (1 − exp(−(D/U − 1) / R))) for D > U, else D
(Hoffmann et al. 2022, arXiv 2203.15556, eq. 2; Muennighoff et al. 2023, arXiv 2305.16264, eq. 5). R is their
estimate: a ladder with few repeats says nothing about it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REPEATS = 15.387756  # R_D* of Muennighoff et al.
FEWEST = 6  # points for five parameters
_EXPONENTS = np.geomspace(0.03, 3, 40)
_SIZES = 64  # at which the best one is looked for
_COMPUTE = np.geomspace(1 / 16, 4, 385)  # shares of a rung's compute


def effective_tokens(tokens: float, unique: float) -> float:
  """D' for D tokens of which at most `unique` are different."""
  if tokens <= unique:
    return tokens
  return unique * (1 + REPEATS * (1 - math.exp(-(tokens / unique - 1) / REPEATS)))


@dataclasses.dataclass(frozen=True)
class Law:
  """Attributes: E, A, α, B, β of the module's formula; rms, of the residuals in nats; points, that were fitted."""

  least: float
  of_size: float
  size_exponent: float
  of_data: float
  data_exponent: float
  rms: float
  points: int

  def loss(self, parameters: float, effective: float) -> float:
    size, data = parameters**-self.size_exponent, effective**-self.data_exponent
    return self.least + self.of_size * size + self.of_data * data


def fit(parameters_P: np.ndarray, effective_P: np.ndarray, loss_P: np.ndarray) -> Law | None:
  """Least squares with E, A, B ≥ 0; None for fewer than `FEWEST` points, or fewer than three values of N or D'.

  For given exponents the rest is linear, so only these are searched: on a grid, then from its best point.
  """
  from scipy import optimize

  few = min(len(np.unique(parameters_P)), len(np.unique(effective_P))) < 3
  if len(loss_P) < FEWEST or few or not np.isfinite(loss_P).all():
    return None
  middle_n, middle_d = (math.exp(np.log(x).mean()) for x in (parameters_P, effective_P))

  def solved(exponents: Sequence[float]) -> tuple[np.ndarray, float]:
    a, b = exponents
    design_P3 = np.stack([np.ones(len(loss_P)), (parameters_P / middle_n) ** -a, (effective_P / middle_d) ** -b], 1)
    return optimize.nnls(design_P3, loss_P)

  def residual(logarithms: np.ndarray) -> float:
    return float(solved(np.exp(np.clip(logarithms, math.log(_EXPONENTS[0]), math.log(_EXPONENTS[-1]))))[1])

  start = min(((a, b) for a in _EXPONENTS for b in _EXPONENTS), key=lambda exponents: solved(exponents)[1])
  found = optimize.minimize(
    residual, np.log(start), method='Nelder-Mead', options={'xatol': 1e-6, 'fatol': 1e-12, 'maxiter': 2_000}
  )
  a, b = np.exp(np.clip(found.x, math.log(_EXPONENTS[0]), math.log(_EXPONENTS[-1])))
  (least, of_size, of_data), norm = solved((a, b))
  return Law(
    float(least),
    float(of_size * middle_n**a),
    float(a),
    float(of_data * middle_d**b),
    float(b),
    float(norm / math.sqrt(len(loss_P))),
    len(loss_P),
  )


def check(index: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """The `law` entry of `multiplier.json`; None where there are too few sizes to fit one.

  The fit is over the best rate of every rung and size. `rungs` compares each rung with the law's best model of the same
  compute, among sizes between the smallest and the largest that were tried: `best` is its loss, `compute` the share of
  the rung's compute with which the law's best model reaches the rung's loss.

  Args:
    index: entries of all models that were tried, as in the `index.json` of the stage `ladder`.
  """
  best: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
  for entry in index:
    if entry['held_out_loss'] is None:
      continue
    of_size = best.setdefault((entry['rung'], entry['parameters']), [])
    if of_size and entry['rate'] != of_size[0]['rate']:
      if entry['chosen'] or (entry['held_out_loss'] < of_size[0]['held_out_loss'] and not of_size[0]['chosen']):
        of_size[:] = [entry]
    else:
      of_size.append(entry)
  points = [same[0] for same in best.values()]
  loss_P = np.array([np.mean([entry['held_out_loss'] for entry in same]) for same in best.values()])
  unique = max((e['tokens'] / e['epochs'] for e in points if e['epochs'] > 1), default=math.inf)
  n_P = np.array([float(e['parameters']) for e in points])
  d_P = np.array([effective_tokens(e['tokens'], unique) for e in points])
  law = fit(n_P, d_P, loss_P)
  if law is None:
    return None
  # FLOP for a token is smooth in the size.
  order = np.argsort(n_P)
  log_n, log_cost = np.log(n_P[order]), np.log([points[i]['flop'] / points[i]['tokens'] for i in order])
  sizes = np.geomspace(n_P.min(), n_P.max(), _SIZES)
  cost = np.exp(np.interp(np.log(sizes), log_n, log_cost))

  def best_at(flop: float) -> float:
    return min(law.loss(n, effective_tokens(flop / c, unique)) for n, c in zip(sizes, cost, strict=True))

  rungs = []
  for number in sorted({entry['rung'] for entry in index}):
    same = [e for e in index if e['rung'] == number and e['chosen']]
    flop, loss = same[0]['flop'], float(np.mean([e['held_out_loss'] for e in same]))
    reached = [share for share in _COMPUTE if best_at(share * flop) <= loss]
    share = float(reached[0]) if reached else None
    rungs.append({'factor': same[0]['factor'], 'flop': flop, 'loss': loss, 'best': best_at(flop), 'compute': share})
  facts = {'least': law.least, 'of_size': law.of_size, 'size_exponent': law.size_exponent, 'of_data': law.of_data}
  return facts | {'data_exponent': law.data_exponent, 'rms': law.rms, 'points': law.points, 'rungs': rungs}

"""Intervals for the difference between two arms, over training seeds and evaluation items at once.

**Model.** Arm a, seed s, item i of document g; y is the log-probability of the right answer, in nats:

    y[a,s,i] = μ[a] + item[i] + seed[a,s] + taste[a,i] + noise[a,s,i]

`item` is how hard the item is; every arm meets the same items, so it cancels in a difference. `seed` is what another
initialisation, another order of the data and, for the random arms, another draw of the subset would have changed for
all items alike. `taste` is how much arm a suits item i, whatever the seed. All but μ are random with mean zero.

**Estimate.** The difference of grand means. With D[i] the difference between the two arms' means over seeds at item i,
S_a seeds in arm a, n items, and MS the mean squares of arm a's own seeds × items table:

    V = v_I + Σ_a max(0, v_S[a] − v_E[a])
    v_I    = max(var_i(D)/n, the same clustered by document, v_E[method] + v_E[baseline])
    v_S[a] = variance over seeds of the mean over items / S_a
    v_E[a] = MS of the interaction of seed and item / (S_a n)

v_E is taken off once because it sits both in v_I and in v_S (Cornfield and Tukey's expected mean squares). A variance
component that comes out negative is set to zero, so V can only be too large for it: the interval is conservative. An
arm with a single seed borrows v_S and v_E of the other arm, times that arm's seeds; if both have one, the interval
covers items only and says so. Degrees of freedom after Satterthwaite: V² over the sum of the squared parts, each
divided by its own degrees of freedom; then a t interval.

**Pairing of seeds.** Arms with the same seed share their initialisation; which data stand where in the order differs
because the data do. `paired_seeds=False` takes the arms' seeds for independent and so has about 2(S−1) degrees of
freedom for them where pairing has S−1. At three seeds that makes t 2.8 and not 4.3, which only a correlation between
arms above 0.58 would make up for; and if the shared initialisation makes arms move together, the unpaired interval is
merely too wide. `paired_seeds=True` applies the one-arm formula to the table of differences; it pays in models trained
so briefly that their initialisation still shows. Decide by the correlation between two random arms, never by which of
the two favours the method.

**What the interval does not cover.** Arms whose selection is deterministic (DsDm, bottom-k) were selected once, with
one set of proxies: it speaks about new seeds and new items for *that* selection, not about new selections.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate with its interval.

  Attributes:
    difference: the estimate, in the unit of the values.
    low: lower end of the interval.
    high: upper end of the interval.
    p_value: two-sided, for the true difference being zero; it is below 1 − confidence exactly when the interval
      excludes zero.
    degrees_of_freedom: after Satterthwaite; inf where nothing varies.
    basis: what the interval generalises to: 'seeds and items', 'seeds and items, one arm with borrowed seed variance',
      or 'items only' (one seed everywhere: noise between seeds is not in it).
  """

  difference: float
  low: float
  high: float
  p_value: float
  degrees_of_freedom: float
  basis: str = 'seeds and items'

  def excludes_zero(self) -> bool:
    return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class _Part:
  """A share of the variance of an estimate, with its degrees of freedom."""

  variance: float
  degrees: float


def crossed_difference(
  method_SI: np.ndarray,
  baseline_SI: np.ndarray,
  paired_seeds: bool = False,
  confidence: float = 0.95,
  documents_I: np.ndarray | None = None,
) -> Interval:
  """Difference of two arms' means with an interval over seeds and items (see the module's text for the formula).

  Args:
    method_SI: values of one arm, a row per seed and a column per item; cast to float64.
    baseline_SI: values of the other arm at the same items; it may have another number of seeds unless they are paired.
    paired_seeds: row s of both arms belongs together; False takes all rows for independent.
    confidence: coverage of the interval, above 0 and below 1.
    documents_I: the document of each item, any hashable dtype; items of one document are not taken for independent.
      None takes each item for a document of its own.

  Returns:
    The interval for mean(method) − mean(baseline). Where nothing varies (identical arms), low = difference = high and
    the p-value is 1 if the difference is zero, otherwise 0.

  Raises:
    ValueError: fewer than two items or documents, items that do not match, values that are not finite, paired arms with
      unequal seeds, or confidence outside (0, 1).
  """
  method_SI = np.asarray(method_SI, np.float64)
  baseline_SI = np.asarray(baseline_SI, np.float64)
  _check(method_SI, baseline_SI, paired_seeds, confidence)
  if paired_seeds:
    tables = [method_SI - baseline_SI]
    difference_I = tables[0].mean(axis=0)
  else:
    tables = [method_SI, baseline_SI]
    difference_I = method_SI.mean(axis=0) - baseline_SI.mean(axis=0)

  seeds, interactions, basis = _seed_parts(tables)
  items = _item_part(difference_I, documents_I)
  interaction = sum(part.variance for part in interactions)
  parts = [_Part(max(items.variance, interaction), items.degrees), *seeds, *interactions]
  excess = sum(max(0.0, s.variance - e.variance) for s, e in zip(seeds, interactions, strict=True))
  variance = parts[0].variance + excess
  return _interval(float(difference_I.mean()), variance, parts, confidence, basis)


def mean_interval(values_SI: np.ndarray, confidence: float = 0.95, documents_I: np.ndarray | None = None) -> Interval:
  """Mean of one arm over seeds and items, with the interval of `crossed_difference` against a constant zero.

  Much wider than the intervals of differences: how hard the items are does not cancel.
  """
  return crossed_difference(values_SI, np.zeros_like(values_SI), True, confidence, documents_I)


def holm(p_values: Sequence[float]) -> np.ndarray:
  """p-values adjusted by Holm's step-down rule, in the order given: float64, at most 1.

  Calling those below α findings keeps the chance of even one false finding below α, whatever the dependence.
  """
  p_N = np.asarray(p_values, np.float64)
  order_N = np.argsort(p_N, kind='stable')
  factors_N = np.arange(len(p_N), 0, -1)
  adjusted_N = np.empty_like(p_N)
  adjusted_N[order_N] = np.minimum(1.0, np.maximum.accumulate(p_N[order_N] * factors_N))
  return adjusted_N


def _check(method_SI: np.ndarray, baseline_SI: np.ndarray, paired: bool, confidence: float) -> None:
  if method_SI.ndim != 2 or baseline_SI.ndim != 2 or 0 in (len(method_SI), len(baseline_SI)):
    raise ValueError(f'want [seeds, items], got {method_SI.shape} and {baseline_SI.shape}')
  if method_SI.shape[1] != baseline_SI.shape[1]:
    raise ValueError(f'both arms need the same items, got {method_SI.shape[1]} and {baseline_SI.shape[1]}')
  if method_SI.shape[1] < 2:
    raise ValueError('an interval over items needs at least two of them')
  if paired and len(method_SI) != len(baseline_SI):
    raise ValueError(f'paired seeds need equal numbers, got {len(method_SI)} and {len(baseline_SI)}')
  if not 0 < confidence < 1:
    raise ValueError(f'confidence must lie between 0 and 1, got {confidence}')
  if not (np.isfinite(method_SI).all() and np.isfinite(baseline_SI).all()):
    raise ValueError('values must be finite')


def _seed_parts(tables: list[np.ndarray]) -> tuple[list[_Part], list[_Part], str]:
  """v_S and v_E of each table [S, I] with several rows; a table of one row borrows those of the first such table."""
  seeds, interactions, lender_rows = [], [], []
  for table_SI in tables:
    s, n = table_SI.shape
    if s == 1:
      continue
    mean_S = table_SI.mean(axis=1)
    residual_SI = table_SI - mean_S[:, None] - table_SI.mean(axis=0)[None, :] + table_SI.mean()
    degrees = (s - 1) * (n - 1)
    seeds.append(_Part(float(mean_S.var(ddof=1)) / s, s - 1))
    interactions.append(_Part(float((residual_SI**2).sum()) / degrees / (s * n), degrees))
    lender_rows.append(s)
  if not seeds:
    return [], [], 'items only'
  if len(seeds) == len(tables):
    return seeds, interactions, 'seeds and items'
  # One estimate serves both arms, so it stays one part with the lender's degrees of freedom.
  for parts in (seeds, interactions):
    parts[0] = _Part(parts[0].variance * (1 + lender_rows[0]), parts[0].degrees)
  return seeds, interactions, 'seeds and items, one arm with borrowed seed variance'


def _item_part(difference_I: np.ndarray, documents_I: np.ndarray | None) -> _Part:
  """v_I: the larger of the variance of the mean over independent items and over independent documents."""
  n = len(difference_I)
  variance = float(difference_I.var(ddof=1)) / n
  if documents_I is None:
    return _Part(variance, n - 1)
  if len(documents_I) != n:
    raise ValueError(f'documents_I has {len(documents_I)} entries for {n} items')
  _, document_I = np.unique(documents_I, return_inverse=True)
  count = int(document_I.max()) + 1
  if count < 2:
    raise ValueError('an interval over items needs items of at least two documents')
  residual_G = np.bincount(document_I, weights=difference_I - difference_I.mean(), minlength=count)
  clustered = count / (count - 1) * float((residual_G**2).sum()) / n**2
  return _Part(max(variance, clustered), count - 1)


def _interval(difference: float, variance: float, parts: list[_Part], confidence: float, basis: str) -> Interval:
  # Rounding leaves about 1e-32 of squares where nothing varies.
  if variance <= np.finfo(np.float64).eps ** 2 * max(1.0, difference**2):
    p_value = 1.0 if difference == 0 else 0.0
    return Interval(difference, difference, difference, p_value, float('inf'), basis)
  degrees = variance**2 / sum(part.variance**2 / part.degrees for part in parts)
  error = variance**0.5
  half = float(stats.t.ppf((1 + confidence) / 2, degrees)) * error
  p_value = float(2 * stats.t.sf(abs(difference) / error, degrees))
  return Interval(difference, difference - half, difference + half, p_value, degrees, basis)

"""Intervals for differences between arms, over training seeds and evaluation items at once.

**Model.** Arm a, seed s, item i of document g; y is the log-probability of the right answer, in nats:

    y[a,s,i] = μ[a] + item[i] + seed[a,s] + taste[a,i] + noise[a,s,i]

`item` is the difficulty of the item. All arms are evaluated on the same items, so it cancels in a difference. `seed` is
the effect, equal for all items, of the initialisation, the order of the data and, for the random arms, the draw of the
subset. `taste` is how well arm a suits item i, for any seed. All but μ are random with mean zero.

**Estimate.** The difference of grand means. With D[i] the difference between the two arms' means over seeds at item i,
S_a seeds in arm a, n items, and MS the mean squares of arm a's own seeds × items table:

    V = v_I + Σ_a max(0, v_S[a] − v_E[a])
    v_I    = max(var_i(D)/n, the same clustered by document, v_E[method] + v_E[baseline])
    v_S[a] = variance over seeds of the mean over items / S_a
    v_E[a] = MS of the interaction of seed and item / (S_a n)

v_E is subtracted once because both v_I and v_S contain it (Cornfield and Tukey's expected mean squares). A negative
variance component is set to zero, which can only make V too large: the interval is conservative. An arm with a single
seed borrows v_S and v_E of the other arm, times that arm's seeds. If both have one, the interval covers items only and
`basis` says so; `bootstrap_difference` is then the better choice. A difference is the simplest contrast
Σ_a w_a μ[a]; in others each arm's v_S and v_E count w_a² times. Degrees of freedom after Satterthwaite: V² over the sum
of the squared parts, each divided by its own degrees of freedom; then a t interval.

**Pairing of seeds.** Arms with the same seed share their initialisation, but not their data or its order.
`paired_seeds=False` treats the arms' seeds as independent and has about 2(S−1) degrees of freedom for them, where
pairing has S−1. With three seeds t is then 2.8 instead of 4.3; pairing is only narrower if the correlation between arms
is above 0.58. If the shared initialisation does correlate the arms, the unpaired interval is merely too wide.
`paired_seeds=True` applies the one-arm formula to the table of differences. It pays for models trained so briefly that
their initialisation still matters. Decide by the correlation between two random arms, never by which of the two favours
the method.

**What the interval does not cover.** Arms with a deterministic selection (DsDm, bottom-k) were selected once, with one
set of proxies. Their intervals cover new seeds and new items for *that* selection, not new selections.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

FEWEST_DOCUMENTS = 10  # that are drawn from with replacement


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate with its interval.

  Attributes:
    difference: the estimate, in the unit of the values.
    low: lower end of the interval.
    high: upper end of the interval.
    p_value: two-sided, for the true difference being zero. It is below 1 − confidence exactly when the interval
      excludes zero; of a bootstrap, except for its draws at and next to zero, since those at zero count half.
    degrees_of_freedom: after Satterthwaite; inf where nothing varies.
    basis: what the interval generalises to: 'seeds and items', 'seeds and items, one arm with borrowed seed variance',
      or 'items only' or 'items only (bootstrap)' (one seed everywhere; noise between seeds is not covered).
  """

  difference: float
  low: float
  high: float
  p_value: float
  degrees_of_freedom: float
  basis: str = 'seeds and items'

  def excludes_zero(self) -> bool:
    return self.low > 0 or self.high < 0

  def within(self, lowest: float, highest: float) -> 'Interval':
    """The same interval without the values that cannot be, such as accuracies below 0."""
    low, high = (min(max(end, lowest), highest) for end in (self.low, self.high))
    return dataclasses.replace(self, low=low, high=high)


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
    baseline_SI: values of the other arm on the same items; the number of seeds may differ unless they are paired.
    paired_seeds: whether row s of one arm belongs to row s of the other; False treats all rows as independent.
    confidence: coverage of the interval, above 0 and below 1.
    documents_I: the document of each item, any hashable dtype; items of one document are not treated as independent.
      None makes each item its own document.

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
  else:
    tables = [method_SI, baseline_SI]
  return _crossed(tables, [1.0] if paired_seeds else [1.0, -1.0], confidence, documents_I)


def contrast(
  tables: Sequence[np.ndarray],
  weights: Sequence[float],
  confidence: float = 0.95,
  documents_I: np.ndarray | None = None,
) -> Interval:
  """Σ_a weights[a] · mean of arm a, with the interval of `crossed_difference`; arms' seeds are independent.

  Args:
    tables: values [seeds, items] of each arm, all on the same items.
    weights: one for each arm, not zero.
    confidence: coverage of the interval, above 0 and below 1.
    documents_I: see `crossed_difference`.

  Raises:
    ValueError: as `crossed_difference`.
  """
  tables = [np.asarray(table_SI, np.float64) for table_SI in tables]
  for table_SI in tables:
    _check(tables[0], table_SI, False, confidence)
  return _crossed(tables, weights, confidence, documents_I)


def _crossed(
  tables: Sequence[np.ndarray], weights: Sequence[float], confidence: float, documents_I: np.ndarray | None
) -> Interval:
  value_I = np.sum([w * table_SI.mean(axis=0) for w, table_SI in zip(weights, tables, strict=True)], axis=0)
  seeds, interactions, basis = _seed_parts(tables, weights)
  items = _item_part(value_I, documents_I)
  interaction = sum(part.variance for part in interactions)
  parts = [_Part(max(items.variance, interaction), items.degrees), *seeds, *interactions]
  excess = sum(max(0.0, s.variance - e.variance) for s, e in zip(seeds, interactions, strict=True))
  return _interval(float(value_I.mean()), parts[0].variance + excess, parts, confidence, basis)


def mean_interval(values_SI: np.ndarray, confidence: float = 0.95, documents_I: np.ndarray | None = None) -> Interval:
  """Mean of one arm over seeds and items, with the interval of `crossed_difference` against a constant zero.

  Much wider than the intervals of differences: how hard the items are does not cancel.
  """
  return crossed_difference(values_SI, np.zeros_like(values_SI), True, confidence, documents_I)


def reweighted(values_SI: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
  """A table whose plain means over items are the weighted means of `values_SI`, for the functions above.

  With m[s] = Σ_i weight[i]·y[s,i] it is m[s] + n·weight[i]·(y[s,i] − m[s]): the variance of its mean over items is then
  that of a weighted mean, n/(n−1)·Σ weight²·(y − m)², in the linearised form of survey statistics.

  Args:
    values_SI: values, a row per seed.
    weight_I: at least 0, sum 1. Averages within categories first: 1/(categories · items of the item's category).
  """
  values_SI = np.asarray(values_SI, np.float64)
  mean_S1 = values_SI @ weight_I[:, None]
  return mean_S1 + len(weight_I) * weight_I[None] * (values_SI - mean_S1)


def macro_weights(categories: Sequence[str]) -> np.ndarray:
  """Weights of items whose mean is taken within each category first: float64 [items], sum 1."""
  _, category_I, count_G = np.unique(np.asarray(categories), return_inverse=True, return_counts=True)
  return 1.0 / (len(count_G) * count_G[category_I])


def bootstrap_difference(
  difference_I: np.ndarray,
  rng: np.random.Generator,
  confidence: float = 0.95,
  documents_I: np.ndarray | None = None,
  resamples: int = 10_000,
) -> Interval:
  """Mean difference over items between two single models, so that only items vary.

  scipy resamples documents with replacement. The interval is BCa (Efron 1987), which allows for skew. The p-value is
  one minus the largest confidence at which the interval excludes zero. Of fewer than `FEWEST_DOCUMENTS` documents (or
  items, where each is its own) resamples vary too little: the interval is then that of `crossed_difference`, a t
  interval over documents.

  scipy's own BCa interval is not used, although it comes from the same draws. It does not give the bias and the
  acceleration that the p-value needs; it is NaN where no resample lies on one side of the mean; and its sums are in
  another order, so that ends differ in the last digits, or visibly where a resample equals the mean but for rounding.

  Args:
    difference_I: values of one model minus the other's.
    rng: of the draws.
    confidence: coverage, above 0 and below 1.
    documents_I: see `crossed_difference`.
    resamples: number of draws; p-values are no finer than 2/resamples.

  Raises:
    ValueError: as `crossed_difference`.
  """
  difference_I = np.asarray(difference_I, np.float64)
  _check(difference_I[None], difference_I[None], False, confidence)
  document_I, count = _document_numbers(documents_I, len(difference_I))
  if count < FEWEST_DOCUMENTS:
    return mean_interval(difference_I[None], confidence, documents_I)
  total_G = np.bincount(document_I, weights=difference_I, minlength=count)
  items_G = np.bincount(document_I, minlength=count).astype(np.float64)
  basis, mean = 'items only (bootstrap)', float(total_G.sum() / items_G.sum())
  rounding = 1e-12 * float(np.abs(difference_I).max())  # sums of other orders differ by less
  mean_R = stats.bootstrap(
    (total_G, items_G),
    lambda total, items, axis: total.sum(axis) / items.sum(axis),
    paired=True,
    vectorized=True,
    n_resamples=resamples,
    batch=max(1, 4_000_000 // count),  # draws of a batch take at most 32 MB
    method='percentile',
    rng=rng,
  ).bootstrap_distribution
  if np.ptp(mean_R) <= rounding:
    return Interval(mean, mean, mean, 1.0 if abs(mean) <= rounding else 0.0, float('inf'), basis)

  def below(value: float) -> float:
    """z of the share of resamples below; ties count half, so that values on a grid do not push it to one side."""
    share = (mean_R < value - rounding).mean() + 0.5 * (np.abs(mean_R - value) <= rounding).mean()
    return float(stats.norm.ppf(share.clip(0.5 / resamples, 1 - 0.5 / resamples)))

  bias = below(mean)
  left_out_G = (total_G.sum() - total_G) / (items_G.sum() - items_G)
  influence_G = left_out_G.mean() - left_out_G
  skew = float((influence_G**3).sum() / (6 * (influence_G**2).sum() ** 1.5))
  tail = float(stats.norm.ppf((1 + confidence) / 2))
  levels = stats.norm.cdf([bias + (bias + z) / (1 - skew * (bias + z)) for z in (-tail, tail)])
  low, high = np.quantile(mean_R, levels)
  shift = below(0.0) - bias
  z = shift / (1 + skew * shift) - bias
  p_value = 2 * float(stats.norm.sf(abs(z)))
  return Interval(mean, float(low), float(high), p_value, float('inf'), basis)


def holm(p_values: Sequence[float]) -> np.ndarray:
  """p-values adjusted by Holm's step-down rule, in the order given: float64, at most 1.

  Rejecting those below α keeps the chance of even one false rejection below α, for any dependence between tests.
  """
  p_N = np.asarray(p_values, np.float64)
  order_N = np.argsort(p_N, kind='stable')
  factors_N = np.arange(len(p_N), 0, -1)
  adjusted_N = np.empty_like(p_N)
  adjusted_N[order_N] = np.minimum(1.0, np.maximum.accumulate(p_N[order_N] * factors_N))
  return adjusted_N


def _check(method_SI: np.ndarray, baseline_SI: np.ndarray, paired: bool, confidence: float) -> None:
  if method_SI.ndim != 2 or baseline_SI.ndim != 2 or 0 in (len(method_SI), len(baseline_SI)):
    raise ValueError(f'expected [seeds, items], got {method_SI.shape} and {baseline_SI.shape}')
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


def _seed_parts(tables: Sequence[np.ndarray], weights: Sequence[float]) -> tuple[list[_Part], list[_Part], str]:
  """v_S and v_E of each table [S, I] with several rows; tables of one row borrow those of the first such table."""
  lender = next((index for index, table_SI in enumerate(tables) if len(table_SI) > 1), None)
  if lender is None:
    return [], [], 'items only'
  seeds, interactions = [], []
  for index, (table_SI, weight) in enumerate(zip(tables, weights, strict=True)):
    s, n = table_SI.shape
    if s == 1:
      continue
    mean_S = table_SI.mean(axis=1)
    residual_SI = table_SI - mean_S[:, None] - table_SI.mean(axis=0)[None, :] + table_SI.mean()
    degrees = (s - 1) * (n - 1)
    factor = weight**2 / s
    if index == lender:
      # The borrowers use the same estimate, so it stays one part with the lender's degrees of freedom.
      factor += sum(w**2 for w, other_SI in zip(weights, tables, strict=True) if len(other_SI) == 1)
    seeds.append(_Part(factor * float(mean_S.var(ddof=1)), s - 1))
    interactions.append(_Part(factor * float((residual_SI**2).sum()) / degrees / n, degrees))
  if len(seeds) == len(tables):
    return seeds, interactions, 'seeds and items'
  return seeds, interactions, 'seeds and items, one arm with borrowed seed variance'


def _item_part(difference_I: np.ndarray, documents_I: np.ndarray | None) -> _Part:
  """v_I: the variance of the mean over independent items or over independent documents, whichever is larger."""
  n = len(difference_I)
  variance = float(difference_I.var(ddof=1)) / n
  if documents_I is None:
    return _Part(variance, n - 1)
  document_I, count = _document_numbers(documents_I, n)
  residual_G = np.bincount(document_I, weights=difference_I - difference_I.mean(), minlength=count)
  clustered = count / (count - 1) * float((residual_G**2).sum()) / n**2
  return _Part(max(variance, clustered), count - 1)


def _document_numbers(documents_I: np.ndarray | None, n: int) -> tuple[np.ndarray, int]:
  """(number of each item's document from 0, how many there are)."""
  if documents_I is None:
    return np.arange(n), n
  if len(documents_I) != n:
    raise ValueError(f'documents_I has {len(documents_I)} entries for {n} items')
  _, document_I = np.unique(documents_I, return_inverse=True)
  count = int(document_I.max()) + 1
  if count < 2:
    raise ValueError('an interval over items needs items of at least two documents')
  return document_I, count


def _interval(difference: float, variance: float, parts: list[_Part], confidence: float, basis: str) -> Interval:
  # Where nothing varies, rounding leaves squares of about 1e-32.
  if variance <= np.finfo(np.float64).eps ** 2 * max(1.0, difference**2):
    p_value = 1.0 if difference == 0 else 0.0
    return Interval(difference, difference, difference, p_value, float('inf'), basis)
  degrees = variance**2 / sum(part.variance**2 / part.degrees for part in parts)
  error = variance**0.5
  half = float(stats.t.ppf((1 + confidence) / 2, degrees)) * error
  p_value = float(2 * stats.t.sf(abs(difference) / error, degrees))
  return Interval(difference, difference - half, difference + half, p_value, degrees, basis)

"""Intervals against hand-worked numbers, a second way of computing them, and the truth of simulated experiments."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dsdm_jax.evaluation import statistics


def _rng(*names: int) -> np.random.Generator:
  return np.random.default_rng(names)


def _arm(g: np.random.Generator, item_I: np.ndarray, seeds: int, *, seed=0.03, taste=0.1, noise=0.2, effect=0.0):
  n = len(item_I)
  between = g.normal(0, seed, (seeds, 1))
  return effect + item_I[None, :] + between + g.normal(0, taste, n)[None, :] + g.normal(0, noise, (seeds, n))


def test_hand_worked_unpaired():
  """Baseline constant, so everything is read off one 2×2 table of the method.

  Table [[1, 3], [3, 9]]: means over seeds D = (2, 6), v_I = 8/2 = 4; seed means (2, 6), v_S = 8/2 = 4; residuals are
  all ±1, MS = 4/1, v_E = 4/(2·2) = 1. V = 4 + (4 − 1) = 7. Degrees: 49 / (16/1 + 16/1 + 1/1) = 49/33.
  """
  found = statistics.crossed_difference(np.array([[1.0, 3.0], [3.0, 9.0]]), np.zeros((2, 2)))
  assert found.difference == 4
  assert found.degrees_of_freedom == pytest.approx(49 / 33, rel=1e-12)
  half = stats.t.ppf(0.975, 49 / 33) * 7**0.5
  assert (found.low, found.high) == pytest.approx((4 - half, 4 + half), rel=1e-12)
  assert found.p_value == pytest.approx(2 * stats.t.sf(4 / 7**0.5, 49 / 33), rel=1e-12)


def _oracle(method_SI, baseline_SI):
  """V and its degrees of freedom from sums of squares, in plain loops, in float64."""
  n = method_SI.shape[1]
  grand = [sum(sum(row) for row in a) / a.size for a in (method_SI, baseline_SI)]
  columns = [[sum(a[s][i] for s in range(len(a))) / len(a) for i in range(n)] for a in (method_SI, baseline_SI)]
  ss_items = sum((columns[0][i] - columns[1][i] - grand[0] + grand[1]) ** 2 for i in range(n))
  v_items = ss_items / (n - 1) / n
  parts, excess, total_e = [(v_items, n - 1)], 0.0, 0.0
  for a, mean, column in zip((method_SI, baseline_SI), grand, columns, strict=True):
    s = len(a)
    rows = [sum(row) / n for row in a]
    ms_seed = n * sum((r - mean) ** 2 for r in rows) / (s - 1)
    ss_e = sum((a[r][i] - rows[r] - column[i] + mean) ** 2 for r in range(s) for i in range(n))
    ms_e = ss_e / ((s - 1) * (n - 1))
    parts += [(ms_seed / (s * n), s - 1), (ms_e / (s * n), (s - 1) * (n - 1))]
    excess += max(0.0, ms_seed - ms_e) / (s * n)
    total_e += ms_e / (s * n)
  variance = max(v_items, total_e) + excess
  parts[0] = (max(v_items, total_e), n - 1)
  return variance, variance**2 / sum(v**2 / d for v, d in parts)


@pytest.mark.parametrize('seeds', [(3, 3), (5, 2), (2, 10)])
def test_agrees_with_sums_of_squares(seeds):
  g = _rng(1, *seeds)
  item_I = g.normal(-4, 1, 17)
  method_SI, baseline_SI = _arm(g, item_I, seeds[0], effect=0.3), _arm(g, item_I, seeds[1])
  found = statistics.crossed_difference(method_SI, baseline_SI)
  variance, degrees = _oracle(method_SI, baseline_SI)
  assert found.degrees_of_freedom == pytest.approx(degrees, rel=1e-9)
  assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, degrees) * variance**0.5, rel=1e-9)


def test_paired_is_the_crossed_formula_on_the_differences():
  """The table of differences against a constant is the same experiment, whichever way it is handed in."""
  g = _rng(2)
  item_I = g.normal(0, 1, 12)
  method_SI, baseline_SI = _arm(g, item_I, 4), _arm(g, item_I, 4)
  paired = statistics.crossed_difference(method_SI, baseline_SI, paired_seeds=True)
  plain = statistics.mean_interval(method_SI - baseline_SI)
  assert paired == plain
  assert paired.degrees_of_freedom != statistics.crossed_difference(method_SI, baseline_SI).degrees_of_freedom


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.integers(2, 9), st.floats(0, 1))
def test_antisymmetric_shift_and_verdict(seed, seeds_a, seeds_b, items, scale):
  """Swapping arms mirrors the interval, adding a constant moves it, and it excludes zero just when p is below 5 %."""
  g = _rng(3, seed)
  item_I = g.normal(0, 1, items)
  a_SI = _arm(g, item_I, seeds_a, effect=scale, seed=scale)
  b_SI = _arm(g, item_I, seeds_b)
  there, back = statistics.crossed_difference(a_SI, b_SI), statistics.crossed_difference(b_SI, a_SI)
  np.testing.assert_allclose([there.low, there.high], [-back.high, -back.low], atol=1e-9, rtol=1e-9)
  moved = statistics.crossed_difference(a_SI + 1, b_SI)
  np.testing.assert_allclose([moved.low, moved.high], [there.low + 1, there.high + 1], atol=1e-9, rtol=1e-6)
  assert there.low <= there.difference <= there.high
  if abs(there.p_value - 0.05) > 1e-6:
    assert there.excludes_zero() == (there.p_value < 0.05)


def test_one_seed_each_covers_items_only():
  """It is then the paired t test over items."""
  g = _rng(4)
  a_SI, b_SI = g.normal(0, 1, (1, 30)), g.normal(0.3, 1, (1, 30))
  found = statistics.crossed_difference(a_SI, b_SI)
  known = stats.ttest_rel(a_SI[0], b_SI[0])
  assert found.basis == 'items only'
  assert found.p_value == pytest.approx(known.pvalue, rel=1e-9)
  assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()), rel=1e-9)


def test_one_seed_borrows_the_other_arms_seed_variance():
  """Baseline [[0, 0]]; the table of the hand-worked case lends 2 × v_S = 8 and 2 × v_E = 2 to the arm with one seed."""
  found = statistics.crossed_difference(np.array([[1.0, 3.0], [3.0, 9.0]]), np.zeros((1, 2)))
  assert 'borrowed' in found.basis
  variance = 4 + (12 - 3)  # v_I = 4 exceeds v_E = 1 + 2; v_S = 4 + 8
  assert found.degrees_of_freedom == pytest.approx(variance**2 / (4**2 / 1 + 12**2 / 1 + 3**2 / 1), rel=1e-12)


def test_identical_arms_and_constant_arms():
  g = _rng(5)
  table_SI = np.tile(g.normal(0, 1, (1, 8)), (3, 1))
  same = statistics.crossed_difference(table_SI, table_SI)
  assert (same.low, same.difference, same.high, same.p_value) == (0, 0, 0, 1)
  apart = statistics.crossed_difference(table_SI + 0.5, table_SI)
  assert apart.low == apart.high == pytest.approx(0.5)
  assert apart.p_value == 0
  assert apart.excludes_zero()


def test_negative_components_never_narrow_the_interval():
  """Seeds that agree more than their noise allows count as no variance between seeds, not as less than none."""
  table_SI = np.array([[1.0, -1.0, 2.0, -2.0], [-1.0, 1.0, -2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])  # seed means are equal
  found = statistics.crossed_difference(table_SI, np.zeros((3, 4)))
  residual_ms = 20 / 6  # sum of squares 20 over (3−1)(4−1)
  variance = residual_ms / 12  # v_I is zero, so the interaction is the floor
  degrees = variance**2 / (variance**2 / 3 + variance**2 / 6)
  assert found.high == pytest.approx(stats.t.ppf(0.975, degrees) * variance**0.5, rel=1e-9)


def test_items_of_one_document_count_once():
  """Each item copied four times inside its document adds nothing: the interval stays near that of the originals."""
  g = _rng(6)
  item_I = g.normal(0, 1, 40)
  a_SI, b_SI = _arm(g, item_I, 3, seed=0, noise=0), _arm(g, item_I, 3, seed=0, noise=0)
  document_I = np.repeat(np.arange(40), 4)
  original = statistics.crossed_difference(a_SI, b_SI)
  naive = statistics.crossed_difference(np.repeat(a_SI, 4, axis=1), np.repeat(b_SI, 4, axis=1))
  clustered = statistics.crossed_difference(
    np.repeat(a_SI, 4, axis=1), np.repeat(b_SI, 4, axis=1), documents_I=document_I
  )
  np.testing.assert_allclose([clustered.low, clustered.high], [original.low, original.high], rtol=1e-9)
  # Four times the items would halve it.
  assert naive.high - naive.low < 0.55 * (original.high - original.low)


@pytest.mark.parametrize(
  ('seeds', 'seed_sd', 'paired'), [(3, 0.0, False), (3, 0.03, True), (5, 0.2, False), (10, 0.03, False)]
)
def test_coverage(seeds, seed_sd, paired):
  """95 % intervals hold the truth in 91 to 98 % of 1,500 experiments (standard error of that share 0.6 points).

  The noise between seeds is nil, as large as that of the items, or all there is.
  """
  g = _rng(7, seeds, int(100 * seed_sd), paired)
  hits, experiments = 0, 1_500
  for _ in range(experiments):
    item_I = g.normal(-4, 1, 60)
    a_SI = _arm(g, item_I, seeds, seed=seed_sd, effect=0.1)
    b_SI = _arm(g, item_I, seeds, seed=seed_sd)
    found = statistics.crossed_difference(a_SI, b_SI, paired_seeds=paired)
    hits += found.low <= 0.1 <= found.high
  assert 0.91 <= hits / experiments <= 0.98


def test_holm_hand_worked():
  """Sorted .01, .02, .03, .04 times 4, 3, 2, 1 is .04, .06, .06, .04, made monotone: .04, .06, .06, .06."""
  np.testing.assert_allclose(statistics.holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06], rtol=1e-12)
  assert statistics.holm([]).shape == (0,)
  assert statistics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
  ('a', 'b', 'options', 'message'),
  [
    (np.zeros((2, 3)), np.zeros((2, 4)), {}, 'same items'),
    (np.zeros((2, 1)), np.zeros((2, 1)), {}, 'at least two'),
    (np.zeros((2, 3)), np.zeros((3, 3)), {'paired_seeds': True}, 'equal numbers'),
    (np.zeros((0, 3)), np.zeros((3, 3)), {}, 'seeds, items'),
    (np.full((2, 3), np.nan), np.zeros((2, 3)), {}, 'finite'),
    (np.zeros((2, 3)), np.zeros((2, 3)), {'confidence': 1.0}, 'between 0 and 1'),
    (np.ones((2, 3)), np.zeros((2, 3)), {'documents_I': np.array(['a', 'a'])}, 'entries'),
    (np.ones((2, 3)), np.zeros((2, 3)), {'documents_I': np.array(['a'] * 3)}, 'two documents'),
  ],
)
def test_refuses(a, b, options, message):
  with pytest.raises(ValueError, match=message):
    statistics.crossed_difference(a, b, **options)


def test_contrast_of_two_is_their_difference():
  g = _rng(10)
  item_I = g.normal(0, 1, 15)
  for seeds in ((3, 4), (1, 4), (3, 1)):
    a_SI, b_SI = _arm(g, item_I, seeds[0]), _arm(g, item_I, seeds[1])
    document_I = np.arange(15) // 3
    found = statistics.contrast([a_SI, b_SI], [1, -1], 0.9, document_I)
    assert found == statistics.crossed_difference(a_SI, b_SI, False, 0.9, document_I)


def test_contrast_hand_worked():
  """Half of the table of the first test: its variance 7 counts a quarter, whichever way the half is written."""
  table_SI = np.array([[1.0, 3.0], [3.0, 9.0]])
  half = statistics.contrast([table_SI, np.zeros((2, 2))], [0.5, -0.25])
  assert half.difference == 2
  assert (half.high - half.low) / 2 == pytest.approx(stats.t.ppf(0.975, 49 / 33) * (7 / 4) ** 0.5, rel=1e-12)
  assert half.difference == statistics.contrast([table_SI / 2, np.zeros((2, 2))], [1, -1]).difference


def test_macro_average_hand_worked():
  """Categories x = {1, 3}, y = {6, 9, 12}: macro mean (2 + 9)/2. Weights are 1/4 and 1/6."""
  weight_I = statistics.macro_weights(['x', 'y', 'y', 'x', 'y'])
  np.testing.assert_allclose(weight_I, [1 / 4, 1 / 6, 1 / 6, 1 / 4, 1 / 6], rtol=1e-12)
  values_SI = np.array([[1.0, 6, 9, 3, 12], [2.0, 7, 9, 3, 12]])
  found = statistics.reweighted(values_SI, weight_I)
  np.testing.assert_allclose(found.mean(axis=1), [5.5, (2.5 + 28 / 3) / 2], rtol=1e-12)
  interval = statistics.mean_interval(statistics.reweighted(values_SI[:1], weight_I))
  variance = 5 / 4 * sum(w**2 * (y - 5.5) ** 2 for w, y in zip(weight_I, values_SI[0], strict=True))
  assert (interval.high - interval.low) / 2 == pytest.approx(stats.t.ppf(0.975, 4) * variance**0.5, rel=1e-12)
  np.testing.assert_allclose(statistics.reweighted(values_SI, np.full(5, 0.2)), values_SI, rtol=1e-12)


def test_bootstrap_agrees_with_scipy():
  """Both are BCa with 10,000 draws: ends differ by the noise of a 2.5 % quantile, about 2 % of the half width."""
  value_I = _rng(12).exponential(1.0, 40)
  found = statistics.bootstrap_difference(value_I, _rng(13))
  known = stats.bootstrap((value_I,), np.mean, n_resamples=10_000, method='BCa', rng=_rng(14)).confidence_interval
  half = (found.high - found.low) / 2
  np.testing.assert_allclose([found.low, found.high], known, atol=0.06 * half)
  assert abs(found.high + found.low - 2 * found.difference) > 0.1 * half, 'skewed data, skewed interval'


def test_bootstrap_p_value_says_what_the_interval_says():
  g = _rng(15)
  for shift in np.linspace(-0.5, 0.5, 40):
    value_I = g.exponential(1.0, 30) - 1 + shift
    found = statistics.bootstrap_difference(value_I, g, 0.9, resamples=2_000)
    if abs(found.p_value - 0.1) > 0.01:
      assert found.excludes_zero() == (found.p_value < 0.1)


def test_bootstrap_draws_documents_whole():
  """Copies of an item inside its document add nothing."""
  value_I = _rng(16).normal(0.2, 1, 40)
  original = statistics.bootstrap_difference(value_I, _rng(17))
  copied = statistics.bootstrap_difference(np.repeat(value_I, 4), _rng(17), documents_I=np.repeat(np.arange(40), 4))
  np.testing.assert_allclose([copied.low, copied.high], [original.low, original.high], rtol=1e-9)
  same = statistics.bootstrap_difference(np.zeros(5), _rng(18))
  assert (same.low, same.high, same.p_value) == (0, 0, 1)


def test_bootstrap_counts_resamples_at_the_mean_for_both_sides():
  """Six documents of mean 0.1 and six of 0.3: 23 % of the resamples are at 0.2, up to the rounding of their sums."""
  document_I = np.repeat(np.arange(12), 50)
  value_I = np.where(document_I % 2, 0.3, 0.1)
  found = statistics.bootstrap_difference(value_I, _rng(20), documents_I=document_I)
  assert found.difference == pytest.approx(0.2, rel=1e-12)
  assert found.high - 0.2 == pytest.approx(0.2 - found.low, rel=1e-9), 'symmetric data, symmetric interval'


def test_few_documents_have_a_t_interval():
  """Items of each document are equal, so that it is Student's over the documents."""
  mean_G = _rng(21).normal(0.1, 0.3, 9)
  found = statistics.bootstrap_difference(np.repeat(mean_G, 4), _rng(22), documents_I=np.repeat(np.arange(9), 4))
  known = stats.ttest_1samp(mean_G, 0)
  assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()), rel=1e-9)
  assert found.p_value == pytest.approx(known.pvalue, rel=1e-9)
  assert (found.basis, found.degrees_of_freedom) == ('items only', pytest.approx(8))
  assert statistics.bootstrap_difference(_rng(23).normal(0, 1, 10), _rng(24)).basis == 'items only (bootstrap)'


@pytest.mark.parametrize('documents', [3, 5, 9])
def test_coverage_of_few_documents(documents):
  """95 % intervals hold the truth in 92 to 98 % of 600 experiments, with a standard error of 0.9 points.

  A bootstrap holds it less often: docs/evaluation.md.
  """
  g = _rng(25, documents)
  document_I = np.repeat(np.arange(documents), 20)
  values = [0.1 + g.normal(0, 0.3, documents)[document_I] + g.normal(0, 0.5, len(document_I)) for _ in range(600)]
  found = [statistics.bootstrap_difference(value_I, g, documents_I=document_I, resamples=100) for value_I in values]
  assert 0.92 <= np.mean([f.low <= 0.1 <= f.high for f in found]) <= 0.98


@pytest.mark.parametrize('values', ['exponential', 'accuracy'])
def test_bootstrap_coverage(values):
  """95 % intervals over 100 items hold the truth in 91 to 98 % of 300 experiments, where items are skewed or 0/1.

  The standard error of that share is 1.3 points.
  """
  g = _rng(19, len(values))
  draw = {
    'exponential': lambda: g.exponential(1, 100) - 0.9,
    'accuracy': lambda: (g.random(100) < 0.4) * 1.0 - (g.random(100) < 0.3),
  }
  found = [statistics.bootstrap_difference(draw[values](), g, resamples=1_000) for _ in range(300)]
  assert 0.91 <= np.mean([f.low <= 0.1 <= f.high for f in found]) <= 0.98

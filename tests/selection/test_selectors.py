"""Selection is exact and seeded, within the caps and the pool."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsdm_jax.errors import UserError
from dsdm_jax.selection import dsdm_diverse, dsdm_sampled, ranking
from dsdm_jax.selection.ranking import top
from tests.helpers.selection import ArrayCandidates, Features, Rows, selected

RANDOM = np.random.default_rng(0).normal(size=100).astype(np.float32)


# Few distinct values, so that ties are the rule; extremes of float32 among them.
SCORES = hnp.arrays(
  np.float32,
  st.integers(1, 60),
  elements=st.sampled_from([np.float32(v) for v in (-3e38, -1.5, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.5, 3e38)]),
)


@given(SCORES, st.data())
def test_top_is_a_full_sort_with_ties_by_lower_row(score_N, data):
  count = data.draw(st.integers(1, len(score_N)))
  expected = sorted(range(len(score_N)), key=lambda row: (-float(score_N[row]), row))[:count]
  found = top(score_N, count)
  assert found.dtype == np.int64
  assert found.tolist() == expected


def test_bottom_is_the_other_end():
  pool = ArrayCandidates(np.float32([3, 1, 2, 1, 5, 1]))
  assert selected('bottom', pool, 2).rows.tolist() == [1, 3]
  assert selected('dsdm', pool, 2).rows.tolist() == [4, 0]
  assert selected('dsdm', pool, 2).scores.tolist() == [5, 3]


@given(st.integers(1, 59), st.integers(1, 30))
def test_shifted_scores_give_shifted_rows(shift, count):
  score_N = np.random.default_rng(shift).normal(size=60).astype(np.float32)
  plain = selected('dsdm', ArrayCandidates(score_N), count).rows
  shifted = selected('dsdm', ArrayCandidates(np.roll(score_N, shift)), count).rows
  assert shifted.tolist() == ((plain + shift) % 60).tolist()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('method', ['dsdm', 'bottom', 'dsdm_gumbel', 'dsdm_boltzmann'])
def test_a_score_that_is_not_a_number_is_an_error_with_its_row(bad, method):
  score_N = np.zeros(20)
  score_N[7] = bad
  with pytest.raises(UserError, match=r'row \d+ is not a number'), np.errstate(invalid='ignore'):
    selected(method, ArrayCandidates(score_N), 3)
  with pytest.raises(UserError, match='row 7 '):
    top(score_N, 3)


@pytest.mark.parametrize(
  ('method', 'examples', 'epochs'),
  [
    ('dsdm', 21, 1),
    ('bottom', 21, 1),
    ('random', 21, 1),
    ('random_one_epoch', 7, 3),
    ('dsdm_gumbel', 21, 1),
    ('dsdm_boltzmann', 81, 4),
  ],
)
def test_more_rows_than_the_pool_has(method, examples, epochs):
  with pytest.raises(UserError, match=r'selection\.examples') as caught:
    selected(method, ArrayCandidates(RANDOM[:20]), examples, epochs)
  assert '20' in str(caught.value)


@pytest.mark.parametrize(('method', 'size'), [('dsdm', 20), ('bottom', 20), ('random', 20), ('random_one_epoch', 20)])
def test_as_many_rows_as_the_pool_has(method, size):
  rows = selected(method, ArrayCandidates(RANDOM[:20]), 20 if method != 'random_one_epoch' else 10, 2).rows
  assert sorted(rows) == list(range(size))


@pytest.mark.parametrize(('method', 'size'), [('random', 10), ('random_one_epoch', 30)])
def test_random_is_seeded_without_replacement_and_ignores_scores(method, size):
  rows = selected(method, ArrayCandidates(RANDOM), seed=1).rows
  assert len(rows) == len(set(rows.tolist())) == size
  assert rows.min() >= 0 and rows.max() < 100
  assert rows.tolist() == selected(method, ArrayCandidates(np.arange(100)), seed=1).rows.tolist()
  assert rows.tolist() != selected(method, ArrayCandidates(RANDOM), seed=2).rows.tolist()


def test_random_takes_every_row_equally_often():
  counts, pool = np.zeros(20), ArrayCandidates(RANDOM[:20])
  for seed in range(2_000):
    counts[selected('random', pool, 5, 1, seed).rows] += 1
  # Each row: binomial(2000, 1/4), sd 19.4; five sd over 20 rows fail by chance once in 90,000.
  assert np.abs(counts - 500).max() < 5 * np.sqrt(2_000 * 0.25 * 0.75)


def test_random_arms_draw_apart():
  pool = ArrayCandidates(np.zeros(1_000))
  a, b = (set(selected(m, pool, 30, 1, 1).rows.tolist()) for m in ('random', 'random_one_epoch'))
  assert a != b


@given(SCORES, st.integers(0, 5), st.integers(1, 5), st.integers(1, 40), st.sampled_from([0.3, 0.5, 1.0]))
def test_caps_hold_and_no_better_row_is_left_out(score_N, document_cap, documents, count, source_cap):
  rows = np.arange(len(score_N))
  pool = ArrayCandidates(
    score_N,
    Rows(np.zeros((len(score_N), 8), np.int32), rows % 3, rows % documents),
    document_cap=document_cap,
    source_cap=source_cap,
  )
  try:
    found = selected('dsdm', pool, count).rows
  except UserError:
    assert (document_cap and document_cap * documents < count) or source_cap < 1 or count > len(score_N)
    return
  assert len(set(found.tolist())) == count
  if document_cap:
    assert np.bincount(found % documents).max() <= document_cap
  tenths = {0.3: 3, 0.5: 5, 1.0: 10}[source_cap]
  assert 10 * np.bincount(found % 3).max() <= tenths * count
  if source_cap == 1:  # one cap alone: the greedy choice, row after row
    taken: list[int] = []
    for row in sorted(rows, key=lambda row: (-float(score_N[row]), row)):
      if len(taken) < count and (
        not document_cap or sum(t % documents == row % documents for t in taken) < document_cap
      ):
        taken.append(row)
    assert found.tolist() == taken


@pytest.mark.parametrize(
  ('share', 'count', 'rows'),
  [
    (0.29, 100, 29),
    (0.57, 100, 57),
    (0.3, 10, 3),
    (0.5, 5, 2),
    (0.7, 10, 7),
    (1 / 3, 10, 3),
    (0.999, 100, 99),
    (0.1, 9, 0),
    (0.07, 100_000_000, 7_000_000),
  ],
)
def test_a_source_gives_its_share_in_whole_rows(share, count, rows):
  assert ranking.rows_of_share(share, count) == rows


def test_a_source_gives_its_whole_share():
  # All rows of source 0 are better than those of source 1, so it gives all 29 of 100 rows that it may.
  pool = ArrayCandidates(
    np.arange(400)[::-1], Rows(np.zeros((400, 8), np.int32), np.arange(400) // 200), source_cap=0.29
  )
  with pytest.raises(UserError, match='leave 58 of 100 rows'):
    selected('dsdm', pool, 100)
  pool.options.source_cap = 0.57
  assert np.bincount(selected('dsdm', pool, 100).rows // 200).tolist() == [57, 43]


@given(hnp.arrays(np.float32, 40, elements=st.floats(-8, 8, width=32)), st.integers(1, 40), st.integers(1, 6))
def test_draws_fill_the_budget_within_the_cap(log_weight_N, total, cap):
  count_N = dsdm_sampled.draw(log_weight_N, total, cap, 0)
  assert count_N.sum() == total
  assert count_N.max() <= cap
  np.testing.assert_array_equal(count_N, dsdm_sampled.draw(log_weight_N, total, cap, 0))


def one_by_one(log_weight_N, total, cap, rng):
  """Draws by the definition: each from the rows below the cap, by their weights."""
  count_N = np.zeros(len(log_weight_N), int)
  for _ in range(total):
    p_N = np.exp(log_weight_N) * (count_N < cap)
    count_N[rng.choice(len(p_N), p=p_N / p_N.sum())] += 1
  return count_N


@pytest.mark.parametrize('chunk', [64, 1 << 20])
def test_draws_have_the_distribution_of_sequential_draws(monkeypatch, chunk):
  monkeypatch.setattr(dsdm_sampled, '_CHUNK', chunk)
  # Three kinds of rows; the heaviest have enough weight to reach the cap of 3.
  log_weight_N = np.log(np.repeat([1.0, 4.0, 16.0], 50)).astype(np.float32)
  rng, tries, total, cap = np.random.default_rng(0), 150, 200, 3

  def kinds(count_N):
    assert count_N.sum() == total and count_N.max() <= cap
    return count_N.reshape(3, 50).sum(axis=1), np.bincount(count_N, minlength=cap + 1)

  ours = [kinds(dsdm_sampled.draw(log_weight_N, total, cap, seed)) for seed in range(tries)]
  theirs = [kinds(one_by_one(log_weight_N.astype(float), total, cap, rng)) for _ in range(tries)]
  for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
    a, b = np.array(a), np.array(b)
    error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / tries)
    # Seven means; five standard errors fail by chance once in 250,000.
    assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 5 * error).all()
    # Of variances too: the standard error of either is √(2/tries) of it.
    assert (np.abs(a.var(axis=0) / b.var(axis=0) - 1) < 5 * np.sqrt(4 / tries)).all()


@pytest.mark.parametrize('temperature', [1e-6, 1e-3, 0.05, 30.0])
@pytest.mark.parametrize('share', [0.001, 0.25, 3.0, 4.0])
def test_many_draws_at_any_temperature(temperature, share):
  z_N = np.random.default_rng(0).normal(size=20_000)
  log_weight_N = (z_N / temperature).astype(np.float32)
  total = int(share * 20_000)
  count_N = dsdm_sampled.draw(log_weight_N, total, 4, 0)
  assert count_N.sum() == total and count_N.max() <= 4
  if temperature <= 1e-3:  # so cold that the best rows reach the cap, and hardly any other row is drawn
    best = np.argsort(-z_N)[: total // 4]
    assert count_N[best].sum() > 0.98 * total


def test_a_bracket_without_the_last_arrival_is_widened(monkeypatch):
  tried, log_time = [], dsdm_sampled._ArrivalTimes.log_time
  monkeypatch.setattr(dsdm_sampled, '_SPREAD', 0.01)
  monkeypatch.setattr(
    dsdm_sampled._ArrivalTimes, 'log_time', lambda *args, **end: tried.append(1) or log_time(*args, **end)
  )
  for seed in range(20):
    count_N = dsdm_sampled.draw(RANDOM, 90, 3, seed)
    assert count_N.sum() == 90 and count_N.max() <= 3
  assert len(tried) > 2 * 20


def test_draws_of_a_seed_are_its_own():
  log_weight_N = np.zeros(500, np.float32)
  one, same, other = (dsdm_sampled.draw(log_weight_N, 300, 2, seed).tolist() for seed in (0, 0, 1))
  assert one == same != other


def test_draws_when_weights_vanish():
  count_N = dsdm_sampled.draw(np.float32([0, -1e6, -1e6]), 5, 2, 0)
  assert count_N.sum() == 5 and count_N.max() == 2


def test_gumbel_draws_by_the_weights():
  """One row of two: the first with probability e^z₁/T / Σ; a binomial of 2,000, five sd."""
  pool = ArrayCandidates(np.float32([1, 0]), temperature=2.0)
  first = sum(selected('dsdm_gumbel', pool, 1, 1, seed).rows[0] == 0 for seed in range(2_000))
  z = np.float64([1, -1]) / 2.0  # standardised, over the temperature
  p = np.exp(z[0]) / np.exp(z).sum()
  assert abs(first - 2_000 * p) < 5 * np.sqrt(2_000 * p * (1 - p))


def test_temperature_goes_from_the_top_to_random():
  cold, warm = (set(selected('dsdm_gumbel', ArrayCandidates(RANDOM, temperature=t)).rows.tolist()) for t in (1e-3, 1e3))
  best = set(top(RANDOM, 10).tolist())
  assert cold == best
  assert len(warm & best) < 6


def test_gumbel_noise_is_the_same_however_it_is_cut(monkeypatch):
  whole = ranking.gumbel(1_000, 3, 'x')
  assert ranking.gumbel(400, 3, 'x').tolist() == whole[:400].tolist()
  # Mean 0.5772, variance π²/6: five standard errors.
  many = ranking.gumbel(100_000, 0, 'x').astype(np.float64)
  assert abs(many.mean() - 0.5772157) < 5 * np.sqrt(np.pi**2 / 6 / 1e5)
  assert abs(many.var() - np.pi**2 / 6) < 0.06  # sd of the variance: sqrt((5.4 − 1) / 1e5) · π²/6 = 0.011


def test_greedy_skips_repeated_rows():
  phi_MJ = np.float32([[1, 0], [1, 0], [0, 1], [-1, 0]])
  z_M = np.float32([3.0, 2.9, 2.5, 2.0])
  assert dsdm_diverse.greedy(z_M, phi_MJ, 3, 0.0).tolist() == [0, 1, 2]
  # The copy of row 0 costs 1 and falls to 1.9; the opposite of row 0 costs nothing.
  assert dsdm_diverse.greedy(z_M, phi_MJ, 4, 1.0).tolist() == [0, 2, 3, 1]


def test_greedy_breaks_ties_by_the_lower_row():
  # Mean 0 and variance 1. Row 5 is the best; row 4 repeats it, which costs its advantage over row 0.
  score_N = np.float32([0, -1, -2, 0, 1, 2, 0, 0, 0, 0])
  phi_NJ = np.eye(10)
  phi_NJ[4] = phi_NJ[5]
  assert selected(
    'dsdm_greedy', ArrayCandidates(score_N, features=Features(phi_NJ), diversity=1.0), 3
  ).rows.tolist() == [5, 0, 3]


@pytest.mark.parametrize('method', ['dsdm_greedy', 'dsdm_clusters'])
def test_redundancy_in_feature_space_costs(method):
  rng = np.random.default_rng(0)
  # Twenty near copies with the best scores, and eighty rows in other directions with slightly lower scores.
  phi_NJ = rng.normal(size=(100, 64))
  phi_NJ[:20] = phi_NJ[0] + 0.01 * rng.normal(size=(20, 64))
  score_N = np.concatenate([np.full(20, 1.2), np.linspace(0.8, 1.0, 80)]) + 1e-3 * rng.random(100)
  plain, free = (
    selected(method, ArrayCandidates(score_N, features=Features(phi_NJ), diversity=d, clusters=40), 20).rows
    for d in (0.0, 5.0)
  )
  assert sorted(plain.tolist()) == list(range(20))
  assert (free < 20).sum() <= 8 and len(set(free.tolist())) == 20
  copies = {'dsdm_greedy': 1}
  assert method not in copies or (free < 20).sum() == copies[method]


def test_gradient_dot_is_the_mean_inner_product():
  rng = np.random.default_rng(0)
  phi_NJ, target_TJ = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
  found = selected('gradient', ArrayCandidates(np.zeros(50), features=Features(phi_NJ, target_TJ)), 50)
  by_hand_N = np.array([sum(float(a @ b) for b in target_TJ.astype(float)) / 4 for a in phi_NJ.astype(float)])
  assert found.rows.tolist() == np.argsort(-by_hand_N).tolist()
  np.testing.assert_allclose(found.scores, np.sort(by_hand_N)[::-1], rtol=1e-4, atol=1e-5)  # float32 sums of six


def test_imported_scores(tmp_path):
  file = tmp_path / 'scores.npy'
  np.save(file, RANDOM)
  assert selected('imported', ArrayCandidates(RANDOM, imported=str(file))).rows.tolist() == top(RANDOM, 10).tolist()
  np.save(file, RANDOM[:99])
  with pytest.raises(UserError, match='99 scores and the pool 100 rows'):
    selected('imported', ArrayCandidates(RANDOM, imported=str(file)))


def test_a_million_scores_with_ties():
  """Thousands of ties at every value; `python -m dsdm_jax.bench selection` measures time and memory."""
  score_N = np.round(np.random.default_rng(0).normal(size=1_000_000).astype(np.float32), 2)
  rows = top(score_N, 250_000)
  key = score_N[rows]
  assert (np.diff(key) <= 0).all()
  assert (np.diff(rows)[np.diff(key) == 0] > 0).all()
  cut = key[-1]
  assert set(np.flatnonzero(score_N > cut).tolist()) <= set(rows.tolist())
  assert np.flatnonzero(score_N == cut)[: (key == cut).sum()].tolist() == rows[key == cut].tolist()


def test_hybrid_weighs_both_scores_alike_among_the_rows_that_a_prefilter_kept(monkeypatch):
  """The kept rows are the most similar ones, so that similarities vary less among them than over the pool."""
  similarity_N = np.linspace(-3, 3, 40).astype(np.float32)
  score_N = np.where(similarity_N > 1, np.random.default_rng(0).normal(size=40), np.nan).astype(np.float32)
  pool, kept_N = ArrayCandidates(score_N), ~np.isnan(score_N)
  pool.__dict__['unscored_N'] = ~kept_N
  monkeypatch.setattr('dsdm_jax.selection.lsa.nearest', lambda *_: similarity_N)
  found = selected('hybrid', pool, kept_N.sum())
  parts = [(x[found.rows] - x[kept_N].mean()) / x[kept_N].std() for x in (score_N, similarity_N)]
  np.testing.assert_allclose(found.scores, sum(parts), atol=1e-5)

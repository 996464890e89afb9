"""Selection is exact and seeded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsdm_jax.core.errors import UserError
from dsdm_jax.selection import select
from dsdm_jax.selection.registry import SELECTORS, Request, top

select.load_selectors()


class Table:
  """Scores of one target."""

  def __init__(self, score_N):
    self._score_N = np.asarray(score_N, np.float32)

  def score_N(self, target: str) -> np.ndarray:
    del target
    return self._score_N


def request(num_rows=100, examples=10, epochs=3, seed=0, score_N=None) -> Request:
  scores = np.random.default_rng(0).normal(size=num_rows) if score_N is None else score_N
  return Request(num_rows, 'mix', examples, epochs, seed, Table(scores))


# Few distinct values, so that ties are the rule; extremes of float32 among them.
SCORES = hnp.arrays(
  np.float32, st.integers(1, 60),
  elements=st.sampled_from([np.float32(v) for v in (-3e38, -1.5, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.5, 3e38)]),
)  # fmt: skip


@given(SCORES, st.data())
def test_top_is_a_full_sort_with_ties_by_lower_row(score_N, data):
  count = data.draw(st.integers(1, len(score_N)))
  wanted = sorted(range(len(score_N)), key=lambda row: (-float(score_N[row]), row))[:count]
  found = top(score_N, count)
  assert found.dtype == np.int64
  assert found.tolist() == wanted


def test_bottom_is_the_other_end():
  score_N = np.float32([3, 1, 2, 1, 5, 1])
  assert SELECTORS['bottom'].select(request(6, 2, score_N=score_N)).tolist() == [1, 3]
  assert SELECTORS['dsdm'].select(request(6, 2, score_N=score_N)).tolist() == [4, 0]


@given(st.integers(1, 59), st.integers(1, 30))
def test_shifted_scores_give_shifted_rows(shift, count):
  score_N = np.random.default_rng(shift).normal(size=60).astype(np.float32)
  plain = SELECTORS['dsdm'].select(request(60, count, score_N=score_N))
  shifted = SELECTORS['dsdm'].select(request(60, count, score_N=np.roll(score_N, shift)))
  assert shifted.tolist() == ((plain + shift) % 60).tolist()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('method', ['dsdm', 'bottom'])
def test_score_that_is_no_number_is_an_error_that_names_its_row(bad, method):
  score_N = np.zeros(20)
  score_N[7] = bad
  with pytest.raises(UserError, match='row 7 '):
    SELECTORS[method].select(request(20, 3, score_N=score_N))


@pytest.mark.parametrize(
  ('method', 'examples', 'epochs'), [('dsdm', 21, 1), ('bottom', 21, 1), ('random', 21, 1), ('random_one_epoch', 7, 3)]
)
def test_more_rows_than_the_pool_has(method, examples, epochs):
  with pytest.raises(UserError, match=r'selection\.examples') as caught:
    SELECTORS[method].select(request(20, examples, epochs))
  assert '20' in str(caught.value) and '21' in str(caught.value)


@pytest.mark.parametrize(('method', 'size'), [('dsdm', 20), ('bottom', 20), ('random', 20), ('random_one_epoch', 20)])
def test_as_many_rows_as_the_pool_has(method, size):
  rows = SELECTORS[method].select(request(20, 20 if method != 'random_one_epoch' else 10, 2))
  assert sorted(rows) == list(range(size))


@pytest.mark.parametrize(('method', 'size'), [('random', 10), ('random_one_epoch', 30)])
def test_random_is_seeded_without_replacement_and_ignores_scores(method, size):
  chooser = SELECTORS[method]
  rows = chooser.select(request(seed=1))
  assert len(rows) == len(set(rows.tolist())) == size
  assert rows.min() >= 0 and rows.max() < 100
  assert rows.tolist() == chooser.select(request(seed=1, score_N=np.arange(100))).tolist()
  assert rows.tolist() != chooser.select(request(seed=2)).tolist()


def test_random_takes_every_row_equally_often():
  counts = np.zeros(20)
  for seed in range(2_000):
    counts[SELECTORS['random'].select(request(20, 5, 1, seed))] += 1
  # Each row: binomial(2000, 1/4), sd 19.4; five sd over 20 rows fail by chance once in 90,000.
  assert np.abs(counts - 500).max() < 5 * np.sqrt(2_000 * 0.25 * 0.75)


def test_random_arms_draw_apart():
  a, b = (set(SELECTORS[m].select(request(1_000, 30, 1)).tolist()) for m in ('random', 'random_one_epoch'))
  assert a != b

"""Cheap predictors on cases worked by hand."""

import types

import numpy as np
import pytest
import scipy.sparse

from dsdm_jax.data.targets.targets import Examples
from dsdm_jax.validation import cheap, validate
from tests.helpers.selection import Rows


def test_padding_and_its_pairs_are_not_counted():
  tokens = np.array([[3, 3, 4, 0]])
  single = cheap.count(tokens, tokens != 0, 6, pairs=False).toarray()
  assert single.tolist() == [[0, 0, 0, 2, 1, 0]]
  assert cheap.count(tokens, tokens != 0, 64, pairs=True).sum() == 2


def test_bm25_by_hand():
  rows = np.array([[1, 1, 2, 3], [2, 3, 3, 3]])
  query = np.array([[1, 0, 0, 0]])
  score = cheap.bm25(cheap.count(rows, np.ones(rows.shape), 5, False), cheap.count(query, query != 0, 5, False))
  idf = np.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
  assert score[:, 0] == pytest.approx([idf * 2 * 2.2 / (2 + 1.2), 0.0], rel=1e-6)


def test_log_ratio_by_hand_and_by_task():
  rows, targets = np.array([[1, 1, 2, 2], [3, 3, 3, 3]]), np.array([[1, 1, 1, 0], [3, 3, 0, 0]])
  counts = (cheap.count(x, x != 0, 4, False) for x in (rows, targets))
  score = cheap.log_ratio(*counts, np.array(['a', 'b']))
  pool = np.array([1, 3, 3, 5]) / 12
  a = np.array([1, 4, 1, 1]) / 7
  ratio = np.log(a / pool)
  assert score[:, 0] == pytest.approx([ratio[[1, 1, 2, 2]].mean(), ratio[3]], rel=1e-5)
  assert score[0, 0] > score[1, 0]
  assert score[0, 1] < score[1, 1]


def _predictors(rows, filled, targets, weights):
  return cheap.predictors(rows, filled, targets, weights, np.array(['a', 'b']), 6, lambda: np.zeros(2), lambda: ())


@pytest.mark.parametrize('name', ['BM25', 'n-gram ratio (DSIR)', 'LSA'])
def test_rows_end_where_their_padding_begins(name):
  """The padding of unpacked rows, 0 or 5, is also a token of the targets."""
  rows, filled = np.random.default_rng(0).integers(0, 6, (9, 6)), np.arange(6) < np.arange(1, 7).repeat(2)[:9, None]
  targets, weights = np.array([[5, 0, 1, 5], [5, 4, 2, 3]]), np.array([[0, 0, 1, 0], [0, 1, 1, 1]])
  found = []
  for padding in (0, 5):
    padded = np.where(filled, rows, padding)
    found.append(_predictors(padded, filled, targets, weights)[name]())
    assert np.ptp(found[-1]) > 0
  np.testing.assert_array_equal(*found)


def test_rows_of_the_bank_know_their_padding():
  pool = Rows(np.arange(12).reshape(3, 4))
  pool.sizes = lambda rows: np.array([4, 2, 3])[rows]
  pool.vocab_size, options = 12, types.SimpleNamespace(rows=2, target_examples=1)
  one = Examples(np.zeros((1, 4)), np.zeros((1, 4)), ({'document': 'd'},))
  targets = types.SimpleNamespace(tasks=('docs',), examples=lambda task, side: one)
  found = validate.examples_of(options, pool, targets, np.array([True, False, False]))
  assert found.filled_NL.tolist() == [[True, True, False, False], [True, True, True, False]]


def test_targets_end_with_their_last_counted_token():
  """Token 0 is a text's too, and the padding, 5, is the end mark that texts begin with."""
  rows = np.array([[1, 0, 2, 3], [4, 4, 5, 1]])
  found = {}
  for padding in (5, 0):
    targets, weights = np.array([[5, 0, 1, padding], [5, 4, padding, padding]]), np.array([[0, 0, 1, 0], [0, 1, 0, 0]])
    made = _predictors(rows, np.ones(rows.shape), targets, weights)
    found[padding] = [made[name]() for name in ('BM25', 'n-gram ratio (DSIR)')]
  query = np.array([[1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]])
  by_hand = cheap.bm25(cheap.count(rows, np.ones(rows.shape), 6, False), scipy.sparse.csr_array(query))
  np.testing.assert_allclose(found[5][0], by_hand)
  for a, b in zip(found[5], found[0], strict=True):
    np.testing.assert_array_equal(a, b)


def test_cosine_subtracts_the_mean():
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((50, 8)) + 100
  found = cheap.cosine(rows, rows[:3], centre=True)
  assert np.argmax(found, axis=0).tolist() == [0, 1, 2]
  assert abs(np.median(found)) < 0.3
  assert np.median(cheap.cosine(rows, rows[:3], centre=False)) > 0.99


def test_lsa_finds_texts_of_the_same_topic_that_share_no_word():
  topics = np.array([[1, 2, 3, 1], [2, 3, 4, 4], [1, 3, 4, 2], [5, 6, 7, 5], [6, 7, 8, 8], [5, 7, 8, 6]])
  counts = (cheap.count(x, np.ones(x.shape), 10, False) for x in (topics, np.array([[1, 1, 1, 1], [8, 8, 8, 9]])))
  row_ND, target_TD = cheap.latent(*counts)
  found = cheap.cosine(row_ND[:, :2], target_TD[:, :2], centre=False)
  assert (found[:3, 0] > 0.9).all() and (found[3:, 0] < 0.1).all()
  assert (found[3:, 1] > 0.9).all() and (found[:3, 1] < 0.1).all()

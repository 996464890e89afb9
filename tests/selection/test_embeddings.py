"""Selectors that use the proxies: near duplicates, nearest target examples, perplexity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.errors import UserError
from dsdm_jax.selection import proxy_signals, semdedup
from dsdm_jax.selection.summaries import duplicates
from tests.helpers.selection import ArrayCandidates, Rows, selected, target


def unit(x_ND: np.ndarray) -> np.ndarray:
  return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)


class Proxies:
  """Embeddings and log-likelihoods of the test's choice."""

  def __init__(self, x_ND: np.ndarray, target_TD: np.ndarray | None = None):
    self._x_ND, self._target_TD = x_ND, target_TD

  def embeddings(self) -> np.ndarray:
    return self._x_ND

  def embeddings_of(self, sequences) -> np.ndarray:
    assert self._target_TD is not None and len(sequences) == len(self._target_TD)
    return self._target_TD

  def log_likelihood_N(self) -> np.ndarray:
    return self._x_ND[:, 0]


@given(st.integers(0, 20), st.integers(2, 60), st.floats(0.2, 0.99))
def test_in_one_cluster_rows_that_stay_are_apart_and_dropped_rows_have_a_duplicate(seed, rows, similarity):
  x_ND = unit(np.random.default_rng(seed).normal(size=(rows, 3)))
  dropped_N = semdedup.nearest_earlier(x_ND, 1) > similarity
  cosine_NN = x_ND.astype(np.float64) @ x_ND.T.astype(np.float64)
  np.fill_diagonal(cosine_NN, -1)
  left = np.flatnonzero(~dropped_N)
  assert len(left) >= 1
  assert cosine_NN[np.ix_(left, left)].max(initial=-1) <= similarity + 1e-5
  assert (cosine_NN[dropped_N].max(axis=1, initial=-1) > similarity - 1e-5).all()


def test_copies_are_dropped_in_any_number_of_clusters():
  rng = np.random.default_rng(0)
  apart_ND = unit(rng.normal(size=(300, 32)))
  copies_ND = unit(apart_ND[:80] + 0.01 * rng.normal(size=(80, 32)))
  for count in (0, 5, 40):
    dropped_N = semdedup.nearest_earlier(np.concatenate([apart_ND, copies_ND]), count) > 0.95
    # One of each pair stays, or both where a boundary of clusters separates them.
    assert (~dropped_N[:80] & ~dropped_N[300:]).sum() <= 4
    assert not (dropped_N[:80] & dropped_N[300:]).any()
    assert not dropped_N[80:300].any()


def test_blocks_of_a_cluster_are_compared_with_each_other(monkeypatch):
  monkeypatch.setattr(semdedup, '_BLOCK', 7)
  x_MD = unit(np.random.default_rng(0).normal(size=(50, 3)))
  by_hand = [(x_MD[:i] @ x_MD[i]).max(initial=-1) for i in range(50)]
  np.testing.assert_allclose(semdedup._to_earlier(x_MD), by_hand, atol=1e-6)


def test_semdedup_draws_from_the_rows_that_are_left():
  rng = np.random.default_rng(0)
  x_ND = unit(np.concatenate([np.tile(rng.normal(size=(1, 16)), (60, 1)), rng.normal(size=(40, 16))]))
  pool = ArrayCandidates(np.zeros(100), proxies=Proxies(x_ND), clusters=4, duplicate_keep=0.0, duplicate_similarity=0.8)
  found = selected('semdedup', pool, 30)
  assert found.provenance['dropped'] == 59
  assert (found.rows < 60).sum() <= 1
  assert found.rows.tolist() != selected('semdedup', pool, 30, seed=1).rows.tolist()
  with pytest.raises(UserError, match='42 rows and 41 are left of the 100'):
    selected('semdedup', pool, 42)
  # By share: of a fifth no row is one of the copies, but for their first; an arm that needs more rows has them.
  pool.options.duplicate_keep = 0.2
  del pool.costs._values['semdedup']
  found = selected('semdedup', pool, 20)
  assert found.provenance['dropped'] == 80 and (found.rows < 60).sum() <= 1
  assert selected('semdedup', pool, 42).provenance['dropped'] == 58


def test_semdedup_keeps_as_many_unmasked_rows_as_an_arm_needs():
  """A row's largest cosine falls with its number, so that the last rows are kept."""
  pool = ArrayCandidates(np.zeros(100))
  pool.once('semdedup', lambda: np.linspace(0.9, 0, 100).astype(np.float32))
  free = selected('semdedup', pool, 20)
  assert free.provenance['dropped'] == 80 and free.rows.min() == 80
  pool.masked_N[80:85] = True
  found = selected('semdedup', pool, 20)
  assert found.rows.tolist() == [*range(75, 80), *range(85, 100)], 'all there are, and no more than an arm needs'
  few = selected('semdedup', pool, 15)
  assert few.provenance['dropped'] == 80, 'a fifth holds 15 others'
  with pytest.raises(UserError, match='96 rows and 95 are left'):
    selected('semdedup', pool, 96)
  assert selected('semdedup', pool, 95).size == 95


def test_semdedup_in_one_epoch_fills_the_budget_with_distinct_rows():
  x_ND = unit(np.random.default_rng(0).normal(size=(100, 16)))
  found = selected(
    'semdedup_one_epoch', ArrayCandidates(np.zeros(100), proxies=Proxies(x_ND), clusters=4), 20, epochs=3
  )
  assert len(np.unique(found.rows)) == 60


def test_k_means_is_the_same_on_any_number_of_threads():
  from threadpoolctl import threadpool_limits

  x_ND = unit(np.random.default_rng(0).normal(size=(3_000, 16)))
  found = []
  for threads in (1, 2):
    with threadpool_limits(threads):
      found.append(semdedup.kmeans(x_ND, 20, np.random.default_rng(1)))
  np.testing.assert_array_equal(found[0], found[1])


def test_whitened_embeddings_have_the_same_variance_in_every_direction():
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(4_000, 6)) * [30, 10, 3, 1, 0.3, 0.3] @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
  x_ND = (x_ND - x_ND.mean(axis=0)).astype(np.float32)
  white_DD = proxy_signals.whitening(x_ND)
  np.testing.assert_allclose(white_DD, white_DD.T, atol=1e-6)
  variance_D = np.linalg.eigvalsh(np.cov((x_ND @ white_DD).T))
  # ε is 1e-3 of the mean variance, 168: of the smallest, 0.09, a third is left.
  assert variance_D[-3:] == pytest.approx(1, rel=0.02) and 0.2 < variance_D[0] < 0.5
  np.testing.assert_array_equal(proxy_signals.whitening(np.zeros((3, 2), np.float32)), np.eye(2))


def test_embedding_match_is_the_nearest_example():
  rng = np.random.default_rng(0)
  x_ND, target_TD = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(3, 8)))
  pool = ArrayCandidates(np.zeros(50), proxies=Proxies(x_ND, target_TD))
  found = selected('embedding', pool, 50, target=target(sequences=[[1, 2]] * 3))
  nearest_N = (x_ND @ target_TD.T).max(axis=1)
  assert found.rows.tolist() == np.argsort(-nearest_N, kind='stable').tolist()


def test_perplexity_has_two_ends():
  pool = ArrayCandidates(np.zeros(4), proxies=Proxies(np.float32([[-1.0], [-4.0], [-2.0], [-3.0]])))
  assert selected('perplexity_low', pool, 2).rows.tolist() == [0, 2]
  assert selected('perplexity_high', pool, 2).rows.tolist() == [1, 3]
  assert selected('perplexity_middle', pool, 2).rows.tolist() == [2, 3]


@pytest.mark.parametrize(
  ('method', 'wanted'), [('low', [1, 4, 2, 3]), ('high', [3, 2, 4, 1]), ('middle', [2, 4, 1, 3])]
)
def test_rows_without_a_token_that_the_loss_counts_have_no_perplexity(method, wanted):
  pool = ArrayCandidates(np.zeros(5), proxies=Proxies(np.float32([[0.0], [-1.0], [-3.0], [-4.0], [-2.0]])))
  pool.pool.counted_N[0] = False
  assert selected(f'perplexity_{method}', pool, 5).rows.tolist() == [*wanted, 0]


def test_color_filter_by_hand():
  class Tuned:
    """Log-likelihoods before (state 0) and after (state 1) tuning; records its arguments."""

    def state(self, checkpoint):
      return checkpoint

    def tuned(self, sequences, steps, rate):
      self.tuned_with = [s.tolist() for s in sequences], steps, rate
      return 1

    def log_likelihood_of_texts(self, state, sequences):
      held.extend(s.tolist() for s in sequences)
      _, steps, rate = self.tuned_with
      return -abs(steps - 2) - rate

    def log_likelihood_of(self, state):
      return np.float32([[-3.0, -2.0, -1.0, -4.0], [-1.0, -2.0, -2.5, -1.0]])[state]

  proxies = Tuned()
  pool, held = ArrayCandidates(np.zeros(4), proxies=proxies, conditional_steps=8), []
  wanted = target([f't{i}' for i in range(8)], [[1, i] for i in range(8)])
  found = selected('color_filter', pool, 4, target=wanted)
  # After − before: 2, 0, −1.5, 3.
  assert found.rows.tolist() == [3, 0, 1, 2]
  assert found.scores.tolist() == [3, 2, 0, -1.5]
  assert proxies.tuned_with == ([[1, i] for i in range(8)], 2, 0.1)
  pool = ArrayCandidates(np.zeros(4), proxies=proxies, conditional_steps=8)
  pool.pool.counted_N[1] = False  # the loss counts no token of this row, so it did not get easier
  assert selected('color_filter', pool, 4, target=wanted).scores.tolist() == [3, 2, -1.5, -2.5]
  assert 0 < len({tuple(s) for s in held}) < 8


def test_duplicates_are_recognised_after_a_shift():
  stream = np.random.default_rng(0).integers(3, 500, 4_000)
  apart = stream.reshape(-1, 100)
  shifted = stream[17:3_917].reshape(-1, 100)
  tokens_KL = np.concatenate([apart, shifted[:10], apart[:5]])
  found = duplicates(tokens_KL)
  assert not found[:40].any()
  assert found[40:].mean() > 0.8  # text shifted by 17 of 100 tokens is in two rows, both of them earlier
  assert found[50:].all()
  assert duplicates(np.zeros((3, 4), np.int32)).tolist() == [False, True, True]
  # Rows that share nothing but their padding are no duplicates of each other.
  short_KL, size_K, with_padding = np.arange(8 * 64).reshape(8, 64), np.full(8, 24), []
  short_KL[7] = short_KL[2]
  for pad in range(20):  # the runs of some are compared
    short_KL[:, 24:] = pad
    assert np.flatnonzero(duplicates(short_KL, size_K)).tolist() == [7]
    with_padding.append(int(duplicates(short_KL).sum()))
  assert max(with_padding) > 1
  assert Rows(apart).length == 100

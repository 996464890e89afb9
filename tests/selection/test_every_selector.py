"""What every selector must keep to, whatever the pool: rows in range, caps, seeds, ties."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdm_jax.config.methods import METHODS
from dsdm_jax.errors import UserError
from dsdm_jax.selection import clusters
from dsdm_jax.selection.candidates import Candidates
from dsdm_jax.selection.registry import SELECTORS, Budget, find, selector
from tests.selection.made import Features, Made, Rows, target

WORDS = [f'w{i}' for i in range(12)]
RANKED = [m for m in METHODS if 'random' not in m and 'semdedup' not in m and m != 'dsdm_boltzmann']


class Proxies:
  """Embeddings and log-likelihoods of few values, so that ties are many."""

  def __init__(self, x_ND: np.ndarray):
    norm_N = np.linalg.norm(x_ND, axis=1, keepdims=True)
    self._x_ND = (x_ND / np.where(norm_N > 0, norm_N, 1)).astype(np.float32)

  def embeddings(self) -> np.ndarray:
    return self._x_ND

  def embeddings_of(self, sequences) -> np.ndarray:
    return self._x_ND[: len(sequences)]

  def log_likelihood_N(self) -> np.ndarray:
    return self._x_ND[:, 0].copy()

  def metagradient_N(self, examples) -> np.ndarray:
    del examples
    return self._x_ND[:, 1].copy()

  def state(self, checkpoint: int) -> int:
    return checkpoint

  def tuned(self, sequences, steps, learning_rate, seed) -> int:
    del sequences, steps, learning_rate, seed
    return 1

  def log_likelihood_of(self, state: int) -> np.ndarray:
    return self._x_ND[:, state].copy()


@dataclasses.dataclass
class Case:
  """A pool on which every method can work, made of few values."""

  rows: int
  seed: int
  document_cap: int
  source_cap: float
  repeat_cap: int
  imported: str

  def pool(self) -> Candidates:
    rng = np.random.default_rng(self.seed)
    text_N = [' '.join(rng.choice(WORDS, 6)) for _ in range(self.rows)]
    text_N[self.rows // 2 :] = text_N[: -(self.rows // 2)]  # each text twice
    tokens_NL = np.tile(np.arange(self.rows, dtype=np.int32)[:, None], 8)
    np.save(self.imported, rng.integers(0, 3, self.rows).astype(np.float32))
    return Made(
      rng.integers(-2, 3, self.rows), Rows(tokens_NL, rng.integers(0, 3, self.rows), np.arange(self.rows) // 3, text_N),
      Features(rng.normal(size=(self.rows, 5)), rng.normal(size=(2, 5))), Proxies(rng.integers(-1, 2, (self.rows, 3))),
      document_cap=self.document_cap, source_cap=self.source_cap, repeat_cap=self.repeat_cap, ngram_buckets=64,
      distill_rows=50, imported=self.imported, clusters=3,
    )  # fmt: skip


CASES = st.builds(
  Case, st.integers(60, 90), st.integers(0, 50), st.integers(0, 3), st.sampled_from([0.5, 0.8, 1.0]),
  st.integers(2, 5), st.just(''),
)  # fmt: skip
WANTED = target([' '.join(WORDS[:5]), ' '.join(WORDS[3:9])], [[1, 2, 3], [4, 5]])


def test_every_method_is_here():
  assert set(SELECTORS) == set(METHODS)


def test_a_built_in_selector_is_not_replaced():
  def mine(pool, target, budget, seed):
    raise AssertionError

  there = SELECTORS['random']
  with pytest.raises(UserError, match="is called 'random' as dsdm_jax.selection.random:random is; rename") as caught:
    selector('random', targeted=False, seeded=True)(mine)
  assert '\n' not in str(caught.value)
  assert SELECTORS['random'] is there
  selector('random', targeted=False, seeded=True)(there.select)  # a module that is read again


@pytest.mark.parametrize('method', METHODS)
@settings(max_examples=12)
@given(case=CASES, examples=st.integers(1, 40), epochs=st.integers(1, 2), seed=st.integers(0, 9))
def test_rows_are_in_range_within_their_caps_and_the_same_again(tmp_path_factory, method, case, examples, epochs, seed):
  case.imported = str(tmp_path_factory.getbasetemp() / 'scores.npy')
  budget = Budget(examples, epochs, case.repeat_cap)
  pool = case.pool()
  try:
    found = find(method).select(pool, WANTED, budget, seed)
  except UserError as refusal:
    said = str(refusal)
  else:
    said = ''
  if said:  # too few rows are left for the budget, and nothing else
    assert any(word in said for word in ('leave', 'left', 'has'))
    return
  found.check(case.rows, budget.repeat_cap if method == 'dsdm_boltzmann' else 1)
  assert found.rows.dtype == np.int64
  assert found.size == (
    budget.total if method in ('random_one_epoch', 'semdedup_one_epoch', 'dsdm_boltzmann') else examples
  )
  if method in RANKED:
    if case.document_cap:
      assert np.bincount(pool.document_N[found.rows]).max() <= case.document_cap
    tenths = {0.5: 5, 0.8: 8, 1.0: 10}[case.source_cap]
    assert 10 * np.bincount(pool.source_N[found.rows]).max() <= tenths * examples
  again = find(method).select(case.pool(), WANTED, budget, seed)
  assert again.rows.tolist() == found.rows.tolist()
  if not find(method).seeded and method != 'dsdm_permuted':  # one permutation stands for all seeds
    other = find(method).select(pool, WANTED, budget, seed + 1)
    assert other.rows.tolist() == found.rows.tolist()


@pytest.mark.parametrize('method', [m for m in RANKED if not m.startswith(('dsdm_greedy', 'dsdm_clusters'))])
def test_equal_scores_go_to_the_lower_row(tmp_path, method):
  case = Case(80, 3, 0, 1.0, 4, str(tmp_path / 'scores.npy'))
  found = find(method).select(case.pool(), WANTED, Budget(60, 1, 4), 0)
  assert found.scores is not None
  tied = np.diff(found.scores) == 0
  assert (np.diff(found.scores) <= 0).all()
  assert (np.diff(found.rows)[tied] > 0).all()
  # Methods that draw break ties by noise, and features are all different here; the others have ties to break.
  assert tied.any() or find(method).seeded or method == 'gradient'


def test_ties_of_clusters_do_not_follow_the_order_of_arrival():
  x_ND = np.float32([[1, 0], [0, 1], [1, 1]]) / np.float32([[1], [1], [2**0.5]])
  centres_KD = np.float32([[1, 0], [0, 1]])
  assert clusters.assign(x_ND, centres_KD).tolist() == [0, 1, 0]

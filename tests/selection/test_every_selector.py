"""Properties of every selector on any pool: rows in range, caps, seeds, ties."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdm_jax.config.methods import METHODS
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection import semdedup
from dsdm_jax.selection.candidates import Budget, Candidates, find, selector
from tests.helpers.selection import ArrayCandidates, Features, Rows, target

WORDS = [f'w{i}' for i in range(12)]
RANKED = [m for m in METHODS if not any(word in m for word in ('random', 'semdedup', 'minhash', 'boltzmann'))]


class Proxies:
  """Embeddings and log-likelihoods with few values, so that there are many ties."""

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

  def adam_cosines(self, by_task, dimension) -> np.ndarray:
    del dimension
    return self._x_ND[:, : len(by_task)].T.copy()

  def state(self, checkpoint: int) -> int:
    return checkpoint

  def tuned(self, sequences, steps, rate) -> int:
    del sequences, steps, rate
    return 1

  def log_likelihood_of_texts(self, state, sequences) -> float:
    del state, sequences
    return -1.0

  def log_likelihood_of(self, state: int) -> np.ndarray:
    return self._x_ND[:, state].copy()


@dataclasses.dataclass
class Case:
  """A pool with few values, for every method."""

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
    return ArrayCandidates(
      rng.integers(-2, 3, self.rows),
      Rows(tokens_NL, rng.integers(0, 3, self.rows), np.arange(self.rows) // 3, text_N),
      Features(rng.normal(size=(self.rows, 5)), rng.normal(size=(2, 5))),
      Proxies(rng.integers(-1, 2, (self.rows, 3))),
      document_cap=self.document_cap,
      source_cap=self.source_cap,
      repeat_cap=self.repeat_cap,
      ngram_buckets=64,
      distill_rows=50,
      imported=self.imported,
      clusters=3,
    )


CASES = st.builds(
  Case,
  st.integers(60, 90),
  st.integers(0, 50),
  st.integers(0, 3),
  st.sampled_from([0.5, 0.8, 1.0]),
  st.integers(2, 5),
  st.just(''),
)
TARGET = target([' '.join(WORDS[:5]), ' '.join(WORDS[3:9])], [[1, 2, 3], [4, 5]])


@pytest.mark.parametrize('method', METHODS)
def test_every_method_of_the_table_is_a_function(method):
  by_name, by_path = find(method), find(METHODS[method].path)
  assert by_name == by_path and by_name.select.__name__ == method
  assert (by_name.targeted, by_name.seeded) == (METHODS[method].targeted, METHODS[method].seeded)


@selector(targeted=False, seeded=False)
def first_rows(pool, target, budget, seed):
  del pool, target, seed
  return Selection.of(np.arange(budget.examples))


def test_a_custom_selector_can_ignore_targets_and_seeds():
  marked, plain = (find(f'tests.selection.{name}') for name in ('test_every_selector:first_rows', 'every:shortest'))
  assert (marked.targeted, marked.seeded) == (False, False)
  assert (plain.targeted, plain.seeded) == (True, True)


@pytest.mark.parametrize('method', METHODS)
@settings(max_examples=6)
@given(case=CASES, examples=st.integers(1, 40), epochs=st.integers(1, 2), seed=st.integers(0, 9))
def test_rows_are_in_range_within_caps_and_repeatable(tmp_path_factory, method, case, examples, epochs, seed):
  case.imported = str(tmp_path_factory.getbasetemp() / 'scores.npy')
  budget = Budget(examples, epochs, case.repeat_cap)
  pool = case.pool()
  message = ''
  try:
    selection = find(method).select(pool, TARGET, budget, seed)
  except UserError as error:
    message = str(error)
  if message:  # the only allowed reason: too few rows for the budget
    assert any(word in message for word in ('leave', 'left', 'has'))
    return
  selection.check(case.rows, budget.repeat_cap if method == 'dsdm_boltzmann' else 1)
  assert selection.rows.dtype == np.int64
  assert selection.size == (
    budget.total if method in ('random_one_epoch', 'semdedup_one_epoch', 'dsdm_boltzmann') else examples
  )
  if method in RANKED:
    if case.document_cap:
      assert np.bincount(pool.document_N[selection.rows]).max() <= case.document_cap
    tenths = {0.5: 5, 0.8: 8, 1.0: 10}[case.source_cap]
    assert 10 * np.bincount(pool.source_N[selection.rows]).max() <= tenths * examples
  again = find(method).select(case.pool(), TARGET, budget, seed)
  assert again.rows.tolist() == selection.rows.tolist()
  if not find(method).seeded and method != 'dsdm_permuted':  # one permutation for all seeds
    other = find(method).select(pool, TARGET, budget, seed + 1)
    assert other.rows.tolist() == selection.rows.tolist()


@pytest.mark.parametrize('method', [m for m in RANKED if not m.startswith(('dsdm_greedy', 'dsdm_clusters'))])
def test_equal_scores_go_to_the_lower_row(tmp_path, method):
  case = Case(80, 3, 0, 1.0, 4, str(tmp_path / 'scores.npy'))
  selection = find(method).select(case.pool(), TARGET, Budget(60, 1, 4), 0)
  assert selection.scores is not None
  tied = np.diff(selection.scores) == 0
  assert (np.diff(selection.scores) <= 0).all()
  assert (np.diff(selection.rows)[tied] > 0).all()
  # Methods that draw break ties by noise, and all features differ here; the others have ties to break.
  assert tied.any() or find(method).seeded or method in ('gradient', 'gradient_cosine')


def test_ties_of_clusters_go_to_the_first():
  x_ND = np.float32([[1, 0], [0, 1], [1, 1]]) / np.float32([[1], [1], [2**0.5]])
  centres_KD = np.float32([[1, 0], [0, 1]])
  assert semdedup.nearest_centre(x_ND, centres_KD).tolist() == [0, 1, 0]

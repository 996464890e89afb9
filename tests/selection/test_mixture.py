"""The visits of a mixture, counted over its whole order."""

import types

import numpy as np
import pytest

from configs.base import get_config
from dsdm_jax.core import prng
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection import mixture
from dsdm_jax.selection.candidates import Budget
from tests.helpers.selection import NO_TARGET, ArrayCandidates

SCORE_N = np.random.default_rng(0).normal(size=2_000).astype(np.float32)


class Pool(ArrayCandidates):
  def target(self, name):
    del name
    return NO_TARGET


def mixed(folder, parts, budget, seed=1, **options):
  """(Examples at each position of the training: rows int64; the entry of the index; all rows together.)"""
  config = get_config()
  config.mixture.parts = parts
  context = types.SimpleNamespace(config=config, first=True, out=folder)
  entry, every = mixture.select_mixture(context, Pool(SCORE_N, **options), budget, seed)
  order = prng.derive(config.seed, 'order', seed)
  schedule = selection_lib.schedule(folder, entry, budget.total, order)
  return schedule, entry, every


@pytest.mark.parametrize(
  ('part', 'cap'),
  [
    ('dsdm_boltzmann', 16),
    ('dsdm_boltzmann epochs=3 cap=7', 7),
    ('dsdm_boltzmann epochs=2.5', 16),
    ('dsdm_boltzmann rows=100', 16),
    ('dsdm_boltzmann rows=20 cap=2', 2),
    ('dsdm epochs=5 cap=6', 6),
  ],
)
def test_passes_and_draws_together_stay_within_a_parts_cap(tmp_path, part, cap):
  # So cold that nearly all draws are of a few rows, at twice the rate of the other part.
  schedule, entry, _ = mixed(tmp_path, (f'{part} rate=2', 'random epochs=1'), Budget(512, 4, 16), temperature=0.02)
  part_B, row_B, _ = schedule.at(np.arange(2_048))
  visits_N = np.bincount(row_B[part_B == 0])
  assert visits_N.max() <= cap
  assert visits_N.max() > cap // 2, 'it is reached, or almost'
  assert entry['parts'][0]['most'] >= (part_B == 0).sum()


def test_all_rows_together_weigh_their_visits(tmp_path):
  parts = ('dsdm rate=2', 'dsdm_boltzmann rows=50 cap=2', 'random epochs=1')
  schedule, entry, every = mixed(tmp_path, parts, Budget(500, 4, 16))
  _, row_B, _ = schedule.at(np.arange(2_000))
  np.testing.assert_array_equal(every.rows, np.unique(np.concatenate([p.rows for p in schedule.parts])))
  np.testing.assert_array_equal(every.weights, np.bincount(row_B, minlength=2_000)[every.rows])
  assert every.weights.sum() == 2_000
  provenance = Selection.load(tmp_path, entry['selection']).provenance
  assert provenance['most_visits'] == every.weights.max()
  assert [p['visits'] for p in provenance['parts']] == schedule.visits(2_000).tolist()


def test_a_mixture_that_cannot_be_filled_is_refused_during_selection(tmp_path):
  with pytest.raises(UserError, match='may give 150 of 2000 examples'):
    mixed(tmp_path, ('dsdm rows=50 cap=2', 'random rows=50 cap=1'), Budget(500, 4, 16))

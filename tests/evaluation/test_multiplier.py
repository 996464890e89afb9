"""Reading results off a ladder: by hand, at its ends, and against the truth of simulated experiments."""

import math

import numpy as np
import pytest

from dsdm_jax.config.methods import STAGES
from dsdm_jax.evaluation import multiplier

COMPUTE = [1.0, 2.0, 4.0, 8.0]
COSTS = {
  stage: {'flop': flop, 'seconds': flop / 10} for stage, flop in zip(STAGES, (30.0, 20.0, 5.0, 1.0), strict=True)
}


def _exact(level: float) -> np.ndarray:
  """Three seeds, four items, nothing varies but the items."""
  return np.tile(np.array([[0.0, 1.0, 2.0, 3.0]]) + level, (3, 1))


def _ladder() -> list[np.ndarray]:
  return [_exact(level) for level in (0.0, 1.0, 2.0, 3.0)]  # one nat per doubling


@pytest.mark.parametrize('doublings', [0.5, 1.0, 1.73, 2.99])
def test_without_noise_the_reading_is_the_line(doublings):
  reading = multiplier.read_off(_exact(doublings), _ladder(), COMPUTE)
  assert reading.estimate == pytest.approx(2**doublings, rel=1e-9)
  assert reading.low == pytest.approx(2**doublings, rel=0.023) and reading.high == pytest.approx(
    2**doublings, rel=0.023
  )
  assert reading.low <= reading.estimate <= reading.high


@pytest.mark.parametrize(
  ('level', 'text', 'estimate', 'low', 'high'), [(5.0, '> 8', None, 8.0, None), (-1.0, '< 1', None, None, 1.0)]
)
def test_outside_the_ladder(level, text, estimate, low, high):
  reading = multiplier.read_off(_exact(level), _ladder(), COMPUTE)
  assert (reading.estimate, reading.low, reading.high) == (estimate, low, high)
  assert reading.text() == text
  assert reading.per(2.0).text() == {'> 8': '> 4', '< 1': '< 0.5'}[text]


def _noisy(g: np.random.Generator, level: float, item_I: np.ndarray, seeds: int = 3) -> np.ndarray:
  return level + item_I + g.normal(0, 0.15, (seeds, 1)) + g.normal(0, 0.3, (seeds, len(item_I)))


def test_interval_extends_past_the_ends_where_noise_does():
  g = np.random.default_rng(0)
  item_I = g.normal(-4, 1, 50)
  rungs = [_noisy(g, level, item_I) for level in (0.0, 1.0, 2.0, 3.0)]
  high = multiplier.read_off(_noisy(g, 3.0, item_I), rungs, COMPUTE)
  assert high.high is None and high.low is not None and high.text().endswith('> 8]')
  low = multiplier.read_off(_noisy(g, 0.0, item_I), rungs, COMPUTE)
  assert low.low is None and low.high is not None and '[< 1, ' in low.text()


def test_coverage():
  """95 % intervals hold the true compute in 91 to 98 % of 400 experiments (standard error of that share 1.1 points)."""
  seeds, g = 3, np.random.default_rng(3)
  truth = 2**1.4
  hits = 0
  for _ in range(400):
    item_I = g.normal(-4, 1, 30)
    rungs = [_noisy(g, level, item_I, seeds) for level in (1.0, 2.0)]
    reading = multiplier.read_off(_noisy(g, 1.4, item_I, seeds), rungs, [2.0, 4.0])
    hits += (reading.low or 0) <= truth <= (reading.high or math.inf)
  assert 0.91 <= hits / 400 <= 0.98


def test_a_ladder_that_is_not_monotone_gives_its_first_crossing():
  rungs = [_exact(level) for level in (0.0, 2.0, 1.0, 3.0)]
  reading = multiplier.read_off(_exact(1.5), rungs, COMPUTE)
  assert reading.estimate == pytest.approx(2**0.75, rel=1e-9)
  assert reading.low == pytest.approx(2**0.75, rel=0.03) and reading.high == pytest.approx(4 * 2**0.25, rel=0.03)


def test_gross_and_net_by_hand():
  """C_equivalent 4, C_final 2: gross 2. DsDm needs 30 + 20 + 5 + 1 = 56, over 14 uses 4: net 4/(2 + 4)."""
  reading = multiplier.read_off(_exact(2.0), _ladder(), COMPUTE)
  row = multiplier.arm(reading, _charge('dsdm'), uses=14)
  assert row['gross']['estimate'] == pytest.approx(2)
  assert row['net']['estimate'] == pytest.approx(4 / 6)
  assert (row['flop_selection'], row['seconds_selection']) == (56, pytest.approx(5.6))
  assert row['needs_flop_selection_below'] == pytest.approx(28), '(2 − 1) · 2 · 14'
  free = multiplier.arm(reading, _charge('random'), uses=1)
  assert free['net'] == free['gross'] and free['flop_selection'] == 0


def _charge(method: str, *selections: str, own_costs=None) -> multiplier.Charge:
  return multiplier.charge(method, selections, {'flop': 2.0, 'seconds': 3.0}, COSTS, own_costs or {}, proxies=2)


@pytest.mark.parametrize(
  ('method', 'flop'),
  [
    ('random', 0),
    *(('dsir', 1), ('lsa', 1), ('minhash', 1), ('fasttext', 1), ('oracle', 1)),
    *(('semdedup', 16), ('embedding', 16), ('color_filter', 16)),  # one of the two proxies
    *(('perplexity_middle', 31), ('gradient', 51), ('gradient_cosine', 51)),
    *(('dsdm_gumbel', 56), ('dsdm_greedy', 56), ('hybrid_embedding', 56), ('my.own:selector', 56)),
  ],
)
def test_every_method_is_charged_the_stages_it_needs(method, flop):
  assert _charge(method).selection['flop'] == flop


def test_an_arm_is_charged_its_own_selections():
  own_costs = {'dsir--mix--0': {'flop': 0.2, 'seconds': 3.0}, 'dsir--mix--1': {'flop': 0.4, 'seconds': 5.0}}

  def cost(method: str, *names: str) -> dict[str, float]:
    return _charge(method, *names, own_costs=own_costs).selection

  assert cost('dsir', 'dsir--mix--0', 'dsir--mix--1', 'dsir--mix--1') == pytest.approx({'flop': 0.3, 'seconds': 4.0})
  assert cost('dsdm', 'dsir--mix--0')['flop'] == pytest.approx(30 + 20 + 5 + 0.2)
  with pytest.raises(KeyError):
    cost('dsdm', 'dsdm--mix--0')


@pytest.mark.parametrize('cost', [1.9, 2.1])
def test_net_is_above_one_exactly_where_selecting_costs_less_than_it_saves(cost):
  reading = multiplier.read_off(_exact(2.0), _ladder(), COMPUTE)
  charged = multiplier.Charge({'flop': 2.0, 'seconds': 1.0}, {'flop': cost, 'seconds': 1.0})
  row = multiplier.arm(reading, charged, uses=1)
  assert (row['net']['estimate'] > 1) == (cost < row['needs_flop_selection_below'])


@pytest.mark.parametrize('compute', [[1.0], [2.0, 1.0]])
def test_refuses(compute):
  with pytest.raises(ValueError, match='rising'):
    multiplier.read_off(_exact(1.0), _ladder()[: len(compute)], compute)

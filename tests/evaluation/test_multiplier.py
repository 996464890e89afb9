"""Reading results off a ladder: by hand, at its ends, and with the truth of simulated experiments."""

import math

import numpy as np
import pytest

from dsdm_jax.evaluation import compute, multiplier

COMPUTE = [1.0, 2.0, 4.0, 8.0]
COSTS = {stage: {'flop': flop, 'seconds': flop / 10} for stage, flop in
         zip(multiplier.STAGES, (30.0, 20.0, 5.0, 1.0), strict=True)}  # fmt: skip


def _exact(level: float) -> np.ndarray:
  """Three seeds, four items, nothing that varies but the items."""
  return np.tile(np.array([[0.0, 1.0, 2.0, 3.0]]) + level, (3, 1))


def _ladder() -> list[np.ndarray]:
  return [_exact(level) for level in (0.0, 1.0, 2.0, 3.0)]  # one nat per doubling


@pytest.mark.parametrize('doublings', [0.5, 1.0, 1.73, 2.99])
def test_without_noise_the_reading_is_the_line(doublings):
  found = multiplier.read_off(_exact(doublings), _ladder(), COMPUTE)
  assert found.estimate == pytest.approx(2**doublings, rel=1e-9)
  assert found.low == pytest.approx(2**doublings, rel=0.023) and found.high == pytest.approx(2**doublings, rel=0.023)
  assert found.low <= found.estimate <= found.high


@pytest.mark.parametrize(
  ('level', 'text', 'estimate', 'low', 'high'),
  [(5.0, '> 8', None, 8.0, None), (-1.0, '< 1', None, None, 1.0)],
)
def test_outside_the_ladder(level, text, estimate, low, high):
  found = multiplier.read_off(_exact(level), _ladder(), COMPUTE)
  assert (found.estimate, found.low, found.high) == (estimate, low, high)
  assert found.text() == text
  assert found.per(2.0).text() == {'> 8': '> 4', '< 1': '< 0.5'}[text]


def _noisy(g: np.random.Generator, level: float, item_I: np.ndarray, seeds: int = 3) -> np.ndarray:
  return level + item_I + g.normal(0, 0.15, (seeds, 1)) + g.normal(0, 0.3, (seeds, len(item_I)))


def test_interval_reaches_past_the_ends_where_noise_does():
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
    found = multiplier.read_off(_noisy(g, 1.4, item_I, seeds), rungs, [2.0, 4.0])
    hits += (found.low or 0) <= truth <= (found.high or math.inf)
  assert 0.91 <= hits / 400 <= 0.98


def test_a_ladder_that_is_not_monotone_gives_its_first_crossing():
  rungs = [_exact(level) for level in (0.0, 2.0, 1.0, 3.0)]
  found = multiplier.read_off(_exact(1.5), rungs, COMPUTE)
  assert found.estimate == pytest.approx(2**0.75, rel=1e-9)
  assert found.low == pytest.approx(2**0.75, rel=0.03) and found.high == pytest.approx(4 * 2**0.25, rel=0.03)


def test_gross_and_net_by_hand():
  """C_equivalent 4, C_final 2: gross 2. DsDm stands on 30 + 20 + 5 + 1 = 56, over 14 uses 4: net 4/(2 + 4)."""
  reading = multiplier.read_off(_exact(2.0), _ladder(), COMPUTE)
  found = multiplier.arm(reading, 'dsdm', {'flop': 2.0, 'seconds': 3.0}, COSTS, uses=14)
  assert found['gross']['estimate'] == pytest.approx(2)
  assert found['net']['estimate'] == pytest.approx(4 / 6)
  assert (found['flop_selection'], found['seconds_selection']) == (56, pytest.approx(5.6))
  assert found['needs_flop_selection_below'] == pytest.approx(28), '(2 − 1) · 2 · 14'
  free = multiplier.arm(reading, 'random', {'flop': 2.0, 'seconds': 3.0}, COSTS, uses=1)
  assert free['net'] == free['gross'] and free['flop_selection'] == 0


@pytest.mark.parametrize(
  ('method', 'flop'),
  [('dsir', 1), ('oracle', 1), ('semdedup', 31), ('gradient', 51), ('dsdm_gumbel', 56), ('my.own:selector', 56)],
)
def test_every_method_bears_the_stages_it_stands_on(method, flop):
  assert multiplier.selection_cost(method, COSTS)['flop'] == flop


def test_an_arm_bears_the_selections_of_its_own():
  choices = {'dsir--mix--0': {'flop': 0.2, 'seconds': 3.0}, 'dsir--mix--1': {'flop': 0.4, 'seconds': 5.0}}
  final = {'flop': 2.0, 'seconds': 1.0}

  def spent(method: str, *names: str) -> dict[str, float]:
    found = compute.charge(method, names, final, COSTS, choices)
    return multiplier.selection_cost(found.method, found.costs)

  assert spent('dsir', 'dsir--mix--0', 'dsir--mix--1', 'dsir--mix--1') == pytest.approx({'flop': 0.3, 'seconds': 4.0})
  assert spent('dsdm', 'dsir--mix--0')['flop'] == pytest.approx(30 + 20 + 5 + 0.2)
  assert spent('dsdm', 'dsdm--mix--0')['flop'] == 56, 'the whole stage where it was not measured'
  assert spent('dsdm')['flop'] == 56


def test_net_is_above_one_exactly_where_choosing_costs_less_than_it_saves():
  reading = multiplier.read_off(_exact(2.0), _ladder(), COMPUTE)
  for cost in (1.9, 2.1):
    costs = {**{stage: {'flop': 0.0, 'seconds': 0.0} for stage in multiplier.STAGES}}
    costs['features'] = {'flop': cost, 'seconds': 1.0}
    found = multiplier.arm(reading, 'dsdm', {'flop': 2.0, 'seconds': 1.0}, costs, uses=1)
    assert (found['net']['estimate'] > 1) == (cost < found['needs_flop_selection_below'])


@pytest.mark.parametrize('compute', [[1.0], [2.0, 1.0]])
def test_refuses(compute):
  with pytest.raises(ValueError, match='rising'):
    multiplier.read_off(_exact(1.0), _ladder()[: len(compute)], compute)

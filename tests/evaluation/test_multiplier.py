"""Reading results off a ladder: by hand, at its ends, in seconds, and against the truth of simulated experiments."""

import math

import numpy as np
import pytest

from dsdm_jax.config.methods import STAGES
from dsdm_jax.evaluation import multiplier
from dsdm_jax.evaluation.results import Table

COMPUTE = [1.0, 2.0, 4.0, 8.0]
COSTS = {
  stage: {'flop': flop, 'seconds': flop / 10}
  for stage, flop in zip(STAGES, (0.0, 30.0, 18.0, 2.0, 5.0, 1.0), strict=True)
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


@pytest.mark.parametrize(('levels', 'level', 'above'), [((0.0, 1.0, 0.2), 1.05, True), ((1.0, 0.0, 0.8), 0.05, False)])
def test_a_reading_outside_a_ladder_that_turns_is_in_its_interval(levels, level, above):
  g = np.random.default_rng(1)
  item_I = g.normal(-4, 1, 50)
  rungs = [_noisy(g, x, item_I) for x in levels]
  method_SI = _noisy(g, level, item_I)
  method_SI += level + item_I.mean() - method_SI.mean()  # so that it is outside by a little
  rungs = [rung + x + item_I.mean() - rung.mean() for rung, x in zip(rungs, levels, strict=True)]
  reading = multiplier.read_off(method_SI, rungs, COMPUTE[:3])
  assert reading.estimate is None and reading.above == above
  if above:
    assert reading.low is not None and 1 < reading.low < 4 and reading.text() == f'> 4 [{reading.low:.3g}, > 4]'
  else:
    assert reading.high is not None and 1 < reading.high < 4 and reading.text() == f'< 1 [< 1, {reading.high:.3g}]'
  seconds = reading.on(COMPUTE[:3], [10.0, 20.0, 40.0])
  assert (seconds.low is None, seconds.high is None) == (not above, above)


def test_coverage():
  """95 % intervals hold the true compute in 91 to 98 % of 200 experiments (standard error of that share 1.5 points)."""
  seeds, g = 3, np.random.default_rng(3)
  truth = 2**1.4
  hits = 0
  for _ in range(200):
    item_I = g.normal(-4, 1, 30)
    rungs = [_noisy(g, level, item_I, seeds) for level in (1.0, 2.0)]
    reading = multiplier.read_off(_noisy(g, 1.4, item_I, seeds), rungs, [2.0, 4.0])
    hits += (reading.low or 0) <= truth <= (reading.high or math.inf)
  assert 0.91 <= hits / 200 <= 0.98


def test_coverage_of_a_ladder_whose_models_were_chosen():
  """As `test_coverage`, where each rung takes the best of five candidates by the pool loss of its first seed.

  Candidates are nearly equal, so that noise decides, and a model's seed moves its pool loss and its tasks together. The
  truth is read on the curve of what is chosen on average.
  """
  g, truth, hits = np.random.default_rng(5), 2**1.4, 0
  offset_P = np.array([0.0, -0.02, -0.05, -0.05, -0.1])

  def rung(level: float, item_I: np.ndarray) -> tuple[np.ndarray, float]:
    first_P = g.normal(0, 0.15, len(offset_P))
    pool_P = -(level + offset_P + 0.5 * first_P + g.normal(0, 0.02, len(offset_P)))
    place = int(np.argmin(pool_P))
    seed_S1 = np.array([first_P[place], *g.normal(0, 0.15, 2)])[:, None]
    values_SI = level + offset_P[place] + item_I + seed_S1 + g.normal(0, 0.3, (3, len(item_I)))
    return values_SI, float(offset_P[place])

  chosen = [rung(1.0, np.zeros(30))[1] for _ in range(2_000)]
  shift = float(np.mean(chosen))
  for _ in range(200):
    item_I = g.normal(-4, 1, 30)
    rungs = [rung(level, item_I)[0] for level in (1.0, 2.0)]
    reading = multiplier.read_off(_noisy(g, 1.4 + shift, item_I), rungs, [2.0, 4.0])
    hits += (reading.low or 0) <= truth <= (reading.high or math.inf)
  assert 0.91 <= hits / 200 <= 0.98


@pytest.mark.parametrize('level', [-1.0, 0.25, 1.5, 2.75, 5.0])
def test_in_seconds_it_is_the_same_place(level):
  """Seconds 10, 14, 20, 50 at the rungs; between them linear in both logarithms."""
  seconds = [10.0, 14.0, 20.0, 50.0]
  reading = multiplier.read_off(_exact(level), _ladder(), COMPUTE)
  there = reading.on(COMPUTE, seconds)
  if not 0 <= level <= 3:
    assert there.text() == {'> 8': '> 50', '< 1': '< 10'}[reading.text()]
    return
  rung, share = int(level), level % 1
  wanted = seconds[rung] ** (1 - share) * seconds[rung + 1] ** share
  assert there.estimate == pytest.approx(wanted, rel=1e-9)
  assert there.low <= there.estimate <= there.high and there.high / there.low < 1.05


def test_seconds_that_fall_widen_the_interval():
  reading = multiplier.Reading(2.83, 1.5, 7.0, 1.0, 8.0)
  there = reading.on(COMPUTE, [10.0, 30.0, 20.0, 40.0])
  assert there.low < 20 and there.high == pytest.approx(np.exp(np.interp(np.log(7), np.log([4, 8]), np.log([20, 40]))))
  assert there.low <= there.estimate <= there.high


def test_a_ladder_that_is_not_monotone_gives_its_first_crossing():
  rungs = [_exact(level) for level in (0.0, 2.0, 1.0, 3.0)]
  reading = multiplier.read_off(_exact(1.5), rungs, COMPUTE)
  assert reading.estimate == pytest.approx(2**0.75, rel=1e-9)
  assert reading.low == pytest.approx(2**0.75, rel=0.03) and reading.high == pytest.approx(4 * 2**0.25, rel=0.03)


def test_gross_and_net_by_hand():
  """C_equivalent 4, C_final 2: gross 2. DsDm needs 30 + 20 + 5 + 1 = 56, over 14 uses 4: net 4/(2 + 4)."""
  reading = multiplier.read_off(_exact(2.0), _ladder(), COMPUTE)
  row = multiplier.arm(_both(reading), _charge('dsdm'), uses=14)
  assert row['gross']['estimate'] == pytest.approx(2)
  assert row['net']['estimate'] == pytest.approx(4 / 6)
  assert (row['flop_selection'], row['seconds_selection']) == (56, pytest.approx(5.6))
  assert row['needs_flop_selection_below'] == pytest.approx(28), '(2 − 1) · 2 · 14'
  # 12 seconds equivalent, 3 for one training, 5.6 / 14 for a share of the selection.
  assert row['gross_seconds']['estimate'] == pytest.approx(4)
  assert row['net_seconds']['estimate'] == pytest.approx(12 / 3.4)
  assert row['needs_seconds_selection_below'] == pytest.approx(126), '(4 − 1) · 3 · 14'
  free = multiplier.arm(_both(reading), _charge('random'), uses=1)
  assert free['net'] == free['gross'] and free['flop_selection'] == 0
  unknown = multiplier.arm({'flop': reading, 'seconds': None}, _charge('dsdm'), uses=1)
  assert unknown['net'] is not None and unknown['net_seconds'] is unknown['gross_seconds'] is None


def _both(reading: multiplier.Reading) -> dict[str, multiplier.Reading]:
  return {'flop': reading, 'seconds': reading.on(COMPUTE, [3 * x for x in COMPUTE])}


def _charge(method: str, *selections: str, own_costs=None) -> multiplier.Charge:
  return multiplier.charge(method, selections, {'flop': 2.0, 'seconds': 3.0}, COSTS, own_costs or {}, proxies=2)


@pytest.mark.parametrize(
  ('method', 'flop'),
  [
    ('random', 0),
    *(('dsir', 1), ('lsa', 1), ('minhash', 1), ('fasttext', 1), ('oracle', 1)),
    *(('semdedup', 16), ('embedding', 16), ('color_filter', 16)),  # one of the two proxies
    *(('perplexity_middle', 31), ('less', 31), ('gradient', 51), ('gradient_cosine', 51)),
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
  row = multiplier.arm(_both(reading), charged, uses=1)
  assert (row['net']['estimate'] > 1) == (cost < row['needs_flop_selection_below'])


@pytest.mark.parametrize(('level', 'below'), [(-1.0, None), (5.0, (16 - 1) * 2.0)])
def test_beyond_the_ladder_a_cost_pays_only_where_that_is_certain(level, below):
  """Rungs of 4 to 32 and C_final 2: below them nothing is known of the gross; above, it is at least 16."""
  reading = multiplier.read_off(_exact(level), _ladder(), [4 * x for x in COMPUTE])
  charged = multiplier.Charge({'flop': 2.0, 'seconds': 1.0}, {'flop': 1.0, 'seconds': 1.0})
  row = multiplier.arm({'flop': reading, 'seconds': None}, charged, uses=1)
  assert row['needs_flop_selection_below'] == below


@pytest.mark.parametrize('compute', [[1.0], [2.0, 1.0]])
def test_refuses(compute):
  with pytest.raises(ValueError, match='rising'):
    multiplier.read_off(_exact(1.0), _ladder()[: len(compute)], compute)


def test_models_that_were_tried_and_not_chosen_are_listed_and_not_read():
  """Two rungs; values exist for the chosen models alone, and the first model of a rung took longest."""

  def entry(rung: int, size: float, seed: int, chosen: bool, seconds: float) -> dict:
    facts = {'rung': rung, 'factor': 2.0**rung, 'size': size, 'rate': 1.0, 'seed': seed, 'chosen': chosen}
    facts |= {'flop': 2.0**rung, 'seconds': seconds, 'epochs': 1.0, 'tokens': 100, 'parameters': int(10 * size)}
    return facts | {'model': {'layers': 1, 'width': 8}, 'held_out_loss': 3.0 - rung + abs(size - 0.5)}

  index = [
    line
    for rung in (0, 1)
    for line in (
      entry(rung, 1.0, 0, False, 9.0),
      *(entry(rung, 0.5, seed, True, seconds * 2**rung) for seed, seconds in enumerate((8.0, 1.0, 1.5))),
    )
  ]
  values = np.concatenate([_exact(0.0), _exact(1.0)])
  table = Table('docs', 'holdout', {'logprob': values}, None, 1)
  arm = Table('docs', 'holdout', {'logprob': _exact(0.5)}, None, 1)
  runs = [{'method': 'dsdm', 'target_mix': 'mix', 'seed': seed, 'selection': 'dsdm--mix--0'} for seed in range(3)]
  charges = multiplier.Charge({'flop': 1.0, 'seconds': 1.5}, {'flop': 0.5, 'seconds': 6.0})
  read = multiplier.multipliers(
    [arm], runs, multiplier.Ladder(index, [table]), lambda method, selections: charges, 0.95, 1
  )
  assert [(r['factor'], r['size'], r['chosen'], r['seeds']) for r in read['rungs']] == [
    *((1.0, 1.0, False, 1), (1.0, 0.5, True, 3)),
    *((2.0, 1.0, False, 1), (2.0, 0.5, True, 3)),
  ]
  assert [(p['flop'], p['seconds']) for p in read['curves'][0]['points']] == [(1.0, 1.5), (2.0, 3.0)]
  [row] = read['arms']
  assert row['gross']['estimate'] == pytest.approx(2**0.5) and row['net']['estimate'] == pytest.approx(2**0.5 / 1.5)
  assert row['gross_seconds']['estimate'] == pytest.approx(2**0.5)
  assert row['net_seconds']['estimate'] == pytest.approx(1.5 * 2**0.5 / 7.5)
  assert read['law'] is None and 'of 4 that were tried' in ' '.join(read['notes'])


@pytest.mark.parametrize(('rung', 'arm', 'noted'), [(1, 1, True), (1, 3, False), (3, 1, False)])
def test_intervals_without_the_noise_of_training_say_so(rung, arm, noted):
  rungs = [{'chosen': True, 'seeds': rung, 'tokens': 9, 'parameters': 3}]
  runs = [{'method': 'random', 'target_mix': 'any', 'seed': seed} for seed in range(arm)]
  assert any('over items alone' in note for note in multiplier._notes(runs, rungs, None)) == noted

"""The roofline, the search for a batch that fits, and whether choosing pays, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from dsdm_jax.core.errors import UserError
from dsdm_jax.plan import cost, hlo, plan, programs, topology
from dsdm_jax.plan.chips import CHIPS, chip


def test_a_step_takes_between_the_longest_part_and_all_of_them():
  v5e = CHIPS['v5e']
  sent = (hlo.Collective('all-gather', 8, 1, 2e9),)
  time = cost.seconds(197e12, 1, hlo.Program(sent, 0.819e9, 0, 0), v5e)
  assert (time.compute, time.hbm, time.link) == pytest.approx((1.0, 1e-3, 1e-2))
  assert time.low == pytest.approx(1.0)
  assert time.high == pytest.approx(1 + 1e-3 + 2e-2)  # the links of one axis alone: half of the ports
  assert time.bound == 'compute'
  assert cost.seconds(197e12, 6, hlo.Program((), 0.0, 0, 0), v5e).low == pytest.approx(6.0)
  assert cost.seconds(0, 1, hlo.Program(sent, 0.0, 0, 0), v5e).bound == 'links'


@given(st.integers(2, 300), st.floats(1, 400), st.floats(0, 3), st.booleans())
def test_largest_batch(parts, room, power, told):
  """Memory a·rows^power + b: whatever its curve, and whether or not the first program's memory was told."""
  tried = []

  def memory(rows):
    tried.append(rows)
    return 1.0 + rows**power

  at_most = [rows for rows in range(1, parts) if 1.0 + rows**power <= room]
  first = 1.0 + parts**power if told else float('inf')
  assert cost.largest(parts, max(first, room + 1), room, memory) == max(at_most, default=0)
  assert len(tried) <= 2 * parts.bit_length()  # every other look halves
  assert len(set(tried)) == len(tried)


def test_where_memory_grows_by_the_row_few_programs_are_compiled():
  tried = []

  def memory(rows):
    tried.append(rows)
    return 2.0 + 0.11 * rows

  assert cost.largest(1_024, memory(1_024), 16.0, memory) == 127
  assert len(tried) - 1 <= 6


def _work(stage, runs, flop):
  return programs.Work(stage, lambda _: (lambda: None, ()), 1, 'k', runs, 1, 1, flop)


@pytest.mark.parametrize(('each', 'net'), [(1.0, 1.6), (4.0, 1.0), (8.0, 2 / 3)])
def test_choosing_pays_when_it_costs_less_than_it_saves(monkeypatch, each, net):
  config = base.get_config()
  config.selection.methods, config.pretraining.seeds = ('random', 'dsdm'), 3
  monkeypatch.setattr(programs.Work, 'flop', lambda work: work.least_flop)
  works = [*(_work(name, 1, each) for name in programs.SELECTION), _work('pretraining', 6, 16.0)]
  found = plan._multiplier(works, config)
  assert (found['selection_flop'], found['final_flop']) == (4 * each, 16)  # six runs for six models
  assert found['net'] == pytest.approx(net)
  assert (found['net'] > 1) == (found['selection_flop'] < (found['gross'] - 1) * found['final_flop'])
  assert found['finals_to_break_even'] == pytest.approx(each / 4)


@pytest.mark.parametrize(
  ('name', 'count', 'type_'),
  [('v5e:2x4', 8, 'v5litepod-8'), ('v5p:8x8x16', 1_024, 'v5p-2048'), ('v6e:16x16', 256, 'v6e-256')],
)
def test_slices(name, count, type_):
  assert topology.chips(name) == count
  assert chip(name).accelerator_type(count) == type_


def test_a_chip_that_is_not_known_is_told():
  with pytest.raises(UserError, match=r'plan.topology.*v5e'):
    topology.chips('v7:2x2')

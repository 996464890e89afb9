"""The roofline, the search for a batch that fits, and whether selection pays, by hand."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from dsdm_jax.core import flops
from dsdm_jax.errors import UserError
from dsdm_jax.plan import cost, hlo, page, plan, preflight, programs, topology
from dsdm_jax.plan.topology import CHIPS, chip
from tests.plan.test_hlo import PROGRAM


def test_step_takes_between_the_longest_part_and_the_sum():
  v5e = CHIPS['v5e']
  sent = (hlo.Collective('all-gather', 8, False, 1, 2e9),)
  time = cost.seconds(197e12, 1, hlo.Program(sent, 0.819e9, 0, 0), v5e)
  assert (time.compute, time.hbm, time.link) == pytest.approx((1.0, 1e-3, 1e-2))
  assert time.low == pytest.approx(1.0)
  assert time.high == pytest.approx(1 + 1e-3 + 2e-2)  # the links of one axis alone: half of the ports
  assert time.bound == 'compute'
  assert cost.seconds(197e12, 6, hlo.Program((), 0.0, 0, 0), v5e).low == pytest.approx(6.0)
  assert cost.seconds(0, 1, hlo.Program(sent, 0.0, 0, 0), v5e).bound == 'links'
  across = (hlo.Collective('all-reduce', 2, True, 1, 1e8),)
  time = cost.seconds(0, 1, hlo.Program(across, 0.0, 0, 0), v5e)
  assert (time.network, time.low, time.bound) == (pytest.approx(0.032), time.network, 'network')  # 3.125 GB/s


@given(st.integers(2, 300), st.floats(1, 400), st.floats(0, 3), st.booleans())
def test_largest_batch(parts, room, power, known):
  """Memory rows^power + 1, for any power, with and without known memory of the first program."""
  tried = []

  def memory(rows):
    tried.append(rows)
    return 1.0 + rows**power

  at_most = [rows for rows in range(1, parts) if 1.0 + rows**power <= room]
  first = 1.0 + parts**power if known else float('inf')
  assert cost.largest(parts, max(first, room + 1), room, memory) == max(at_most, default=0)
  assert len(tried) <= 2 * parts.bit_length()  # every other look halves
  assert len(set(tried)) == len(tried)


def test_linear_memory_needs_few_compilations():
  tried = []

  def memory(rows):
    tried.append(rows)
    return 2.0 + 0.11 * rows

  assert cost.largest(1_024, memory(1_024), 16.0, memory) == 127
  assert len(tried) - 1 <= 6


def _work(stage, runs, flop):
  return programs.Work(stage, lambda _: (lambda: None, ()), 1, 'k', runs, 1, 1, flop)


def test_choosing_by_text_takes_time_for_each_method_that_reads_it():
  tokens = 185_114 * 256  # of a pool for which `fasttext` took 124 s and `lsa` 134 s
  one = {name: preflight.seconds_by_text([name], tokens, 1) for name in ('fasttext', 'lsa', 'dsir', 'random', 'dsdm')}
  assert one['fasttext'] == pytest.approx(124, rel=0.1) and one['lsa'] == pytest.approx(134, rel=0.1)
  assert one['fasttext'] > one['dsir'] > one['random'] == one['dsdm'] == 0
  several = ['lsa', 'dsir', 'my.module:choose', 'minhash']
  minhash = preflight.seconds_by_text(['minhash'], tokens, 3)  # ignores targets
  assert preflight.seconds_by_text(several, tokens, 3) == pytest.approx(3 * (one['lsa'] + one['dsir']) + minhash)
  assert minhash == preflight.seconds_by_text(['minhash'], tokens, 1) > 0


@pytest.mark.parametrize(('each', 'net'), [(1.0, 1.6), (4.0, 1.0), (8.0, 2 / 3)])
def test_selection_pays_when_it_costs_less_than_it_saves(monkeypatch, each, net):
  config = base.get_config()
  config.selection.methods, config.pretraining.seeds = ('random', 'dsdm'), 3
  monkeypatch.setattr(programs.Work, 'flop', lambda work: work.least_flop)
  works = [*(_work(name, 1, each) for name in ('proxies', 'features', 'gram', 'scores')), _work('pretraining', 6, 16.0)]
  found = plan._multiplier({work.stage: work.flop() * work.runs for work in works}, config)
  assert (found['selection_flop'], found['final_flop']) == (4 * each, 16)  # six runs for six models
  assert found['net'] == pytest.approx(net)
  assert (found['net'] > 1) == (found['selection_flop'] < (found['gross'] - 1) * found['final_flop'])
  assert found['finals_to_break_even'] == pytest.approx(each / 4)


@pytest.mark.parametrize(
  ('name', 'count', 'type_'),
  [('v5e:2x4', 8, 'v5litepod-8'), ('v5p:16x16x24', 6_144, 'v5p-12288'), ('v6e:16x16', 256, 'v6e-256')],
)
def test_slices(name, count, type_):
  assert topology.chips(name) == count
  assert chip(name).accelerator_type(count) == type_


def test_unknown_chip_is_refused():
  with pytest.raises(UserError, match=r'plan.topology.*v5e'):
    topology.chips('v7:2x2')


@pytest.mark.parametrize('name', ['v5e:2x2x2', 'v6e:4x4x4', 'v5e:16x32', 'v6e:1x257', 'v5p:16x20x20', 'v4:16x16x17'])
def test_slices_that_no_chip_has_are_refused(name):
  with pytest.raises(UserError, match=r'is more than the largest slice of v\w+ has: [23] axes and [\d,]+ chips'):
    topology.chips(name)


def test_figures_of_a_device_are_its_share_of_the_chip():
  for name, found in CHIPS.items():
    assert found.device.peak_flops * found.devices == found.peak_flops
    assert found.device.hbm_bytes * found.devices == found.hbm_bytes
    # On a TPU VM both cores of a v4 chip are one device.
    assert flops.PEAKS[name] == (found if name == 'v4' else found.device).peak_flops


def _estimate(monkeypatch, memory, text=PROGRAM, remat=''):
  """Of a program of 32 rows on eight chips, which takes `memory(rows)` bytes."""
  monkeypatch.setattr(programs.Work, 'flop', lambda work: work.least_flop)
  work = dataclasses.replace(_work('features', 3, 1e12), batch=32, batch_key='features.batch_size', remat_key=remat)
  compiler = lambda work, batch=None: cost.Compiled(memory(batch or work.batch), 0.0, False, text)  # noqa: E731
  return cost.estimate(work, compiler, CHIPS['v5e'], 8, 8, 1.0)


def test_loops_of_unknown_length_are_reported(monkeypatch):
  known = _estimate(monkeypatch, lambda rows: 1e9)
  unknown = _estimate(monkeypatch, lambda rows: 1e9, PROGRAM.replace('constant(12)', 'parameter(1)'))
  assert (known.unknown_trips, unknown.unknown_trips) == (0, 1)
  (line,) = page._uncounted([dataclasses.asdict(e) for e in (known, unknown)])
  assert line.startswith('features has loops of unknown trip count (1), which count once')


@pytest.mark.parametrize(
  ('remat', 'advice'),
  [
    ('', 'set --config.features.batch_size=16, or a larger --config.mesh.model'),
    (
      'model.remat',
      'set --config.features.batch_size=16, or --config.model.remat=True, or a larger --config.mesh.model',
    ),
  ],
)
def test_advice_where_a_program_does_not_fit(monkeypatch, remat, advice):
  """7 GB for each row of a chip: two fit 16 GB, four do not."""
  found = _estimate(monkeypatch, lambda rows: 7e9 * rows / 8, remat=remat)
  assert (found.fits, found.largest_batch, found.hours) == (False, 16, [])
  assert found.advice == f'features does not fit: {advice}'


def test_no_batch_is_advised_where_none_fits(monkeypatch):
  found = _estimate(monkeypatch, lambda rows: 2e10)
  assert (found.largest_batch, found.advice) == (0, 'features does not fit: set a larger --config.mesh.model')

"""The plan without libtpu, and counts of runs, parameters, FLOP and disk by hand."""

import json

import pytest

from configs import base
from dsdm_jax.errors import UserError
from dsdm_jax.plan import page, plan, topology


@pytest.fixture
def config():
  config = base.get_config()
  config.model.update({'layers': 2, 'width': 32, 'heads': 2, 'kv_heads': 2, 'mlp_width': 64})
  config.pool.length, config.pool.vocab_size = 16, 512
  config.features.update(
    {'projection': 'two_sided', 'dimension': 128, 'batch_size': 64, 'shard_rows': 256, 'store_dtype': 'int8'}
  )
  config.datamodel.update({'groups': 1, 'bootstrap': 0})
  config.proxies.update({'count': 3, 'subset_share': 0.25, 'epochs': 2.0})
  config.selection.update({'methods': ('dsdm', 'random'), 'targets': ('mix', 'docs'), 'examples': 512, 'epochs': 4})
  config.pretraining.seeds = 2
  config.plan.update({'rows': 10_000, 'price_per_chip_hour': 2.0})
  return config


def test_without_libtpu_the_plan_has_counts_and_explains_how_to_install_it(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(topology, 'available', lambda: False)
  plan.run(config, tmp_path)
  printed = capsys.readouterr().out
  assert topology.HOW_TO_GET_LIBTPU in printed
  assert printed.startswith('Selection pays for one model if')
  found = json.loads((tmp_path / 'plan_v5e_2x4.json').read_text())
  assert found['final_runs'] == (2 + 1) * 2
  # By hand, FLOP of a token: matrices of a layer are D·4D and 2·D·F, the tied table is V·D; attention is 4·L·D a layer.
  matrices, attention = 2 * (32 * 128 + 2 * 32 * 64) + 512 * 32, 2 * 4 * 16 * 32
  step = (6 * matrices + 3 * attention) * 32 * 16
  proxy_steps, final_steps = 2 * 2_500 // 32 * 3, 512 * 4 // 32 * 6
  assert found['flop']['proxies'] == proxy_steps * step
  assert found['flop']['pretraining'] == final_steps * step
  runs = 3 * -(-10_000 // 64)
  # Eight linear layers, two tables and the vectors have 128 // 11 columns each: 3 × 3, or 11 × 1. Probes multiply by
  # A and B in linear layers and in the tied head, and only by B where rows are looked up.
  sides = 2 * (32 + 96 + 32 + 32 + 2 * (32 + 64)) + (512 + 32) + 2 * 32
  thin = 2 * (3 * sides + 3 * 3 * 11) * 16 + 2 * 11 * (5 * 2 * 32 + 2 * (96 + 32 + 64 + 32))
  assert found['flop']['features'] == runs * ((4 * matrices + 3 * attention) * 16 + thin) * 64
  j = found['dimension']
  assert j == 10 * 3 * 3 + 11
  assert found['flop']['gram'] == 3 * 40 * 2 * 256 * (10 * 9**2 + 11**2)  # a block for each layer
  assert found['store_bytes'] == 3 * 10_000 * j


def test_each_checkpoint_of_a_proxy_has_features_and_a_datamodel(config, monkeypatch):
  monkeypatch.setattr(topology, 'available', lambda: False)
  one = plan.make(config)
  config.proxies.checkpoints = 3
  three = plan.make(config)
  for stage in ('features', 'gram', 'scores'):
    assert three['flop'][stage] == 3 * one['flop'][stage]
  assert three['flop']['proxies'] == one['flop']['proxies']
  assert three['store_bytes'] == 3 * one['store_bytes']


def test_dense_features_are_planned(config, monkeypatch):
  monkeypatch.setattr(topology, 'available', lambda: False)
  config.features.projection = 'dense'
  found = plan.make(config)
  parameters = 2 * (12 * 32**2 - 4 * 32**2) + 2 * (9 * 32 + 64) + 512 * 32 + 16 * 32 + 2 * 32
  gradients = 6 * (2 * (32 * 128 + 2 * 32 * 64) + 512 * 32) + 3 * 2 * 4 * 16 * 32
  rows = 3 * -(-10_000 // 64) * 64
  # R fills blocks of 8,192 parameters, some of them in part.
  assert found['flop']['features'] == rows * (gradients * 16 + 2 * -(-parameters // 8_192) * 8_192 * 128)


def test_rungs_of_the_ladder_are_planned(config, monkeypatch):
  monkeypatch.setattr(topology, 'available', lambda: False)
  config.ladder.update({'rungs': ('1', '4'), 'step': 1.0, 'seeds': 3})
  flop = plan.make(config)['flop']
  each = flop['pretraining'] / 6
  assert flop['ladder 1'] == 3 * each
  assert flop['ladder 4'] == pytest.approx(3 * 4 * each, rel=0.01)  # in whole steps
  config.ladder.step = 2.0  # at least the four neighbors are tried
  assert plan.make(config)['flop']['ladder 1'] == 7 * each


def test_hours_are_beside_flop():
  hours = {'proxies': [1, 2], 'features': [2, 5], 'gram': [0.5, 1], 'scores': [0.5, 1], 'pretraining': [6, 12]}
  stages = [{'stage': stage, 'hours': of_stage, 'fits': True} for stage, of_stage in hours.items()]
  assert page.in_hours({'stages': stages, 'final_runs': 6}) == ['In hours: selection 4–9, one final model 1–2.']
  stages[1]['fits'] = False
  assert page.in_hours({'stages': stages, 'final_runs': 6}) == page.in_hours({'stages': []}) == []


def test_rows_are_estimated_from_the_pools_bytes(config, monkeypatch):
  monkeypatch.setattr(topology, 'available', lambda: False)
  config.plan.rows, config.pool.max_bytes = 0, 64_000
  assert plan.make(config)['rows'] == 1_000


def test_several_slices_have_a_replica_each(config, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(topology, 'available', lambda: False)
  config.plan.slices, config.mesh.model = 2, 2
  plan.run(config, tmp_path)
  found = json.loads((tmp_path / 'plan_v5e_2x4_2_slices.json').read_text())
  assert (found['chips'], found['slices']) == (16, 2)
  assert found['mesh'] == {'replica': 2, 'data': 4, 'model': 2}
  assert '16 chips (2 slices of v5litepod-8), mesh 2 × 4 × 2' in capsys.readouterr().out
  with pytest.raises(UserError, match='plan.slices = 2 .* does not publish'):
    topology.devices('v4:2x2x1', 2)


@pytest.mark.parametrize('shape', ['v5e:0x4', 'v5e:04x4', 'v5p:2x2x0'])
def test_slices_without_chips_are_refused(config, shape, tmp_path):
  config.plan.topology = shape
  with pytest.raises(UserError, match='plan.topology'):
    plan.run(config, tmp_path)


def test_batches_that_the_slice_does_not_divide_are_refused(config):
  config.plan.topology = 'v5e:16x16'
  with pytest.raises(UserError, match='256 devices'):
    plan.make(config)

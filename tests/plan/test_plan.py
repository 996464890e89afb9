"""The plan without libtpu, and counts of runs, parameters, FLOP and disk by hand."""

import dataclasses
import importlib
import json

import jax
import pytest

from configs import base
from dsdm_jax import configs
from dsdm_jax.errors import UserError
from dsdm_jax.plan import cost, page, plan, topology


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


def _verdict(found):
  """The line that says whether selection pays, from the FLOP of the stages before the final models."""
  before = [name for name in found['flop'] if name not in ('pretraining', 'ladder 1', 'ladder 2', 'ladder 4')]
  chosen, final = sum(found['flop'][name] for name in before), found['flop']['pretraining'] / found['final_runs']
  assert found['multiplier']['selection_flop'] == pytest.approx(chosen)
  return f'Selection pays for one model if C_selection < (gross − 1) · C_final: {chosen:.2e} against {final:.2e} FLOP'


@pytest.mark.parametrize('name', configs.names())
def test_packaged_configs_are_planned(name, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(topology, 'available', lambda: False)
  config = importlib.import_module(f'dsdm_jax.configs.{name}').get_config()
  plan.run(config, tmp_path)
  printed = capsys.readouterr().out.splitlines()
  found = json.loads(next(tmp_path.glob('plan_*.json')).read_text())
  assert printed[0].startswith(_verdict(found))
  assert {line.split('  ')[0] for line in printed} >= {'proxies', 'features', 'scores', 'pretraining'}
  assert all(any(line.startswith(f'{stage}  ') for line in printed) for stage in found['flop'])
  assert any(line.startswith('feature store: ') for line in printed)


_PROJECTIONS = [
  {'projection': 'ekfac'},
  {'projection': 'ekfac', 'mode': 'jvp'},
  {'projection': 'dense'},
  {'projection': 'dense', 'mode': 'stream'},
  {'projection': 'dense', 'mode': 'jvp'},
  *({'projection': 'two_sided', 'gram': gram} for gram in ('auto', 'layers', 'full', 'joint')),
]


@pytest.mark.parametrize('settings', _PROJECTIONS, ids=lambda x: '_'.join(x.values()))
def test_every_projection_has_all_lines(config, settings, tmp_path, capsys, monkeypatch):
  """As where libtpu is installed, with 1 to 2 hours for each stage in place of what the compiler says."""

  def estimate(work, *_):
    numbers = dict.fromkeys((field.name for field in dataclasses.fields(cost.Estimate)), 1)
    lists = {'collectives': [], **{key: [1.0, 2.0] for key in ('seconds_per_run', 'mfu', 'tokens_per_second', 'hours')}}
    texts = {'stage': work.stage, 'bound': 'compute', 'advice': '', 'fits': True, 'unknown_trips': 0}
    return cost.Estimate(**(numbers | lists | texts))

  monkeypatch.setattr(cost, 'estimate', estimate)
  monkeypatch.setattr(topology, 'available', lambda: True)
  monkeypatch.setattr(topology, 'devices', lambda *_: jax.devices('cpu')[:8])
  config.features.projection, config.features.mode = settings['projection'], settings.get('mode', 'store')
  config.features.store_dtype, config.datamodel.gram = 'float32', settings.get('gram', 'auto')
  config.datamodel.examples = 0
  plan.run(config, tmp_path)
  printed = capsys.readouterr().out.splitlines()
  found = json.loads((tmp_path / 'plan_v5e_2x4.json').read_text())
  stages = [stage['stage'] for stage in found['stages']]
  of_features = ['target_means'] if settings['projection'] == 'ekfac' else ['gram']
  assert stages == list(found['flop']) == ['proxies', 'features', *of_features, 'scores', 'pretraining']
  [verdict] = [line for line in printed if line.startswith('Selection pays')]
  assert verdict.startswith(_verdict(found)) and 'net for one: ' in verdict
  assert 'In hours: selection 4–8, one final model 0.167–0.333.' in printed
  assert all(any(line.startswith(f'{stage}  ') for line in printed) for stage in stages)
  [total] = [line for line in printed if line.startswith('Total')]
  assert total.startswith('Total: 5–10 hours, 40–80 chip-hours, 80–160 USD')


def test_ekfac_costs_its_sample_the_targets_and_the_pool(config, monkeypatch):
  monkeypatch.setattr(topology, 'available', lambda: False)
  config.features.update({'projection': 'ekfac', 'basis_rows': 128})
  config.targets.update({'tasks': ('docs', 'api_qa'), 'max_examples': 64})
  config.datamodel.update({'groups': 3, 'examples': 1})
  flop = plan.make(config)['flop']
  # By hand, FLOP of a row of 16 tokens: see above; the mean weighs each gradient of a matrix 3 + 1 times.
  matrices, attention = 2 * (32 * 128 + 2 * 32 * 64) + 512 * 32, 2 * 4 * 16 * 32
  gradient, tables = (6 * matrices + 3 * attention) * 16, matrices + 16 * 32
  assert flop['features'] == 3 * 2 * 128 * gradient
  assert flop['target_means'] == 3 * 2 * 64 * (gradient + 2 * 4 * tables)
  assert flop['scores'] > 3 * 10_000 * gradient


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
  plan_ = {'stages': stages, 'flop': dict.fromkeys(hours, 1.0), 'final_runs': 6}
  assert page.in_hours(plan_) == ['In hours: selection 4–9, one final model 1–2.']
  stages[1]['fits'] = False
  assert page.in_hours(plan_) == page.in_hours(plan_ | {'stages': []}) == []


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

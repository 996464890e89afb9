"""The configs of large runs, compiled for their own slices by libtpu."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from configs import c4_dsdm, v5e_8
from dsdm_jax.config.validate import resolve, validate
from dsdm_jax.data import hub
from dsdm_jax.data.targets import benchmarks
from dsdm_jax.plan import programs
from dsdm_jax.training import ladder
from tests.conftest import ROOT


def _plan(python: Path, folder: Path, *arguments: str) -> dict:
  command = [python, '-m', 'dsdm_jax.main', '--stage=plan', f'--workdir={folder}', *arguments]
  # XLA's least effort takes a fifth of the time; set DSDM_JAX_FULL_PLANS to compile as a run does.
  effort = {} if 'DSDM_JAX_FULL_PLANS' in os.environ else {'JAX_EXEC_TIME_OPTIMIZATION_EFFORT': '-1.0'}
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'JAX_NUMPY_RANK_PROMOTION': 'allow', **effort}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
  assert done.returncode == 0, done.stderr[-2_000:]
  (file,) = folder.glob('plan_*.json')
  return json.loads(file.read_text())


def _check(found: dict) -> None:
  """Every stage fits its chip and has exactly the expected collectives."""
  stages = {stage['stage']: stage for stage in found['stages']}
  assert list(stages)[:5] == ['proxies', 'features', 'gram', 'scores', 'pretraining']
  for stage in stages.values():
    assert stage['fits'], stage['advice']
    assert stage['memory_bytes'] < stage['hbm_bytes_of_chip']
  sends = {name: {c['operation'] for c in stage['collectives']} for name, stage in stages.items()}
  assert sends['features'] <= {'all-gather'}  # weights, where they are split
  assert sends['gram'] <= {'all-reduce', 'reduce-scatter'}  # one sum over the rows
  assert sends['scores'] == set()
  for name in ('proxies', *list(stages)[4:]):  # weights gathered, gradients summed: nothing that moves activations
    # A permutation aligns parts that do not fill registers.
    assert sends[name] <= {'all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute'}
    # A step sends weights and gradients, some times; activations would go with the batch and be far more.
    assert stages[name]['link_bytes_per_run'] < 40 * stages[name]['parameters']


@pytest.mark.slow
def test_one_host_compiles_and_fits(libtpu, tmp_path):
  found = _plan(libtpu, tmp_path, '--config=configs/v5e_8.py')
  _check(found)
  stages = {stage['stage']: stage for stage in found['stages']}
  features, training = stages['features'], stages['proxies']
  # What features are meant to be: hardly more than the algorithm's own FLOP, and less memory than training.
  assert features['flop_per_run'] <= 1.06 * features['least_flop_per_run']
  assert features['temporary_bytes'] < training['temporary_bytes']
  assert features['mfu'][1] >= 0.4  # 0.97 at full effort


@pytest.mark.slow
def test_every_chip_has_slices_and_impossible_shapes_are_refused(libtpu):
  script = """
from dsdm_jax.errors import UserError
from dsdm_jax.plan import topology
for name in ('v4:2x2x1', 'v5e:1x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:1x1', 'tpu7x:2x2x1', 'v5e:3x3', 'v6e:1x8'):
  try:
    print(name, len(topology.devices(name)), topology.chips(name))
  except UserError as error:
    print(name, 'refused' if f'plan.topology = {name!r}' in str(error) else error)
"""
  done = subprocess.run([libtpu, '-c', script], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.stdout.splitlines() == [
    'v4:2x2x1 8 4',
    'v5e:1x1 1 1',
    'v5e:2x2 4 4',
    'v5p:2x2x1 4 4',
    'v6e:1x1 1 1',
    'tpu7x:2x2x1 8 4',
    'v5e:3x3 refused',
    'v6e:1x8 refused',
  ], done.stderr[-2_000:]


_SLICES = """
import sys
import jax
from configs import base
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.plan import hlo, topology
from dsdm_jax.training.step import Trainer

slices = int(sys.argv[1])
config = base.get_config()
config.model.update({'layers': 2, 'width': 256, 'heads': 2, 'kv_heads': 2, 'mlp_width': 512, 'scan_layers': True})
config.model.update({'attention': 'fused', 'compute_dtype': 'bfloat16'})
config.pretraining.train.batch_size = 8 * slices
with jax.default_device(jax.devices('cpu')[0]):
  mesh = make_mesh(config.mesh, topology.devices('v5e:2x4', slices))
  trainer = Trainer(config.model, config.pretraining.train, 512, 128, mesh)
  arguments = trainer.abstract, *trainer.abstract_batch, jax.ShapeDtypeStruct((), jax.numpy.int32)
  program = hlo.analyse(trainer.step.lower(*arguments).compile().as_text())
weights = sum(x.size for x in jax.tree.leaves(trainer.abstract.params))
print(dict(mesh.shape), program.kernels)
print([(c.operation, c.members) for c in program.collectives if c.between_slices])
print([(c.operation, c.members) for c in program.collectives if not c.between_slices])
print(program.network_bytes / weights)
"""


@pytest.mark.full
@pytest.mark.parametrize('slices', [2, 4])
def test_no_weight_crosses_slices(libtpu, slices):
  environment = os.environ | {'JAX_EXEC_TIME_OPTIMIZATION_EFFORT': '-1.0', 'JAX_NUMPY_RANK_PROMOTION': 'allow'}
  done = subprocess.run(
    [libtpu, '-c', _SLICES, str(slices)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2_000:]
  mesh, across, inside, network = done.stdout.splitlines()
  assert mesh == f"{{'replica': {slices}, 'data': 8, 'model': 1}} 4"  # kernels: forward and backward, in two layers
  assert across == f"[('all-reduce', {slices})]"
  assert inside == "[('all-gather', 8), ('all-reduce', 8), ('reduce-scatter', 8)]"
  # Twice (slices − 1) / slices of an eighth of the gradient, in float32; vectors are sent whole.
  assert float(network) == pytest.approx(2 * (slices - 1) / slices * 4 / 8, rel=0.2)


@pytest.mark.slow
def test_the_papers_scale_compiles_and_fits(libtpu, tmp_path):
  found = _plan(libtpu, tmp_path, '--config=configs/c4_dsdm.py')
  _check(found)
  assert [stage['stage'] for stage in found['stages'][5:]] == ['ladder 1', 'ladder 2']


def test_the_papers_config_is_the_papers():
  c = c4_dsdm.get_config()
  assert c.pool.sources == ('tfds:c4/en.noblocklist',)
  assert (c.plan.rows, c.pool.length, c.proxies.count, c.features.dimension) == (216_948_746, 1_024, 4, 16_384)
  assert {b.name for b in benchmarks.TABLE if b.role == 'target'} == set(c.targets.tasks)
  assert {b.name for b in benchmarks.TABLE if b.role == 'held_out'} == set(c.evaluation.tasks) - {'targets'}
  assert max(max(b.counts) for b in benchmarks.TABLE) <= c.targets.max_examples
  assert (c.datamodel.mix, c.selection.targets) == ('mean', ('jeopardy+squad+lambada',))
  assert programs.final_runs(c) == 5  # DsDm, Classifier, DSIR, SemDeDup, Random
  assert round(0.38 * c.plan.rows) // c.proxies.train.batch_size == pytest.approx(80_000, rel=0.01)
  assert c.selection.examples * c.selection.epochs // c.pretraining.train.batch_size == 25_000
  rungs = ladder.plan(resolve(c, dict), c.pool.vocab_size, c.pool.length, lambda model: model.width)
  # Random at twice the compute: √2 times the parameters, to within the 32 of some 2,400 columns that widths go by.
  assert rungs[1].parameters == pytest.approx(2**0.5 * rungs[0].parameters, rel=0.014)


@pytest.mark.parametrize('module', [c4_dsdm, v5e_8])
def test_configs_are_valid_and_have_the_documented_size(module):
  config = module.get_config()
  validate(config)
  config = hub.localized(config, data=False)  # its vocabulary and sources are elsewhere
  config = resolve(config, dict)
  proxy, final = (
    programs.Model.of(model, config.pool.vocab_size, config.pool.length)
    for model in (config.proxies.model, config.model)
  )
  assert proxy.parameters == pytest.approx(125e6, rel=0.02)
  assert final.parameters == pytest.approx(1.3e9 if module is c4_dsdm else 125e6, rel=0.02)
  tokens = config.selection.examples * config.selection.epochs * config.pool.length
  assert tokens == pytest.approx(20 * final.parameters, rel=0.02)  # Chinchilla's budget

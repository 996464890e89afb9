"""What the compiled two-sided step sends between devices: nothing, or weights."""

import re

import jax
import pytest

from configs import base
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.core.mesh import batch_sharding, make_mesh, replicated
from dsdm_jax.lm import outputs

from .conftest import VARIANTS, make_problem

COLLECTIVE = re.compile(
  r'= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\('
)


@pytest.fixture
def data_mesh() -> jax.sharding.Mesh:
  config = base.get_config().mesh
  config.data, config.model = 8, 1
  return make_mesh(config)


SHAPE = re.compile(r'\w+\[([\d,]*)\]')


def _found(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """(operation, shape of one result) of each collective of a compiled program; one may have a tuple of results."""
  return [
    (operation, tuple(int(n) for n in shape.split(',') if n))
    for results, operation in COLLECTIVE.findall(text)
    for shape in SHAPE.findall(results)
  ]


def _collectives(problem, step, mesh, weights) -> list[tuple[str, tuple[int, ...]]]:
  """As `_found`, of the compiled step."""
  batch = batch_sharding(mesh)
  prepared = step.prepare(problem.params, 0)
  compiled = jax.jit(step.apply, in_shardings=(weights, batch, batch), out_shardings=batch)
  inputs = jax.device_put((problem.tokens_BL, problem.weights_BL), batch)
  if weights is not None:
    prepared = jax.device_put(prepared, weights)
  return _found(compiled.lower(prepared, *inputs).compile().as_text())


def test_no_collective_where_weights_are_replicated(data_mesh):
  problem = make_problem(**VARIANTS['scanned_rematerialised'])
  step = TwoSidedFeatures(problem.model, outputs.margin, '.*', 512, 0, data_mesh)
  assert _collectives(problem, step, data_mesh, replicated(data_mesh)) == []


def test_only_weights_are_gathered_where_they_are_split(data_mesh):
  problem = make_problem(**VARIANTS['scanned_rematerialised'])
  step = TwoSidedFeatures(problem.model, outputs.margin, '.*', 512, 0, data_mesh)
  found = _collectives(problem, step, data_mesh, None)
  assert {operation for operation, _ in found} == {'all-gather'}
  shapes = {x.shape[-2:] for x in jax.tree.leaves(problem.params) if x.ndim > 1}
  shapes |= {shape[::-1] for shape in shapes}
  for _, shape in found:
    assert shape[-2:] in shapes, f'{shape} is not a weight'


def test_collectives_with_a_tuple_of_results_are_seen():
  """As XLA writes one that takes several arrays at once, and one that is started and waited for."""
  assert _found('%all-reduce.3 = (f32[3]{0}, f32[5,2]{1,0}) all-reduce(%a, %b), channel_id=1, to_apply=%add') == [
    ('all-reduce', (3,)),
    ('all-reduce', (5, 2)),
  ]
  assert _found('%g = (f32[4]{0}, f32[32]{0}) all-gather-start(%x)') == [('all-gather', (4,)), ('all-gather', (32,))]
  assert _found('%f = (f32[3]{0}, f32[5]{0}) fusion(%a), kind=kLoop') == []

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
  r'= (\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\('
)


@pytest.fixture
def data_mesh() -> jax.sharding.Mesh:
  config = base.get_config().mesh
  config.data, config.model = 8, 1
  return make_mesh(config)


def _collectives(problem, step, mesh, weights) -> list[tuple[str, str]]:
  """(result type, operation) of each collective of the compiled step."""
  batch = batch_sharding(mesh)
  prepared = step.prepare(problem.params, 0)
  compiled = jax.jit(step.apply, in_shardings=(weights, batch, batch), out_shardings=batch)
  inputs = jax.device_put((problem.tokens_BL, problem.weights_BL), batch)
  if weights is not None:
    prepared = jax.device_put(prepared, weights)
  return COLLECTIVE.findall(compiled.lower(prepared, *inputs).compile().as_text())


@pytest.mark.parametrize('variant', ['unrolled', 'scanned_rematerialised'])
def test_no_collective_where_weights_are_replicated(variant, data_mesh):
  problem = make_problem(**VARIANTS[variant])
  step = TwoSidedFeatures(problem.model, outputs.margin, '.*', 512, 0, data_mesh)
  assert _collectives(problem, step, data_mesh, replicated(data_mesh)) == []


@pytest.mark.parametrize('variant', ['unrolled', 'scanned_rematerialised'])
def test_only_weights_are_gathered_where_they_are_split(variant, data_mesh):
  problem = make_problem(**VARIANTS[variant])
  step = TwoSidedFeatures(problem.model, outputs.margin, '.*', 512, 0, data_mesh)
  found = _collectives(problem, step, data_mesh, None)
  assert {operation for _, operation in found} == {'all-gather'}
  shapes = {x.shape[-2:] for x in jax.tree.leaves(problem.params) if x.ndim > 1}
  shapes |= {shape[::-1] for shape in shapes}
  for result, _ in found:
    size = tuple(int(n) for n in re.search(r'\[([\d,]*)\]', result).group(1).split(','))
    assert size[-2:] in shapes, f'{result} is not a weight'

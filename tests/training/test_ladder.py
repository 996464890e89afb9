"""Sizes of the ladder: compute, parameters and tokens against what they should be."""

import math

import pytest

from configs import quickstart
from dsdm_jax.errors import UserError
from dsdm_jax.training import ladder

FACTORS = ('0.25', '0.5', '1', '2', '4')


@pytest.fixture(scope='module')
def planned() -> list[ladder.Rung]:
  config = quickstart.get_config()
  config.ladder.rungs = FACTORS
  return ladder.plan(config, 1_024, 128)


def test_parameters_and_tokens_grow_together(planned):
  """Within half a step from one width to the next: 4 of 40 or more, and parameters grow with at most its square."""
  base = planned[2]
  for rung in planned:
    assert rung.parameters / base.parameters == pytest.approx(math.sqrt(rung.factor), rel=0.1)
    assert rung.examples / base.examples == pytest.approx(math.sqrt(rung.factor), rel=0.1)
    assert rung.parameters * rung.examples / (base.parameters * base.examples) == pytest.approx(rung.factor, rel=0.01)


def test_rung_of_one_is_the_arms_own_model(planned):
  config = quickstart.get_config()
  assert planned[2].model.to_dict() == config.model.to_dict()
  assert planned[2].examples == config.selection.examples * config.selection.epochs


def test_rungs_that_cannot_be():
  config = quickstart.get_config()
  config.ladder.rungs = ('0.00001', '1')
  with pytest.raises(UserError, match='ladder.rungs holds 1e-05'):
    ladder.plan(config, 1_024, 128)

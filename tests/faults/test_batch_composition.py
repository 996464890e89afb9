"""Features of a row do not depend on what else is in its batch, on its place there, or on what follows its tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
from dsdm_jax.lm import outputs
from tests.attribution.conftest import BATCH, LENGTH, VOCAB, make_problem, one_device

__all__ = ['one_device']
ROUNDING = 3e-6  # as in tests/attribution/test_gradients.py: float32 sums of the same terms in another order


@pytest.mark.parametrize('kind', ['two_sided', 'dense'])
def test_same_example_in_other_batches_and_paddings(kind, one_device):
  problem = make_problem()
  if kind == 'two_sided':
    step = TwoSidedFeatures(problem.model, outputs.margin, '.*', 256, 3, one_device)
  else:
    step = DenseFeatures(problem.model, outputs.margin, 256, 3, one_device, 0)
  prepared, real = step.prepare(problem.params, 0), LENGTH // 2
  tokens_BL, weights_BL = problem.tokens_BL, problem.weights_BL.at[:, real:].set(0)  # what follows is padding
  wanted_BJ = np.asarray(step(prepared, tokens_BL, weights_BL))
  random_BL = jax.random.randint(jax.random.key(9), (BATCH, LENGTH), 0, VOCAB)

  def check(found_J, row):
    assert np.linalg.norm(found_J - wanted_BJ[row]) <= ROUNDING * np.linalg.norm(wanted_BJ[row])

  turned = np.asarray(step(prepared, tokens_BL[::-1], weights_BL[::-1]))
  padded = np.asarray(step(prepared, tokens_BL.at[:, real:].set(random_BL[:, real:]), weights_BL))
  for row in range(BATCH):
    check(turned[BATCH - 1 - row], row)
    check(padded[row], row)
  for row, place in ((0, BATCH - 1), (3, 1)):
    alone_BL = random_BL.at[place].set(tokens_BL[row])
    mixed = np.asarray(step(prepared, alone_BL, jnp.ones((BATCH, LENGTH)).at[place].set(weights_BL[row])))
    check(mixed[place], row)
    other = (place + 1) % BATCH
    assert np.linalg.norm(mixed[other] - wanted_BJ[other]) > 0.1 * np.linalg.norm(wanted_BJ[other])  # it can differ

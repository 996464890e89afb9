"""Scores by forward mode against dense features, which have an oracle of their own."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.attribution import gradients
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
from dsdm_jax.core import flops
from dsdm_jax.lm import outputs
from dsdm_jax.lm.decoder import Decoder

from .conftest import SOME_VARIANTS, VARIANTS, VOCAB, make_problem

J = 96
# Sums of a few ten thousand products in another order, relative to the largest score: 6e-8 · √(2.5e4) ≈ 1e-5.
ROUNDING = 1e-5


def _u(targets: int) -> np.ndarray:
  return np.random.default_rng(1).normal(size=(J, targets)).astype(np.float32)


def _explicit(problem, mesh, u_JT, output_fn=outputs.margin, checkpoint=1):
  step = DenseFeatures(problem.model, output_fn, J, 3, mesh)
  phi_BJ = step(step.prepare(problem.params, checkpoint), problem.tokens_BL, problem.weights_BL)
  return np.asarray(phi_BJ, np.float64) @ u_JT


def _close(got, wanted):
  assert np.abs(np.asarray(got) - wanted).max() < ROUNDING * np.abs(wanted).max()


@pytest.mark.parametrize('variant', SOME_VARIANTS)
def test_agrees_with_dense_features(variant, one_device):
  problem = make_problem(**VARIANTS[variant])
  scorer = DirectionalScores(problem.model, outputs.margin, 3, one_device)
  wanted_BT = _explicit(problem, one_device, _u(3))
  for targets in (3, 1):  # several take the backward pass
    got_BT = scorer(scorer.prepare(problem.params, _u(3)[:, :targets], 1), problem.tokens_BL, problem.weights_BL)
    assert got_BT.dtype == np.float32
    _close(got_BT, wanted_BT[:, :targets])


def test_other_output_and_microbatches(plain_problem, one_device):
  p = plain_problem
  scorer = DirectionalScores(p.model, outputs.log_likelihood, 3, one_device, microbatch=2)
  got_BT = scorer(scorer.prepare(p.params, _u(2), 1), p.tokens_BL, p.weights_BL)
  _close(got_BT, _explicit(p, one_device, _u(2), outputs.log_likelihood))


def test_same_scores_on_any_mesh(plain_problem, one_device, eight_devices):
  p, wanted_BT = plain_problem, _explicit(plain_problem, one_device, _u(2))
  scorer = DirectionalScores(p.model, outputs.margin, 3, eight_devices)
  for targets in (2, 1):
    got_BT = scorer(scorer.prepare(p.params, _u(2)[:, :targets], 1), p.tokens_BL, p.weights_BL)
    _close(got_BT, wanted_BT[:, :targets])


@pytest.mark.parametrize('step', ['one direction', 'two directions', 'two-sided'])
def test_parts_of_a_batch_give_what_the_batch_gives(step, plain_problem, one_device, monkeypatch):
  p = plain_problem

  def compute():
    if step == 'two-sided':
      features = TwoSidedFeatures(p.model, outputs.margin, '.*', J, 3, one_device)
      return features(features.prepare(p.params, 1), p.tokens_BL, p.weights_BL)
    scorer = DirectionalScores(p.model, outputs.margin, 3, one_device)
    directions = _u(1 if step == 'one direction' else 2)
    return scorer(scorer.prepare(p.params, directions, 1), p.tokens_BL, p.weights_BL)

  wanted, asked = np.asarray(compute()), []
  monkeypatch.setattr(gradients, 'rows_in_cache', lambda *given: asked.append(given) or 2)
  _close(compute(), wanted)
  directions = {'one direction': 1, 'two directions': 2, 'two-sided': 0}[step]
  assert asked == [(8, 16, VOCAB, 4 * directions * sum(x.size for x in jax.tree.leaves(p.params)))]


class _Doubled(Decoder):
  def __call__(self, tokens_BL):
    return 2 * super().__call__(tokens_BL)


def _biased_head(config, *given):
  config.tied_embeddings = False
  model = Decoder(config, *given)
  model.head = nnx.Linear(32, VOCAB, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(1))
  return model


@pytest.mark.parametrize('build', [_Doubled, _biased_head])
def test_a_model_with_other_logits_is_differentiated_as_a_whole(build, plain_problem, one_device):
  config = base.model()
  config.update({'width': 32, 'mlp_width': 64})
  model = build(config, VOCAB, plain_problem.tokens_BL.shape[1], nnx.Rngs(0))
  p = dataclasses.replace(plain_problem, model=model, params=nnx.state(model, nnx.Param))
  scorer = DirectionalScores(p.model, outputs.margin, 3, one_device)
  _close(scorer(scorer.prepare(p.params, _u(1), 1), p.tokens_BL, p.weights_BL), _explicit(p, one_device, _u(1)))


def test_one_direction_in_bfloat16(one_device):
  p, low = make_problem(), make_problem(compute_dtype='bfloat16')
  wanted_BT = _explicit(p, one_device, _u(1))
  scorer = DirectionalScores(low.model, outputs.margin, 3, one_device)
  got_BT = np.asarray(scorer(scorer.prepare(p.params, _u(1), 1), p.tokens_BL, p.weights_BL))
  assert np.abs(got_BT - wanted_BT).max() < 0.03 * np.abs(wanted_BT).max()  # eight bits, added over layers


def test_scores_of_tokens_add_up_and_are_of_their_tokens(plain_problem, one_device):
  p, u_JT = plain_problem, _u(2)
  whole, shares = (
    np.asarray(scorer(scorer.prepare(p.params, u_JT, 1), p.tokens_BL, p.weights_BL))
    for scorer in (DirectionalScores(p.model, f, 3, one_device) for f in (outputs.margin, outputs.margin_shares))
  )
  assert shares.shape == (8, 15, 2)
  _close(shares.sum(axis=1), whole)
  assert not shares[0, 4:8].any() and shares[1, 4:8].all()  # tokens 5 to 8 of row 0 weigh nothing
  only = np.zeros((8, 16), np.float32)
  only[:, 7] = 1
  scorer = DirectionalScores(p.model, outputs.margin, 3, one_device)
  alone = np.asarray(scorer(scorer.prepare(p.params, u_JT, 1), p.tokens_BL, jax.numpy.asarray(only)))
  _close(shares[1, 6] * 15, alone[1])


def test_further_targets_cost_a_product_with_the_gradient(one_device):
  """One target takes a forward-mode pass; more take one backward pass, whose gradients serve all of them."""
  p = make_problem()
  scorer = DirectionalScores(p.model, outputs.margin, 3, one_device)
  one, two, three = (
    flops.count(scorer.apply, scorer.prepare(p.params, _u(t), 1), p.tokens_BL, p.weights_BL) for t in (1, 2, 3)
  )
  weights = sum(x.size for x in jax.tree.leaves(p.params))
  looked_up = len(p.tokens_BL[0]) * p.params['embedding']['embedding'].shape[1]  # the table's other part is the head
  assert three - two == 2 * len(p.tokens_BL) * (weights + looked_up)
  assert two - 2 * (three - two) < 1.05 * one

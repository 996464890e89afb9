"""Optimizers by name, moments in fewer bits, schedules; parts of a batch and z-loss in the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from dsdm_jax.errors import UserError
from dsdm_jax.training import optimizer
from tests.training.test_step import BATCH, LENGTH, batches, make_trainer, run_steps

PARAMS = {'a': {'kernel': jnp.arange(6.0).reshape(2, 3) / 5, 'bias': jnp.ones(3)}}
GRADS = {'a': {'kernel': jnp.arange(6.0).reshape(2, 3) / 7 - 0.3, 'bias': jnp.full(3, 0.2)}}


def config(**keys):
  c = base.get_config().pretraining.train
  c.update({'gradient_clip': 0.0, 'weight_decay': 0.1, **keys})
  return c


def moved(transformation: optax.GradientTransformation, rate: float, sign: float, steps: int = 3):
  params, state = PARAMS, transformation.init(PARAMS)
  for _ in range(steps):
    updates, state = transformation.update(GRADS, state, params)
    params = jax.tree.map(lambda p, u: p + sign * rate * u, params, updates)
  return params


@pytest.mark.parametrize(
  ('keys', 'wanted'),
  [
    (
      {'optimizer': 'lion', 'optimizer_arguments': 'b1=0.8'},
      lambda rate: optax.lion(rate, b1=0.8, weight_decay=0.1, mask=optimizer.decay_mask),
    ),
    (
      {'optimizer': 'sgd', 'optimizer_arguments': 'momentum=0.9, nesterov=True', 'weight_decay': 0.0},
      lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    ),
    ({'optimizer': 'contrib.muon', 'weight_decay': 0.0}, lambda rate: optax.contrib.muon(rate)),
    ({'optimizer': 'optax:adam', 'weight_decay': 0.0}, lambda rate: optax.adam(rate)),
    ({}, lambda rate: optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=optimizer.decay_mask)),
  ],
  ids=['lion', 'sgd', 'muon', 'by module', 'adamw'],
)
def test_named_optimizer_is_that_of_optax(keys, wanted):
  found = moved(optimizer.make(config(**keys)), 0.01, -1.0)
  expected = moved(wanted(0.01), 1.0, 1.0)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)  # ten roundings of float32 or so


def test_optimizer_without_weight_decay_gets_it_on_matrices():
  a, b = (moved(optimizer.make(config(optimizer='sgd', weight_decay=w)), 0.01, -1.0, 1)['a'] for w in (0.5, 0.0))
  np.testing.assert_allclose(b['kernel'] - a['kernel'], 0.01 * 0.5 * PARAMS['a']['kernel'], atol=1e-7)
  np.testing.assert_array_equal(a['bias'], b['bias'])


@pytest.mark.parametrize(
  ('keys', 'words'),
  [
    ({'optimizer': 'adamm'}, 'is not in optax'),
    ({'optimizer': 'sgd', 'optimizer_arguments': 'momentun=0.9'}, 'it takes learning_rate, momentum'),
  ],
)
def test_unknown_optimizer_or_argument_is_reported_in_one_line(keys, words):
  with pytest.raises(UserError, match=words) as caught:
    optimizer.make(config(**keys))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('halved', 'other'), [('mu', 'nu'), ('nu', 'mu')])
def test_moments_are_stored_in_the_requested_dtype(halved, other):
  keys = {f'{halved}_dtype': 'bfloat16', 'adam_eps': 1e-3}
  halves, whole = optimizer.make(config(**keys)), optimizer.make(config(adam_eps=1e-3))
  state = halves.init(PARAMS)
  _, state = halves.update(GRADS, state, PARAMS)
  (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(s, 'mu')]
  assert {x.dtype for x in jax.tree.leaves(getattr(adam, halved))} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(getattr(adam, other))} == {jnp.dtype('float32')}
  a, b = moved(halves, 0.01, -1.0), moved(whole, 0.01, -1.0)
  differs = False
  for start, x, y in zip(*map(jax.tree.leaves, (PARAMS, a, b)), strict=True):
    # A step is rate · m/(√v + ε) < rate; m, or v, is rounded by 2⁻⁹ of itself at most twice before the third.
    np.testing.assert_allclose(x - start, y - start, atol=3 * 0.01 * 2 * 2**-9)
    differs |= bool((x != y).any())
  assert differs, 'something was rounded'


def test_training_in_bfloat16_keeps_parameters_moments_and_loss_in_float32():
  trainer = make_trainer(model={'compute_dtype': 'bfloat16'}, nu_dtype='bfloat16')
  whole = make_trainer()
  (tokens_BL,) = batches(1)
  start = trainer.init(jax.random.key(3))
  logits_BLV = trainer.logits(start.params, start.rest, tokens_BL)
  assert logits_BLV.dtype == jnp.float32
  others_BLV = whole.logits(start.params, start.rest, tokens_BL)
  assert (logits_BLV != others_BLV).any(), 'something is computed in bfloat16'
  x_BLV = np.asarray(logits_BLV, np.float64)[:, :-1]
  right_BL = np.take_along_axis(x_BLV, tokens_BL[:, 1:, None], axis=2)[..., 0]
  nll = (np.log(np.exp(x_BLV).sum(-1)) - right_BL).mean()
  pair = jax.device_put((tokens_BL, np.ones(BATCH, np.float32)), trainer.batch_sharding)
  state, metrics = trainer.step(start, *pair, jnp.int32(6))
  assert {name: x.dtype for name, x in metrics.items()} == dict.fromkeys(metrics, jnp.dtype('float32'))
  # XLA leaves out other roundings inside a step than outside: logits of about 0.1 change by 2⁻⁸ of themselves.
  assert float(metrics['loss']) == pytest.approx(nll, rel=1e-4)
  assert metrics['loss'] != metrics['loss'].astype(jnp.bfloat16).astype(jnp.float32), 'it has bits beyond bfloat16'
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}
  (adam,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(s, 'mu')]
  assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype('float32')}
  assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype('bfloat16')}


def test_wsd_stays_at_the_peak_and_falls_to_its_floor():
  c = config(schedule='wsd', decay_share=0.25, warmup_steps=10, final_learning_rate=0.0)
  rate = [float(optimizer.learning_rate(c, jnp.int32(s), jnp.int32(100))) / c.learning_rate for s in range(100)]
  assert rate[0] == pytest.approx(0.1) and rate[9:76] == pytest.approx([1.0] * 67)
  assert rate[76:] == pytest.approx([1 - (s - 75) / 25 for s in range(76, 100)], abs=1e-6)


def test_linear_and_constant():
  rates = {}
  for schedule in ('linear', 'constant'):
    c = config(schedule=schedule, warmup_steps=10)
    rates[schedule] = [float(optimizer.learning_rate(c, jnp.int32(s), jnp.int32(110))) for s in (4, 60, 109)]
  peak = config().learning_rate
  assert rates['constant'] == pytest.approx([peak / 2, peak, peak])
  assert rates['linear'] == pytest.approx([peak / 2, peak * (1 - 0.9 * 0.5), peak * (1 - 0.9 * 0.99)])


def test_parts_of_a_batch_train_as_the_batch():
  tokens = batches(2)
  weights = [np.random.default_rng(i).random(BATCH).astype(np.float32) for i in range(2)]
  a, whole = run_steps(make_trainer(adam_eps=1e-3), tokens, weights)
  b, parts = run_steps(make_trainer(adam_eps=1e-3, microbatches=4), tokens, weights)
  for x, y in zip(whole, parts, strict=True):
    assert x == pytest.approx(y, rel=1e-5)
  for k in a:
    np.testing.assert_allclose(a[k], b[k], atol=4e-6, err_msg=k)  # as in test_step: rate · rounding / eps


def test_z_loss_is_the_mean_squared_logsumexp_and_pulls_it_down():
  tokens = batches(1)
  trainer = make_trainer(z_loss=0.5)
  _, (line,) = run_steps(trainer, tokens)
  state = trainer.init(jax.random.key(3))
  logits_BLV = np.asarray(trainer.logits(state.params, state.rest, tokens[0]), np.float64)
  z_BL = np.log(np.exp(logits_BLV[:, : LENGTH - 1]).sum(-1))
  assert line['z_loss'] == pytest.approx((z_BL**2).mean(), rel=1e-5)
  _, (plain,) = run_steps(make_trainer(), tokens)
  assert line['loss'] == pytest.approx(plain['loss'], rel=1e-6)  # logged without it
  assert line['gradient_norm'] > 1.01 * plain['gradient_norm']

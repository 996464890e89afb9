"""Whole trainings as one function of row weights: equal to single steps, and differentiable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdm_jax.errors import UserError
from dsdm_jax.lm.outputs import margin
from dsdm_jax.training.differentiable import Metagradient, ScannedTraining, TargetOutputs
from tests.training.test_step import LENGTH, VOCAB, base, flat

ROWS, TARGETS = 40, 6


@pytest.fixture(scope='module')
def data():
  rng = np.random.default_rng(0)
  tokens_NL = rng.integers(1, VOCAB, (ROWS, LENGTH), dtype=np.int32)
  tokens_TL = rng.integers(1, VOCAB, (TARGETS, LENGTH), dtype=np.int32)
  weights_TL = np.ones((TARGETS, LENGTH), np.float32)
  weights_TL[:, 0] = 0
  return tokens_NL, tokens_TL, weights_TL


def make(tokens_NL: np.ndarray, epochs: float = 2.4, **train) -> ScannedTraining:
  config = base.get_config()
  config.model.update({'layers': 1, 'width': 16, 'heads': 2, 'kv_heads': 2, 'mlp_width': 32})
  config.pretraining.train.update({'batch_size': 8, 'warmup_steps': 2, 'adam_eps_root': 1e-6, **train})
  return ScannedTraining(config.model, config.pretraining.train, VOCAB, tokens_NL, epochs, seed=5)


@pytest.fixture(scope='module')
def training(data) -> ScannedTraining:
  return make(data[0])


def test_scan_equals_single_train_steps(training, data):
  weight_MN = np.random.default_rng(1).integers(0, 2, (3, ROWS)).astype(np.float32)
  early, late = training.train('a', weight_MN, (0.5, 1.0))
  assert training.steps == 12
  for m, weight_N in enumerate(weight_MN):
    state, half = training.start('a'), None
    for step, rows_B in enumerate(training.order('a')):
      state, _ = training.trainer.step(
        state, jnp.asarray(data[0][rows_B]), jnp.asarray(weight_N[rows_B]), jnp.int32(training.steps)
      )
      half = flat(state.params) if step + 1 == 6 else half
    for wanted, found in ((half, early), (flat(state.params), late)):
      for path, value in flat(jax.tree.map(lambda x, m=m: x[m], found.params)).items():
        # Twelve steps of Adam on other summation orders: a few units in the last place of weights below one.
        np.testing.assert_allclose(value, wanted[path], atol=2e-5, err_msg=path)


def test_each_epoch_holds_every_row_once_and_runs_differ(training):
  flat_order = training.order('a').ravel()
  for epoch in range(2):
    assert sorted(flat_order[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))
  assert (training.order('a') != training.order('b')).any()


@pytest.mark.parametrize('epochs', [0.0, 0.17])
def test_training_without_a_step_is_refused(data, epochs):
  with pytest.raises(UserError, match=f'^{epochs:g} epochs of 40 rows are less than one batch of 8; raise the epochs'):
    make(data[0], epochs)


def test_row_of_weight_zero_has_no_effect(training, data):
  weight_MN = np.ones((1, ROWS), np.float32)
  weight_MN[0, 7] = 0
  other = data[0].copy()
  other[7] = 1
  one, two = training.train('a', weight_MN)[0], make(other).train('a', weight_MN)[0]
  for path, value in flat(one.params).items():
    np.testing.assert_array_equal(value, flat(two.params)[path], err_msg=path)


def test_metagradient_agrees_with_finite_differences(training, data):
  outputs = TargetOutputs(training, margin, *data[1:])
  member_KT = np.arange(TARGETS)[None] // 3 == np.arange(2)[:, None]
  meta = Metagradient(training, outputs, member_KT)
  rng = np.random.default_rng(3)
  weight_N = rng.uniform(0.5, 1.0, ROWS).astype(np.float32)
  output_K, derivative_KN = meta('a', weight_N)
  np.testing.assert_allclose(output_K, meta.output('a', weight_N), rtol=1e-5)
  trained = outputs(training.train('a', weight_N[None])[0])[0]
  np.testing.assert_allclose(output_K, member_KT @ trained[0] / 3, rtol=1e-4)
  size = 0.02
  found, wanted = [], []
  for _ in range(8):
    direction_N = rng.standard_normal(ROWS).astype(np.float32)
    up, down = (meta.output('a', weight_N + sign * size * direction_N) for sign in (1, -1))
    found.append(derivative_KN @ direction_N)
    wanted.append((up - down) / (2 * size))
  # The second-order term drops out; what is left is the third order and float32's 1e-6 over the step of 0.02.
  np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())

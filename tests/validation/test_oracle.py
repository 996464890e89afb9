"""Derivatives through training against central differences in float64, on both settings of the bank, in miniature."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import validation
from dsdm_jax.bench import derivative
from dsdm_jax.bench.derivative import widened
from dsdm_jax.lm.outputs import margin
from dsdm_jax.training.differentiable import Metagradient, ScannedTraining, TargetOutputs
from dsdm_jax.validation.validate import METASMOOTH, PLAIN, train_config

VOCAB, LENGTH, ROWS, TARGETS = 48, 12, 192, 6


def make(name: str) -> tuple[ConfigDict, ScannedTraining, Metagradient]:
  config = validation.get_config()
  config.model.update({'layers': 1, 'width': 16, 'heads': 2, 'kv_heads': 2, 'mlp_width': 32})
  rng = np.random.default_rng(0)
  tokens_NL = rng.integers(1, VOCAB, (ROWS, LENGTH), dtype=np.int32)
  tokens_TL = rng.integers(1, VOCAB, (TARGETS, LENGTH), dtype=np.int32)
  weights_TL = np.ones((TARGETS, LENGTH), np.float32)
  weights_TL[:, 0] = 0
  train = train_config(config, name)
  training = ScannedTraining(config.proxies.model, train, VOCAB, tokens_NL, 3.0, seed=5)
  member_KT = np.arange(TARGETS)[None] // 3 == np.arange(2)[:, None]
  return train, training, Metagradient(training, TargetOutputs(training, margin, tokens_TL, weights_TL), member_KT)


@pytest.mark.parametrize(('name', 'eps_root', 'batch', 'steps'), [(PLAIN, 1e-8, 32, 18), (METASMOOTH, 1e-6, 64, 9)])
def test_oracle_agrees_with_finite_differences(name, eps_root, batch, steps):
  train, training, oracle = make(name)
  assert (train.adam_eps_root, train.batch_size, training.steps) == (eps_root, batch, steps)
  _, derivative_KN = oracle(0, np.ones(ROWS))
  size = 1e-4
  directions = derivative.directions(0, derivative_KN.mean(axis=0), 2)
  every_DN = np.concatenate(list(directions.values()))
  weight_DN = np.concatenate([1 + size * every_DN, 1 - size * every_DN])
  up_DK, down_DK = np.split(derivative.outputs_of(oracle, training, weight_DN, at_once=3), 2)
  every_DK = (up_DK - down_DK) / (2 * size)
  for kind, d_DN, change_DK in zip(directions, np.split(every_DN, 2), np.split(every_DK, 2), strict=True):
    # The step leaves what goes with its square, 1e-8, and float64 less; the derivative has float32's 1e-7, which
    # training magnifies.
    atol = 1e-5 * np.abs(change_DK).max()
    np.testing.assert_allclose(d_DN @ derivative_KN.T, change_DK, atol=atol, err_msg=kind)


def test_directions_are_of_rows_and_groups_with_the_extremes_first():
  value_N = np.random.default_rng(1).permutation(200).astype(float)
  made = derivative.directions(3, value_N, 5)
  assert [made[kind].sum(axis=1).tolist() for kind in ('rows', 'groups')] == [[1] * 5, [4] * 5]
  assert [np.flatnonzero(d).tolist() for d in made['rows'][:2]] == [[value_N.argmax()], [value_N.argmin()]]
  assert sorted(value_N[made['groups'][0] > 0]) == [196, 197, 198, 199]
  assert sorted(value_N[made['groups'][1] > 0]) == [0, 1, 2, 3]


def test_widened_computes_the_same_function_in_float64():
  _, training, oracle = make(PLAIN)
  weight_N = np.random.default_rng(2).uniform(0.5, 1, ROWS)
  begin = training.start(0), training.order(0)
  wide = widened(oracle.apply, np.ones(ROWS, np.float32), *begin)
  with jax.enable_x64(True):
    found_K = np.asarray(jax.jit(wide)(weight_N, *begin))
    nearby_K = np.asarray(jax.jit(wide)(weight_N + 1e-12, *begin))
  assert found_K.dtype == np.float64
  np.testing.assert_allclose(found_K, oracle.output(0, weight_N), rtol=1e-4)
  assert 0 < np.abs(nearby_K - found_K).max() < 1e-9, 'float32 would not see so small a change'


@pytest.mark.parametrize('reverse', [False, True])
def test_widened_handles_scan_cond_and_scatter_add(reverse):
  def function(x_N, index_M):
    def body(total, x):
      return jax.lax.cond(x > 0, lambda: total + x / 3, lambda: total - jax.nn.logsumexp(x_N)), total

    total, seen_N = jax.lax.scan(body, 0.0, x_N, reverse=reverse)
    return {'total': total, 'seen_N': seen_N, 'gradient_N': jax.grad(lambda x_N: (x_N[index_M] ** 2).sum())(x_N)}

  x_N, index_M = np.array([0.1, -0.2, 0.3, 0.7]), np.array([0, 2, 2], np.int32)
  wide = widened(function, x_N.astype(np.float32), index_M)
  with jax.enable_x64(True):
    wanted, found = function(jax.numpy.asarray(x_N), index_M), wide(x_N, index_M)
  for key, value in wanted.items():
    assert found[key].dtype == np.float64
    np.testing.assert_allclose(found[key], value, rtol=1e-15, err_msg=key)

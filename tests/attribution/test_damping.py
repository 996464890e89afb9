"""The automatic damping: its arithmetic, its caution, and that it does not lose on networks trained on many subsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from configs import base
from dsdm_jax.attribution import damping, datamodel, solve
from dsdm_jax.attribution.accumulators import Accumulator
from tests.attribution.test_datamodel import Rows

INPUTS, HIDDEN, CLASSES = 16, 16, 5
ROWS, TARGETS, PROXIES, BANK, STEPS = 200, 64, 3, 30, 100


def test_the_scorer_takes_no_part_in_the_pair():
  assert damping.held_out_pairs(2) == []
  assert damping.held_out_pairs(3) == [(0, 1, 2), (1, 0, 2), (2, 0, 1)]
  assert len(damping.held_out_pairs(4)) == 4 * 3
  # Two checkpoints for each of three proxies: those of the third tell how two differ.
  assert damping.held_out_pairs(3, 2) == [(0, 1, 2), (1, 1, 2), (2, 0, 2), (3, 0, 2), (4, 0, 1), (5, 0, 1)]


def test_agreement_is_the_rank_correlation():
  rng = np.random.default_rng(0)
  predicted, observed = rng.normal(size=(2, 3, 20)), rng.normal(size=(3, 20))
  found = damping.choose(0.1, (0.1, 1.0), [predicted], [observed], [np.full((2, 20), 1 / 20)])
  for candidate, p_PT in zip((0.1, 1.0), predicted, strict=True):
    expected = np.mean([scipy.stats.spearmanr(p, o).statistic for p, o in zip(p_PT, observed, strict=True)])
    assert found.agreement[candidate] == pytest.approx(expected)
  assert found.gain == pytest.approx(max(found.agreement.values()) - found.agreement[0.1])


def _choice(signal, seed=0, pairs=3, targets=50):
  """A candidate that predicts with some signal against a fixed one that predicts nothing."""
  rng = np.random.default_rng(seed)
  observed = rng.normal(size=(pairs, targets))
  predicted = np.stack([rng.normal(size=observed.shape), signal * observed + rng.normal(size=observed.shape)])
  weights = solve.TargetWeights.of_documents([str(i) for i in range(targets)], 1, 100, seed, 't')
  return damping.choose(0.1, (0.1, 1.0), [predicted], [observed], [weights.weight_KT[weights.resample_rows]])


def test_a_clear_gain_is_taken_and_noise_is_not():
  assert _choice(1.0).damping == 1.0
  taken = [_choice(0.0, seed).damping == 1.0 for seed in range(60)]
  # A gain above one standard error comes by chance in one of six.
  assert np.mean(taken) < 0.3


def test_no_resamples_leave_the_fixed_damping():
  observed = np.arange(5.0)[None]
  found = damping.choose(0.1, (0.1, 1.0), [np.stack([-observed, observed])], [observed], [np.zeros((0, 5))])
  assert found.damping == 0.1
  assert found.as_json()['gain_error'] is None


# A network with one hidden layer, trained on many random halves of its data.


def _init(key, scale=1.0):
  first, second = jax.random.split(key)
  return {
    'inner': scale * jax.random.normal(first, (INPUTS, HIDDEN)) / 4,
    'outer': scale * jax.random.normal(second, (HIDDEN, CLASSES)) / 5,
  }


def _logits(params, x):
  return jnp.tanh(x @ params['inner']) @ params['outer']


def _margin(params, x_I, y):
  logits_V = _logits(params, x_I)
  right_V = jnp.arange(CLASSES) == y
  return jnp.sum(jnp.where(right_V, logits_V, 0)) - jax.nn.logsumexp(jnp.where(right_V, -jnp.inf, logits_V))


def _train(key, mask_N, x_NI, y_N):
  def loss(params):
    log_p = jax.nn.log_softmax(_logits(params, x_NI))
    return -jnp.sum(mask_N * jnp.take_along_axis(log_p, y_N[:, None], 1)[:, 0]) / jnp.sum(mask_N)

  def step(carry, i):  # Adam with a rate that falls to zero
    params, m, v = carry
    grads = jax.grad(loss)(params)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
    rate = 0.03 * (1 - i / STEPS)
    params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, m, v)
    return (params, m, v), None

  params = _init(key)
  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(step, (params, zeros, zeros), jnp.arange(STEPS))[0][0]


@jax.jit
def _features(params, x_NI, y_N):
  gradient = jax.vmap(jax.grad(_margin), in_axes=(None, 0, 0))(params, x_NI, y_N)
  return jnp.concatenate([g.reshape(len(g), -1) for g in jax.tree.leaves(gradient)], axis=1)


def test_auto_does_not_lose_to_the_best_damping_on_a_bank_of_trained_subsets():
  """Linear datamodeling score over 30 subsets that neither the scores nor the choice have seen."""
  seed = 0
  rng = np.random.default_rng(seed)
  x_NI = rng.normal(size=(ROWS + TARGETS, INPUTS)).astype(np.float32)
  y_N = np.argmax(_logits(_init(jax.random.key(100 + seed), 5.0), x_NI), axis=1)
  y_N = np.where(rng.random(len(y_N)) < 0.1, rng.integers(0, CLASSES, len(y_N)), y_N)
  pool, target = (x_NI[:ROWS], y_N[:ROWS]), (x_NI[ROWS:], y_N[ROWS:])
  seen_CN = np.stack([rng.permutation(ROWS) < ROWS // 2 for _ in range(PROXIES + BANK)])
  keys = jax.random.split(jax.random.key(seed), len(seen_CN))
  trained = jax.jit(jax.vmap(_train, in_axes=(0, 0, None, None)))(keys, seen_CN.astype(np.float32), *pool)
  output_CT = np.asarray(jax.jit(jax.vmap(jax.vmap(_margin, (None, 0, 0)), (0, None, None)))(trained, *target))

  proxies = [jax.tree.map(lambda leaf, c=c: leaf[c], trained) for c in range(PROXIES)]
  phi = [[np.asarray(_features(p, *examples)) for p in proxies] for examples in (pool, target)]
  blocks = datamodel.whole(phi[0][0].shape[1])
  members = [solve.Member(Rows(n, 128), [t], blocks, str(c)) for c, (n, t) in enumerate(zip(*phi, strict=True))]
  options = base.get_config().datamodel
  weights = [solve.TargetWeights.of_documents([str(i) for i in range(TARGETS)], 1, 64, 0, 't')]
  held_out = solve.HeldOutProxies(seen_CN[:PROXIES], [output_CT[:PROXIES]])
  solved = solve.solve('checkpoints', members, weights, options, None, lambda rows: None, Accumulator(), held_out)
  assert len(solved.solutions) == PROXIES

  scores = {}  # relative damping → LDS, every target example for itself
  for relative in solved.choice.agreement:
    predicted_MT = 0
    for member in members:
      parts = datamodel.gram(member.source)
      u_JT = datamodel.solve(parts, blocks, member.targets[0], relative, overwrite=True).u_JK
      predicted_MT += seen_CN[PROXIES:] @ datamodel.scores(member.source, u_JT)
    truth_MT = output_CT[PROXIES:]
    scores[relative] = np.mean(
      [scipy.stats.spearmanr(p, t).statistic for p, t in zip(predicted_MT.T, truth_MT.T, strict=True)]
    )
  fixed = scores[options.damping]
  print(f'LDS fixed {fixed:.3f}, auto {scores[solved.damping]:.3f}, best {max(scores.values()):.3f}')
  # Each of 64 examples has a correlation over 30 subsets, known to 1/√30; their mean to 0.02.
  noise = 1 / np.sqrt(BANK * TARGETS)
  assert scores[solved.damping] > max(scores.values()) - noise
  assert scores[solved.damping] > fixed + noise

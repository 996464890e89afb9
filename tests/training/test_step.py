"""One training step against an oracle in NumPy float64, and the weights of examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.core import mesh
from dsdm_jax.data.order.batches import token_weights
from dsdm_jax.errors import UserError
from dsdm_jax.training import optimizer, step
from dsdm_jax.training.step import Trainer
from dsdm_jax.training.vmapped import VmappedTrainer

VOCAB, LENGTH, BATCH = 48, 12, 8


def make_trainer(devices: int = 1, model=None, **train) -> Trainer:
  """The same object for the same arguments, so that tests compile its programs once."""
  return cached_trainer(devices, tuple((model or {}).items()), tuple(train.items()))


@functools.cache
def cached_trainer(devices: int, model: tuple, train: tuple) -> Trainer:
  config = base.get_config()
  config.model.update({'layers': 1, 'width': 16, 'heads': 2, 'kv_heads': 2, 'mlp_width': 32, **dict(model)})
  config.pretraining.train.update({'batch_size': BATCH, **dict(train)})
  grid = mesh.make_mesh(config.mesh, jax.devices()[:devices])
  return Trainer(config.model, config.pretraining.train, VOCAB, LENGTH, grid)


def batches(count: int, seed: int = 0) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32) for _ in range(count)]


def flat(tree) -> dict[str, np.ndarray]:
  return {'/'.join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(tree)}


def run_steps(trainer: Trainer, tokens, weights=None, steps: int = 6):
  """(final parameters, metrics of each step)."""
  state, seen = trainer.init(jax.random.key(3)), []
  for i, tokens_BL in enumerate(tokens):
    weight_B = np.ones(BATCH, np.float32) if weights is None else weights[i]
    pair = jax.device_put((tokens_BL, weight_B), trainer.batch_sharding)
    state, metrics = trainer.step(state, *pair, jnp.int32(steps))
    seen.append({k: float(v) for k, v in metrics.items()})
  return flat(state.params), seen


@pytest.mark.parametrize(('devices', 'models'), [(1, 1), (8, 3)])
def test_counting_flop_does_not_trace_the_step_again(devices, models, monkeypatch):
  traced = []
  apply = Trainer.apply
  monkeypatch.setattr(Trainer, 'apply', lambda self, *given: traced.append(given) or apply(self, *given))
  one = cached_trainer.__wrapped__(devices, (), ())
  trainer = one if models == 1 else VmappedTrainer(one, models)
  flop = trainer.flop_per_step
  assert trainer.flop_per_step == flop > 0
  state = one.init(jax.random.key(3)) if models == 1 else trainer.init([jax.random.key(i) for i in range(models)])
  axis = (models,) if models > 1 else ()
  pair = np.ones((*axis, BATCH, LENGTH), np.int32), np.ones((*axis, BATCH), np.float32)
  for _ in range(2):
    state, _ = trainer.step(state, *jax.device_put(pair, trainer.batch_sharding), jnp.int32(2))
  assert len(traced) == 1
  assert flop == models * make_trainer(devices).flop_per_step


def oracle(trainer: Trainer, tokens, weights, steps: int, c) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
  """AdamW, clip and schedule written out in NumPy float64; only the gradient of one row's mean loss is JAX's."""
  state = trainer.init(jax.random.key(3))
  params = {k: v.astype(np.float64) for k, v in flat(state.params).items()}

  @jax.jit
  def row_loss(params, tokens_L):
    logits_LV = nnx.merge(trainer.graphdef, params, state.rest)(tokens_L[None])[0, :-1]
    p_LV = jax.nn.softmax(logits_LV)
    return -jnp.mean(jnp.log(p_LV[jnp.arange(LENGTH - 1), tokens_L[1:]]))

  gradient = jax.jit(jax.value_and_grad(row_loss))
  shape = state.params
  mu, nu = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
  seen = []
  for t, (tokens_BL, weight_B) in enumerate(zip(tokens, weights, strict=True)):
    at = nnx.from_flat_state(
      [
        (path, v.replace(jnp.asarray(params['/'.join(map(str, path))], jnp.float32)))
        for path, v in nnx.to_flat_state(shape)
      ]
    )
    loss, g = 0.0, {k: np.zeros_like(v) for k, v in params.items()}
    for tokens_L, weight in zip(tokens_BL, weight_B, strict=True):
      value, row = gradient(at, tokens_L)
      loss += weight * float(value) / BATCH
      for k, v in flat(row).items():
        g[k] += weight * v.astype(np.float64) / BATCH
    norm = np.sqrt(sum((v**2).sum() for v in g.values()))
    shrink = min(1.0, c.gradient_clip / norm) if c.gradient_clip else 1.0
    warmup = min(c.warmup_steps, steps / 2)
    if t < warmup:
      rate = c.learning_rate * (t + 1) / warmup
    else:
      cosine = 0.5 * (1 + np.cos(np.pi * (t - warmup) / (steps - warmup)))
      rate = c.learning_rate * (c.final_learning_rate + (1 - c.final_learning_rate) * cosine)
    for k, v in params.items():
      mu[k] = c.adam_b1 * mu[k] + (1 - c.adam_b1) * g[k] * shrink
      nu[k] = c.adam_b2 * nu[k] + (1 - c.adam_b2) * (g[k] * shrink) ** 2
      step = (mu[k] / (1 - c.adam_b1 ** (t + 1))) / (np.sqrt(nu[k] / (1 - c.adam_b2 ** (t + 1))) + c.adam_eps)
      matrix = k.endswith(('kernel', 'embedding'))
      params[k] = v - rate * (step + (c.weight_decay * v if matrix else 0))
    seen.append({'loss': loss / weight_B.mean(), 'gradient_norm': norm, 'learning_rate': rate})
  return params, seen


@pytest.mark.parametrize('clip', [0.0, 0.05], ids=['no clip', 'clipped'])
def test_steps_are_adamw_with_schedule_and_clip(clip):
  # eps well above the rounding of gradients: where both are tiny, Adam divides noise by noise.
  keys = {'gradient_clip': clip, 'weight_decay': 0.3, 'warmup_steps': 2, 'adam_eps': 1e-3, 'learning_rate': 0.01}
  trainer = make_trainer(**keys)
  config = base.get_config().pretraining.train
  config.update(keys)
  tokens = batches(4)
  weights = [np.random.default_rng(i).random(BATCH).astype(np.float32) for i in range(4)]
  found, seen = run_steps(trainer, tokens, weights)
  wanted, expected = oracle(trainer, tokens, weights, 6, config)
  for a, b in zip(seen, expected, strict=True):
    for metric in b:
      assert a[metric] == pytest.approx(b[metric], rel=1e-5), metric
  if clip:
    assert all(line['gradient_norm'] > clip for line in expected), 'the clip must take part'
  # Gradients carry float32 rounding of about 1e-7 in 0.1; a step turns that into at most rate·δ/eps = 1e-6.
  for k in wanted:
    np.testing.assert_allclose(found[k], wanted[k], atol=4e-6, err_msg=k)


def test_row_of_weight_zero_is_left_out_and_others_keep_their_weight():
  trainer = make_trainer()
  (tokens_BL,) = batches(1)
  weight_B = np.ones(BATCH, np.float32)
  weight_B[2] = 0
  other_BL = tokens_BL.copy()
  other_BL[2] = (other_BL[2] + 1) % VOCAB
  a, first = run_steps(trainer, [tokens_BL], [weight_B])
  b, second = run_steps(trainer, [other_BL], [weight_B])
  assert first == second
  for k in a:
    np.testing.assert_array_equal(a[k], b[k])  # the row's tokens do not matter
  losses = []
  for row in range(BATCH):
    only_B = np.zeros(BATCH, np.float32)
    only_B[row] = 1
    losses.append(run_steps(trainer, [tokens_BL], [only_B])[1][0]['loss'])
  assert first[0]['loss'] == pytest.approx((sum(losses) - losses[2]) / (BATCH - 1), rel=1e-5)  # nats per token
  (loss, _), _ = trainer._gradient(trainer.init(jax.random.key(3)), tokens_BL, weight_B)
  assert loss == pytest.approx((sum(losses) - losses[2]) / BATCH, rel=1e-5)  # divided by B, not by the weights' sum
  nothing = run_steps(trainer, [tokens_BL], [np.zeros(BATCH, np.float32)])[1][0]
  assert nothing['loss'] == nothing['gradient_norm'] == 0


@pytest.mark.parametrize('devices', [1, 8])
def test_the_logged_loss_is_per_token_whatever_the_weights(devices):
  """Rows of whole documents weigh the share of their tokens that are selected."""
  trainer, [tokens_BL] = make_trainer(devices, z_loss=0.1), batches(1)
  counted_BL = np.ones((BATCH, LENGTH), np.float32)
  counted_BL[:, :4] = 0
  half_B = np.full(BATCH, 0.5, np.float32)
  for weigh in (lambda weight_B: weight_B, lambda weight_B: token_weights(counted_BL, weight_B)):
    one, half = (run_steps(trainer, [tokens_BL], [weigh(w)])[1][0] for w in (2 * half_B, half_B))
    for name in ('loss', 'z_loss'):
      assert half[name] == pytest.approx(one[name], rel=1e-6)
    assert half['gradient_norm'] == pytest.approx(0.5 * one['gradient_norm'], rel=1e-5)


@pytest.mark.parametrize(('set_to', 'devices', 'parts'), [(0, 1, 32), (0, 8, 1), (4, 1, 4), (4, 8, 4)])
def test_only_one_cpu_device_chooses_the_number_of_parts(set_to, devices, parts):
  config = base.training()
  config.microbatches = set_to
  grid = mesh.make_mesh(base.get_config().mesh, jax.devices()[:devices])
  assert step.microbatches(config, 32, 256, 4_096, 1_000, grid) == parts


def test_a_cpu_trains_on_parts_that_its_caches_hold(monkeypatch):
  rows, steps, asked = 6, jnp.int32(6), []  # another batch than the config's, as in bench
  tokens_BL, weight_B = batches(1)[0][:rows], np.linspace(0, 1, rows, dtype=np.float32)
  trainer = make_trainer(adam_eps=1e-3)
  state = trainer.init(jax.random.key(3))
  whole = jax.jit(lambda *given: trainer.apply(*given))(state, tokens_BL, weight_B, steps)
  monkeypatch.setattr(step, 'rows_in_cache', lambda *given: asked.append(given) or 2)
  parts = jax.jit(lambda *given: trainer.apply(*given))(state, tokens_BL, weight_B, steps)
  assert asked == [(rows, LENGTH, VOCAB, 4 * sum(x.size for x in jax.tree.leaves(state.params)))]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), parts, whole)
  scans = [
    e for e in jax.make_jaxpr(trainer.apply)(state, tokens_BL, weight_B, steps).eqns if e.primitive.name == 'scan'
  ]
  assert [scan.params['length'] for scan in scans] == [rows // 2]


@pytest.mark.parametrize(('shape', 'microbatches'), [((1, 2, 4), 1), ((2, 2, 2), 2)])
def test_eight_devices_train_as_one(shape, microbatches):
  tokens = batches(5)
  one = make_trainer(1)
  config = base.get_config()
  config.model.update({'layers': 1, 'width': 16, 'heads': 2, 'kv_heads': 2, 'mlp_width': 32})
  config.mesh.replicas, config.mesh.data, config.mesh.model = shape
  config.pretraining.train.update({'batch_size': BATCH, 'microbatches': microbatches})
  many = Trainer(config.model, config.pretraining.train, VOCAB, LENGTH, mesh.make_mesh(config.mesh))
  shardings = [s.spec for s in jax.tree.leaves(many.shardings.params)]
  assert any(any(spec) for spec in shardings), 'some weights are split'
  _, a = run_steps(one, tokens)
  _, b = run_steps(many, tokens)
  for x, y in zip(a, b, strict=True):
    assert x['learning_rate'] == y['learning_rate']
    # Sums over devices come in another order: rounding of float32 in sums of 88 terms, grown over five steps.
    assert x['loss'] == pytest.approx(y['loss'], rel=2e-5)
    assert x['gradient_norm'] == pytest.approx(y['gradient_norm'], rel=2e-4)


def test_parameters_are_initialised_sharded():
  trainer = make_trainer(8)
  state = trainer.init(jax.random.key(0))
  for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.shardings), strict=True):
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_initialisation_is_the_same_on_any_mesh():
  a, b = (flat(make_trainer(n).init(jax.random.key(5)).params) for n in (1, 8))
  for k in a:
    np.testing.assert_array_equal(a[k], b[k])


@pytest.mark.parametrize('steps', [1, 2, 5, 100])
def test_schedule_reaches_its_peak_and_its_floor(steps):
  config = base.get_config().pretraining.train
  rate = [float(optimizer.learning_rate(config, jnp.int32(s), jnp.int32(steps))) for s in range(steps)]
  assert max(rate) == pytest.approx(config.learning_rate, rel=1e-6)
  assert min(rate) > 0
  peak = int(np.argmax(rate))
  assert rate[: peak + 1] == sorted(rate[: peak + 1])
  assert rate[peak:] == sorted(rate[peak:], reverse=True)
  if steps == 100:
    assert rate[0] == pytest.approx(config.learning_rate / config.warmup_steps, rel=1e-6)
    assert rate[-1] == pytest.approx(config.learning_rate * config.final_learning_rate, rel=0.02)


def test_sequence_longer_than_the_positions_is_refused():
  trainer = make_trainer()
  params, rest = (jax.eval_shape(lambda: trainer.init(jax.random.key(0)))[i] for i in (1, 2))
  with pytest.raises(UserError, match=r'sequences of 13 tokens are longer than the 12 positions of the model; cut'):
    jax.eval_shape(trainer.logits, params, rest, jnp.zeros((2, LENGTH + 1), jnp.int32))


def test_loss_and_gradient_count_some_tokens_alone():
  """Against the loss written out for each counted token; a row without any has none."""
  trainer, [tokens_BL] = make_trainer(), batches(1)
  counted_BL = np.zeros((BATCH, LENGTH), np.float32)
  counted_BL[0, 3], counted_BL[1, [2, 5, 7]], counted_BL[2] = 1, 1, 1
  counted_BL[:, 0] = 0
  weight_B = np.array([1, 2, 1] + [1] * (BATCH - 3), np.float32)
  state = trainer.init(jax.random.key(3))

  def explicit(params):
    logits_BLV = nnx.merge(trainer.graphdef, params, state.rest)(tokens_BL)
    log_p_BLV = logits_BLV - jnp.log(jnp.sum(jnp.exp(logits_BLV), axis=-1, keepdims=True))
    row = [-log_p_BLV[0, 2, tokens_BL[0, 3]]]
    row.append(-2 * sum(log_p_BLV[1, i - 1, tokens_BL[1, i]] for i in (2, 5, 7)) / 3)
    row.append(-sum(log_p_BLV[2, i - 1, tokens_BL[2, i]] for i in range(1, LENGTH)) / (LENGTH - 1))
    return sum(row) / BATCH

  loss, gradient = jax.jit(jax.value_and_grad(explicit))(state.params)
  compute = jax.jit(trainer._gradient)
  (found, metrics), grads = compute(state, tokens_BL, token_weights(counted_BL, weight_B))
  np.testing.assert_allclose(found, loss, rtol=1e-6)
  assert metrics['loss'] == found
  wanted = flat(gradient)
  for path, value in flat(grads).items():
    np.testing.assert_allclose(value, wanted[path], atol=1e-6, err_msg=path)
  # Where all tokens count, both forms of weights are one loss.
  everything = np.ones((BATCH, LENGTH), np.float32)
  everything[:, 0] = 0
  both = [compute(state, tokens_BL, w)[0][0] for w in (weight_B, token_weights(everything, weight_B))]
  np.testing.assert_allclose(*both, rtol=1e-6)

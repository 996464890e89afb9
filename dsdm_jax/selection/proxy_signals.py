"""Signals of the proxy models about rows: log-likelihoods, embeddings, and the effect of fine-tuning on a target."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.attribution import rademacher
from dsdm_jax.attribution.gradients import in_microbatches
from dsdm_jax.attribution.scores import UNSEEN, proxy_weights, seen
from dsdm_jax.attribution.second_moment import adam_state
from dsdm_jax.attribution.sources import ahead
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import flops, prng, storage
from dsdm_jax.core.mesh import one_device
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.batches import row_range_batches
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Examples
from dsdm_jax.errors import UserError
from dsdm_jax.lm.outputs import counted_mean, log_likelihood, token_log_probability
from dsdm_jax.training.differentiable import LEAST_EPS_ROOT, Metagradient, ScannedTraining, TargetOutputs
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.proxies import trainer_of
from dsdm_jax.training.step import Trainer, TrainState, trainer

BLOCK = 65_536  # rows that are whitened together
FIT_ROWS = 65_536  # evenly spaced rows from which the variances of a larger pool are estimated
# Tokens of a batch. Not a setting: other batches round differently, and would select other rows.
_TOKENS = 4_096
_WIDTH = 256  # columns of an embedding that is computed from logits
_GRADIENTS = 2**27  # numbers in the gradients of rows that are held at once, but one row


class Proxies:
  """Forward passes of the proxies over the pool and over examples."""

  def __init__(self, context: Context, pool: Pool):
    self._context, self._pool = context, pool
    self._config, self._proxies = context.config, context.inputs['proxies']
    # Always one device, for the same reason as _TOKENS.
    self._mesh = one_device()
    self._trainer = trainer_of(self._config.proxies, pool, self._mesh)
    self._batch = max(1, _TOKENS // pool.length)
    self._tuners: dict[float, Trainer] = {}
    sharded = self._trainer.batch_sharding
    states = self._trainer.shardings.params, self._trainer.shardings.rest
    self._likelihood = jax.jit(
      self._mean_log_probability, in_shardings=(*states, sharded, sharded), out_shardings=sharded
    )
    self._embed = jax.jit(self._mean_hidden, in_shardings=(*states, sharded, sharded), out_shardings=sharded)

  def state(self, checkpoint: int) -> TrainState:
    name = f'proxy_{checkpoint}'
    return load_state(self._proxies.path / name, self._trainer, self._proxies.last_step(name))

  def log_likelihood_N(self) -> np.ndarray:
    """Mean log-probability of each row's tokens given the tokens before them, nats per token; float32 [N].

    Averaged over the proxies that did not train on the row; it is easier for those that did.
    """
    count = self._config.proxies.count
    by_proxy_PN = np.stack([self.log_likelihood_of(self.state(proxy)) for proxy in range(count)])
    seen_PN = seen(self._context.inputs['proxies'], count, self._pool.num_rows)
    weight_PN = proxy_weights(seen_PN, UNSEEN)
    return np.einsum('pn,pn->n', by_proxy_PN.astype(np.float64), weight_PN).astype(np.float32)

  def log_likelihood_of(self, state: TrainState) -> np.ndarray:
    """As `log_likelihood_N`, by one model."""
    return self._over_pool(lambda *batch: self._likelihood(state.params, state.rest, *batch), 'log-likelihood')

  def embeddings(self) -> np.ndarray:
    """Embedding of every row by the first proxy: mean over tokens, whitened, of unit length; float32 [N, D].

    D is the model's width if the model has a method `hidden` (tokens_BL → x_BLD, before the head). The logits of other
    models are projected by random signs to at most 256 columns.
    """
    state = self.state(0)
    column_L = np.arange(self._pool.length)

    def there(rows_B: np.ndarray) -> np.ndarray:
      return (column_L < self._pool.sizes(rows_B)[:, None]).astype(np.float32)

    raw_ND = self._over_pool(functools.partial(self._embed, state.params, state.rest), 'embeddings', there)
    self._mean_D = raw_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    # A few directions have most of the variance (two of 64 have 60 %), and along these many texts are close that have
    # no word in common.
    self._white_DD = whitening(raw_ND[:: -(-len(raw_ND) // FIT_ROWS)] - self._mean_D)
    return self._whiten(raw_ND)

  def embeddings_of(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
    """The embedding of unpadded token ids, whitened like the rows; call `embeddings` first. float32 [T, D]."""
    state = self.state(0)
    parts = []
    for start in range(0, len(sequences), self._batch):
      tokens_BL, mask_BL = _padded(sequences[start : start + self._batch], self._batch, self._pool.length)
      if not start:
        flop = flops.count(self._embed, state.params, state.rest, tokens_BL, mask_BL)
        self._context.add_flop(flop * -(-len(sequences) // self._batch))
      parts.append(np.asarray(self._embed(state.params, state.rest, tokens_BL, mask_BL)))
    return self._whiten(np.concatenate(parts)[: len(sequences)])

  def _whiten(self, x_ND: np.ndarray) -> np.ndarray:
    """Whitens embeddings in place."""
    for start in range(0, len(x_ND), BLOCK):
      x_BD = (x_ND[start : start + BLOCK] - self._mean_D) @ self._white_DD
      norm_B = np.linalg.norm(x_BD, axis=1, keepdims=True)
      x_ND[start : start + BLOCK] = x_BD / np.where(norm_B > 0, norm_B, 1)
    return x_ND

  def tuned(self, sequences: Sequence[np.ndarray], steps: int, rate: float) -> TrainState:
    """The first proxy after `steps` steps on `sequences`, which are joined and cut into rows like the pool.

    Args:
      sequences: token ids.
      steps: of the proxies' optimizer and schedule.
      rate: share of the proxies' learning rate.

    Raises:
      UserError: the sequences have no tokens.
    """
    tokens_NL, train = self._joined(sequences), ConfigDict(self._config.proxies.train.to_dict())
    train.learning_rate *= rate
    if rate not in self._tuners:  # compiled once
      pool, model = self._pool, self._config.proxies.model
      self._tuners[rate] = trainer(model, train, pool.vocab_size, pool.length, self._mesh)
    compiled = self._tuners[rate]
    rng = prng.numpy_stream(0, 'selection', 'tuned')
    old = self.state(0)
    state = compiled.init(prng.stream(0, 'selection', 'tuned'))._replace(params=old.params, rest=old.rest)
    weight_B = np.ones(train.batch_size, np.float32)
    for _ in range(steps):
      tokens_BL = tokens_NL[rng.integers(len(tokens_NL), size=train.batch_size)]
      batch = jax.device_put((tokens_BL, weight_B), compiled.batch_sharding)
      state, _ = compiled.step(state, *batch, jnp.int32(steps))
    self._context.add_flop(compiled.flop_per_step * steps)
    return state

  def log_likelihood_of_texts(self, state: TrainState, sequences: Sequence[np.ndarray]) -> float:
    """Mean log-probability of token ids, joined and cut into rows like the pool, by one model; nats per token."""
    tokens_NL = self._joined(sequences)
    total = 0.0
    for start in range(0, len(tokens_NL), self._batch):
      rows_BL = tokens_NL[start : start + self._batch]
      tokens_BL = np.resize(rows_BL, (self._batch, self._pool.length))
      if not start:
        weights_BL = np.ones(tokens_BL.shape, np.float32)
        flop = flops.count(self._likelihood, state.params, state.rest, tokens_BL, weights_BL)
        self._context.add_flop(flop * -(-len(tokens_NL) // self._batch))
      total += float(
        np.asarray(self._likelihood(state.params, state.rest, tokens_BL, weights_BL))[: len(rows_BL)].sum()
      )
    return total / len(tokens_NL)

  def _joined(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
    stream = np.concatenate([np.zeros(0, np.int32), *sequences])
    if not len(stream):
      raise UserError('the target has no tokens to train on; give it examples, or leave color_filter out')
    length = self._pool.length
    rows = -(-len(stream) // length)
    return np.resize(stream, rows * length).reshape(rows, length)  # padded with its beginning

  def metagradient_N(self, examples: Examples) -> np.ndarray:
    """Derivative of the examples' mean output with respect to each row's weight, through a training; float32 [N].

    The training is that of a proxy, but on every row of the pool, `proxies.epochs` times.

    Raises:
      UserError: a derivative is not finite.
    """
    pool, proxies = self._pool, self._config.proxies
    train = ConfigDict(proxies.train.to_dict())
    train.adam_eps_root = max(train.adam_eps_root, LEAST_EPS_ROOT)
    rows = np.arange(pool.num_rows)
    weights_NL = pool.weights(rows) if pool.counts_some else None
    training = ScannedTraining(
      proxies.model, train, pool.vocab_size, pool.tokens(rows), proxies.epochs, self._config.seed, weights_NL
    )
    function = load_callable(self._config.features.output_fn)
    outputs = TargetOutputs(training, function, examples.tokens_TL, examples.weights_TL)
    metagradient = Metagradient(training, outputs, np.ones((1, len(examples)), bool))
    self._context.add_flop(metagradient.flop(0))
    return metagradient(0, np.ones(pool.num_rows))[1][0]

  def adam_cosines(self, by_task: Sequence[Examples], dimension: int) -> np.ndarray:
    """Cosine of the step that Adam would take on each row to the gradient of a task's examples; float32 [tasks, N].

    The mean over a task's examples and over proxies; see `selection.less`.

    Args:
      by_task: target examples of each task.
      dimension: of the random projection.

    Raises:
      UserError: the proxies were not trained by Adam.
    """
    train, count = self._config.proxies.train, self._config.proxies.count
    adam = optax.scale_by_adam(train.adam_b1, train.adam_b2, train.adam_eps, train.adam_eps_root)
    one = self._batch, self._pool.length

    def loss(params: nnx.State, rest: nnx.State, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
      return -log_likelihood(self._trainer.logits(params, rest, tokens_L[None])[0], tokens_L, weights_L)

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, None, 0, 0))

    def unit(moments: Any, state: Any, keys: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
      """Projected gradients of unit length [B, J]; with `moments`, of Adam's steps."""
      size = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
      rows = max((r for r in range(1, one[0] + 1) if one[0] % r == 0 and r * size <= _GRADIENTS), default=1)

      def part(tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
        grads = gradients(*state, tokens_BL, weights_BL)
        if moments is not None:
          grads = jax.vmap(lambda grad: adam.update(grad, moments)[0])(grads)
        phi_BJ = rademacher.project(grads, keys, dimension)
        norm_B1 = jnp.linalg.norm(phi_BJ, axis=1, keepdims=True)
        return phi_BJ / jnp.where(norm_B1 > 0, norm_B1, 1)

      return in_microbatches(part, rows, tokens_BL, weights_BL)

    of_targets = jax.jit(functools.partial(unit, None))
    of_rows = jax.jit(lambda moments, state, keys, u_JK, *row: unit(moments, state, keys, *row) @ u_JK)
    total_KN = np.zeros((len(by_task), self._pool.num_rows))
    for proxy in range(count):
      state = self.state(proxy)
      moments, weights = _adam_state(state.opt_state), (state.params, state.rest)
      keys = rademacher.keys(state.params, self._config.seed, proxy)
      u_JK = jnp.stack([self._mean_unit(of_targets, (weights, keys), examples) for examples in by_task], axis=1)
      score = functools.partial(of_rows, moments, weights, keys, u_JK)
      total_KN += self._over_pool(score, 'LESS').T
    return (total_KN / count).astype(np.float32)

  def _mean_unit(self, of_targets: Callable[..., jax.Array], given: tuple[Any, ...], examples: Examples) -> jax.Array:
    """Mean over examples of `of_targets(*given, tokens_BL, weights_BL)`, in batches of one size: float32 [J]."""
    parts, count = [], len(examples.tokens_TL)
    for start in range(0, count, self._batch):
      rows = [x[start : start + self._batch] for x in (examples.tokens_TL, examples.weights_TL)]
      batch = [np.pad(x, ((0, self._batch - len(x)), (0, 0))) for x in rows]
      if not start:
        self._context.add_flop(flops.count(of_targets, *given, *batch) * -(-count // self._batch))
      parts.append(of_targets(*given, *batch)[: len(rows[0])])
    return jnp.concatenate(parts).mean(axis=0)

  def _over_pool(
    self,
    apply: Callable[[np.ndarray, np.ndarray], jax.Array],
    name: str,
    weights: Callable[[np.ndarray], np.ndarray] | None = None,
  ) -> np.ndarray:
    """`apply(tokens_BL, weights_BL)` of all rows, where `weights(rows_B)` is `pool.weights` unless given."""
    result, done, pool = np.empty(0, np.float32), 0, self._pool
    weights = weights or pool.weights
    with self._context.log.bar(total=pool.num_rows, desc=name, unit='row') as bar:
      for tokens_BL, rows_B, valid_B in ahead(row_range_batches(pool, 0, pool.num_rows, self._batch)):
        batch = tokens_BL, weights(rows_B)
        part = np.asarray(apply(*batch))[valid_B]
        if not done:
          self._context.add_flop(flops.count(apply, *batch) * -(-pool.num_rows // self._batch))
          result = storage.empty((pool.num_rows, *part.shape[1:]), part.dtype)
        result[done : done + len(part)] = part
        done += len(part)
        bar.update(len(part))
    return result

  def _model(self, params: nnx.State, rest: nnx.State) -> nnx.Module:
    return nnx.merge(self._trainer.graphdef, params, rest)

  def _mean_log_probability(
    self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array
  ) -> jax.Array:
    logits_BLV = self._model(params, rest)(tokens_BL)
    return counted_mean(jax.vmap(token_log_probability)(logits_BLV, tokens_BL), weights_BL)

  def _mean_hidden(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    model = self._model(params, rest)
    if hasattr(model, 'hidden'):
      x_BLD = model.hidden(tokens_BL).astype(jnp.float32)
    else:
      logits_BLV = model(tokens_BL).astype(jnp.float32)
      size = logits_BLV.shape[-1]
      signs_VD = jax.random.rademacher(prng.stream(0, 'embedding'), (size, min(size, _WIDTH)), jnp.float32)
      x_BLD = jnp.einsum('blv,vd->bld', jax.nn.log_softmax(logits_BLV), signs_VD)
    total_BD = jnp.einsum('bld,bl->bd', x_BLD, mask_BL)
    return total_BD / jnp.maximum(mask_BL.sum(axis=1, keepdims=True), 1.0)


def _adam_state(opt_state: Any) -> optax.ScaleByAdamState:
  state = adam_state(opt_state)
  if state is None:
    raise UserError(
      'less needs the moments of Adam, and the proxies took no step of it; set --config.proxies.train.optimizer=adamw '
      'and epochs above 0, or remove less from --config.selection.methods'
    )
  return state


def whitening(x_ND: np.ndarray) -> np.ndarray:
  """The symmetric matrix that gives every direction of centred rows the same variance: (Σ + εI)^(−1/2), float32.

  ε is a thousandth of the mean variance, since directions with hardly any variance are noise.
  """
  from threadpoolctl import threadpool_limits

  with threadpool_limits(1):  # more threads would add floating-point numbers in another order
    wide_ND = x_ND.astype(np.float64)
    variance_D, turn_DD = np.linalg.eigh(wide_ND.T @ wide_ND / max(1, len(wide_ND)))
    variance_D = np.maximum(variance_D, 0) + 1e-3 * variance_D.mean()
    if not variance_D.max() > 0:  # a single row, or all rows are equal
      return np.eye(x_ND.shape[1], dtype=np.float32)
    return ((turn_DD / np.sqrt(variance_D)) @ turn_DD.T).astype(np.float32)


def _padded(sequences: Sequence[np.ndarray], batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens_BL int32, mask_BL float32): 1 for tokens, by length, since the padding id can also be a token."""
  tokens_BL, mask_BL = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.float32)
  for row, tokens_L in enumerate(sequences):
    tokens_BL[row, : len(tokens_L)] = tokens_L
    mask_BL[row, : len(tokens_L)] = 1
  return tokens_BL, mask_BL

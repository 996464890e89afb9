"""A whole training as one pure function of the weight of each row, and its derivative: the oracle.

A subset of the pool is a 0/1 weight per row, in one fixed order of batches, so that two trainings differ in their rows
only. A training is a scan over steps: it can be mapped over many models, and differentiated with respect to the
weights.

The derivative dF_k/dw at w = 1, where F_k is the mean output of a task's examples at the end of training, is what a
linear datamodel becomes in the limit of small changes, where it is exact (MAGIC, arXiv 2504.16430; REPLAY, arXiv
2503.13751). It holds for one initialisation and order, costs a few trainings per task, and needs Adam's ε inside the
square root (`adam_eps_root`), as the derivative of √v is infinite where a second moment is zero.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.core import flops, prng
from dsdm_jax.core.mesh import one_device
from dsdm_jax.data.order.batches import token_weights
from dsdm_jax.errors import UserError
from dsdm_jax.lm.outputs import OutputFn, log_likelihood
from dsdm_jax.training.step import Trainer, TrainState, trainer

LEAST_EPS_ROOT = 1e-8  # derivatives through Adam are useless with a smaller `adam_eps_root`


class ScannedTraining:
  """Trainings of one model on one set of rows with one learning algorithm, on the first device of this process.

  Args:
    model, train: configs of the model and of its training.
    vocab_size: of the tokens.
    tokens_NL: all rows.
    epochs: passes over the rows.
    seed: of the random streams.
    weights_NL: 1 for tokens that the loss counts, else 0; None counts all.

  Raises:
    UserError: a training would have no step.
  """

  def __init__(
    self,
    model: ConfigDict,
    train: ConfigDict,
    vocab_size: int,
    tokens_NL: np.ndarray,
    epochs: float,
    seed: int,
    weights_NL: np.ndarray | None = None,
  ):
    mesh = one_device()
    self.trainer: Trainer = trainer(model, train, vocab_size, tokens_NL.shape[1], mesh)
    self.rows = len(tokens_NL)
    self.batch_size = train.batch_size
    self.steps = round(epochs * self.rows) // train.batch_size
    if self.steps < 1:
      raise UserError(
        f'{epochs:g} epochs of {self.rows} rows are less than one batch of {train.batch_size}; raise the epochs or the '
        'rows of this training, or lower its batch_size'
      )
    self._tokens_NL, self._seed = jnp.asarray(tokens_NL, jnp.int32), seed
    self._share_NL = None if weights_NL is None else jnp.asarray(token_weights(weights_NL, np.ones(self.rows)))
    self._advance_models = jax.jit(jax.vmap(self.advance, in_axes=(0, 0, None)))

    def broadcast(state: TrainState, models: int) -> TrainState:
      return jax.tree.map(lambda x: jnp.broadcast_to(x, (models, *x.shape)), state)

    self._broadcast = jax.jit(broadcast, static_argnums=1)

  def order(self, run: int | str) -> np.ndarray:
    """Rows of each batch of one run, int32 [steps, B]; each epoch is a permutation of all rows."""
    generator = prng.numpy_stream(self._seed, 'validation', 'order', run)
    epochs = math.ceil(self.steps * self.batch_size / self.rows)
    flat = np.concatenate([generator.permutation(self.rows) for _ in range(epochs)])
    return flat[: self.steps * self.batch_size].reshape(self.steps, self.batch_size).astype(np.int32)

  def start(self, run: int | str) -> TrainState:
    """The state of one run before training."""
    return self.trainer.init(prng.stream(self._seed, 'init', 'validation', run))

  def train(self, run: int | str, weight_MN: np.ndarray, stops: tuple[float, ...] = (1.0,)) -> list[TrainState]:
    """Trains M models of one run, which share initialisation and order and differ in the weights of rows.

    Args:
      run: name of the random streams.
      weight_MN: weight of each row, for each model.
      stops: increasing shares of the training; the state at each is returned, with a leading axis M.
    """
    order_SB, weights_MN = self.order(run), jnp.asarray(weight_MN, jnp.float32)
    state, states, start = self._broadcast(self.start(run), len(weight_MN)), [], 0
    for stop in stops:
      end = round(stop * self.steps)
      state = self._advance_models(state, weights_MN, jnp.asarray(order_SB[start:end]))
      states.append(state)
      start = end
    return states

  def advance(self, state: TrainState, weight_N: jax.Array, order_SB: jax.Array) -> TrainState:
    """Takes the steps of `order_SB`; pure, and differentiable in the weights.

    The backward pass stores the state every √S steps and recomputes the rest: memory of 2√S states and the activations
    of one step, for about two more forward passes.
    """
    steps = jnp.int32(self.steps)

    def body(state: TrainState, rows_B: jax.Array) -> tuple[TrainState, None]:
      weight = weight_N[rows_B]
      if self._share_NL is not None:
        weight = weight[:, None] * self._share_NL[rows_B]
      return self.trainer.apply(state, self._tokens_NL[rows_B], weight, steps)[0], None

    def segment(state: TrainState, rows_KB: jax.Array) -> tuple[TrainState, None]:
      return jax.lax.scan(jax.checkpoint(body), state, rows_KB)

    length = max(math.isqrt(len(order_SB)), 1)
    whole = len(order_SB) // length * length
    segments = order_SB[:whole].reshape(-1, length, self.batch_size)
    state, _ = jax.lax.scan(jax.checkpoint(segment), state, segments)
    return segment(state, order_SB[whole:])[0]


class TargetOutputs:
  """The output function and the log-likelihood of each target example under a trained model.

  Args:
    training: of the models.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar.
    tokens_TL, weights_TL: the target examples.
  """

  def __init__(self, training: ScannedTraining, output_fn: OutputFn, tokens_TL: np.ndarray, weights_TL: np.ndarray):
    self._trainer, self._output_fn = training.trainer, output_fn
    self._tokens_TL, self._weights_TL = jnp.asarray(tokens_TL, jnp.int32), jnp.asarray(weights_TL, jnp.float32)
    self._apply_models = jax.jit(jax.vmap(self.apply))

  def apply(self, state: TrainState) -> tuple[jax.Array, jax.Array]:
    """(output_T, log_likelihood_T) of one model, float32; pure."""
    logits_TLV = self._trainer.logits(state.params, state.rest, self._tokens_TL)
    functions = (self._output_fn, log_likelihood)
    outputs = [jax.vmap(f)(logits_TLV, self._tokens_TL, self._weights_TL) for f in functions]
    return outputs[0], outputs[1]

  def __call__(self, states: TrainState) -> tuple[np.ndarray, np.ndarray]:
    """(output_MT, log_likelihood_MT) of M models."""
    output_MT, log_likelihood_MT = self._apply_models(states)
    return np.asarray(output_MT), np.asarray(log_likelihood_MT)


class Metagradient:
  """The derivative of the tasks' mean outputs with respect to the weights of rows.

  Args:
    training: to differentiate through.
    outputs: of the trained model.
    member_KT: bool, the examples of each task.

  Attributes:
    apply: (weight_N, state before training, order_SB) → output_K; pure.
  """

  def __init__(self, training: ScannedTraining, outputs: TargetOutputs, member_KT: np.ndarray):
    mean_KT = jnp.asarray(member_KT / member_KT.sum(axis=1, keepdims=True), jnp.float32)

    def final(weight_N: jax.Array, state: TrainState, order_SB: jax.Array) -> jax.Array:
      return mean_KT @ outputs.apply(training.advance(state, weight_N, order_SB))[0]

    def gradient(weight_N: jax.Array, state: TrainState, order_SB: jax.Array) -> tuple[jax.Array, jax.Array]:
      output_K, backward = jax.vjp(lambda w: final(w, state, order_SB), weight_N)
      return output_K, jax.vmap(backward)(jnp.eye(len(output_K)))[0]

    self._training, self.apply = training, final
    self._gradient, self._final = jax.jit(gradient), jax.jit(final)

  def __call__(self, run: int | str, weight_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (output_K, derivative_KN) at the weights `weight_N`, float32.

    Raises:
      UserError: a derivative is not finite.
    """
    output_K, derivative_KN = self._gradient(jnp.asarray(weight_N, jnp.float32), *self._inputs(run))
    if not np.isfinite(derivative_KN).all():
      raise UserError(
        'the derivative of training is not finite; raise proxies.train.adam_eps_root (at least 1e-8), or lower '
        'proxies.train.learning_rate'
      )
    return np.asarray(output_K), np.asarray(derivative_KN)

  def flop(self, run: int | str) -> float:
    """FLOP of one call, with the recomputed forward passes."""
    weight_N = jax.ShapeDtypeStruct((self._training.rows,), jnp.float32)
    return flops.count(self._gradient, weight_N, *self._inputs(run))

  def output(self, run: int | str, weight_N: np.ndarray) -> np.ndarray:
    """output_K alone, float32, for finite differences."""
    return np.asarray(self._final(jnp.asarray(weight_N, jnp.float32), *self._inputs(run)))

  def _inputs(self, run: int | str) -> tuple[TrainState, jax.Array]:
    return self._training.start(run), jnp.asarray(self._training.order(run))

"""A whole training as one function of how much each row counts.

Which rows a datamodel is asked about is a weight per row, 0 or 1, in one fixed order of batches: two trainings then
differ by the rows alone. As a scan over steps it can be mapped over many models at once, and differentiated with
respect to the weights.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.core import prng
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.errors import UserError
from dsdm_jax.lm.outputs import OutputFn, log_likelihood
from dsdm_jax.training.step import Trainer, TrainState, trainer


class ScannedTraining:
  """Trainings of one model on one table of rows, by one learning algorithm, on this process's first device.

  Args:
    model, train: configs of the model and of its training.
    vocab_size: of the tokens.
    tokens_NL: all rows that may be trained on.
    epochs: passes over them.
    seed: root of the streams.

  Raises:
    UserError: that makes no step.
  """

  def __init__(
    self, model: ConfigDict, train: ConfigDict, vocab_size: int, tokens_NL: np.ndarray, epochs: float, seed: int
  ):
    mesh = make_mesh(ConfigDict({'data': 1, 'model': 1}), jax.local_devices()[:1])
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
    self._many = jax.jit(jax.vmap(self.advance, in_axes=(0, 0, None)))
    self._spread = jax.jit(lambda state, many: jax.tree.map(lambda x: jnp.broadcast_to(x, (many, *x.shape)), state),
                           static_argnums=1)  # fmt: skip

  def order(self, run: int | str) -> np.ndarray:
    """Rows of each batch of one run, int32 [steps, B]: each epoch a permutation of all rows."""
    generator = prng.numpy_stream(self._seed, 'validation', 'order', run)
    epochs = math.ceil(self.steps * self.batch_size / self.rows)
    flat = np.concatenate([generator.permutation(self.rows) for _ in range(epochs)])
    return flat[: self.steps * self.batch_size].reshape(self.steps, self.batch_size).astype(np.int32)

  def start(self, run: int | str) -> TrainState:
    """The untrained model of one run."""
    return self.trainer.init(prng.stream(self._seed, 'init', 'validation', run))

  def train(self, run: int | str, weight_MN: np.ndarray, stops: tuple[float, ...] = (1.0,)) -> list[TrainState]:
    """M models of one run, which share initialisation and order and differ by their rows.

    Args:
      weight_MN: how much each row counts, for each model.
      stops: shares of the training, rising; the state at each is returned, with a leading axis M.
    """
    order_SB, counts_MN = self.order(run), jnp.asarray(weight_MN, jnp.float32)
    state, states, begun = self._spread(self.start(run), len(weight_MN)), [], 0
    for stop in stops:
      end = round(stop * self.steps)
      state = self._many(state, counts_MN, jnp.asarray(order_SB[begun:end]))
      states.append(state)
      begun = end
    return states

  def advance(self, state: TrainState, weight_N: jax.Array, order_SB: jax.Array) -> TrainState:
    """The steps of `order_SB`, one after the other; pure, and differentiable in the weights.

    Backwards it keeps the state every √S steps and makes the rest anew: memory of 2√S states and one step's
    activations, for about two more forward passes.
    """
    steps = jnp.int32(self.steps)

    def body(state: TrainState, rows_B: jax.Array) -> tuple[TrainState, None]:
      return self.trainer.apply(state, self._tokens_NL[rows_B], weight_N[rows_B], steps)[0], None

    def segment(state: TrainState, rows_KB: jax.Array) -> tuple[TrainState, None]:
      return jax.lax.scan(jax.checkpoint(body), state, rows_KB)

    length = max(math.isqrt(len(order_SB)), 1)
    whole = len(order_SB) // length * length
    segments = order_SB[:whole].reshape(-1, length, self.batch_size)
    state, _ = jax.lax.scan(jax.checkpoint(segment), state, segments)
    return segment(state, order_SB[whole:])[0]


class TargetOutputs:
  """What is measured of a trained model: the output function and the log-likelihood of each target example.

  Args:
    training: of the models.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar.
    tokens_TL, weights_TL: the examples.
  """

  def __init__(self, training: ScannedTraining, output_fn: OutputFn, tokens_TL: np.ndarray, weights_TL: np.ndarray):
    self._trainer, self._output_fn = training.trainer, output_fn
    self._tokens_TL, self._weights_TL = jnp.asarray(tokens_TL, jnp.int32), jnp.asarray(weights_TL, jnp.float32)
    self._many = jax.jit(jax.vmap(self.apply))

  def apply(self, state: TrainState) -> tuple[jax.Array, jax.Array]:
    """(output_T, log_likelihood_T) of one model, float32; pure."""
    logits_TLV = self._trainer.logits(state.params, state.rest, self._tokens_TL)
    functions = (self._output_fn, log_likelihood)
    outputs = [jax.vmap(f)(logits_TLV, self._tokens_TL, self._weights_TL) for f in functions]
    return outputs[0], outputs[1]

  def __call__(self, states: TrainState) -> tuple[np.ndarray, np.ndarray]:
    """(output_MT, log_likelihood_MT) of M models."""
    output_MT, log_likelihood_MT = self._many(states)
    return np.asarray(output_MT), np.asarray(log_likelihood_MT)

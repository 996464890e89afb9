"""What the proxies themselves say: output functions of target examples, and probabilities of the pool's tokens."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsdm_jax.attribution.sources import ahead
from dsdm_jax.core import flops
from dsdm_jax.core.mesh import assemble, fetch, place, share
from dsdm_jax.data.order.batches import row_range_batches
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.lm.outputs import token_log_probability
from dsdm_jax.training.step import Trainer, TrainState

OutputFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class ProxyOutputs:
  """Compiled forward passes of one model shape.

  Args:
    trainer: of the proxies' model.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar.
    batch_size: examples per step over all devices.
  """

  def __init__(self, trainer: Trainer, output_fn: OutputFn, batch_size: int):
    self._trainer, self._output_fn, self._batch_size = trainer, output_fn, batch_size
    batch = trainer.batch_sharding
    states = trainer.shardings.params, trainer.shardings.rest
    self._output = jax.jit(self._apply_output, in_shardings=(*states, batch, batch), out_shardings=batch)
    self._probability = jax.jit(self._apply_probability, in_shardings=(*states, batch), out_shardings=batch)
    self.flop = 0.0

  def _logits(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array) -> jax.Array:
    return nnx.merge(self._trainer.graphdef, params, rest)(tokens_BL)

  def _apply_output(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return jax.vmap(self._output_fn)(self._logits(params, rest, tokens_BL), tokens_BL, weights_BL)

  def _apply_probability(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array) -> jax.Array:
    logits_BLV = self._logits(params, rest, tokens_BL)
    return jnp.mean(jnp.exp(jax.vmap(token_log_probability)(logits_BLV, tokens_BL)), axis=1)

  def of_examples(self, state: TrainState, tokens_TL: np.ndarray, weights_TL: np.ndarray) -> np.ndarray:
    """The output function of each example, float32 [T]."""
    parts = []
    for tokens_BL, weights_BL in self._batches(tokens_TL, weights_TL):
      parts.append(fetch(self._output(state.params, state.rest, tokens_BL, weights_BL)))
    self.flop += len(parts) * flops.count(self._apply_output, state.params, state.rest, tokens_BL, weights_BL)
    return np.concatenate(parts)[: len(tokens_TL)]

  def mean_probability(self, state: TrainState, pool: Pool, progress: Callable[[int], object]) -> np.ndarray:
    """Mean over the predicted tokens of each row of the probability of the right one, float32 [N]."""
    parts = []
    sharding, size = self._trainer.batch_sharding, self._batch_size
    for tokens, _, valid_B in ahead(row_range_batches(pool, 0, pool.num_rows, size, share(sharding, size))):
      tokens_BL = assemble(tokens, sharding, size)
      parts.append(fetch(self._probability(state.params, state.rest, tokens_BL))[valid_B])
      progress(len(parts[-1]))
    self.flop += len(parts) * flops.count(self._apply_probability, state.params, state.rest, tokens_BL)
    return np.concatenate(parts)

  def _batches(self, *arrays: np.ndarray) -> Iterator[tuple[jax.Array, ...]]:
    size = self._batch_size
    for start in range(0, len(arrays[0]), size):
      parts = [x[start : start + size] for x in arrays]
      padded = tuple(np.pad(x, ((0, size - len(x)), (0, 0))) for x in parts)
      yield place(padded, self._trainer.batch_sharding)

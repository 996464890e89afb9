"""What a model gives to the right answers: log-probability and exact match of each item."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsdm_jax.core.mesh import fetch, place
from dsdm_jax.lm.outputs import log_likelihood
from dsdm_jax.training.step import Trainer, TrainState


class Scorer:
  """Compiled scoring of batches for one model shape.

  `score(params, tokens_IL, weights_IL)` → (logprob_I, accuracy_I), both float32: the mean over the answer's tokens of
  log p(token | everything before it) in nats, and 1 where the argmax is right at each of them (teacher-forced), else 0.
  """

  def __init__(self, trainer: Trainer, batch_size: int):
    self._trainer, self._batch_size = trainer, batch_size
    batch = trainer.batch_sharding
    self._step = jax.jit(
      self.apply, in_shardings=(trainer.shardings.params, trainer.shardings.rest, batch, batch), out_shardings=batch
    )

  def apply(
    self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """(logprob_B, accuracy_B); the pure function behind `score`."""
    logits_BLV = nnx.merge(self._trainer.graphdef, params, rest)(tokens_BL)
    logprob_B = jax.vmap(log_likelihood)(logits_BLV, tokens_BL, weights_BL)
    hit_BL = jnp.argmax(logits_BLV[:, :-1], axis=-1) == tokens_BL[:, 1:]
    right_B = jnp.all(hit_BL | (weights_BL[:, 1:] == 0), axis=1)
    return logprob_B, right_B.astype(jnp.float32)

  def score(self, state: TrainState, tokens_IL: np.ndarray, weights_IL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [
      fetch(self._step(state.params, state.rest, tokens_BL, weights_BL))
      for tokens_BL, weights_BL in self._batches(tokens_IL, weights_IL)
    ]
    logprob_I, accuracy_I = (np.concatenate(column)[: len(tokens_IL)] for column in zip(*parts, strict=True))
    return logprob_I, accuracy_I

  def _batches(self, tokens_IL: np.ndarray, weights_IL: np.ndarray) -> Iterator[tuple[jax.Array, jax.Array]]:
    for start in range(0, len(tokens_IL), self._batch_size):
      stop = start + self._batch_size
      missing = max(0, stop - len(tokens_IL))
      pair = tuple(np.pad(x[start:stop], ((0, missing), (0, 0))) for x in (tokens_IL, weights_IL))
      yield place(pair, self._trainer.batch_sharding)

"""Loss on rows that a run does not train on, every so many steps."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.core import prng
from dsdm_jax.core.mesh import place, replicated
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.lm.outputs import token_log_probability
from dsdm_jax.training.step import Trainer, TrainState


class HeldOut:
  """Calling it with a state gives {'held_out_loss': mean nats per token}, on the device and not waited for.

  Args:
    tokens_NL: int32, rows; a number that the batch divides.
    batch: rows at a time, a multiple of the devices that share one.
  """

  def __init__(self, trainer: Trainer, tokens_NL: np.ndarray, batch: int):
    self._batches = [
      place(tokens_NL[start : start + batch], trainer.batch_sharding) for start in range(0, len(tokens_NL), batch)
    ]

    def loss(params: nnx.State, rest: nnx.State, tokens_BL: jax.Array) -> jax.Array:
      logits_BLV = trainer.logits(params, rest, tokens_BL)
      return -jnp.mean(jax.vmap(token_log_probability)(logits_BLV, tokens_BL))

    shardings = (trainer.shardings.params, trainer.shardings.rest, trainer.batch_sharding)
    self._loss = jax.jit(loss, in_shardings=shardings, out_shardings=replicated(trainer.mesh))

  def __call__(self, state: TrainState) -> dict[str, jax.Array]:
    losses = [self._loss(state.params, state.rest, tokens_BL) for tokens_BL in self._batches]
    return {'held_out_loss': sum(losses[1:], losses[0]) / len(losses)}


def held_out(trainer: Trainer, pool: Pool, trained: np.ndarray, config: ConfigDict, seed: int) -> HeldOut | None:
  """On rows drawn from those not among `trained`, `evaluate_rows` at most; None where the config asks for none.

  Raises:
    UserError: there is not a batch of such rows.
  """
  if not config.evaluate_every_steps:
    return None
  rows = np.setdiff1d(np.arange(pool.num_rows), trained)
  count = min(config.evaluate_rows, len(rows)) // config.batch_size * config.batch_size
  if not count:
    raise UserError(
      f'evaluate_every_steps = {config.evaluate_every_steps} needs {config.batch_size} rows (batch_size) beside those '
      f'trained on, within evaluate_rows = {config.evaluate_rows}, and there are {len(rows)}; set it to 0'
    )
  chosen = prng.numpy_stream(seed, 'held_out').choice(rows, count, replace=False)
  return HeldOut(trainer, pool.tokens(np.sort(chosen).astype(np.int64)), config.batch_size)

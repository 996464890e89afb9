"""What a run logs beside its training loss: its speed, and the loss on held-out rows."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.core import flops, prng
from dsdm_jax.core.mesh import place, replicated
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.lm.outputs import token_log_probability
from dsdm_jax.training.step import Trainer, TrainState

WARM_STEPS = 2  # the first steps compile and fill queues, and are not timed
_EARLY_STEPS = 20  # number of timed steps after which a run that waits for its input is reported
_WAITING_SHARE = 0.1  # of the time


class Meter:
  """Measures the speed of one run, from the third step on.

  A step counts as starved if the device has finished all work when the batch arrives; the wait for that batch is then
  lost time.

  Args:
    context: receives events, scalars and profiles.
    name: of the run.
    profile_steps: number of steps to profile for TensorBoard, from the third on; 0 for none.
  """

  def __init__(self, context: Context, name: str, profile_steps: int):
    self._context, self._name, self._profile = context, name, profile_steps if context.first else 0
    self.flop_per_step, self.tokens_per_step = 0.0, 0
    self._steps, self._began, self._starved = 0, time.monotonic(), 0.0
    self._profiling = False

  def read(self, batches: Iterator[dict[str, np.ndarray]], last: dict[str, Any] | None) -> dict[str, np.ndarray]:
    """Returns the next batch; `last` are the metrics of the previous step, which show whether the device is idle."""
    began = time.monotonic()
    batch = next(batches)
    if last is not None and self._steps >= WARM_STEPS and all(x.is_ready() for x in last.values()):
      self._starved += time.monotonic() - began
    return batch

  def stepped(self, metrics: dict[str, jax.Array]) -> None:
    """Counts a step that was dispatched."""
    self._steps += 1
    if self._steps == 1:
      jax.block_until_ready(metrics)
      self._context.log.event('first_step', run=self._name)
    if self._steps == WARM_STEPS:
      jax.block_until_ready(metrics)
      self._began = time.monotonic()
      if self._profile:
        jax.profiler.start_trace(str(self._context.log.curves(self._name)))
        self._profiling = True
    if self._profiling and self._steps == WARM_STEPS + self._profile:
      jax.block_until_ready(metrics)
      self.stop_profile()
    if self._steps == WARM_STEPS + _EARLY_STEPS:
      share = self._starved / max(time.monotonic() - self._began, 1e-9)
      if share > _WAITING_SHARE:
        self._context.log.event('input_bound', run=self._name, input_share=round(share, 4))
        self._context.log.warn(
          f'  {self._name} waits for its data {share:.0%} of the time; put the workdir on a faster disk, or use larger '
          'batches or a larger model'
        )

  def stop_profile(self) -> None:
    if self._profiling:
      jax.profiler.stop_trace()
      self._profiling = False
      self._context.log.warn(f'  profile of {self._name}: tensorboard --logdir {self._context.log.curves(self._name)}')

  def speed(self) -> dict[str, Any]:
    """Tokens and FLOP per second, share of time that was starved, and MFU where the devices' peak is known."""
    seconds = time.monotonic() - self._began
    steps = self._steps - WARM_STEPS
    if steps < 1 or seconds <= 0:
      return {}
    speed: dict[str, Any] = {
      'tokens_per_second': round(steps * self.tokens_per_step / seconds, 1),
      'flop_per_second': round(steps * self.flop_per_step / seconds),
      'input_share': round(self._starved / seconds, 4),
    }
    peak = flops.peak(jax.devices())
    if peak:
      speed['mfu'] = round(steps * self.flop_per_step / seconds / peak, 4)
    return speed


class HeldOut:
  """Calling it with a state returns {'held_out_loss': mean nats per token}, on the device and without waiting.

  Args:
    trainer: of the model.
    tokens_NL: int32, rows; N is a multiple of `batch`.
    weights_NL: 1 for tokens that count, else 0; None counts all.
    batch: rows per batch, a multiple of the devices that share one.
  """

  def __init__(self, trainer: Trainer, tokens_NL: np.ndarray, batch: int, weights_NL: np.ndarray | None = None):
    weights_NL = np.ones(tokens_NL.shape, np.float32) if weights_NL is None else weights_NL
    weights_NL = weights_NL / max(weights_NL[:, 1:].sum(), 1)
    parts = (slice(start, start + batch) for start in range(0, len(tokens_NL), batch))
    sharding = trainer.batch_sharding
    self._batches = [place((tokens_NL[part], weights_NL[part].astype(np.float32)), sharding) for part in parts]

    def loss(params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
      logits_BLV = trainer.logits(params, rest, tokens_BL)
      return -jnp.sum(weights_BL[:, 1:] * jax.vmap(token_log_probability)(logits_BLV, tokens_BL))

    shardings = (trainer.shardings.params, trainer.shardings.rest, sharding, sharding)
    self._loss = jax.jit(loss, in_shardings=shardings, out_shardings=replicated(trainer.mesh))

  def __call__(self, state: TrainState) -> dict[str, jax.Array]:
    losses = [self._loss(state.params, state.rest, *batch) for batch in self._batches]
    return {'held_out_loss': sum(losses[1:], losses[0])}


def held_out(trainer: Trainer, pool: Pool, trained: np.ndarray, config: ConfigDict, seed: int) -> HeldOut | None:
  """The loss on at most `evaluate_rows` random rows outside `trained`; None where `evaluate_every_steps` is 0.

  Raises:
    UserError: there are fewer such rows than a batch.
  """
  if not config.evaluate_every_steps:
    return None
  rows = np.setdiff1d(np.arange(pool.num_rows), trained)
  count = min(config.evaluate_rows, len(rows)) // config.batch_size * config.batch_size
  if not count:
    raise UserError(
      f'evaluate_every_steps = {config.evaluate_every_steps} needs {config.batch_size} rows (batch_size) besides those '
      f'trained on, within evaluate_rows = {config.evaluate_rows}, and there are {len(rows)}; set it to 0'
    )
  selected = prng.numpy_stream(seed, 'held_out').choice(rows, count, replace=False)
  rows = np.sort(selected).astype(np.int64)
  return HeldOut(trainer, pool.tokens(rows), config.batch_size, pool.weights(rows))

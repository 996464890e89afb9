"""How fast a training run goes, and what it waits for."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dsdm_jax.core import flops
from dsdm_jax.core.stage import Context

WARM_STEPS = 2  # the first ones compile and fill queues, and are left out
_EARLY_STEPS = 20  # after which it is said that a run waits for its input
_WAITING_SHARE = 0.1  # of the time


class Meter:
  """Speed of one run, from the third step on.

  A step counts as starved when the device had finished everything by the time its batch came; the wait for that batch
  is then time lost.

  Args:
    context: where events, scalars and profiles go.
    name: of the run.
    profile_steps: how many steps to profile, from the third on, for TensorBoard; 0 for none.
  """

  def __init__(self, context: Context, name: str, profile_steps: int):
    self._context, self._name, self._profile = context, name, profile_steps if context.first else 0
    self.flop_per_step, self.tokens_per_step = 0.0, 0
    self._steps, self._began, self._starved = 0, time.monotonic(), 0.0
    self._told = self._profiling = False

  def read(self, batches: Iterator[dict[str, np.ndarray]], last: dict[str, jax.Array] | None) -> dict[str, np.ndarray]:
    """The next batch; `last` are the metrics of the step before it, which show whether the device is idle."""
    began = time.monotonic()
    batch = next(batches)
    if last is not None and self._steps >= WARM_STEPS and _ready(last):
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
      self._warn()

  def stop_profile(self) -> None:
    if self._profiling:
      jax.profiler.stop_trace()
      self._profiling = False
      self._context.log.say(f'  profile of {self._name}: tensorboard --logdir {self._context.log.curves(self._name)}')

  def speed(self) -> dict[str, Any]:
    """Tokens per second, share of the devices' dense bfloat16 peak where that is known, share of time starved."""
    seconds = time.monotonic() - self._began
    steps = self._steps - WARM_STEPS
    if steps < 1 or seconds <= 0:
      return {}
    found: dict[str, Any] = {
      'tokens_per_second': round(steps * self.tokens_per_step / seconds, 1),
      'flop_per_second': round(steps * self.flop_per_step / seconds),
      'input_share': round(self._starved / seconds, 4),
    }
    peak = flops.peak(jax.devices())
    if peak:
      found['mfu'] = round(steps * self.flop_per_step / seconds / peak, 4)
    return found

  def _warn(self) -> None:
    share = self._starved / max(time.monotonic() - self._began, 1e-9)
    if share > _WAITING_SHARE:
      self._context.log.event('input_bound', run=self._name, input_share=round(share, 4))
      self._context.log.say(
        f'  {self._name} waits for its data {share:.0%} of the time: put the workdir on a faster disk, or make the '
        'batches or the model larger'
      )


def _ready(metrics: dict[str, Any]) -> bool:
  """Whether the device has computed them; asks and does not wait."""
  return all(x.is_ready() for x in metrics.values())

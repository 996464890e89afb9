"""The training loop, the same for proxies and for full pretraining."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict

from dsdm_jax.core import atomic, distributed, flops
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.core.errors import UserError
from dsdm_jax.core.mesh import place
from dsdm_jax.core.stage import Context
from dsdm_jax.training.step import Trainer, TrainState

History = list[dict[str, float]]
Batches = Callable[[int], Iterator[dict[str, np.ndarray]]]


def train(
  context: Context,
  trainer: Trainer,
  name: str,
  key: jax.Array,
  batches: Batches,
  steps: int,
  config: ConfigDict,
  bar: tqdm.tqdm,
) -> History:
  """Trains one model, or goes on with it, or finds it finished.

  Leaves `<name>/` (Orbax, the state after the last step) and `<name>.jsonl` (one line per logged step) in the stage's
  folder. The JSONL file is written last: where it stands, the run is finished.

  Args:
    key: of the initialisation.
    batches: first step → iterator of {'tokens_BL', 'weight_B'} from that step on; position is arithmetic.
    steps: in all.
    bar: has `update(steps)`.

  Returns:
    The logged lines: step (1-based), loss in nats per token, gradient norm, learning rate, tokens so far.
  """
  record_file = context.out / f'{name}.jsonl'
  if distributed.decide(record_file.is_file):
    bar.update(steps)
    return read_history(record_file)
  with Checkpoints(context.out / name, keep=config.keep_checkpoints) as checkpoints:
    restored = checkpoints.restore(trainer.abstract)
    state, history = (restored[0], restored[1]['history']) if restored else (trainer.init(key), [])
    start = int(state.step)
    bar.update(start)
    if start:
      context.log.event('resumed', run=name, step=start)
    state = _run(context, trainer, name, state, history, batches(start), steps, config, bar, checkpoints)
    if checkpoints.latest != steps:
      checkpoints.save(steps, state, {'history': history})
  if context.first:
    atomic.write_text(record_file, ''.join(json.dumps(line) + '\n' for line in history))
  context.log.event('trained', run=name, steps=steps, loss=history[-1]['loss'])
  return history


def _run(
  context: Context,
  trainer: Trainer,
  name: str,
  state: TrainState,
  history: History,
  batches: Iterator[dict[str, np.ndarray]],
  steps: int,
  config: ConfigDict,
  bar: tqdm.tqdm,
  checkpoints: Checkpoints,
) -> TrainState:
  start = int(state.step)
  total = jax.numpy.int32(steps)
  pending: tuple[int, dict[str, Any]] | None = None
  flop_per_step, tokens_per_step = 0.0, 0
  began = time.monotonic()
  for step in range(start + 1, steps + 1):
    batch = next(batches)
    tokens_BL, weight_B = place((batch['tokens_BL'], batch['weight_B']), trainer.batch_sharding)
    if not flop_per_step:
      flop_per_step = flops.count(trainer.step, state, tokens_BL, weight_B, total)
      tokens_per_step = tokens_BL.size
    state, metrics = trainer.step(state, tokens_BL, weight_B, total)
    bar.update(1)
    # Read one logged step late: waiting for this one would leave the device idle.
    if step % config.log_every_steps == 0 or step == steps:
      _record(context, name, pending, history, tokens_per_step)
      pending = (step, metrics)
    if config.save_every_steps and step % config.save_every_steps == 0 and step != steps:
      _record(context, name, pending, history, tokens_per_step)
      pending = None
      _check_finite(name, step, metrics)  # a state that diverged must not be what a resume begins with
      checkpoints.save(step, state, {'history': history})
  _record(context, name, pending, history, tokens_per_step)
  done = steps - start
  context.add_flop(flop_per_step * done)
  seconds = time.monotonic() - began
  if done:
    context.log.event('speed', run=name, tokens_per_second=round(done * tokens_per_step / seconds))
  return state


def _record(
  context: Context, name: str, pending: tuple[int, dict[str, Any]] | None, history: History, tokens_per_step: int
) -> None:
  if pending is None:
    return
  step, metrics = pending
  _check_finite(name, step, metrics)
  line: dict[str, float] = {'step': step, 'tokens': step * tokens_per_step}
  for metric, value in metrics.items():
    line[metric] = float(value)
  history.append(line)
  context.log.scalars(step, {k: v for k, v in line.items() if k != 'step'}, run=name)


def _check_finite(name: str, step: int, metrics: Mapping[str, jax.Array]) -> None:
  for metric, value in metrics.items():
    if not math.isfinite(float(value)):
      raise UserError(
        f'{metric} of {name} is {float(value)} at step {step}: training diverged; lower '
        'learning_rate or raise warmup_steps of its train config, then start again'
      )


def read_history(file: Path) -> History:
  return [json.loads(line) for line in file.read_text().splitlines()]


def load_state(directory: Path, trainer: Trainer) -> TrainState:
  """The newest checkpoint in `directory`, on the trainer's mesh.

  Raises:
    UserError: there is none, or it belongs to another model.
  """
  with Checkpoints(directory) as checkpoints:
    restored = checkpoints.restore(trainer.abstract)
  if restored is None:
    raise UserError(f'{directory} holds no checkpoint; delete the stage folder above it and start again')
  return restored[0]

"""The training loop, the same for proxies and for full pretraining."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict

from dsdm_jax.core import processes, storage
from dsdm_jax.core.checkpoints import Checkpoints, Keep
from dsdm_jax.core.mesh import assemble
from dsdm_jax.core.stage import Context
from dsdm_jax.errors import Stopped, UserError
from dsdm_jax.training.meter import Meter
from dsdm_jax.training.step import TrainState

History = list[dict[str, Any]]
Batches = Callable[[int], Iterator[dict[str, np.ndarray]]]
Evaluate = Callable[[TrainState], dict[str, jax.Array]]


def train(
  context: Context,
  trainer: Any,
  name: str,
  key: Any,
  batches: Batches,
  steps: int,
  config: ConfigDict,
  bar: tqdm.tqdm,
  evaluate: Evaluate | None = None,
  names: Sequence[str] = (),
  kept: tuple[int, ...] = (),
) -> History:
  """Trains one model, or goes on with it, or finds it finished.

  Leaves `<name>/` (Orbax, the state after the last step) and `<name>.jsonl` (one line per logged step) in the stage's
  folder. The JSONL file is written last: where it stands, the run is finished.

  Args:
    trainer: a `Trainer`, or `together.Together`.
    key: of the initialisation; of `Together` one for each model.
    batches: first step → iterator of {'tokens_BL', 'weight_B'} from that step on, of which each process yields its
      share (`core.mesh.share`); position is arithmetic.
    steps: in all.
    bar: has `update(steps)`.
    names: of the models, where the trainer trains several side by side (`together`): metrics are lists of theirs.
    evaluate: state → further metrics, scalars on the device; called every `evaluate_every_steps`.
    kept: steps whose state stays in `<name>/`, beside the last.

  Returns:
    The logged lines: step (1-based), loss in nats per token, gradient norm, learning rate, tokens so far, and what
    `evaluate` gave at that step.

  Raises:
    Stopped: SIGTERM came; the state is saved.
    UserError: a metric is not finite, or the checkpoint is another model's.
  """
  record_file = context.out / f'{name}.jsonl'
  if processes.decide(record_file.is_file):
    bar.update(steps * trainer.models)
    return read_history(record_file)
  keep = Keep(config.keep_checkpoints, config.keep_every_steps, config.keep_every_hours, kept)
  with processes.sigterm_watched() as asked_to_stop:
    with Checkpoints(context.out / name, keep) as checkpoints:
      restored = checkpoints.restore(trainer.abstract)
      state, history = (restored[0], restored[1]['history']) if restored else (trainer.init(key), [])
      start = _step_of(state)
      bar.update(start * trainer.models)
      if start:
        context.log.event('resumed', run=name, step=start)
      if restored and checkpoints.latest != start:
        context.log.say(f'the checkpoint of step {checkpoints.latest} of {name} is torn: it goes on from step {start}')
        checkpoints.drop_after(start)
      run = _Run(context, trainer, name, history, steps, config, bar, checkpoints, evaluate, names or [name], kept)
      try:
        state = run.go(state, batches(start), asked_to_stop)
      finally:
        run.meter.stop_profile()
      if checkpoints.latest != steps:
        checkpoints.save(steps, state, {'history': history})
    if context.first:
      storage.write_text(record_file, ''.join(json.dumps(line) + '\n' for line in history))
    context.log.event('trained', run=name, steps=steps, loss=history[-1]['loss'] if history else None)
    # Asked in the last step or while it was saved: the run is finished, and what comes after it must not begin.
    stop = any(processes.gather(asked_to_stop()))
  if stop:
    raise _stopped(name, steps, steps)
  return history


class _Run:
  """One run from its first or a later step to its last; see `train` for the arguments."""

  def __init__(
    self, context: Context, trainer: Any, name: str, history: History, steps: int, config: ConfigDict,
    bar: tqdm.tqdm, checkpoints: Checkpoints, evaluate: Evaluate | None, names: Sequence[str], kept: tuple[int, ...],
  ):  # fmt: skip
    self.names, self.kept = names, kept
    self.context, self.trainer, self.name, self.history, self.steps = context, trainer, name, history, steps
    self.config, self.bar, self.checkpoints, self.evaluate = config, bar, checkpoints, evaluate
    self.meter = Meter(context, name, config.profile_steps)
    self.pending: tuple[int, dict[str, Any]] | None = None
    self.saved = time.monotonic()

  def go(
    self, state: TrainState, batches: Iterator[dict[str, np.ndarray]], asked_to_stop: Callable[[], bool]
  ) -> TrainState:
    start, total = _step_of(state), jax.numpy.int32(self.steps)
    metrics: dict[str, jax.Array] | None = None
    step = start
    try:
      for step in range(start + 1, self.steps + 1):
        batch = self.meter.read(batches, metrics)
        tokens_BL, weight_B = self._placed(batch['tokens_BL'], batch['weight_B'])
        if not self.meter.flop_per_step:
          self.meter.flop_per_step = self.trainer.flop_per_step
          self.meter.tokens_per_step = tokens_BL.size
        state, metrics = self.trainer.step(state, tokens_BL, weight_B, total)
        self.meter.stepped(metrics)
        self.bar.update(self.trainer.models)
        self._after(step, state, metrics, asked_to_stop)
    finally:
      self.context.add_flop(self.meter.flop_per_step * (step - start))
    self._record()
    self.context.log.event('speed', run=self.name, **self.meter.speed())
    return state

  def _placed(self, *local: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return assemble(local, self.trainer.batch_sharding, self.config.batch_size)

  def _after(
    self, step: int, state: TrainState, metrics: dict[str, jax.Array], asked_to_stop: Callable[[], bool]
  ) -> None:
    """What follows a step: evaluation, the record, a checkpoint where one is due, the end where it was asked for."""
    config, seen = self.config, dict(metrics)
    if self.evaluate and config.evaluate_every_steps and step % config.evaluate_every_steps == 0:
      seen |= self.evaluate(state)
    logged = step % config.log_every_steps == 0 or step == self.steps
    if logged:
      # Read one logged step late: waiting for this one would leave the device idle.
      self._record()
      self.pending = (step, seen)
    if step == self.steps:
      return
    save = step in self.kept or (bool(config.save_every_steps) and step % config.save_every_steps == 0)
    stop = False
    # Several processes must go the same way, and agree on it only now and then: it takes a message to each.
    if processes.count() == 1 or logged:
      overdue = bool(config.save_every_minutes) and time.monotonic() - self.saved > 60 * config.save_every_minutes
      said = processes.gather([asked_to_stop(), overdue])
      stop, save = any(s for s, _ in said), save or any(o for _, o in said)
    if save or stop:
      self._save(step, state, metrics)
    if stop:
      raise _stopped(self.name, step, self.steps)

  def _save(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
    self._record()
    _check_finite(self.names, step, metrics)  # a state that diverged must not be what a resume begins with
    self.checkpoints.save(step, state, {'history': self.history})
    self.saved = time.monotonic()

  def _record(self) -> None:
    if self.pending is None:
      return
    step, metrics = self.pending
    self.pending = None
    _check_finite(self.names, step, metrics)
    line: dict[str, Any] = {'step': step, 'tokens': step * self.meter.tokens_per_step // self.trainer.models}
    for metric, value in metrics.items():
      line[metric] = np.asarray(value).tolist()
    self.history.append(line)
    shown = {k: float(np.mean(v)) for k, v in line.items() if k != 'step'}
    speed = self.meter.speed()
    shown |= {k: speed[k] for k in ('tokens_per_second', 'mfu') if k in speed}
    self.context.log.scalars(step, shown, run=self.name)


def _stopped(name: str, step: int, steps: int) -> Stopped:
  return Stopped(
    f'stopped by SIGTERM at step {step} of {steps} of {name}, which is saved; start the same command again to go on '
    'from there'
  )


def _step_of(state: TrainState) -> int:
  return int(np.asarray(state.step).flat[0])


def _check_finite(names: Sequence[str], step: int, metrics: Mapping[str, jax.Array]) -> None:
  for metric, values in metrics.items():
    for name, value in zip(names, np.atleast_1d(np.asarray(values)).tolist(), strict=True):
      if math.isfinite(value):
        continue
      raise UserError(
        f'{metric} of {name} is {value} at step {step}: training diverged; lower '
        'learning_rate or raise warmup_steps of its train config, then start again'
      )


def read_history(file: Path) -> History:
  return [json.loads(line) for line in file.read_text().splitlines()]


def load_state(directory: Path, trainer: Any, step: int | None = None) -> TrainState:
  """The newest checkpoint in `directory`, or that of `step`, on the trainer's mesh.

  Raises:
    UserError: there is none, it is torn, or it belongs to another model.
  """
  with Checkpoints(directory) as checkpoints:
    restored, newest = checkpoints.restore(trainer.abstract, step), checkpoints.latest if step is None else step
  if restored is None and step is not None:
    raise UserError(
      f'{directory} lacks the checkpoint of step {step}; delete the stage folder above it and start again'
    )
  if restored is None:
    raise UserError(f'{directory} holds no checkpoint; delete the stage folder above it and start again')
  state = restored[0]
  if _step_of(state) != newest:  # an earlier one serves to go on from, and is not what the run came to
    raise UserError(
      f'the checkpoint of step {newest} in {directory} is torn, and step {_step_of(state)} before it is not the end of '
      'that run; delete the stage folder above it and start again'
    )
  return state

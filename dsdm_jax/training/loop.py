"""The training loop, shared by proxies, the ladder and pretraining."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.core import processes, stopping, storage
from dsdm_jax.core.checkpoints import Checkpoints, Keep
from dsdm_jax.core.mesh import assemble, greatest
from dsdm_jax.core.progress import Bar
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import Diverged, Stopped, UserError
from dsdm_jax.training.metrics import Meter
from dsdm_jax.training.step import TrainState

History = list[dict[str, Any]]
Batches = Callable[[int], Iterator[dict[str, np.ndarray]]]
Evaluate = Callable[[TrainState], dict[str, jax.Array]]


class Run(NamedTuple):
  """One training run.

  Attributes:
    name: of its folder and of its JSONL file.
    key: seed of the initialisation; a list with one key per model for a `VmappedTrainer`.
    batches: first step → iterator of {'tokens_BL', 'weight_B'} from that step on, and maybe 'weight_BL' instead (see
      `Trainer.step`). Each process yields its share of a batch (`core.mesh.share`). The position is arithmetic, so that
      a run can resume at any step.
    steps: total number of steps.
    evaluate: state → further metrics, scalars on the device; called every `evaluate_every_steps`.
    keep_steps: steps whose checkpoints are kept, besides the last one.
    models: names of the models of a `VmappedTrainer`, whose metrics are lists.
  """

  name: str
  key: Any
  batches: Batches
  steps: int
  evaluate: Evaluate | None = None
  keep_steps: tuple[int, ...] = ()
  models: Sequence[str] = ()


def train(context: Context, trainer: Any, run: Run, config: ConfigDict, bar: Bar) -> History:
  """Trains one run, resumes it, or returns at once where it is finished.

  Writes `<name>/` (Orbax checkpoints, up to the last step) and `<name>.jsonl` (one line per logged step) to the stage's
  folder. The JSONL file is written last: it marks the run as finished.

  Args:
    context: of the stage.
    trainer: a `Trainer` or a `VmappedTrainer`.
    run: what to train.
    config: the `train` section of the run.
    bar: progress bar, updated with the number of steps, times the number of models.

  Returns:
    The logged lines: step (1-based), tokens so far, loss in nats per token, gradient norm, learning rate, and the
    metrics of `run.evaluate`.

  Raises:
    Stopped: a signal arrived; the state is saved.
    Diverged: a metric is not finite.
    UserError: the checkpoint belongs to another model.
  """
  record_file = context.out / f'{run.name}.jsonl'
  context.add_flop(trainer.flop_per_step * run.steps if run.steps else 0.0)
  if processes.decide(lambda: storage.is_marked(record_file)):
    bar.skip(run.steps * trainer.models)
    return storage.read_jsonl(record_file)

  earlier, began = context.cost.parts.get(run.name, 0.0), time.monotonic()

  def save_cost() -> None:
    context.cost.parts[run.name] = earlier + time.monotonic() - began
    context.cost.save()

  def save_checkpoint(step: int, state: TrainState) -> None:
    # The checkpoint has the cost too, as a kill may come before that is saved.
    spent = [context.cost.seconds, earlier + time.monotonic() - began]
    checkpoints.save(step, state, {'history': history, 'spent': spent})
    save_cost()

  keep = Keep(config.keep_checkpoints, config.keep_every_steps, config.keep_every_hours, run.keep_steps)
  with stopping.Hold() as hold:
    with Checkpoints(context.out / run.name, keep) as checkpoints:
      # Initialize, or restore the newest checkpoint that is not damaged.
      restored = checkpoints.restore(trainer.abstract)
      state, history = (restored[0], restored[1]['history']) if restored else (trainer.init(run.key), [])
      if restored and 'spent' in restored[1]:
        context.cost.resume(restored[1]['spent'][0])
        earlier = max(earlier, restored[1]['spent'][1])
      start = _step_of(state)
      bar.skip(start * trainer.models)
      if start:
        context.log.event('resumed', run=run.name, step=start)
      if restored and checkpoints.latest != start:
        context.log.warn(
          f'the checkpoint of step {checkpoints.latest} of {run.name} is torn; resuming from step {start}'
        )
        checkpoints.drop_after(start)

      meter = Meter(context, run.name, config.profile_steps)
      batches, total_steps = run.batches(start), jax.numpy.int32(run.steps)
      metrics: dict[str, jax.Array] | None = None
      pending: list[tuple[int, dict[str, jax.Array]]] = []
      asked: jax.Array | None = None
      step, saved = start, time.monotonic()

      def wishes() -> tuple[int, int]:
        """The signal to stop at, or 0, and whether a checkpoint is due by the clock."""
        return hold.requested, bool(
          config.save_every_minutes
        ) and time.monotonic() - saved > 60 * config.save_every_minutes

      def record() -> None:
        """Reads the pending metrics, which waits for the device, and logs them."""
        while pending:
          logged_step, values = pending.pop()
          _check_finite(run, logged_step, values)
          line: dict[str, Any] = {'step': logged_step}
          line['tokens'] = logged_step * meter.tokens_per_step // trainer.models
          line |= {name: np.asarray(value).tolist() for name, value in values.items()}
          history.append(line)
          scalars = {name: float(np.mean(value)) for name, value in line.items() if name != 'step'}
          scalars |= {name: value for name, value in meter.speed().items() if name in ('tokens_per_second', 'mfu')}
          context.log.scalars(logged_step, scalars, run=run.name)
          bar.show(loss=scalars['loss'])

      try:
        for step in range(start + 1, run.steps + 1):
          # Take a step.
          batch = meter.read(batches, metrics)
          local = batch['tokens_BL'], batch['weight_BL' if 'weight_BL' in batch else 'weight_B']
          tokens_BL, weight = assemble(local, trainer.batch_sharding, config.batch_size)
          if not meter.flop_per_step:
            meter.flop_per_step, meter.tokens_per_step = trainer.flop_per_step, tokens_BL.size
          state, metrics = trainer.step(state, tokens_BL, weight, total_steps)
          meter.stepped(metrics)
          hold.begin()
          bar.update(trainer.models)

          # Evaluate and log.
          values = dict(metrics)
          if run.evaluate and config.evaluate_every_steps and step % config.evaluate_every_steps == 0:
            values |= run.evaluate(state)
          log_now = step % config.log_every_steps == 0 or step == run.steps
          if log_now:
            record()  # of the previous logged step: waiting for this one would leave the device idle
            pending.append((step, values))
          if step == run.steps:
            break

          # Save, and stop on a signal. Several processes must do the same: they ask in logged steps, and read the
          # answer in the next step, which keeps the devices busy meanwhile.
          save = step in run.keep_steps or (bool(config.save_every_steps) and step % config.save_every_steps == 0)
          if processes.count() == 1:
            stop, overdue = wishes()
          else:
            stop, overdue = (0, 0) if asked is None else map(int, jax.device_get(asked))
          if save or overdue or stop:
            record()
            _check_finite(run, step, metrics)  # a run must not resume from a state that diverged
            save_checkpoint(step, state)
            saved = time.monotonic()
          if stop:
            raise _stopped(context, run, step, stop)
          asked = greatest(wishes(), trainer.mesh) if log_now and processes.count() > 1 else None
      finally:
        meter.stop_profile()
      record()
      context.log.event('speed', run=run.name, **meter.speed())
      if checkpoints.latest != run.steps:
        save_checkpoint(run.steps, state)

    save_cost()
    if context.first:
      storage.write_text(record_file, ''.join(json.dumps(line) + '\n' for line in history))
      storage.mark(record_file)
    context.log.event('trained', run=run.name, steps=run.steps, loss=history[-1]['loss'] if history else None)
    # A signal arrived in the last step or while it was saved: this run is finished, and the next one must not start.
    if stop := max(processes.gather(hold.requested)):
      raise _stopped(context, run, run.steps, stop)
  return history


def _stopped(context: Context, run: Run, step: int, number: int) -> Stopped:
  where = f'{context.log.stage} at step {step:,} of {run.steps:,} of {run.name}'
  return Stopped(f'stopped in {where}, which is saved; {stopping.GO_ON}', number)


def _step_of(state: TrainState) -> int:
  return int(np.asarray(state.step).flat[0])


def _check_finite(run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
  for metric, values in metrics.items():
    for name, value in zip(run.models or [run.name], np.atleast_1d(np.asarray(values)).tolist(), strict=True):
      if not math.isfinite(value):
        raise Diverged(
          f'{metric} of {name} is {value} at step {step}: training diverged; lower '
          'learning_rate or raise warmup_steps of its train config, then start again'
        )


def load_state(directory: Location, trainer: Any, step: int | None = None) -> TrainState:
  """Loads the newest checkpoint in `directory`, or the one of `step`, onto the trainer's mesh.

  Raises:
    UserError: there is none, it is torn, or it belongs to another model.
  """
  with Checkpoints(directory) as checkpoints:
    restored, newest = checkpoints.restore(trainer.abstract, step), checkpoints.latest if step is None else step
  if restored is None:
    problem = 'contains no checkpoint' if step is None else f'lacks the checkpoint of step {step}'
    raise UserError(f'{directory} {problem}; delete the stage folder above it and start again')
  state = restored[0]
  if _step_of(state) != newest:  # a run may resume from an earlier checkpoint, but its result is the last one
    raise UserError(
      f'the checkpoint of step {newest} in {directory} is torn, and step {_step_of(state)} before it is not the end of '
      'that run; delete the stage folder above it and start again'
    )
  return state

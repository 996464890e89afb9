"""The training loop: a resumed run equals an uninterrupted one, and a diverging one stops."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dsdm_jax.core import artifacts, flops, storage
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.core.progress import Bar, Log
from dsdm_jax.core.stage import Context
from dsdm_jax.errors import Stopped, UserError
from dsdm_jax.training import loop
from dsdm_jax.training.metrics import HeldOut, Meter
from tests.conftest import ROOT
from tests.training.test_step import BATCH, batches, make_trainer

STEPS = 6
KEYS = {'save_every_steps': 2, 'keep_checkpoints': 1, 'log_every_steps': 1, 'warmup_steps': 1}


class Stop(Exception):  # noqa: N818  interrupts the loop like a kill
  pass


def context(folder: Path, first: bool = True) -> Context:
  folder.mkdir(parents=True, exist_ok=True)
  return Context(None, folder, {}, Log(folder, 'test', enabled=False), Cost(folder, enabled=first), first)


def key() -> jax.Array:
  return jax.random.key(1)


def stream(asked: list[int] | None = None, stop_before: int = STEPS + 1, seed: int = 0):
  data = batches(STEPS, seed)

  def read(start: int):
    if asked is not None:
      asked.append(start)
    for step in range(start, STEPS):
      if step == stop_before:
        raise Stop
      yield {'tokens_BL': data[step], 'weight_B': np.ones(BATCH, np.float32)}

  return read


def config(**keys):
  from configs import base

  c = base.get_config().pretraining.train
  c.update({'batch_size': BATCH, **KEYS, **keys})
  return c


@pytest.fixture(scope='module')
def trainer():
  return make_trainer(**KEYS)


def train(
  folder: Path, trainer, batches_from, bar=None, first=True, log=None, evaluate=None, keep_steps=(), costs=None, **keys
):
  where = context(folder, first) if log is None else Context(None, folder, {}, log, Cost(folder))
  if costs is not None:
    costs.append(where.cost)
  run = loop.Run('model', key(), batches_from, STEPS, evaluate, keep_steps)
  return loop.train(where, trainer, run, config(**keys), bar or Bar(None, None, None, 'step'))


@pytest.fixture(scope='module')
def uninterrupted(trainer, tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('uninterrupted')
  train(folder, trainer, stream())
  return folder


def assert_same(found: Path, wanted: Path, trainer) -> None:
  assert (found / 'model.jsonl').read_bytes() == (wanted / 'model.jsonl').read_bytes()
  a, b = (loop.load_state(folder / 'model', trainer) for folder in (found, wanted))
  assert int(a.step) == int(b.step) == STEPS
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize('at', [1, 4])
def test_stopped_run_resumes_as_the_uninterrupted_one(trainer, uninterrupted, tmp_path, at):
  with pytest.raises(Stop):
    train(tmp_path, trainer, stream(stop_before=at))
  assert not (tmp_path / 'model.jsonl').exists()
  asked: list[int] = []
  bar = Bar(None, None, None, 'step')
  costs: list[Cost] = []
  train(tmp_path, trainer, stream(asked), bar, costs=costs)
  assert asked == [at // 2 * 2], 'resumes from the newest checkpoint'
  assert costs[0].flop == trainer.flop_per_step * STEPS > 0, 'of the steps in the result, whoever took them'
  assert 0 < costs[0].parts['model'] <= costs[0].seconds
  assert bar.n == STEPS
  assert_same(tmp_path, uninterrupted, trainer)


@pytest.mark.parametrize('saves', [1, 3])
def test_kill_between_work_and_cost_loses_and_doubles_no_seconds(trainer, tmp_path, monkeypatch, saves):
  """After a checkpoint, and after the last step; each step takes 100 s."""
  seconds, save, left = [0.0], Cost.save, iter(range(saves))
  clock = SimpleNamespace(monotonic=lambda: seconds[0])
  monkeypatch.setattr(loop, 'time', clock)
  monkeypatch.setattr(artifacts, 'time', clock)

  def slow(start: int):
    for batch in stream()(start):
      seconds[0] += 100
      yield batch

  def killed(cost):
    if next(left, None) is None:
      raise Stop
    save(cost)

  with monkeypatch.context() as patched:
    patched.setattr(Cost, 'save', killed)
    with pytest.raises(Stop):
      train(tmp_path, trainer, slow)
  seconds[0] += 1_000
  train(tmp_path, trainer, slow)
  saved = Cost(tmp_path)
  assert (saved.seconds, saved.parts) == (100 * STEPS, {'model': 100 * STEPS})


def test_finished_run_is_not_trained_again(trainer, uninterrupted):
  before = (uninterrupted / 'model.jsonl').stat().st_mtime_ns
  asked: list[int] = []
  bar = Bar(None, None, None, 'step')
  costs: list[Cost] = []
  history = train(uninterrupted, trainer, stream(asked), bar, costs=costs)
  assert asked == []
  assert costs[0].flop == trainer.flop_per_step * STEPS
  assert bar.n == STEPS
  assert [line['step'] for line in history] == list(range(1, STEPS + 1))
  assert (uninterrupted / 'model.jsonl').stat().st_mtime_ns == before


@pytest.mark.parametrize('damage', [b'', b'{"step": 1, "loss": 9.0}\n', None], ids=['emptied', 'changed', 'note lost'])
def test_damaged_history_of_an_unfinished_stage_is_written_again(trainer, uninterrupted, tmp_path, damage):
  shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
  if damage is None:
    (tmp_path / 'model.jsonl.sha256').unlink()
  else:
    (tmp_path / 'model.jsonl').write_bytes(damage)
  asked: list[int] = []
  train(tmp_path, trainer, stream(asked))
  assert asked == [], 'nothing is trained again'
  assert_same(tmp_path, uninterrupted, trainer)


def test_keep_steps_are_those_of_the_uninterrupted_run(trainer, uninterrupted, tmp_path):
  keep_steps = (1, 3)
  with pytest.raises(Stop):
    train(tmp_path, trainer, stream(stop_before=2), keep_steps=keep_steps)
  train(tmp_path, trainer, stream(), keep_steps=keep_steps)
  assert_same(tmp_path, uninterrupted, trainer)
  assert saved_steps(tmp_path) == [1, 3, STEPS]
  state = trainer.init(key())
  for batch in list(stream()(0))[:3]:
    pair = jax.device_put((batch['tokens_BL'], batch['weight_B']), trainer.batch_sharding)
    state, _ = trainer.step(state, *pair, np.int32(STEPS))
  found = loop.load_state(tmp_path / 'model', trainer, 3)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
  with pytest.raises(UserError, match=r'model lacks the checkpoint of step 2; delete'):
    loop.load_state(tmp_path / 'model', trainer, 2)


def test_divergence_names_metric_step_and_run(trainer, tmp_path):
  data = stream()

  def broken(start: int):
    for step, batch in enumerate(data(start), start + 1):
      weight_B = batch['weight_B'] * (np.float32(np.nan) if step >= 4 else 1)
      yield batch | {'weight_B': weight_B}

  with pytest.raises(UserError) as caught:
    train(tmp_path, trainer, broken)
  message = str(caught.value)
  assert re.match(r'(loss|gradient_norm) of model is nan at step 4: ', message)
  assert 'learning_rate' in message
  assert '\n' not in message
  assert not (tmp_path / 'model.jsonl').exists()
  # Logged every step, a step that diverged is never saved.
  state = loop.load_state(tmp_path / 'model', trainer)
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


def test_missing_checkpoint_is_reported(trainer, tmp_path):
  (tmp_path / 'model').mkdir()
  with pytest.raises(UserError, match='contains no checkpoint'):
    loop.load_state(tmp_path / 'model', trainer)


def test_history_has_what_curves_need(uninterrupted):
  lines = [json.loads(line) for line in (uninterrupted / 'model.jsonl').read_text().splitlines()]
  assert all(line.keys() == {'step', 'tokens', 'loss', 'gradient_norm', 'learning_rate'} for line in lines)
  assert [line['tokens'] for line in lines] == [BATCH * 12 * (i + 1) for i in range(STEPS)]


@pytest.mark.parametrize('at', [4, STEPS])
def test_sigterm_saves_and_the_run_resumes_as_the_uninterrupted_one(trainer, uninterrupted, tmp_path, at):
  data = stream()

  def terminated(start: int):
    for step, batch in enumerate(data(start), start + 1):
      if step == at:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  keys = {'save_every_steps': 0, 'log_every_steps': 1}
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Stopped, match=rf'stopped in \w+ at step {at} of 6 of model, which is saved') as caught:
    train(tmp_path, trainer, terminated, **keys)
  assert caught.value.exit_code == 143
  assert signal.getsignal(signal.SIGTERM) == before
  assert saved_steps(tmp_path) == [at]
  asked: list[int] = []
  train(tmp_path, trainer, stream(asked), **keys)
  assert asked == ([4] if at == 4 else []), 'a run that was stopped in its last step is finished'
  assert_same(tmp_path, uninterrupted, trainer)


def saved_steps(folder: Path) -> list[int]:
  return sorted(int(path.name) for path in (folder / 'model').iterdir() if path.name.isdecimal())


def test_checkpoints_are_kept_by_step(trainer, tmp_path):
  train(tmp_path, trainer, stream(), save_every_steps=1, keep_checkpoints=2, keep_every_steps=3)
  assert saved_steps(tmp_path) == [3, 5, 6]


def test_checkpoints_are_saved_and_kept_by_time(trainer, tmp_path, monkeypatch):
  train(tmp_path / 'now', trainer, stream(), save_every_steps=0, save_every_minutes=1e-9, keep_checkpoints=9)
  assert saved_steps(tmp_path / 'now') == [1, 2, 3, 4, 5, 6]
  train(tmp_path / 'later', trainer, stream(), save_every_steps=0, save_every_minutes=60.0)
  assert saved_steps(tmp_path / 'later') == [6]
  # The first checkpoint of a span of time is kept.
  train(tmp_path / 'kept', trainer, stream(), save_every_steps=1, keep_every_hours=1.0)
  assert saved_steps(tmp_path / 'kept') == [1, 6]


def test_run_resumes_on_another_mesh(trainer, uninterrupted, tmp_path):
  with pytest.raises(Stop):
    train(tmp_path, trainer, stream(stop_before=4))
  many = make_trainer(8, **KEYS)
  history = train(tmp_path, many, stream())
  wanted = storage.read_jsonl(uninterrupted / 'model.jsonl')
  assert history[:4] == wanted[:4]
  for line, expected in zip(history[4:], wanted[4:], strict=True):
    assert line['loss'] == pytest.approx(expected['loss'], rel=2e-5)  # as in test_step: sums in another order
    assert line['loss'] != pytest.approx(wanted[0]['loss'], rel=1e-4)


def tear(checkpoint: Path, damage: str = 'cut') -> None:
  if damage == 'missing':
    (checkpoint / 'state/_METADATA').unlink()
    return
  files = [path for path in checkpoint.rglob('*') if path.is_file() and '/d/' in path.as_posix()]
  assert files
  for file in files:
    data = bytearray(file.read_bytes())
    if damage == 'no checksums':  # Orbax itself notices a truncated file
      (checkpoint / 'checksums.json').unlink(missing_ok=True)
      shutil.rmtree(checkpoint / 'shapes', ignore_errors=True)
    if damage == 'flipped':
      data[len(data) // 2] ^= 1
    else:
      del data[len(data) // 2 :]
    file.write_bytes(data)


torn = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # Orbax drops reads beside it


@torn
@pytest.mark.parametrize('damage', ['missing', 'flipped', 'no checksums'])
def test_torn_checkpoint_falls_back_to_the_one_before_it(trainer, uninterrupted, tmp_path, damage):
  with pytest.raises(Stop):
    train(tmp_path, trainer, stream(stop_before=4), keep_checkpoints=2)
  assert saved_steps(tmp_path) == [2, 4]
  tear(tmp_path / 'model/4', damage)
  asked: list[int] = []
  train(tmp_path, trainer, stream(asked), keep_checkpoints=2)
  assert asked == [2]
  assert_same(tmp_path, uninterrupted, trainer)


@torn
def test_torn_last_checkpoint_is_saved_again(trainer, uninterrupted, tmp_path):
  train(tmp_path, trainer, stream(), keep_checkpoints=2)
  (tmp_path / 'model.jsonl').unlink()  # as if the machine failed just before it is written
  tear(tmp_path / 'model/6')
  log = RecordedLog(tmp_path)
  asked: list[int] = []
  train(tmp_path, trainer, stream(asked), log=log, keep_checkpoints=2)
  assert log.messages == ['the checkpoint of step 6 of model is torn; resuming from step 4']
  assert asked == [4]
  assert saved_steps(tmp_path) == [4, 6]
  assert_same(tmp_path, uninterrupted, trainer)


@torn
def test_finished_run_whose_last_checkpoint_is_torn_is_not_read_at_an_earlier_step(trainer, tmp_path):
  train(tmp_path, trainer, stream(), keep_checkpoints=2)
  tear(tmp_path / 'model/6')
  with pytest.raises(UserError, match=r'the checkpoint of step 6 in .*/model is torn, and step 4 before it') as caught:
    loop.load_state(tmp_path / 'model', trainer)
  assert '\n' not in str(caught.value)
  assert saved_steps(tmp_path) == [4, 6], 'reading removes nothing'


@pytest.mark.full
def test_damage_is_reported_and_nothing_else(tmp_path):
  code = (
    'import sys; from pathlib import Path; import jax.numpy as jnp, numpy as np\n'
    'from dsdm_jax.core.checkpoints import Checkpoints\n'
    'state = {f"w{i}": jnp.asarray(np.random.default_rng(i).random((200, 200))) for i in range(8)}\n'
    'with Checkpoints(Path(sys.argv[1])) as checkpoints:\n'
    '  checkpoints.restore(state) if checkpoints.latest else checkpoints.save(1, state, {})\n'
  )
  save = [sys.executable, '-c', code, str(tmp_path)]
  subprocess.run(save, cwd=ROOT, check=True)
  data = max((p for p in (tmp_path / '1/state').rglob('*') if '/d/' in p.as_posix()), key=lambda p: p.stat().st_size)
  data.unlink()
  done = subprocess.run(save, cwd=ROOT, capture_output=True, text=True, check=False)
  assert 'is missing' in done.stderr.splitlines()[-1] and '/1/state/' in done.stderr.splitlines()[-1]
  assert 'Event loop' not in done.stderr and 'Exception in' not in done.stderr


def test_step_that_would_not_be_saved_raises(trainer, uninterrupted):
  with Checkpoints(uninterrupted / 'model') as checkpoints, pytest.raises(RuntimeError, match='step 5 is not saved'):
    checkpoints.save(5, trainer.init(key()), {})


def test_evaluation_is_logged_in_its_steps_and_does_not_change_the_run(trainer, uninterrupted, tmp_path):
  rows_BL = batches(1, seed=9)[0]
  held_out = HeldOut(trainer, np.concatenate([rows_BL, rows_BL]), BATCH)
  history = train(tmp_path, trainer, stream(), evaluate=held_out, evaluate_every_steps=3)
  assert [line['step'] for line in history if 'held_out_loss' in line] == [3, 6]
  state = loop.load_state(tmp_path / 'model', trainer)
  logits_BLV = np.asarray(trainer.logits(state.params, state.rest, rows_BL), np.float64)[:, :-1]
  right_BL = np.take_along_axis(logits_BLV, rows_BL[:, 1:, None], axis=2)[..., 0]
  wanted = (np.log(np.exp(logits_BLV).sum(-1)) - right_BL).mean()
  assert history[-1]['held_out_loss'] == pytest.approx(wanted, rel=1e-5)
  plain = [{k: v for k, v in line.items() if k != 'held_out_loss'} for line in history]
  assert plain == storage.read_jsonl(uninterrupted / 'model.jsonl')


class RecordedLog(Log):
  """A log that records its messages."""

  def __init__(self, folder: Path):
    super().__init__(folder, 'test')
    self.messages: list[str] = []

  def warn(self, text: str) -> None:
    self.messages.append(text)

  def scalars(self, *args, **kwargs) -> None:
    pass


@pytest.mark.parametrize('slow', [True, False])
def test_run_that_waits_for_its_data_is_reported_early(trainer, tmp_path, slow):
  log = RecordedLog(tmp_path)
  meter = Meter(Context(None, tmp_path, {}, log, Cost(tmp_path)), 'model', profile_steps=0)
  meter.tokens_per_step, meter.flop_per_step = 10, 1e3

  def read():
    while True:
      if slow:
        time.sleep(0.01)
      yield {}

  data, metrics = read(), None
  for _ in range(23):
    meter.read(data, metrics)
    metrics = {'loss': jax.numpy.zeros(())}
    if not slow:
      time.sleep(0.002)  # the step
    meter.stepped(metrics)
  assert len(log.messages) == slow, log.messages
  if slow:
    assert 'model waits for its data' in log.messages[0]
    assert meter.speed()['input_share'] > 0.5
  speed = meter.speed()
  assert 0 < speed['tokens_per_second'] < 21 * 10 / (21 * (0.01 if slow else 0.002))
  assert speed['flop_per_second'] == pytest.approx(speed['tokens_per_second'] * 100, rel=0.01)


def test_profile_on_request(trainer, tmp_path):
  log = RecordedLog(tmp_path)
  train(tmp_path, trainer, stream(), log=log, profile_steps=2)
  assert list((tmp_path / 'tensorboard/model').rglob('*.xplane.pb'))
  assert 'tensorboard --logdir' in log.messages[0]


def test_peak_is_known_for_accelerators_alone():
  class Device:
    def __init__(self, kind: str):
      self.device_kind = kind

  assert flops.peak([Device('NVIDIA H200')] * 2) == 2 * 989e12
  assert flops.peak([Device('TPU v5 lite')]) == 197e12
  assert flops.peak([Device('TPU v5')]) == 459e12
  assert flops.peak([Device('cpu')]) is None

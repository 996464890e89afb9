"""The loop: a resumed run is the undisturbed run, and a diverging one stops."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.errors import UserError
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.training import loop
from tests.conftest import ROOT
from tests.training.test_step import BATCH, batches, flat, make_trainer

STEPS = 6
KEYS = {'save_every_steps': 2, 'keep_checkpoints': 1, 'log_every_steps': 1, 'warmup_steps': 1}


class Bar:
  def __init__(self):
    self.done = 0

  def update(self, steps: int) -> None:
    self.done += steps


class Stop(Exception):  # noqa: N818  what a kill is to the loop
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


def train(folder: Path, trainer, batches_from, bar=None, first: bool = True, **keys):
  return loop.train(context(folder, first), trainer, 'model', key(), batches_from, STEPS, config(**keys), bar or Bar())


@pytest.fixture(scope='module')
def undisturbed(trainer, tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('undisturbed')
  train(folder, trainer, stream())
  return folder


def assert_same(found: Path, wanted: Path, trainer) -> None:
  assert (found / 'model.jsonl').read_bytes() == (wanted / 'model.jsonl').read_bytes()
  a, b = (loop.load_state(folder / 'model', trainer) for folder in (found, wanted))
  assert int(a.step) == int(b.step) == STEPS
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize('at', range(STEPS))
def test_stopped_run_goes_on_as_the_undisturbed_one(trainer, undisturbed, tmp_path, at):
  with pytest.raises(Stop):
    train(tmp_path, trainer, stream(stop_before=at))
  assert not (tmp_path / 'model.jsonl').exists()
  asked: list[int] = []
  bar = Bar()
  train(tmp_path, trainer, stream(asked), bar)
  assert asked == [at // 2 * 2], 'it goes on from the newest checkpoint'
  assert bar.done == STEPS
  assert_same(tmp_path, undisturbed, trainer)


def test_finished_run_is_found_finished(trainer, undisturbed):
  before = (undisturbed / 'model.jsonl').stat().st_mtime_ns
  asked: list[int] = []
  bar = Bar()
  history = train(undisturbed, trainer, stream(asked), bar)
  assert asked == []
  assert bar.done == STEPS
  assert [line['step'] for line in history] == list(range(1, STEPS + 1))
  assert (undisturbed / 'model.jsonl').stat().st_mtime_ns == before


def test_state_on_disk_is_the_last_one(trainer, undisturbed):
  """The checkpoint is of the last step, not of the one before it, whatever save_every_steps says."""
  state = loop.load_state(undisturbed / 'model', trainer)
  once_more = trainer.init(jax.random.key(1))
  for batch in stream()(0):
    pair = jax.device_put((batch['tokens_BL'], batch['weight_B']), trainer.batch_sharding)
    once_more, _ = trainer.step(once_more, *pair, np.int32(STEPS))
  a, b = flat(state.params), flat(once_more.params)
  for k in a:
    np.testing.assert_array_equal(a[k], b[k])


def test_divergence_names_metric_step_and_run(trainer, tmp_path):
  data = stream()

  def broken(start: int):
    for step, batch in enumerate(data(start), start + 1):
      weight_B = batch['weight_B'] * (np.float32(np.nan) if step == 4 else 1)
      yield batch | {'weight_B': weight_B}

  with pytest.raises(UserError) as caught:
    train(tmp_path, trainer, broken)
  message = str(caught.value)
  assert re.match(r'(loss|gradient_norm) of model is nan at step 4: ', message)
  assert 'learning_rate' in message
  assert '\n' not in message
  assert not (tmp_path / 'model.jsonl').exists()


def test_diverged_state_is_never_what_a_restart_begins_with(trainer, tmp_path):
  """Logged every step, a step that diverged is never saved: what is on disk is finite."""
  data = stream()

  def broken(start: int):
    for step, batch in enumerate(data(start), start + 1):
      yield batch | {'weight_B': batch['weight_B'] * (np.float32(np.nan) if step >= 4 else 1)}

  with pytest.raises(UserError, match='step 4'):
    train(tmp_path, trainer, broken)
  state = loop.load_state(tmp_path / 'model', trainer)
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


def test_checkpoint_of_another_model_is_refused_in_one_line(undisturbed):
  """In a process of its own: Orbax drops reads beside the one that failed, and Python warns of them late."""
  code = (
    'import sys; from pathlib import Path; from tests.training.test_step import make_trainer;'
    'from dsdm_jax.core.errors import UserError; from dsdm_jax.training import loop\n'
    "try: loop.load_state(Path(sys.argv[1]), make_trainer(model={'width': 32}))\n"
    'except UserError as error: print(error)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, str(undisturbed / 'model')], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.count('\n') == 1
  assert f'no checkpoint in {undisturbed / "model"} can be restored into this model' in done.stdout


def test_no_checkpoint_is_told(trainer, tmp_path):
  (tmp_path / 'model').mkdir()
  with pytest.raises(UserError, match='holds no checkpoint'):
    loop.load_state(tmp_path / 'model', trainer)


def test_history_has_what_curves_need(undisturbed):
  lines = [json.loads(line) for line in (undisturbed / 'model.jsonl').read_text().splitlines()]
  assert all(line.keys() == {'step', 'tokens', 'loss', 'gradient_norm', 'learning_rate'} for line in lines)
  assert [line['tokens'] for line in lines] == [BATCH * 12 * (i + 1) for i in range(STEPS)]

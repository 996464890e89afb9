"""Two processes train bit for bit like one with as many devices, and resume after one of them is lost."""

from pathlib import Path

import pytest

from tests.core.test_processes import free_port
from tests.pipeline import runs
from tests.training import test_loop
from tests.training.test_step import make_trainer


def train(folder: Path, signal: str = 'SIGKILL', after: int = -1) -> list[tuple[int, str]]:
  """(exit code, standard error) of each process."""
  address, module = f'127.0.0.1:{free_port()}', 'tests.training.two_processes'
  started = [runs.start(address, str(i), str(folder), signal, str(after), module=module) for i in (0, 1)]
  return [(done.returncode, done.stderr) for done in (process.wait(250) for process in started)]


@pytest.fixture(scope='module')
def one_process(tmp_path_factory):
  """(trainer on two devices of this process, folder of its run)."""
  trainer, folder = make_trainer(2, **test_loop.KEYS), tmp_path_factory.mktemp('one')
  test_loop.train(folder, trainer, test_loop.stream())
  return trainer, folder


def test_killed_and_resumed_run_of_two_processes_is_the_run_of_one(one_process, tmp_path):
  trainer, wanted = one_process
  (code, err), (killed, _) = train(tmp_path, 'SIGKILL', after=5)
  assert (code, killed) == (1, -9), err
  assert 'dsdm_jax: process 0: a step that all processes take together failed' in err
  assert not (tmp_path / 'model.jsonl').exists()
  assert any(path.name.isdecimal() for path in (tmp_path / 'model').iterdir()), 'a checkpoint to resume from'
  for code, err in train(tmp_path):
    assert code == 0, err
  test_loop.assert_same(tmp_path, wanted, trainer)


def test_terminated_run_of_two_processes_saves_the_step_that_it_reports(one_process, tmp_path):
  trainer, wanted = one_process
  for code, err in train(tmp_path, 'SIGTERM', after=3):
    assert code == 143, err
    assert 'at step 5 of 6 of model, which is saved; the same command goes on' in err
  assert '5' in {path.name for path in (tmp_path / 'model').iterdir()}
  for code, err in train(tmp_path):
    assert code == 0, err
  test_loop.assert_same(tmp_path, wanted, trainer)

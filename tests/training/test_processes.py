"""Two processes train bit for bit like one with as many devices, and resume after one of them is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.core.test_processes import ends, free_port
from tests.training import test_loop
from tests.training.test_step import make_trainer


def train(folder: Path, signal: str = 'SIGKILL', after: int = -1) -> list[tuple[int, str, str]]:
  address = f'127.0.0.1:{free_port()}'
  return ends(
    [
      subprocess.Popen(
        [sys.executable, '-m', 'tests.training.two_processes', address, str(process), str(folder), signal, str(after)],
        cwd=ROOT,
        env=os.environ | {'JAX_NUM_CPU_DEVICES': '1', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for process in (0, 1)
    ]
  )


@pytest.fixture(scope='module')
def one_process(tmp_path_factory):
  """(trainer on two devices of this process, folder of its run)."""
  trainer, folder = make_trainer(2, **test_loop.KEYS), tmp_path_factory.mktemp('one')
  test_loop.train(folder, trainer, test_loop.stream())
  return trainer, folder


def test_killed_and_resumed_run_of_two_processes_is_the_run_of_one(one_process, tmp_path):
  trainer, wanted = one_process
  (code, _, err), (killed, _, _) = train(tmp_path, 'SIGKILL', after=5)
  assert (code, killed) == (1, -9), err
  assert 'dsdm_jax: process 0: a step that all processes take together failed' in err
  assert not (tmp_path / 'model.jsonl').exists()
  assert any(path.name.isdecimal() for path in (tmp_path / 'model').iterdir()), 'a checkpoint to resume from'
  for code, _, err in train(tmp_path):
    assert code == 0, err
  test_loop.assert_same(tmp_path, wanted, trainer)


def test_terminated_run_of_two_processes_saves_the_step_that_it_reports(one_process, tmp_path):
  trainer, wanted = one_process
  for code, _, err in train(tmp_path, 'SIGTERM', after=4):
    assert code == 143, err
    assert 'stopped by SIGTERM at step 5 of 6 of model, which is saved' in err
  assert '5' in {path.name for path in (tmp_path / 'model').iterdir()}
  for code, _, err in train(tmp_path):
    assert code == 0, err
  test_loop.assert_same(tmp_path, wanted, trainer)

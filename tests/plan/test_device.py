"""`bench device` on the CPU backend, without TensorFlow, and its file in a plan."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dsdm_jax.bench import device
from dsdm_jax.configs.quickstart import get_config
from dsdm_jax.core import storage
from dsdm_jax.errors import UserError
from dsdm_jax.plan import plan
from tests.conftest import ROOT

WITHOUT_TENSORFLOW = """
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'seqio'):
  sys.modules[name] = None
from dsdm_jax.bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_error_is_relative_and_over_all_leaves():
  wanted = {'a': np.array([3.0, 0.0]), 'b': np.array([[4.0]])}
  found = {'a': np.array([3.0, 0.3]), 'b': np.array([[4.4]])}
  assert device.error(found, wanted) == pytest.approx(0.5 / 5)
  assert not device.Check('a', float('nan'), 1.0).passed


def test_a_training_that_resumes_elsewhere_is_found(monkeypatch):
  assert [check.value for check in device.resume()] == [0.0]
  restore = device.Checkpoints.restore

  def other(self, like):
    state, record = restore(self, like)
    return state._replace(step=state.step + 1), record

  monkeypatch.setattr(device.Checkpoints, 'restore', other)
  assert not device.resume()[0].passed


@pytest.mark.slow
@pytest.mark.full
def test_the_whole_check(tmp_path):
  out = tmp_path / 'device.json'
  command = [sys.executable, '-c', WITHOUT_TENSORFLOW, 'device', '--repeats=2', f'--out={out}']
  environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3_000:]
  written = json.loads(out.read_text())
  assert len(written['checks']) == 10 and all(check['passed'] for check in written['checks'])
  measured = ('train_step', 'forward', 'per_example_gradient', 'two_sided', 'dense', 'jvp_score', 'jvp_score_4_targets')
  assert set(written['calibration']) == set(measured)
  assert all(name in done.stdout for name in ('gradient, bfloat16', 'train_step', '64 MiB to the host', 'MiB'))


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (None, 'cannot be read (No such file or directory); make it with: bench device'),
    ({'device': 'TPU v5p', 'chip': 'v5p', 'calibration': {}}, 'was measured on TPU v5p, but plan.topology is of v5e'),
    ({'device': 'TPU v5e', 'chip': 'v5e', 'calibration': {'dense': -1.0}}, 'its factors must be positive numbers'),
    ({'device': 'TPU v5e', 'chip': 'v5e'}, "has no 'calibration'"),
  ],
)
def test_a_calibration_that_does_not_fit_is_refused(tmp_path, content, words):
  config, file = get_config(), tmp_path / 'device.json'
  config.plan.calibration = str(file)
  if content is not None:
    storage.write_json(file, content)
  with pytest.raises(UserError) as caught:
    plan.make(config)
  assert words in str(caught.value) and str(file) in str(caught.value)


def test_programs_of_a_plan_are_calibrated_by_their_own_measurement(tmp_path):
  config, file = get_config(), tmp_path / 'device.json'
  config.features.projection = 'two_sided'
  storage.write_json(file, {'device': 'x', 'chip': 'v5e', 'calibration': {'train_step': 1.5, 'two_sided': 2.0}})
  assert plan._calibration(str(file), 'v5e') == {'train_step': 1.5, 'two_sided': 2.0}


_BY_GRADIENT = {'features': 'per_example_gradient', 'target_means': 'per_example_gradient'}


@pytest.mark.parametrize(
  ('settings', 'directions', 'measured'),
  [
    ({'projection': 'two_sided'}, 2, {'features': 'two_sided', 'gram': '', 'scores': ''}),
    ({'projection': 'dense', 'mode': 'stream'}, 2, {'features': 'dense', 'gram': '', 'scores': ''}),
    ({'projection': 'dense', 'mode': 'jvp'}, 2, {'features': 'dense', 'gram': '', 'scores': 'jvp_score_4_targets'}),
    ({'projection': 'ekfac'}, 2, {**_BY_GRADIENT, 'scores': 'jvp_score_4_targets'}),
    ({'projection': 'ekfac'}, 1, {**_BY_GRADIENT, 'scores': 'jvp_score'}),
  ],
)
def test_stages_are_calibrated_by_the_program_that_they_run(settings, directions, measured):
  config = get_config()
  config.features.update(settings)
  config.datamodel.update({'groups': 1, 'examples': 0, 'bootstrap': 0})
  config.targets.tasks = ('docs', 'api_qa')[:directions]
  measured |= dict.fromkeys(('proxies', 'pretraining', 'ladder 2'), 'train_step')
  assert {stage: plan._measured_as(stage, config) for stage in measured} == measured

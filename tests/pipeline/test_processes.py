"""Two processes evaluate and report as one: all load the models, process 0 alone writes."""

import shutil
import subprocess

import numpy as np
import pytest

from tests.core.test_processes import ends, free_port
from tests.helpers.workdirs import files_of
from tests.pipeline import runs
from tests.pipeline.runs import ROOT


@pytest.mark.slow
def test_two_processes_evaluate_as_one(finished, copied):
  for stage in ('evaluation', 'report'):
    shutil.rmtree(copied / stage)
  address = f'127.0.0.1:{free_port()}'
  flags = (
    runs.TINY,
    f'--workdir={copied}',
    f'--config.distributed.coordinator={address}',
    '--config.distributed.processes=2',
    '--config.distributed.heartbeat_seconds=20',
  )
  outputs = ends([
    subprocess.Popen(
      runs.command(*flags, f'--config.distributed.process={process}'),
      cwd=ROOT, env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for process in (0, 1)
  ])  # fmt: skip
  for code, _, err in outputs:
    assert code == 0, err[-3000:]
  assert 'evaluation: done in' in outputs[0][1]
  assert 'evaluation' not in outputs[1][1]
  count = len(runs.events(finished))
  assert runs.stages_run(copied, count) == ['evaluation', 'report']
  with (
    np.load(files_of(copied, 'evaluation') / 'items.npz') as a,
    np.load(files_of(finished, 'evaluation') / 'items.npz') as b,
  ):
    assert a.keys() == b.keys()
    for key in a:
      # Log-probabilities of up to 6 nats in float32, whose matrix products are cut elsewhere on two devices.
      np.testing.assert_allclose(a[key], b[key], atol=1e-5, err_msg=key)

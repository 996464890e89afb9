"""Two processes evaluate and report as one: all load the models, process 0 alone writes."""

import shutil

import numpy as np
import pytest

from tests.helpers.workdirs import files_of
from tests.pipeline import runs


@pytest.mark.slow
def test_two_processes_evaluate_as_one(finished, copied):
  for stage in ('evaluation', 'report'):
    shutil.rmtree(copied / stage)
  flags = (runs.TINY, f'--workdir={copied}', '--config.distributed.heartbeat_seconds=20')
  first, second = runs.run_two(*flags)
  for done in (first, second):
    assert done.returncode == 0, done.stderr[-3000:]
  assert '] evaluation' in first.stdout
  assert 'evaluation' not in second.stdout
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

"""The smallest pipeline twenty times in one process: neither memory nor handles grow with the runs."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import FAULTS
from tests.pipeline import runs
from tests.pipeline.runs import ROOT

TIMES = 20 if FAULTS else 3
# A run, of 565 measured: those of JAX's and TFDS's caches, the same in every run (docs/limits.md).
OBJECTS = 1_000


@pytest.mark.slow
@pytest.mark.parametrize(
  ('threads', 'growth'),  # GiB a run: 0.0005 measured, in a figure that goes up and down by 0.005, and 0.004
  [
    ('of a user', 0.002),
    pytest.param('of the tests', 0.01, marks=pytest.mark.skipif(not FAULTS, reason='launch/test.sh --faults runs it')),
  ],
)
def test_memory_and_handles_stay(tmp_path, count, threads, growth):
  """Slopes over the runs but for the first ones, which fill caches of bounded size."""
  environment = runs.environment()
  if threads == 'of a user':  # the tests give XLA 64 for collectives, and each keeps some of the memory that it freed
    del environment['PJRT_NPROC']
  done = subprocess.run(
    [sys.executable, '-m', 'tests.faults.soak', str(tmp_path), str(TIMES)], cwd=ROOT, env=environment,
    capture_output=True, text=True, timeout=1_800, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  seen = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"gib"')]
  print(*seen, sep='\n')
  assert len(seen) == TIMES
  handles = [s['handles'] for s in seen[TIMES // 4 :]]
  assert handles[-1] - handles[0] <= 1, seen  # one may be open for a moment
  objects = [s['objects'] for s in seen]
  assert objects[-1] - objects[-2] < OBJECTS, seen
  if FAULTS:
    gib = [s['gib'] for s in seen[TIMES // 4 :]]
    assert np.polyfit(np.arange(len(gib)), gib, 1)[0] < growth, seen
  count('runs in one process', TIMES)

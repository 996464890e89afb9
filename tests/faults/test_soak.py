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
# GiB a run; 0.008 were measured here, most of it in the first 14 runs (docs/limits.md). A run that leaked nothing would
# stay below 0.002.
GROWTH = 0.01


@pytest.mark.slow
def test_memory_and_handles_stay(tmp_path, count):
  """Slopes over the runs but for the first ones, which fill caches of bounded size."""
  done = subprocess.run(
    [sys.executable, '-m', 'tests.faults.soak', str(tmp_path), str(TIMES)], cwd=ROOT, env=runs.environment(),
    capture_output=True, text=True, timeout=1_800, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  seen = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"gib"')]
  print(*seen, sep='\n')
  assert len(seen) == TIMES
  handles = [s['handles'] for s in seen[TIMES // 4 :]]
  assert handles[-1] - handles[0] <= 1, seen  # one may be open for a moment
  if FAULTS:
    gib = [s['gib'] for s in seen[TIMES // 4 :]]
    assert np.polyfit(np.arange(len(gib)), gib, 1)[0] < GROWTH, seen
  count('runs in one process', TIMES)

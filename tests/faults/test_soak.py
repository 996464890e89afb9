"""The smallest pipeline many times in one process: neither handles nor Python objects grow with the runs."""

import json
import subprocess
import sys

import pytest

from tests.conftest import FAULTS, ROOT
from tests.pipeline import runs

TIMES = 20 if FAULTS else 3
# Per run, of 1,545 measured: caches of JAX and TFDS, and what TensorStore leaks for each array that Orbax saves or
# restores, the same in every run (docs/limits.md).
OBJECTS = 2_000


@pytest.mark.slow
def test_handles_and_objects_stay(tmp_path, count):
  environment = runs.environment()
  del environment['PJRT_NPROC']  # as a user runs it: the tests give XLA 64 threads for collectives
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
  count('runs in one process', TIMES)

"""Curves in Weights & Biases and trackio, written by their own packages and read back, without a network."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = """
import importlib.util, json, os, sqlite3, sys
from pathlib import Path
missing = [name for name in ('wandb', 'trackio') if importlib.util.find_spec(name) is None]
if missing:
  sys.exit(f'no {missing[0]}')
from dsdm_jax.core.loggers import Tracker
workdir = Path(sys.argv[1])
os.environ |= {'TRACKIO_DIR': str(workdir / 'trackio'), 'WANDB_SILENT': 'true'}
for start in (1, 3):  # the second as after a resume
  for module in ('wandb', 'trackio'):
    tracker = Tracker(module, workdir, 'proxy_0')
    for step in (start, start + 1):
      tracker.write_scalars(step, {'loss': 1 / step})
    tracker.close()
rows = sqlite3.connect(next((workdir / 'trackio').glob('*.db'))).execute('select run_name, step, metrics from metrics')
print(json.dumps(sorted([name, step, json.loads(metrics)['loss']] for name, step, metrics in rows)))
"""


@pytest.mark.peers
def test_curves_are_in_the_packages_own_files(peers: Path, workdir: Path):
  done = subprocess.run([peers, '-c', SCRIPT, workdir], cwd=ROOT, capture_output=True, text=True, check=False)
  if done.returncode and done.stderr.startswith('no '):
    pytest.skip(f'{done.stderr.strip()} in {peers}: install requirements-peers.txt again')
  assert done.returncode == 0, done.stderr[-3000:]
  assert json.loads(done.stdout.splitlines()[0]) == [['proxy_0', step, 1 / step] for step in (1, 2, 3, 4)]
  kept = list((workdir / 'wandb').glob('offline-run-*/*.wandb'))
  assert len(kept) == 2 and len({path.name for path in kept}) == 1, 'one run, resumed'

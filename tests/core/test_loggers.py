"""Curves in Weights & Biases and trackio, written by their own packages and read back, without a network."""

import json
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = """
import importlib.util, os, sys
from pathlib import Path
module, workdir = sys.argv[1], Path(sys.argv[2])
if importlib.util.find_spec(module) is None:
  sys.exit(f'no {module}')
from dsdm_jax.core.loggers import Tracker
os.environ |= {'TRACKIO_DIR': str(workdir / 'trackio'), 'WANDB_SILENT': 'true'}
for start in (1, 3):  # the second as after a resume
  tracker = Tracker(module, workdir, workdir, 'proxy_0')
  for step in (start, start + 1):
    tracker.write_scalars(step, {'loss': 1 / step})
  tracker.close()
if module == 'wandb':  # records in the log format of LevelDB, in blocks of 32 KiB
  import json, struct
  from wandb.proto import wandb_internal_pb2
  for file in sorted(workdir.glob('wandb/offline-run-*/*.wandb')):
    data, at, record = file.read_bytes(), 7, b''
    while at + 7 < len(data):
      _, size, kind = struct.unpack('<IHB', data[at : at + 7])
      record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
      if kind in (1, 4):  # whole, or the last part
        history, record = wandb_internal_pb2.Record.FromString(record).history, b''
        values = {(item.key or '/'.join(item.nested_key)): json.loads(item.value_json) for item in history.item}
        if values:
          print(json.dumps([values['_step'], values['loss']]))
"""


@pytest.mark.peers
@pytest.mark.parametrize('module', ['wandb', 'trackio'])
def test_curves_are_in_the_packages_own_files(peers: Path, tmp_path: Path, module: str):
  done = subprocess.run([peers, '-c', SCRIPT, module, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
  if done.stderr.startswith('no '):
    pytest.skip(f'{done.stderr.strip()} in {peers} (trackio needs an older pillow than requirements.lock pins)')
  assert done.returncode == 0, done.stderr[-3000:]
  if module == 'wandb':
    kept = list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
    assert len(kept) == 2 and len({path.name for path in kept}) == 1, 'one run, resumed'
    found = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith('['))
    assert found == [[step, 1 / step] for step in (1, 2, 3, 4)]
  else:
    rows = sqlite3.connect(next((tmp_path / 'trackio').glob('*.db'))).execute(
      'select run_name, step, metrics from metrics'
    )
    found = sorted([name, step, json.loads(metrics)['loss']] for name, step, metrics in rows)
    assert found == [['proxy_0', step, 1 / step] for step in (1, 2, 3, 4)]

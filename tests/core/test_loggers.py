"""Curves in Weights & Biases, written by its own package and read back, without a network."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

WRITE = """
import os, sys
from pathlib import Path
from dsdm_jax.core.loggers import WeightsAndBiases
workdir = Path(sys.argv[1])
os.environ['WANDB_SILENT'] = 'true'
for start in (1, 3):  # the second as after a resume
  tracker = WeightsAndBiases(workdir, workdir, 'proxy_0')
  for step in (start, start + 1):
    tracker.write_scalars(step, {'loss': 1 / step})
  tracker.close()
"""
READ = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2
# Records in the log format of LevelDB, in blocks of 32 KiB.
for file in sorted(Path(sys.argv[1]).glob('wandb/offline-run-*/*.wandb')):
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
def test_curves_are_in_the_files_of_weights_and_biases(peers: Path, tmp_path: Path):
  for script in (WRITE, READ):  # the package writes in the background until its process ends
    done = subprocess.run([peers, '-c', script, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
  kept = list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
  assert len(kept) == 2 and len({path.name for path in kept}) == 1, 'one run, resumed'
  found = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith('['))
  assert found == [[step, 1 / step] for step in (1, 2, 3, 4)]

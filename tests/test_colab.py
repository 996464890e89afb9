"""launch/colab.ipynb from its first cell to its last, at the smallest size, in a kernel of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / 'launch' / 'colab.ipynb'
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
NotebookClient(notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def test_outputs_are_stripped():
  cells = json.loads(NOTEBOOK.read_text())['cells']
  code = [cell for cell in cells if cell['cell_type'] == 'code']
  assert code
  assert [cell['id'] for cell in code if cell['outputs'] or cell['execution_count'] is not None] == []


@pytest.mark.slow
def test_runs_from_start_to_end(tmp_path):
  executed = tmp_path / 'executed.ipynb'
  environment = {
    **os.environ,
    'DSDM_JAX_NOTEBOOK_CONFIG': 'tests.pipeline.tiny',
    'DSDM_JAX_NOTEBOOK_WORKDIR': str(tmp_path / 'run'),
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_NUMPY_RANK_PROMOTION': 'allow',
    'IPYTHONDIR': str(tmp_path / 'ipython'),
    'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
  }
  done = subprocess.run(
    [sys.executable, '-c', EXECUTE, NOTEBOOK, ROOT, executed],
    env=environment, capture_output=True, text=True, check=False, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3_000:]
  cells = {cell['id']: cell for cell in json.loads(executed.read_text())['cells']}
  said = {
    name: ''.join(''.join(output['text']) for output in cells[name]['outputs'] if output['output_type'] == 'stream')
    for name in ('run', 'look', 'target')
  }
  assert 'report: done in' in said['run']
  assert said['look'].count('\n') == 2 + 10
  assert 'selection: done in' in said['target']
  assert 'also chosen for the mix' in said['target']
  assert any('image/png' in output.get('data', {}) for output in cells['plot']['outputs'])

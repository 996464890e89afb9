"""launch/colab.ipynb from its first cell to its last, at the smallest size, in a kernel of its own."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

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


def _install(folder: Path, source: str) -> subprocess.CompletedProcess:
  """The notebook's first cell in a folder that is no checkout, with SOURCE set as a reader would."""
  cells = json.loads(NOTEBOOK.read_text())['cells']
  (cell,) = (''.join(cell['source']) for cell in cells if cell['id'] == 'install')
  assert cell.count("SOURCE = ''") == 1
  script = cell.replace("SOURCE = ''", f'SOURCE = {source!r}') + '\nimport configs.base; print(configs.base.__file__)'
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  return subprocess.run(
    [sys.executable, '-c', script], cwd=folder, env=environment, capture_output=True, text=True, check=False
  )


def test_without_a_checkout_it_says_what_to_set(tmp_path):
  done = _install(tmp_path, '')
  assert done.returncode == 1
  assert done.stderr.strip() == 'Set SOURCE in this cell, above, and start it again.'


def test_an_uploaded_archive_will_do(tmp_path):
  with tarfile.open(tmp_path / 'uploaded.tar.gz', 'w:gz') as archive:
    archive.add(ROOT / 'configs', 'dsdm_jax-main/configs')
  for _ in range(2):  # a cell may be started again
    done = _install(tmp_path, 'uploaded.tar.gz')
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.strip() == str(tmp_path / 'dsdm_jax_checkout/dsdm_jax-main/configs/base.py')


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

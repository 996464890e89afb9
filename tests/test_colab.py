"""launch/colab.ipynb from the first cell to the last, at the smallest size."""

import json
import os
import shutil
import subprocess
import sys
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


def _install(folder: Path, source: str = '', workdir: str = '', before: str = '') -> subprocess.CompletedProcess:
  """Runs the notebook's first cell in a folder that is no checkout, with other settings; `before` goes before it."""
  cells = json.loads(NOTEBOOK.read_text())['cells']
  (cell,) = (''.join(cell['source']) for cell in cells if cell['id'] == 'install')
  for setting, value in (('SOURCE', source), ('WORKDIR', workdir)):
    given = next(line for line in cell.splitlines() if line.startswith(f'{setting} = '))
    cell = cell.replace(given, f'{setting} = {value!r}') if value else cell
  script = f'{before}\n{cell}\nfrom dsdm_jax.configs import base; print(base.__file__)'
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  return subprocess.run(
    [sys.executable, '-c', script], cwd=folder, env=environment, capture_output=True, text=True, check=False
  )


PIP = """
import subprocess, sys
def run(command, check):
  print(*command[1:])
  sys.path.insert(0, {root!r})  # what pip would do
subprocess.run = run
"""


def test_outside_a_checkout_pip_installs_from_the_repository(tmp_path):
  done = _install(tmp_path, before=PIP.format(root=str(ROOT)))
  assert done.returncode == 0, done.stderr[-2_000:]
  assert done.stdout.splitlines()[0] == '-m pip install --quiet git+https://github.com/dsdm-jax/dsdm_jax'


def test_a_workdir_on_drive_is_mounted(tmp_path):
  colab = tmp_path / 'google' / 'colab'
  colab.mkdir(parents=True)
  (colab / 'drive.py').write_text('def mount(path): print("mounted", path)')
  before = f'import google; google.__path__.append({str(tmp_path / "google")!r})'
  done = _install(tmp_path, workdir='/content/drive/MyDrive/dsdm', before=PIP.format(root=str(ROOT)) + before)
  assert 'mounted /content/drive' in done.stdout, done.stderr[-2_000:]


@pytest.mark.parametrize('form', ['gztar', 'zip'])
def test_uploaded_archive(tmp_path, form):
  checkout = tmp_path / 'upload' / 'dsdm_jax-main'
  shutil.copytree(ROOT / 'dsdm_jax', checkout / 'dsdm_jax', symlinks=True)
  shutil.copytree(ROOT / 'configs', checkout / 'configs')
  shutil.copy(ROOT / 'pyproject.toml', checkout)
  if form == 'zip':  # as Python unpacks the link that is in a .zip of git
    (checkout / 'dsdm_jax' / 'configs').unlink()
    (checkout / 'dsdm_jax' / 'configs').write_text('../configs')
  archive = shutil.make_archive(str(tmp_path / 'uploaded'), form, tmp_path / 'upload')
  for _ in range(2):  # the cell can run again
    done = _install(tmp_path, source=Path(archive).name)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.strip() == str(tmp_path / 'dsdm_jax_checkout/dsdm_jax-main/dsdm_jax/configs/base.py')


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
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3_000:]
  cells = {cell['id']: cell for cell in json.loads(executed.read_text())['cells']}
  printed = {
    name: ''.join(''.join(output['text']) for output in cells[name]['outputs'] if output['output_type'] == 'stream')
    for name in ('run', 'look', 'target')
  }
  assert '] report' in printed['run']
  assert printed['look'].count('\n') == 2 + 10
  assert 'selection' in printed['target']
  assert 'also chosen for the mix' in printed['target']
  assert any('image/png' in output.get('data', {}) for output in cells['plot']['outputs'])

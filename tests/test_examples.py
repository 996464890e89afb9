"""The examples run, and the public API imports only what is used."""

import gzip
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

import dsdm_jax
from examples import own_model
from tests.conftest import ROOT
from tests.pipeline import runs


def test_own_model_finds_the_rows_that_the_targets_were_copied_from():
  assert sorted(own_model.main().rows) == list(range(8))


def test_import_brings_in_neither_jax_nor_numpy():
  code = "import sys, dsdm_jax; print({'jax', 'numpy', 'pandas', 'tensorflow', 'matplotlib'} & set(sys.modules))"
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == 'set()'


def test_public_names():
  for name in dsdm_jax.__all__:
    assert getattr(dsdm_jax, name) is not None
  with pytest.raises(AttributeError, match="'dsdm_jax' has no attribute 'no_such_name'"):
    _ = dsdm_jax.no_such_name


@pytest.mark.peers
def test_whole_way_of_a_lab(peers, tmp_path):
  [packages] = (peers.parent.parent / 'lib').glob('python*/site-packages')
  code = (
    f"import json, runpy, sys; sys.path.append({str(packages)!r}); sys.argv = ['whole_way']\n"
    f"found = runpy.run_path('examples/whole_way.py')['main']([{str(tmp_path / 'run')!r}])\n"
    'print(json.dumps(found, default=str))'
  )
  done = subprocess.run(
    [ROOT / '.venv' / 'bin' / 'python', '-c', code],
    cwd=ROOT,
    env=runs.environment(1, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'home')),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3_000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert 0 <= found['next_word']['acc,none'] <= 1
  table = pq.read_table(tmp_path / 'run-parquet').to_pylist()
  assert sorted(record['id'] for record in table) == sorted(f'doc-{i}' for i in range(300))
  attributes = list((tmp_path / 'run-dolma').rglob('*.jsonl.gz'))
  lines = [json.loads(line) for file in attributes for line in gzip.decompress(file.read_bytes()).splitlines()]
  assert [line['id'] for line in lines] == [f'doc-{i}' for i in range(200, 300)]  # in the order of dolma's documents
  assert all(line['attributes']['dsdm__score_mix'] for line in lines)
  assert (tmp_path / 'run-model' / 'model.safetensors').is_file()
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  tasks = {(row['task'], row['split']) for row in results['summary']}
  assert tasks == {
    ('lm_eval.next_word', 'target'),
    ('lm_eval.next_word', 'holdout'),
    ('lm_eval.next_word.validation', 'benchmark'),
  }

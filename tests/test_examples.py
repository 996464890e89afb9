"""The examples run, and the public API imports only what is used."""

import gzip
import json
import re
import shlex
import subprocess
import sys
import typing

import pyarrow.parquet as pq
import pytest

import dsdm_jax
from dsdm_jax import pipeline
from dsdm_jax.config import schema
from dsdm_jax.config.validate import validate
from dsdm_jax.config.values import SOURCE_KINDS
from dsdm_jax.lm import hugging_face
from dsdm_jax.selection import documents, export
from examples import own_model, whole_way
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


def _rows(page: str, heading: str) -> list[list[str]]:
  """Cells of the lines of all tables in a section of a page, without heads."""
  section = re.split('(?m)^##', (ROOT / page).read_text().partition(heading)[2])[0]
  rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in section.splitlines() if line[:1] == '|']
  heads = [place for place, row in enumerate(rows) if set(''.join(row)) <= {'-', '|'}]
  return [row for place, row in enumerate(rows) if place not in heads and place + 1 not in heads]


def test_every_line_of_the_table_of_what_opens_what_is_a_test():
  rows = _rows('README.md', '### What opens what')
  assert len(rows) > 20
  for row in rows:
    file, name = re.fullmatch('`(.+)::(test_.+)`', row[-1]).groups()
    assert re.search(rf'(?m)^def {name}\(', (ROOT / 'tests' / file).read_text()), row


def test_the_tables_of_formats_have_those_of_the_program_and_no_others():
  loggers, *_ = typing.get_args(schema.Logs.model_fields['to'].annotation)
  names = {name for row in _rows('README.md', '### What opens what') for name in re.findall('`([^`]+)`', row[0])}
  known = {*SOURCE_KINDS, *hugging_face.FAMILIES, *export.FORMATS, *documents.FORMATS}
  known |= {*typing.get_args(loggers)}
  assert 'wandb' in known
  other = {
    'datasets',
    'loss_mask',
    'tokenizer.json',
    'transformers',
    '.npy',
    '.pt',
    '.parquet',
    'HarnessModel',
    'log.to',
  }
  assert known <= names and names - known - other <= {name for name in names if name.startswith('dsdm export')}
  assert {row[0].strip('`') for row in _rows('docs/pretraining.md', '## Models of Hugging Face')} == {
    *hugging_face.FAMILIES
  }
  exports = _rows('docs/selection.md', '## Export\n')
  assert {*export.FORMATS} <= {name for row in exports for name in re.findall('`([^`]+)`', row[0])}
  pins = (ROOT / 'requirements-peers.txt').read_text() + (ROOT / 'launch' / 'test.sh').read_text()
  pins += (ROOT / 'requirements.txt').read_text()
  versions = re.findall(r'`([\w-]+)` ([\d.]+\d)', '\n'.join(row[-1] for row in exports))
  assert len(versions) == 5 and all(f'{package}=={version}' in pins for package, version in versions), versions


def test_whole_way_fine_tunes_a_model_of_the_hub(monkeypatch, tmp_path):
  """The command of its docstring, up to the run: an id of the hub, and a rate for fine-tuning."""
  command = whole_way.__doc__.partition('WORKDIR ')[2].partition('\n\n')[0].replace('\\\n', ' ')
  configs = []

  def run(config, workdir):
    del workdir
    configs.append(config)
    raise StopIteration

  monkeypatch.setattr(pipeline, 'run', run)
  with pytest.raises(StopIteration):
    whole_way.main([str(tmp_path), *shlex.split(command)])
  [config] = configs
  validate(config)
  assert 1e-4 <= config.pretraining.train.learning_rate <= 1e-3
  assert re.fullmatch(r'[\w-]+/[\w.-]+', config.model.weights)


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

"""A pool is remade or refused if its source files have changed, and still usable if they are gone."""

import json
from pathlib import Path

import pytest

from dsdm_jax import pipeline
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from tests.helpers.data import RECORDS, lines, small_config
from tests.helpers.workdirs import files_of


def test_changed_files_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  file, workdir = tmp_path / 'a.jsonl', tmp_path / 'run'
  file.write_bytes(lines(RECORDS))
  config = small_config(sources=(f'jsonl:{file}',), vocabulary='bytes', leakage_guard=False)

  def run(**keys: bool) -> str:
    pipeline.run(config, workdir, 'pool', **keys)
    return capsys.readouterr().out

  run()
  assert 'pool: reused' in run()
  file.write_bytes(lines([*RECORDS, {'text': 'one more'}]))
  with pytest.raises(UserError, match=rf'pool\.files of jsonl:{file}.*1 files, state'):
    run()
  assert Pool(files_of(workdir, 'pool')).card['documents'] == len(RECORDS)
  assert 'reused' not in run(rerun=True)
  assert Pool(files_of(workdir, 'pool')).card['documents'] == len(RECORDS) + 1
  file.unlink()
  assert 'pool: reused' in run()
  settings = json.loads((workdir / 'pool' / 'manifest.json').read_text())['identity']['settings']
  assert settings[f'pool.files of jsonl:{file}'].startswith('1 files')

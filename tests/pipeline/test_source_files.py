"""A pool is remade or refused if its source files have changed, and still usable if they are gone."""

from pathlib import Path

import pytest

from dsdm_jax import pipeline
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool import build
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from tests.helpers.data import RECORDS, lines, small_config
from tests.helpers.workdirs import files_of


def test_changed_files_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  file, workdir = tmp_path / 'a.jsonl', tmp_path / 'run'
  file.write_bytes(lines(RECORDS))
  config = small_config(sources=(f'jsonl:{file}',), vocabulary='bytes')

  def run(**keys: bool) -> str:
    pipeline.run(config, workdir, 'pool', **keys)
    return capsys.readouterr().out

  run()
  assert 'nothing to do' in run()
  file.write_bytes(lines([*RECORDS, {'text': 'one more'}]))
  with pytest.raises(UserError, match=r'pool\.sources was \["jsonl: content \w+ of 1 file"\], now'):
    run()
  assert Pool(files_of(workdir, 'pool')).card['documents'] == len(RECORDS)
  assert 'nothing' not in run(rerun=True)
  assert Pool(files_of(workdir, 'pool')).card['documents'] == len(RECORDS) + 1
  moved = file.rename(tmp_path / 'b.jsonl')
  assert 'nothing to do' in run()
  config.pool.sources = (f'jsonl:{tmp_path}/misspelt.jsonl',)
  with pytest.raises(UserError, match=r'now \["jsonl: no file matches"\]'):
    run()
  config.pool.sources = (f'jsonl:{moved}',)
  assert 'nothing to do' in run()


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  file = tmp_path / 'a.jsonl'
  file.write_bytes(lines(RECORDS))
  config = small_config(sources=(f'jsonl:{file}',), vocabulary='bytes')
  real = build.run

  def slow(context: Context) -> dict:
    semantics = real(context)
    file.write_bytes(lines(RECORDS[1:]))
    return semantics

  monkeypatch.setattr(build, 'run', slow)
  with pytest.raises(UserError, match=r'a file changed while pool read it: pool\.sources was .*--rerun'):
    pipeline.run(config, tmp_path / 'run', 'pool')
  monkeypatch.setattr(build, 'run', real)
  pipeline.run(config, tmp_path / 'run', 'pool', rerun=True)
  assert Pool(files_of(tmp_path / 'run', 'pool')).card['documents'] == len(RECORDS) - 1

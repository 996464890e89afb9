"""What a user may get wrong: one line on stderr, exit code 2, nothing written."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsdm_jax import pipeline
from dsdm_jax.core import lock
from tests.pipeline import runs


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.pool.lenght=64'], ['--config.pool.lenght=64', 'mean "length"']),
    (['--config.zzz=64'], ['zzz', 'configs/base.py']),
    (['--config.pool.length=long'], ['pool.length', 'long']),
    (['--config.datamodel.damping=much'], ['datamodel.damping', 'much']),
    (['--config.datamodel.damping=0'], ['config key datamodel.damping = 0.0', 'greater than 0']),
    (['--config.pool.kinds=("poems",)'], ['pool.kinds', 'poems', 'licences']),
    (['--config.selection.targets=("squad",)'], ['selection.targets', 'squad']),
    (['--config.model.factory=no_such_module:build'], ['model.factory', 'no_such_module']),
    (['--config.features.output_fn=dsdm_jax.lm.outputs:margni'], ['features.output_fn', 'margni', 'margin']),
    (['--stage=pol'], ['--stage', 'pol', *pipeline.NAMES]),
    (['--workdri=x'], ['workdri', 'workdir']),
    (['stray'], ["'stray'"]),
    (['--config.targets.tasks=("no_such.jsonl",)'], ['no_such.jsonl', 'No such file']),
  ],
  ids=lambda value: value[0] if value[0].startswith('--') else '',
)
def test_bad_flag(tmp_path, flags, words):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', *flags)
  for word in words:
    assert word in message
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--workdir={}/run'], ['--config is missing', 'configs/quickstart.py']),
    ([runs.TINY], ['--workdir is missing', 'runs/quickstart']),
    (['--config=configs/no_such.py', '--workdir={}/run'], ['configs/no_such.py']),
    (['--config={}/slip.py', '--workdir={}/run'], ['slip.py', 'invalid syntax']),
    (['--config={}/empty.py', '--workdir={}/run'], ['empty.py', 'get_config']),
  ],
  ids=['no config', 'no workdir', 'no such config', 'broken config', 'config without get_config'],
)
def test_missing_or_broken_config(tmp_path, flags, words):
  (tmp_path / 'slip.py').write_text('def get_config(:\n')
  (tmp_path / 'empty.py').write_text('')
  message = runs.refused(*(flag.format(tmp_path) for flag in flags))
  for word in words:
    assert word in message
  assert not (tmp_path / 'run').exists()


def test_batch_that_devices_do_not_divide(tmp_path):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', devices=3)
  assert 'config key proxies.train.batch_size = 16 must be a multiple of the 3 devices' in message
  assert '--config.proxies.train.batch_size=15' in message
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.pool.sources=("tests.pipeline.strangers:no_documents",)'], ['the pool is empty', 'pool.sources']),
    (['--config.pool.max_bytes=20', '--config.pool.max_document_bytes=20'], ['pool.vocab_size is 320']),
  ],
)
def test_empty_pool(tmp_path, flags, words):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', *flags)
  for word in [*words, 'raise pool.max_bytes']:
    assert word in message
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('line', 'word'),
  [
    ('{"context": "a", "answer": }', 'not JSON'),
    ('{"context": "a"}', '"continuation" is missing'),
    ('{"context": "a", "answer": " "}', '"answer" is empty'),
    ('["a", "b"]', 'found list'),
  ],
)
def test_target_file_with_a_broken_line(tmp_path, line, word):
  file = tmp_path / 'mine.jsonl'
  file.write_text('{"context": "a", "answer": "b"}\n\n' + line + '\n')
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', f'--config.targets.tasks=("{file}",)')
  assert message.startswith(f'{file}, line 3: ')
  assert word in message
  assert not (tmp_path / 'run').exists()


def test_target_file_that_is_not_utf8(tmp_path):
  file = tmp_path / 'mine.jsonl'
  file.write_bytes(b'{"context": "a", "answer": "b"}\n{"context": "\xff", "answer": "b"}\n')
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', f'--config.targets.tasks=("{file}",)')
  assert f'{file}, line 2: not UTF-8' in message


def test_guarded_benchmark_without_a_file(tmp_path):
  message = runs.refused(
    runs.TINY, f'--workdir={tmp_path / "run"}', '--config.pool.leakage_benchmarks=("piqa",)',
    f'--config.targets.folder={tmp_path}',
  )  # fmt: skip
  assert message.startswith(f'pool.leakage_benchmarks: benchmark piqa: {tmp_path} is no file and holds no piqa.jsonl; ')
  assert not (tmp_path / 'run').exists()


def test_workdir_that_another_run_has(copied):
  with lock.hold(copied):
    before = runs.fingerprint(copied)
    message = runs.refused(runs.TINY, f'--workdir={copied}')
    assert f'{copied} is in use by process {os.getpid()} of ' in message
    assert runs.fingerprint(copied) == before


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    (lambda file: file.unlink(), ['is missing']),
    (lambda file: file.write_bytes(file.read_bytes()[:-1]), ['bytes where']),
    (lambda file: _flip(file), ['has changed']),
  ],
  ids=['missing', 'cut', 'flipped'],
)
def test_damaged_artifact(copied, damage, words):
  file = copied / 'datamodel' / 'scores.npz'
  damage(file)
  before = runs.fingerprint(copied)
  message = runs.refused(runs.TINY, f'--workdir={copied}')
  for word in [str(file), f'delete {copied / "datamodel"}', *words]:
    assert word in message
  assert runs.fingerprint(copied) == before


def test_mixture_too_small_for_the_budget_where_repeats_are_forbidden(copied):
  shutil.rmtree(copied / 'pretraining')
  flags = ('--rerun', '--stage=pretraining', '--config.pretraining.max_epochs=1')
  message = runs.refused(runs.TINY, f'--workdir={copied}', *flags)
  assert re.match(r"part '\S+' has 32 rows but is to give 64 examples, and 32 are the most; ", message)
  assert not (copied / 'pretraining.part').exists()


def _flip(file: Path) -> None:
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(bytes(data))


def test_workdir_is_a_file(tmp_path):
  (tmp_path / 'run').write_text('mine')
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}')
  assert str(tmp_path / 'run') in message
  assert (tmp_path / 'run').read_text() == 'mine'


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
  """A small file system in memory; the test is skipped where this user may not mount one."""
  folder.mkdir()
  if os.geteuid() != 0:
    pytest.skip('mounting a small file system takes root')
  done = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)], capture_output=True, text=True, check=False
  )
  if done.returncode:
    pytest.skip(f'no file system can be mounted here: {done.stderr.strip()}')
  try:
    yield folder
  finally:
    subprocess.run(['umount', '-l', str(folder)], check=True)


def test_read_only_disk(tmp_path):
  with mounted(tmp_path / 'disk', 'ro,size=1m') as disk:
    message = runs.refused(runs.TINY, f'--workdir={disk / "run"}')
    assert f'cannot write {disk / "run"}: Read-only file system' in message
    assert '--workdir' in message
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize('stage', ['pool', 'proxies', 'features'])
def test_full_disk_keeps_what_is_finished_and_goes_on_when_there_is_room(finished, tmp_path, stage):
  kept = pipeline.NAMES[: pipeline.NAMES.index(stage)]
  size = sum(f.stat().st_size for name in kept for f in (finished / name).rglob('*') if f.is_file())
  room = {'pool': 60, 'proxies': 40, 'features': 60}[stage] * 1024 + int(size * 1.3)
  with mounted(tmp_path / 'disk', f'size={room}') as disk:
    for name in kept:
      shutil.copytree(finished / name, disk / name)
    before = runs.fingerprint(disk)
    flags = (runs.TINY, f'--workdir={disk}', f'--stage={stage}')
    done = runs.run(*flags)
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('dsdm_jax: cannot write ')
    assert 'No space left on device' in last
    assert 'finished stages are kept' in last
    after = runs.fingerprint(disk)
    assert {f: after[f] for f in before} == before
    assert not (disk / stage).exists()
    subprocess.run(['mount', '-o', 'remount,size=64m', str(disk)], check=True)
    runs.succeed(*flags)
    assert (disk / stage / 'manifest.json').is_file()


def test_secrets_of_the_environment_are_written_nowhere(finished):
  """The run was given them in variables that clouds and hubs use."""
  secret = runs.SECRET.encode()
  assert [str(p) for p in [*finished.rglob('*'), finished.parent / 'finished.out'] if _holds(p, secret)] == []
  assert _holds(finished / 'results.json', b'datamodel.damping')  # the look itself finds what is there


def _holds(path: Path, text: bytes) -> bool:
  return path.is_file() and text in path.read_bytes()


@pytest.mark.parametrize(
  'path', ['https://ann:s3cret@hub.example/task.jsonl', 's3://key:s3cret@bucket/a.jsonl'], ids=['https', 's3']
)
def test_password_in_the_config_is_refused_and_not_repeated(tmp_path, path):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', f'--config.targets.tasks=("{path}",)')
  assert 'config key targets.tasks holds a password' in message
  assert 's3cret' not in message
  assert not (tmp_path / 'run').exists()

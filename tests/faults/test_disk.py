"""Disk faults in finished work: the next run names the file, and only one stage, or one shard, is recomputed."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax import pipeline
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core import artifacts, storage
from dsdm_jax.errors import UserError
from tests.conftest import FAULTS, ROOT
from tests.helpers.workdirs import files_of
from tests.pipeline import runs
from tests.pipeline.test_bad_input import _flip


def cut(file: Path) -> None:
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


CASES = {
  'flipped bit in the pool': ('pool', 'dataset/*.array_record*', _flip, 'has changed'),
  'manifest cut short': ('targets', 'manifest.json', cut, 'is unreadable'),
  'file missing': ('targets', '*.target.npz', Path.unlink, 'is missing'),
  'flipped bit in a model': ('proxies', 'proxy_0/*/state/d/*', _flip, 'has changed'),
  'write torn': ('datamodel', 'scores/mix/score_N.000000.npy', cut, 'bytes where'),
  'arm lost': ('selection', '*.npz', Path.unlink, 'is missing'),
  'model torn': ('pretraining', '*/*/state/d/*', cut, 'bytes where'),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES if FAULTS else list(CASES)[1:3])
def test_fault_is_named_and_one_stage_rerun(server, finished, copied, tmp_path, count, case):
  stage, pattern, fault, words = CASES[case]
  folder = copied / stage if pattern == 'manifest.json' else files_of(copied, stage)
  file = sorted(folder.glob(pattern))[0]
  fault(file)
  before = runs.fingerprint(copied)
  log = tmp_path / 'log'

  def run() -> int:
    return server.start(log, runs.TINY, f'--workdir={copied}').wait(300)

  assert run() == 2
  message = log.read_text().splitlines()[-1]
  assert message.startswith('dsdm_jax: ')
  assert str(file) in message and words in message and f'delete {copied / stage}' in message
  assert runs.fingerprint(copied) == before
  shutil.rmtree(copied / stage)
  events = len(runs.events(copied))
  assert run() == 0, log.read_text()[-2000:]
  assert runs.stages_run(copied, events) == [stage]
  runs.assert_same_outcome(copied, finished)
  count('faults injected')


@pytest.mark.slow
def test_a_damaged_shard_of_finished_features_is_named_and_alone_recomputed(server, finished, copied, tmp_path, count):
  shard = files_of(copied, 'features') / 'features_1.zarr/c/1/0'
  _flip(shard)
  before, events, log = runs.fingerprint(copied), len(runs.events(copied)), tmp_path / 'log'
  assert server.start(log, runs.TINY, f'--workdir={copied}').wait(300) == 0, log.read_text()[-2000:]
  assert f'{shard} has changed since it was written; only this file is computed again' in log.read_text()
  assert runs.stages_run(copied, events) == ['features']
  runs.assert_same_outcome(copied, finished)
  after = runs.fingerprint(copied)
  written = {copied / name for name in before if after[name] != before[name] and name.startswith('features/')}
  part = files_of(copied, 'features')
  assert written - {part / 'cost.json', part / 'begun.json'} == {
    shard,
    part / 'features_1.done/000001.json',
    part.parent / 'manifest.json',
  }
  assert after[str(shard.relative_to(copied))][0] == runs.fingerprint(finished)[str(shard.relative_to(copied))][0]
  count('faults injected')


FAULTS_OF_A_SHARD = {
  'flipped bit': _flip,
  'cut to ten bytes': lambda file: file.write_bytes(file.read_bytes()[:10]),
  'lost': Path.unlink,
}


@pytest.mark.parametrize('fault', FAULTS_OF_A_SHARD)
@pytest.mark.parametrize(('dtype', 'shard', 'rows'), [('bfloat16', 1, '4 to 7'), ('int8', 2, '8 to 9')])
def test_one_shard_of_a_store_is_recomputed(tmp_path, count, dtype, shard, rows, fault):
  phi_NJ = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)

  def opened() -> FeatureStore:
    return FeatureStore(tmp_path / 'features_0.zarr', 10, 8, 4, dtype)

  def repair() -> None:
    store = opened()
    assert store.missing() == [shard]
    store.write(shard, phi_NJ[slice(*store.bounds(shard))])
    assert opened().missing() == []

  store = opened()
  for number in store.missing():
    store.write(number, phi_NJ[slice(*store.bounds(number))])
  wanted = store.read(shard)
  others = {k: v for k, v in runs.fingerprint(tmp_path).items() if f'/{shard}' not in k and f'00{shard}' not in k}
  for array in ('features_0.zarr', 'features_0.scales.zarr')[: 2 if dtype == 'int8' else 1]:
    FAULTS_OF_A_SHARD[fault](tmp_path / array / 'c' / str(shard) / '0')
    with pytest.raises(UserError, match=rf'rows {rows} in .*features_0.zarr cannot be read'):  # and not zeros
      opened().read(shard)
    repair()
    np.testing.assert_array_equal(opened().read(shard), wanted)
  (tmp_path / 'features_0.done' / f'00000{shard}.json').write_text('{"ro')
  repair()
  after = runs.fingerprint(tmp_path)
  assert {k: after[k] for k in others} == others
  count('faults injected', 2)


def test_shards_of_another_run_are_refused_by_name(tmp_path):
  """As where folders of jobs are laid over each other: markers say whose a shard is, whichever notes came last."""

  def opened(folder: Path, origin: str) -> FeatureStore:
    return FeatureStore(folder / 'features_0.zarr', 12, 8, 4, 'bfloat16', origin=origin)

  mine, theirs = (opened(tmp_path / name, name) for name in ('mine', 'theirs'))
  mine.write(0, np.ones((4, 8), np.float32))
  theirs.write(2, np.ones((4, 8), np.float32))
  shutil.copytree(tmp_path / 'theirs', tmp_path / 'mine', dirs_exist_ok=True)
  with pytest.raises(
    UserError, match=r'mine/features_0.zarr/c/2/0 is of a run with other settings.*000002.json'
  ) as error:
    opened(tmp_path / 'mine', 'mine').missing()
  assert 'delete that marker' in str(error.value)
  (tmp_path / 'mine/features_0.done/000002.json').unlink()
  assert opened(tmp_path / 'mine', 'mine').missing() == [1, 2]


def test_store_of_zeros_is_whole(tmp_path):
  store = FeatureStore(tmp_path / 'features_0.zarr', 4, 8, 4, 'float32')
  store.write(0, np.zeros((4, 8), np.float32))
  assert store.missing() == []
  assert not store.read(0).any()


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


def test_stage_in_the_lower_layer_of_an_overlay_can_be_replaced_and_repaired(tmp_path, count):
  """As in a container whose image holds a finished run: its folders cannot be renamed."""
  identity, other = (artifacts.Identity('features', 1, {'seed': seed}, {}) for seed in (0, 1))

  def make(workdir: Path, identity: artifacts.Identity) -> artifacts.Artifact:
    out = artifacts.begin(workdir, identity)
    for name in ('one', 'deep/two'):
      storage.write_text(out / name, name)
    return artifacts.commit(workdir, identity, {}, artifacts.Cost(out))

  with mounted(tmp_path / 'disk', 'size=8m') as disk:  # an overlay cannot lie on an overlay
    folders = [disk / name for name in ('lower', 'upper', 'work', 'run')]
    for folder in folders:
      folder.mkdir()
    lower, upper, work, run = folders
    make(lower, identity)
    before = runs.fingerprint(lower)
    options = f'lowerdir={lower},upperdir={upper},workdir={work}'
    done = subprocess.run(
      ['mount', '-t', 'overlay', '-o', options, 'overlay', str(run)], capture_output=True, check=False
    )
    if done.returncode:
      pytest.skip('no overlay can be mounted here')
    try:
      made = artifacts.read(run, 'features')['features']
      artifacts.publish(made)
      (made.path / 'one').write_text('eno')
      assert artifacts.reopen(made)
      repaired = make(run, identity)
      assert repaired.path == made.path and repaired.digest == made.digest
      replaced = make(run, other)
      replaced.verify()
      artifacts.publish(replaced)
      assert not made.path.exists()
      assert {finding.kind for finding in artifacts.inspect(run)} == {'whole'}
      assert runs.fingerprint(lower) == before
    finally:
      subprocess.run(['umount', '-l', str(run)], check=True)
  count('faults injected')


def test_read_only_disk(tmp_path, count):
  with mounted(tmp_path / 'disk', 'ro,size=1m') as disk:
    message = runs.refused(runs.TINY, f'--workdir={disk / "run"}')
    assert f'cannot use {disk / "run"}: Read-only file system' in message
    assert 'use another folder' in message
    assert list(disk.iterdir()) == []
  count('faults injected')


@pytest.mark.parametrize('stage', ['proxies', 'pool', 'features'] if FAULTS else ['proxies'])
def test_full_disk_keeps_what_is_finished_and_goes_on_when_there_is_room(finished, tmp_path, count, stage):
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
    assert last.startswith('dsdm_jax: cannot use ')
    assert 'No space left on device' in last
    assert 'finished stages are kept' in last
    after = runs.fingerprint(disk)
    assert {f: after[f] for f in before} == before
    assert not (disk / stage / 'manifest.json').exists()
    subprocess.run(['mount', '-o', 'remount,size=64m', str(disk)], check=True)
    runs.succeed(*flags)
    assert (disk / stage / 'manifest.json').is_file()
  count('faults injected')


LIMITS = {'-f 8': 'File too large', '-n 16': 'Too many open files'}


@pytest.mark.slow
@pytest.mark.skipif(not FAULTS, reason='launch/test.sh --faults runs it; test_operations.py has the short one')
@pytest.mark.parametrize('limit', LIMITS)
def test_limits_of_the_system_while_training_are_one_line(finished, tmp_path, count, limit):
  for name in ('pool', 'targets'):
    shutil.copytree(finished / name, tmp_path / name)
  flags = (runs.TINY, f'--workdir={tmp_path}', '--stage=proxies')
  done = subprocess.run(
    ['/bin/sh', '-c', f'ulimit {limit}; exec "$@"', 'sh', *runs.command(*flags)],
    cwd=ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr[-2000:]
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith(f'dsdm_jax: cannot use {tmp_path}') and LIMITS[limit] in last
  runs.succeed(*flags)
  count('faults injected')

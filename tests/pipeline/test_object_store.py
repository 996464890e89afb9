"""Runs whose workdir is in an object store: they leave what a run on a disk leaves, and every reader opens them."""

import json
import random
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import dsdm_jax
from dsdm_jax import cli
from dsdm_jax.core import storage
from dsdm_jax.core.storage import Address
from tests.core.test_processes import free_port
from tests.helpers.workdirs import files_of
from tests.pipeline import runs

pytestmark = pytest.mark.full  # whole runs
TWO = ('--config.distributed.processes=2', '--config.distributed.heartbeat_seconds=60')


def own_disk(folder: Path) -> dict[str, str]:
  """Variables of a process that finds nothing of another one on its disk."""
  folders = {name: folder / name.lower() for name in ('TMPDIR', 'HOME', 'XDG_CACHE_HOME')}
  for path in folders.values():
    path.mkdir(parents=True, exist_ok=True)
  return {name: str(path) for name, path in folders.items()}


def run(workdir: Address | Path, *flags: str, **environment: str) -> None:
  done = runs.run(runs.TINY, f'--workdir={workdir}', *flags, **environment)
  assert done.returncode == 0, done.stderr[-3000:]


def start_two(coordinator: str, workdir: Address | Path, disks: Path, **environment: str) -> list[runs.Run]:
  """Two processes of one run that share the workdir alone."""
  flags = (runs.TINY, f'--workdir={workdir}', f'--config.distributed.coordinator={coordinator}', *TWO)
  return [
    runs.start(*flags, f'--config.distributed.process={process}', **environment, **own_disk(disks / f'{process}'))
    for process in (0, 1)
  ]


def run_two(coordinator: str, workdir: Address | Path, disks: Path, **environment: str) -> None:
  for process in start_two(coordinator, workdir, disks, **environment):
    done = process.wait(600)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_bytes(found: Path, wanted: Path) -> None:
  """Of all files of scores and selections, and of what is compared of every two runs."""
  for stage in ('datamodel', 'selection'):
    here, there = (contents(files_of(workdir, stage)) for workdir in (found, wanted))
    assert here == there, stage
  runs.assert_same_outcome(found, wanted)


def contents(folder: Path) -> Mapping[str, bytes]:
  names = [name for name in storage.files(folder) if name.endswith(('.npz', '.npy')) or 'index.json' in name]
  assert names
  return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope='module')
def run_in_s3(stores: Callable[[str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Address:
  """A finished run in an object store that checks conditions of writes."""
  workdir = Address(f's3://tests/{secrets.token_hex(8)}/run')
  run(workdir, **stores('s3'), **own_disk(tmp_path_factory.mktemp('disk')))
  return workdir


@pytest.fixture
def remote(run_in_s3: Address, address: Address) -> Address:
  """The same, within reach of this process."""
  del address  # sets the environment
  return run_in_s3


def test_a_run_in_s3_is_the_run_on_a_disk(remote, finished):
  assert_same_bytes(storage.local(remote), finished)
  names = storage.files(remote)
  assert [name for name in names if storage.is_temporary(name)] == []
  events = [name for name in names if name.startswith('events/')]
  lines = [json.loads(line) for name in events for line in storage.read(remote / name).splitlines()]
  assert [e['stage'] for e in lines if e['event'] == 'end'] == runs.stages_run(finished)
  assert any(name.startswith('tensorboard/proxy_0/') for name in names)


def test_readers_open_a_run_in_an_object_store(remote, finished, tmp_path, capsys):
  here, there = dsdm_jax.load(finished), dsdm_jax.load(str(remote))
  np.testing.assert_array_equal(there.scores['mix'], here.scores['mix'])
  tokens_BL = there.pool.tokens([0, 1])
  np.testing.assert_array_equal(there.model('dsdm').logits(tokens_BL), here.model('dsdm').logits(tokens_BL))
  for workdir in (finished, remote):
    name = 'there' if workdir == remote else 'here'
    flags = ('--workdir', str(workdir), '--arm', 'dsdm')
    assert cli.main(['export', *flags, '--format', 'parquet', '--out', str(tmp_path / name / 'rows')]) == 0
    assert cli.main(['export', 'model', *flags, '--out', str(tmp_path / name / 'model')]) == 0
    flags = ('--workdir', str(workdir), '--format', 'parquet', '--out', str(tmp_path / name / 'documents'))
    assert cli.main(['export', 'documents', *flags]) == 0
  capsys.readouterr()
  exported = [
    {f: (folder / f).read_bytes() for f in storage.files(folder)} for folder in (tmp_path / 'here', tmp_path / 'there')
  ]
  assert exported[0].keys() == exported[1].keys()
  assert [name for name in exported[0] if exported[0][name] != exported[1][name]] == []
  assert cli.main(['verify', str(remote)]) == 0


def test_a_checkpoint_in_an_object_store_is_evaluated(remote, copied, stores):
  artifact = dsdm_jax.load(str(remote)).artifact('pretraining')
  flag = f"--config.evaluation.checkpoints=('other={artifact.path / 'dsdm--mix--0'}',)"
  runs.succeed(runs.TINY, f'--workdir={copied}', '--stage=evaluation', flag, '--rerun', **stores('s3'))
  evaluation = files_of(copied, 'evaluation')
  names = [run['method'] for run in json.loads((evaluation / 'runs.json').read_bytes())]
  with np.load(evaluation / 'items.npz') as items:
    for key, value in items.items():
      np.testing.assert_array_equal(value[names.index('other')], value[names.index('dsdm')], err_msg=key)


@pytest.mark.parametrize('address', ['gs'], indirect=True)
def test_a_run_in_gs_is_the_run_on_a_disk(address, stores, finished, tmp_path):
  run(address, **stores('gs'), **own_disk(tmp_path / 'disk'))
  assert_same_bytes(storage.local(address), finished)


@pytest.mark.parametrize('address', ['s3', 'gs'], indirect=True)
def test_two_processes_share_the_address_alone(address, stores, tmp_path):
  coordinator = f'127.0.0.1:{free_port()}'  # the config of both, which results.json has
  run_two(coordinator, tmp_path / 'local', tmp_path / 'shared')
  run_two(coordinator, address, tmp_path / 'disks', **stores(address.scheme))
  assert_same_bytes(storage.local(address), tmp_path / 'local')


@pytest.mark.parametrize('address', ['s3', 'gs'], indirect=True)
def test_killed_machines_of_two_lose_nothing(address, stores, tmp_path):
  """Both machines, or one and then the other, die at random moments, and new ones with empty disks go on."""
  coordinator, rng = f'127.0.0.1:{free_port()}', random.Random(address.scheme)
  run_two(coordinator, tmp_path / 'local', tmp_path / 'shared')
  kills = 0
  for start in range(5):
    started = start_two(coordinator, address, tmp_path / f'disks_{start}', **stores(address.scheme))
    time.sleep(rng.uniform(2, 12))
    for process in rng.sample(started, 2):
      if process.child.poll() is None:
        process.child.kill()
        kills += 1
      time.sleep(rng.choice([0, 2]))
    for process in started:
      process.wait(60)
  assert kills > 5
  run_two(coordinator, address, tmp_path / 'disks', **stores(address.scheme))
  assert_same_bytes(storage.local(address), tmp_path / 'local')

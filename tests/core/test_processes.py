"""Processes find each other, or all say in one line why not; process 0 decides."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from configs import base
from dsdm_jax.core import processes
from dsdm_jax.errors import UserError
from tests.conftest import ROOT


def free_port() -> int:
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def meet_all(*guests: tuple[int, int], seconds: float = 5.0, before=None) -> list[str]:
  """What each (processes, process) is refused with; '' where it is let in."""
  address = f'127.0.0.1:{free_port()}'
  refusals = [''] * len(guests)

  def one(place: int, count: int, process: int) -> None:
    try:
      processes.meet(address, count, process, seconds)
    except UserError as error:
      refusals[place] = str(error)

  threads = [threading.Thread(target=one, args=(i, *guest)) for i, guest in enumerate(guests)]
  for thread in threads:
    thread.start()
  if before is not None:
    before(address)
  for thread in threads:
    thread.join()
  return refusals


def test_all_come_in_any_order():
  assert meet_all((3, 2), (3, 0), (3, 1)) == ['', '', '']


def test_number_given_twice_is_told_to_all():
  refusals = meet_all((3, 0), (3, 1), (3, 1))
  assert set(refusals) == {'two processes have distributed.process = 1; give each a different number'}


def test_counts_that_differ_are_told_to_both():
  refusals = meet_all((2, 0), (3, 2))
  assert len(set(refusals)) == 1
  assert 'distributed.processes is 2 on process 0 and 3 on process 2' in refusals[0]


def test_one_that_does_not_come_is_named():
  refusals = meet_all((4, 0), (4, 1), (4, 3), seconds=1.0)
  assert len(set(refusals)) == 1
  assert 'distributed.processes = 4: process 2 did not connect' in refusals[0]


def test_no_process_0():
  (refusal,) = meet_all((2, 1), seconds=0.5)
  assert 'process 1 could not reach process 0 there' in refusal


def test_host_that_does_not_exist():
  with pytest.raises(UserError, match='no such host'):
    processes.meet('no-such-host.invalid:7777', 2, 1, 5.0)


def test_other_clients_at_the_port_are_ignored():
  def knock(address: str) -> None:
    host, port = processes.split(address)
    for message in (b'GET / HTTP/1.1\r\n\r\n\n', b'[1]\n', b'{}\n'):
      deadline = time.monotonic() + 4
      while time.monotonic() < deadline:
        try:
          with socket.create_connection((host, port), timeout=1) as connection:
            connection.sendall(message)
          break
        except ConnectionRefusedError:
          time.sleep(0.01)

  refusals = ['']
  address: list[str] = []

  def knock_then_come(at: str) -> None:
    knock(at)
    address.append(at)
    processes.meet(at, 2, 1, 4.0)

  refusals = meet_all((2, 0), before=knock_then_come)
  assert refusals == [''] and address


def test_one_process_decides_for_itself():
  assert processes.count() == 1 and processes.is_first()
  assert processes.decide(lambda: 7) == 7
  assert processes.gather('a') == ['a']
  processes.wait()


def start(program: str, *arguments: str, processes: int = 2, **keys: str) -> list[subprocess.Popen[str]]:
  """`program`'s lines after the start, in each of `processes` that are connected; {process} is its number."""
  address = f'127.0.0.1:{free_port()}'
  begun = []
  for process in range(processes):
    code = (
      'import pathlib, sys\n'
      'from configs import base\n'
      'from dsdm_jax.config import validate\n'
      'from dsdm_jax.core import processes\n'
      'from dsdm_jax.errors import UserError\n'
      'config = base.get_config()\n'
      f'config.distributed.update({{"coordinator": {address!r}, "processes": {processes}, "process": {process},\n'
      '  "heartbeat_seconds": 60, "start_seconds": 60})\n'
      f'process = {process}\n{keys.get("before", "")}\n'
      'try:\n'
      '  with processes.running(config, validate.flatten(config)):\n'
      + ''.join(f'    {line}\n' for line in program.splitlines())
      + 'except UserError as error:\n  print(error)\n  processes.leave(2)\nprocesses.leave(0)\n'
    )
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
    begun.append(
      subprocess.Popen(
        [sys.executable, '-c', code, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return begun


def ends(processes: list[subprocess.Popen[str]], seconds: float = 250) -> list[tuple[int, str, str]]:
  """(exit code, standard output, standard error) of each, read at once; all are killed after `seconds`."""

  def kill() -> None:
    for process in processes:
      process.kill()

  limit = threading.Timer(seconds, kill)
  limit.start()
  try:
    with ThreadPoolExecutor(len(processes)) as readers:
      outputs = list(readers.map(subprocess.Popen.communicate, processes))
  finally:
    limit.cancel()
  return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def test_process_0_decides_for_two_and_its_refusal_is_said_by_both(tmp_path):
  program = (
    'chosen = processes.decide(lambda: processes.decide(lambda: {"from": process}))\n'
    'print(chosen, processes.gather(process), processes.is_first())\n'
    'processes.check_shared(pathlib.Path(sys.argv[1]))\n'
    'def refuse():\n'
    '  raise UserError("the disk is odd; turn it")\n'
    'processes.decide(refuse)\n'
  )
  found = ends(start(program, str(tmp_path)))
  for process, (code, out, err) in enumerate(found):
    assert code == 2, err
    assert out.splitlines() == [f"{{'from': 0}} [0, 1] {process == 0}", 'the disk is odd; turn it']
  assert list(tmp_path.iterdir()) == []


def test_settings_that_differ_are_named_by_both():
  for code, out, err in ends(start('pass', before='config.seed = process')):
    assert code == 2, err
    assert out == 'seed is 0 on process 0 and 1 on process 1; start all processes with the same config\n'


def test_when_process_0_is_killed_the_other_prints_a_line():
  """The coordinator lives in process 0, and JAX aborts the others from a thread of its own."""
  program = (
    'import os, signal, time\n'
    'processes.wait()\n'
    'os.kill(os.getpid(), signal.SIGKILL) if process == 0 else time.sleep(200)\n'
  )
  began = time.monotonic()
  (killed, _, _), (code, _, err) = ends(start(program))
  assert killed == -signal.SIGKILL
  assert code != 0
  assert 'dsdm_jax: process 1 was ended: another process of the run was lost' in err
  assert 'the run resumes' in err
  assert time.monotonic() - began < 200


SLURM = {'SLURM_NODEID': '1', 'SLURM_GPUS_ON_NODE': '8'}


@pytest.mark.parametrize(
  ('environment', 'refused'),
  [
    (SLURM | {'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}, True),
    (SLURM | {'SLURM_STEP_TASKS_PER_NODE': '8(x4)'}, False),
    (SLURM | {'SLURM_STEP_TASKS_PER_NODE': '8,2'}, True),
    (SLURM | {'SLURM_STEP_TASKS_PER_NODE': '2,8(x3)'}, False),
    (SLURM | {'SLURM_STEP_TASKS_PER_NODE': '1(x4)', 'JAX_PLATFORMS': 'cpu'}, False),
    ({'SLURM_NODEID': '0', 'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}, False),  # nodes without GPUs
    ({}, False),
  ],
)
def test_gpus_that_slurm_would_leave_idle_are_told(environment, refused):
  if not refused:
    processes._check_slurm(environment)
    return
  with pytest.raises(UserError, match='for its 8 GPUs, and JAX uses one GPU per task.*--ntasks-per-node=8'):
    processes._check_slurm(environment)


def test_the_line_for_slurm_gives_each_gpu_a_process(monkeypatch):
  line = next(
    part for part in (ROOT / 'docs' / 'scale.md').read_text().split('\n\n') if part.lstrip().startswith('srun')
  )
  given = dict(re.findall(r'--([\w.-]+)=(\w+)', line))
  nodes, tasks, gpus = (int(given[key]) for key in ('nodes', 'ntasks-per-node', 'gpus-per-node'))
  assert tasks == gpus
  assert int(given['config.distributed.processes']) == nodes * tasks
  # What JAX makes of such a step: each task takes the GPU of its local number.
  from jax._src import clusters

  variables = {'JOB_ID': '7', 'STEP_NODELIST': 'n[1-4]', 'NTASKS': str(nodes * tasks), 'PROCID': '13', 'LOCALID': '5'}
  for key, value in variables.items():
    monkeypatch.setenv(f'SLURM_{key}', value)
  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, 'slurm', 60)
  assert found[1:] == (32, 13, [5])


def test_a_lost_process_is_noticed_within_a_minute():
  assert base.get_config().distributed.heartbeat_seconds <= 40


# What the normal end of the interpreter waits for: a thread, a worker of a pool, and a function of `atexit`.
HELD = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from fsspec import asyn
from dsdm_jax.core import compile_cache, processes

compile_cache.start()
for_ever = threading.Event()
threading.Thread(target=for_ever.wait).start()
ThreadPoolExecutor(1).submit(for_ever.wait)
asyn.get_loop()
atexit.register(for_ever.wait)
sys.stdout.write('out' * 100_000)
sys.stderr.write('err')
processes.leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize('code', [0, 2])
def test_a_process_ends_at_once_whatever_its_threads_do(code, tmp_path):
  environment = os.environ | {'XDG_CACHE_HOME': str(tmp_path)}
  command = [sys.executable, '-c', HELD, str(code)]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (code, 'out' * 100_000, 'err')
  assert list(tmp_path.glob('dsdm_jax/xla/*/running/*')) == [], 'the next start does not take it for a crash'

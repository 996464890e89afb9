"""Processes find each other, or all say in one line why not; process 0 decides."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from dsdm_jax.core import distributed, rendezvous
from dsdm_jax.core.errors import UserError
from tests.conftest import ROOT


def free_port() -> int:
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def meet_all(*guests: tuple[int, int], seconds: float = 5.0, before=None) -> list[str]:
  """What each (processes, process) is refused with; '' where it is let in."""
  address = f'127.0.0.1:{free_port()}'
  refusals = [''] * len(guests)

  def one(place: int, processes: int, process: int) -> None:
    try:
      rendezvous.meet(address, processes, process, seconds)
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
  assert set(refusals) == {'distributed.process = 1 was given to two processes; give each a number of its own'}


def test_counts_that_differ_are_told_to_both():
  refusals = meet_all((2, 0), (3, 2))
  assert len(set(refusals)) == 1
  assert 'distributed.processes is 2 on process 0 and 3 on process 2' in refusals[0]


def test_one_that_does_not_come_is_named():
  refusals = meet_all((4, 0), (4, 1), (4, 3), seconds=1.0)
  assert len(set(refusals)) == 1
  assert 'distributed.processes = 4: process 2 did not come' in refusals[0]


def test_no_process_0():
  (refusal,) = meet_all((2, 1), seconds=0.5)
  assert 'process 1 could not reach process 0 there' in refusal


def test_host_that_does_not_exist():
  with pytest.raises(UserError, match='no such host'):
    rendezvous.meet('no-such-host.invalid:7777', 2, 1, 5.0)


def test_strangers_at_the_port_do_not_matter():
  def knock(address: str) -> None:
    host, port = rendezvous.split(address)
    for said in (b'GET / HTTP/1.1\r\n\r\n\n', b'[1]\n', b'{}\n'):
      deadline = time.monotonic() + 4
      while time.monotonic() < deadline:
        try:
          with socket.create_connection((host, port), timeout=1) as connection:
            connection.sendall(said)
          break
        except ConnectionRefusedError:
          time.sleep(0.01)

  refusals = ['']
  address: list[str] = []

  def knock_then_come(at: str) -> None:
    knock(at)
    address.append(at)
    rendezvous.meet(at, 2, 1, 4.0)

  refusals = meet_all((2, 0), before=knock_then_come)
  assert refusals == [''] and address


def test_one_process_decides_for_itself():
  assert distributed.count() == 1 and distributed.is_first()
  assert distributed.decide(lambda: 7) == 7
  assert distributed.gather('a') == ['a']
  distributed.wait()


def start(program: str, *arguments: str, processes: int = 2, **keys: str) -> list[subprocess.Popen[str]]:
  """`program`'s lines after the start, in each of `processes` that are connected; {process} stands for the number."""
  address = f'127.0.0.1:{free_port()}'
  begun = []
  for process in range(processes):
    code = (
      'import sys\n'
      'from configs import base\n'
      'from dsdm_jax.core import config as checks, distributed\n'
      'from dsdm_jax.core.errors import UserError\n'
      'config = base.get_config()\n'
      f'config.distributed.update({{"coordinator": {address!r}, "processes": {processes}, "process": {process},\n'
      '  "heartbeat_seconds": 60, "start_seconds": 60})\n'
      f'process = {process}\n{keys.get("before", "")}\n'
      'try:\n'
      '  with distributed.running(config, checks.flatten(config)):\n'
      + ''.join(f'    {line}\n' for line in program.splitlines())
      + 'except UserError as error:\n  print(error)\n  distributed.leave(2)\ndistributed.leave(0)\n'
    )
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
    begun.append(
      subprocess.Popen(
        [sys.executable, '-c', code, *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      )
    )  # fmt: skip
  return begun


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
  """(exit code, standard output, standard error) of each; none is left behind."""
  try:
    said = [process.communicate(timeout=250) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, out, err) for process, (out, err) in zip(processes, said, strict=True)]


def test_process_0_decides_for_two_and_its_refusal_is_said_by_both(tmp_path):
  program = (
    'print(distributed.decide(lambda: {"from": process}), distributed.gather(process), distributed.is_first())\n'
    'distributed.check_shared(sys.argv[1])\n'
    'def refuse():\n'
    '  raise UserError("the disk is odd; turn it")\n'
    'distributed.decide(refuse)\n'
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

"""Control messages between the processes of a run: how many, and how long, at several numbers of processes.

Each number starts that many processes on this machine, with one CPU device each. They share its processors, so that
times grow with their number even where messages do not.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from dsdm_jax.config import schema
from dsdm_jax.config.validate import flatten
from dsdm_jax.core import processes
from dsdm_jax.core.mesh import greatest, make_mesh


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--processes', default='2,4,8,16', help='numbers of processes')
  parser.add_argument('--rounds', type=int, default=30, help='calls of which the median is taken')
  parser.add_argument('--worker', default='', help=argparse.SUPPRESS)


def run(flags: argparse.Namespace) -> None:
  if flags.worker:
    _work(flags)
    return
  print('processes  call      messages  ms')
  for number in map(int, flags.processes.split(',')):
    with socket.create_server(('127.0.0.1', 0)) as server:
      address = f'127.0.0.1:{server.getsockname()[1]}'
    command = [sys.executable, '-m', 'dsdm_jax.bench', 'processes', f'--rounds={flags.rounds}', '--worker']
    workers = [
      subprocess.Popen([*command, f'{address},{number},{i}'], stdout=subprocess.PIPE, text=True) for i in range(number)
    ]
    results = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    for call in results[0]:
      messages = sum(result[call]['messages'] for result in results)
      print(f'{number:9}  {call:8}  {messages:8.0f}  {1e3 * results[0][call]["seconds"]:.1f}', flush=True)


class _Counted:
  """The client of the coordination service, counting its calls: each is a message to the service and its answer."""

  def __init__(self, client: Any):
    self._client, self.messages = client, 0

  def __getattr__(self, name: str) -> Callable[..., Any]:
    method = getattr(self._client, name)

    def call(*arguments: Any) -> Any:
      self.messages += 1
      return method(*arguments)

    return call


def _work(flags: argparse.Namespace) -> None:
  address, number, process = flags.worker.split(',')
  config = schema.config_dict()
  config.distributed.update({'coordinator': address, 'processes': int(number), 'process': int(process)})
  jax.config.update('jax_num_cpu_devices', 1)
  with processes.running(config, flatten(config)):
    processes.before_devices()
    mesh, counted = make_mesh(config.mesh), _Counted(processes._client())
    processes._client = lambda: counted
    calls: dict[str, Callable[[], Any]] = {
      'decide': lambda: processes.decide(lambda: 1),
      'gather': lambda: processes.gather(1),
      'wait': processes.wait,
      'greatest': lambda: jax.device_get(greatest((0, 0), mesh)),
    }
    results = {}
    for name, call in calls.items():
      call()
      processes.wait()
      seconds, counted.messages = [], 0
      for _ in range(flags.rounds):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
      messages = counted.messages / flags.rounds
      results[name] = {'messages': messages, 'seconds': sorted(seconds)[len(seconds) // 2]}
  print(json.dumps(results))

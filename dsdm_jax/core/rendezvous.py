"""Processes of one run meet on a socket before JAX connects them.

JAX ends a process that cannot connect with a stack trace and no word of why: a wrong number, a number given twice, a
process that never came. Here process 0 hears each of the others first, and all of them end with the same one line.
"""

import contextlib
import json
import socket
import time

from dsdm_jax.errors import UserError

_RETRY_SECONDS = 0.1
_LINE_BYTES = 4_096  # the most that one side says


def meet(address: str, processes: int, process: int, seconds: float) -> None:
  """Returns once all processes have come to `address` ('host:port', of process 0) and agree who is who.

  Raises:
    UserError: on every process that can be told, when a number is taken twice, when processes disagree on how many they
      are, or when not all have come after `seconds`.
  """
  host, port = split(address)
  deadline = time.monotonic() + seconds
  if process == 0:
    refusal = _host(address, port, processes, deadline)
  else:
    refusal = _guest(address, host, port, processes, process, deadline)
  if refusal:
    raise UserError(refusal)


def split(address: str) -> tuple[str, int]:
  """('host', port) of 'host:port'."""
  host, _, port = address.rpartition(':')
  return host.strip('[]'), int(port)


def _host(address: str, port: int, processes: int, deadline: float) -> str:
  """Hears all others, answers all; '' or what is wrong."""
  guests: dict[int, socket.socket] = {}
  refusal = ''
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(socket.create_server(('', port), backlog=max(processes, 8)))
    except OSError as error:
      return (
        f'distributed.coordinator = {address!r}: process 0 cannot listen there ({error.strerror}); give an address of '
        'the machine of process 0 with a free port, and distributed.process = 0 to one process alone'
      )
    strangers = []
    while len(guests) < processes - 1 and not refusal:
      server.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        connection = stack.enter_context(server.accept()[0])
      except TimeoutError:
        missing = [str(i) for i in range(1, processes) if i not in guests]
        refusal = (
          f'distributed.processes = {processes}: process {", ".join(missing)} did not come to {address} in time; start '
          'all processes, each with its own distributed.process and all with the same distributed.processes'
        )
        break
      said = _hear(connection, 5.0)
      if said is None or not isinstance(said.get('process'), int):
        continue  # something else that looks for open ports
      number = said['process']
      if said.get('processes') != processes:
        strangers.append(connection)
        refusal = (
          f'distributed.processes is {processes} on process 0 and {said.get("processes")} on process {number}; give '
          'the same number to all'
        )
      elif number in guests:
        strangers.append(connection)
        refusal = f'distributed.process = {number} was given to two processes; give each a number of its own'
      else:
        guests[number] = connection
    for connection in [*guests.values(), *strangers]:
      with contextlib.suppress(OSError):  # one that is gone need not hear
        connection.sendall(json.dumps({'refusal': refusal}).encode() + b'\n')
  return refusal


def _guest(address: str, host: str, port: int, processes: int, process: int, deadline: float) -> str:
  while True:
    left = max(0.01, deadline - time.monotonic())
    try:
      with socket.create_connection((host, port), timeout=left) as connection:
        connection.sendall(json.dumps({'process': process, 'processes': processes}).encode() + b'\n')
        answer = _hear(connection, max(0.01, deadline - time.monotonic()) + 5)
        if answer is not None:
          return str(answer['refusal'])
        reason = 'it hung up'
    except socket.gaierror as error:
      return f'distributed.coordinator = {address!r}: no such host ({error.strerror}); name the machine of process 0'
    except OSError as error:
      reason = error.strerror or type(error).__name__
    if time.monotonic() + _RETRY_SECONDS >= deadline:
      return (
        f'distributed.coordinator = {address!r}: process {process} could not reach process 0 there ({reason}); start '
        'process 0 too, and let the address be one that all machines reach'
      )
    time.sleep(_RETRY_SECONDS)


def _hear(connection: socket.socket, seconds: float) -> dict | None:
  """One JSON object on a line; None where there comes none."""
  connection.settimeout(seconds)
  data = b''
  try:
    while not data.endswith(b'\n') and len(data) < _LINE_BYTES:
      part = connection.recv(_LINE_BYTES)
      if not part:
        return None
      data += part
    said = json.loads(data)
  except (OSError, ValueError):
    return None
  return said if isinstance(said, dict) else None

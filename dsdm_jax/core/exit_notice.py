"""Says why a process ended where it cannot say so itself.

When the coordinator of a run of several processes is gone, JAX aborts the others from a thread of its own, with a C++
stack trace for a message. A small child waits at a pipe instead: when its parent goes without having withdrawn it, it
prints the line.
"""

import subprocess
import sys

_PROGRAM = 'import sys\nif not sys.stdin.buffer.read(): sys.stderr.write(sys.argv[1])'


class LastWord:
  """Prints `line` on standard error when this process ends, however it ends, before `withdraw` was called."""

  def __init__(self, line: str):
    self._child = subprocess.Popen(
      [sys.executable, '-I', '-S', '-c', _PROGRAM, f'{line}\n'], stdin=subprocess.PIPE, start_new_session=True
    )

  def withdraw(self) -> None:
    self._child.communicate(b'.')

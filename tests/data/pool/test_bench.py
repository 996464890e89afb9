"""The bench counts the memory of every process that prepares a pool."""

import subprocess
import sys

from dsdm_jax.bench import data

_HOLDS = "held = b'x' * 200_000_000; print('ready', flush=True); input()"
_PARENT = f'import subprocess, sys; sys.exit(subprocess.run([sys.executable, "-c", {_HOLDS!r}]).returncode)'


def test_memory_of_a_process_below_a_process_counts():
  with data.memory_watched() as seen:
    child = subprocess.Popen([sys.executable, '-c', _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == 'ready\n'
    during = data.family_bytes()
    child.communicate('\n')
  # Against after, not before: this process may free memory of earlier tests in between.
  assert during - data.family_bytes() > 200_000_000
  assert max(seen) <= during + 100_000_000

"""The cache of compiled programs is the user's own, and a start that crashed empties it."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import ROOT

START = """
  import os, sys
  from dsdm_jax.core import compile_cache
  alone, signal = sys.argv[1:]
  cache, line = compile_cache.start(alone == 'alone')
  print(cache, flush=True)
  print(line, flush=True)
  if signal != '0':
    os.kill(os.getpid(), int(signal))
"""


def start(home: Path, alone: bool = True, ends_by: int = 0) -> tuple[str, str]:
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(START), 'alone' if alone else 'several', str(int(ends_by))],
    cwd=ROOT,
    env=os.environ | {'XDG_CACHE_HOME': str(home)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == -ends_by and 'Traceback' not in done.stderr, done.stderr
  cache, line = done.stdout.splitlines()
  return cache, line


@pytest.mark.parametrize(
  ('ends_by', 'alone', 'emptied'),
  [
    (0, True, False),
    (signal.SIGKILL, True, False),
    (signal.SIGTERM, True, False),
    (signal.SIGSEGV, True, True),
    (signal.SIGBUS, False, True),
    (signal.SIGABRT, True, True),
    (signal.SIGABRT, False, False),  # a partner was lost
  ],
)
def test_a_crash_and_nothing_else_empties_the_cache(tmp_path, ends_by, alone, emptied):
  cache, line = start(tmp_path, alone, ends_by)
  assert Path(cache).is_relative_to(tmp_path) and line == ''
  entry = Path(cache) / 'jit_apply-0123-cache'
  entry.write_bytes(b'x')
  again, line = start(tmp_path)
  assert again == cache and entry.exists() != emptied
  assert line.startswith('an earlier start crashed (') == emptied and line.endswith('emptied it') == emptied
  assert list((Path(cache) / 'running').iterdir()) == []
  assert start(tmp_path) == (cache, '')


def test_a_home_that_cannot_be_written_has_no_cache(tmp_path):
  (tmp_path / 'file').write_text('')
  assert start(tmp_path / 'file') == ('None', '')

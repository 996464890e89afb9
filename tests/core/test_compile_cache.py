"""The cache of compiled programs is the user's own, and a start that crashed empties it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from hashlib import sha256
from pathlib import Path

import pytest

from dsdm_jax.configs.base import get_config
from dsdm_jax.core import compile_cache, runner
from dsdm_jax.core.runner import load
from dsdm_jax.core.stage import Stage
from tests.conftest import ROOT

START = """
  import os, sys
  from dsdm_jax.core import compile_cache
  alone, signal = sys.argv[1:]
  cache, line = compile_cache.start(alone == 'alone')
  if cache is not None:
    (cache / 'jit_apply-0123-cache').write_bytes(b'program')
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
  again, line = start(tmp_path)
  assert again == cache
  assert line.startswith('an earlier start crashed (') == emptied and line.endswith('emptied it') == emptied
  assert list((Path(cache) / 'running').iterdir()) == []
  assert start(tmp_path) == (cache, '')


@pytest.mark.parametrize('damage', ['none', *range(0, 7 * 8, 5), 'cut', 'other', 'note', 'no note'])
def test_an_entry_that_has_changed_is_deleted_before_jax_reads_it(tmp_path, monkeypatch, damage):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(compile_cache, '_put_canary', lambda path: None)  # of this process, which does not end
  monkeypatch.setattr(compile_cache.atexit, 'register', lambda *call: None)
  cache, _ = compile_cache.start()
  entry, note = cache / 'jit_apply-0123-cache', cache / 'checksums.json'
  entry.write_bytes(b'program')
  compile_cache.note(cache)
  if isinstance(damage, int):
    data = bytearray(entry.read_bytes())
    data[damage // 8] ^= 1 << damage % 8
    entry.write_bytes(data)
  elif damage == 'cut':
    entry.write_bytes(b'prog')
  elif damage == 'other':
    (cache / 'jit_other-0123-cache').write_bytes(b'of a process that was killed')
  elif damage != 'none':
    note.write_bytes(b'{"jit' if damage == 'note' else b'{}')
  again, line = compile_cache.start()
  assert again == cache and [p.name for p in cache.glob('jit*')] == (
    [entry.name] if damage in ('none', 'other') else []
  )
  assert line.startswith('1 compiled programs in ') == (isinstance(damage, int) or damage == 'cut')
  entry.write_bytes(entry.read_bytes() if entry.exists() else b'compiled again')
  compile_cache.note(cache)
  assert compile_cache.start() == (cache, '') and entry.exists()


def test_a_home_that_cannot_be_written_has_no_cache(tmp_path):
  (tmp_path / 'file').write_text('')
  assert start(tmp_path / 'file') == ('None', '')


def test_programs_are_noted_after_each_stage(tmp_path, monkeypatch):
  """So a kill in a later stage does not cost them."""
  cache, workdir = tmp_path / 'cache', tmp_path / 'run'
  cache.mkdir()

  def compiles(context):
    (cache / 'jit_apply-0123-cache').write_bytes(b'program')
    return {}

  monkeypatch.setattr(runner, 'load', lambda name: compiles if name == 'any:code' else load(name))
  only = runner.Runner([Stage('pool', (), ('seed',), 'any:code')], get_config(), workdir)
  only._cache = cache
  workdir.mkdir()
  only.run_stage(only.stages['pool'])
  assert json.loads((cache / 'checksums.json').read_text()) == {'jit_apply-0123-cache': sha256(b'program').hexdigest()}

"""What parsing raises becomes one line that names the flag."""

import subprocess

import pytest
from absl import flags

from dsdm_jax.core.command_line import explain
from tests.pipeline import runs

ARGV = ['dsdm_jax', '--config=mine.py', '--config.pool.lenght=3', '--workdir=w']


@pytest.mark.parametrize(
  ('error', 'start'),
  [
    (KeyError('\'lenght\'\nDid you mean "length" instead of "lenght"?'), '--config.pool.lenght=3: '),
    (AttributeError("no field 'lenght'"), '--config.pool.lenght=3: '),
    (SyntaxError('invalid syntax'), '--config=mine.py: SyntaxError: invalid syntax; '),
    (AttributeError("module 'm' has no attribute 'get_config'"), '--config=mine.py: AttributeError: '),
    (ZeroDivisionError(), '--config=mine.py: ZeroDivisionError: ZeroDivisionError; '),
    (flags.UnrecognizedFlagError('workdri'), "Unknown command line flag 'workdri'"),
  ],
)
def test_line(error, start):
  line = explain(error, ARGV)
  assert line.startswith(start)
  assert '\n' not in line
  assert '; ' in line


def test_help_names_the_flags_and_is_no_error():
  usage = runs.succeed('--help')
  assert usage == runs.succeed('-h')
  assert usage.startswith('usage: python -m dsdm_jax.main --config=FILE --workdir=FOLDER ')
  for flag in ('--config', '--workdir', '--stage', '--[no]rerun'):
    assert f'\n  {flag}: ' in usage


def test_help_into_a_pipe_that_is_closed_is_silent():
  with subprocess.Popen(
    runs.command('--help'), cwd=runs.ROOT, env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.close()
    assert process.stderr.read() == b''
  assert process.returncode == 0

"""What parsing raises becomes one line that names the flag."""

import errno
import os
import subprocess
import sys

import pytest
from absl import flags

from dsdm_jax.core.command_line import cannot_use, explain, system_error
from tests.conftest import ROOT
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
  # Of the main module, which a forked run is not.
  usage, short = (subprocess.check_output(runs.command(f), cwd=ROOT, env=runs.environment()) for f in ('--help', '-h'))
  assert usage == short
  usage = usage.decode()
  assert usage.startswith('usage: python -m dsdm_jax.main --config=FILE --workdir=FOLDER ')
  for flag in ('--config', '--workdir', '--stage', '--[no]rerun'):
    assert f'\n  {flag}: ' in usage


def test_help_into_a_pipe_that_is_closed_is_silent():
  with subprocess.Popen(
    runs.command('--help'), cwd=ROOT, env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.close()
    assert process.stderr.read() == b''
  assert process.returncode == 0


def test_output_into_a_pipe_that_is_closed_is_silent_and_ends_as_by_its_signal(tmp_path):
  """At once, as where a line is flushed, or when what is left of it is written at the end."""
  (tmp_path / 'run' / 'pool').mkdir(parents=True)
  (tmp_path / 'run' / 'pool' / 'manifest.json').write_text('{}')
  verify = [sys.executable, '-m', 'dsdm_jax.cli', 'verify', str(tmp_path / 'run')]
  assert subprocess.run(verify, cwd=ROOT, capture_output=True, check=False).stdout
  for buffered in ('', '1'):
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {'PYTHONUNBUFFERED': buffered}
    done = subprocess.run(verify, cwd=ROOT, env=environment, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b'')


@pytest.mark.parametrize('number', 'EIO ESTALE EFBIG EPIPE EMFILE ENOSPC EDQUOT EROFS EXDEV ENOMEM ELOOP'.split())
def test_errors_of_the_system_are_one_line(number):
  """Wherever they come from: the system, another package's exception, or the text of TensorStore or ArrayRecord."""
  code = getattr(errno, number)
  error = OSError(code, os.strerror(code), '/disk/file')
  hidden = ValueError(f"INTERNAL: Error writing '/disk/file' [os_error_code='{code}']")
  caused = RuntimeError('a checkpoint failed')
  caused.__cause__ = hidden
  record = RuntimeError(f'read() failed: {os.strerror(code)}; reading /disk/file; at byte 0; Could not read')
  pairs = ((error, '/disk/file'), (hidden, 'runs/mine'), (caused, 'runs/mine'), (record, '/disk/file'))
  for raised, named in pairs:
    found = system_error(raised)
    line = cannot_use(found, 'runs/mine')
    piped = number == 'EPIPE' and not found.filename
    assert found.errno == code and '\n' not in line and line.endswith(' is kept' if piped else ' are kept')
    assert piped or line.startswith(f'cannot use {named}: {os.strerror(code)}; ')
  assert system_error(KeyError('x')) is None and system_error(OSError('no number')) is None
  caused_by_itself = ValueError('x')  # by `raise error from error`
  caused_by_itself.__cause__ = caused_by_itself
  assert system_error(caused_by_itself) is None


STREAMS = """
import sys
from dsdm_jax.core.command_line import cannot_use, open_streams, report
open_streams()
with open(sys.argv[1], 'w') as file:
  assert file.fileno() > 2
  try:
    print('\u03bb score', flush=True)
    print('progress \u03bb', file=sys.stderr, flush=True)
  except OSError as error:
    assert cannot_use(error, 'runs/mine').startswith('cannot write standard ')
report('dsdm_jax: the last line \u03bb')
sys.exit(2)
"""


@pytest.mark.parametrize(
  ('encoding', 'shown', 'closed'),
  [('ascii', '\\u03bb', ''), ('latin-1', '\\u03bb', ''), ('utf-8', 'λ', '')]
  + [('utf-8', 'λ', closed) for closed in ('>&-', '2>&-', '>&- 2>&-', '<&- >&- 2>&-', '>/dev/full', '2>/dev/full')],
)
def test_streams_that_are_closed_full_or_narrow_end_with_the_line_alone(tmp_path, encoding, shown, closed):
  done = subprocess.run(
    ['/bin/sh', '-c', f'"$0" -c "$1" "$2" {closed}', sys.executable, STREAMS, str(tmp_path / 'file')],
    cwd=ROOT,
    env=os.environ | {'PYTHONIOENCODING': encoding},
    capture_output=True,
    check=False,
  )
  assert done.returncode == 2, done.stderr
  out, err = (stream.decode(encoding) for stream in (done.stdout, done.stderr))
  assert out == ('' if '>&-' in closed.replace('2>&-', '') or closed == '>/dev/full' else f'{shown} score\n')
  progress = '' if closed == '>/dev/full' else f'progress {shown}\n'
  assert err == ('' if closed.endswith(('2>&-', '2>/dev/full')) else f'{progress}dsdm_jax: the last line {shown}\n')
  assert (tmp_path / 'file').read_bytes() == b''

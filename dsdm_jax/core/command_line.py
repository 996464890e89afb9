"""Errors of the command line and of the disk as one line, and --help."""

import contextlib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from dsdm_jax.core import stopping
from dsdm_jax.errors import StoreError, UserError, as_os_error, visible

# What to do about errors of the system; about others, whatever resolves them.
_REMEDIES = {
  errno.ENOSPC: 'free space there',
  errno.EDQUOT: 'free space there',
  errno.EFBIG: 'raise the limit on the size of files (ulimit -f)',
  errno.EMFILE: 'raise the number of open files (ulimit -n 4096)',
  errno.ENFILE: 'close other programs, or raise the number of open files of this machine',
  errno.EIO: 'check that disk (dmesg)',
  errno.ESTALE: 'look whether another machine has replaced it',
  errno.ENOMEM: 'use a machine with more memory',
}


_STREAMS = ('standard output', 'standard error')
_USAGE = """usage: python -m dsdm_jax.main --config=FILE --workdir=FOLDER [--stage=STAGE] [--config.KEY=VALUE ...]

configs/quickstart.py is the place to begin, and docs/keys.md has every key with its unit.
"""


class _Help(flags.BooleanFlag):
  """--help: prints the flags and exits with code 0."""

  def __init__(self) -> None:
    super().__init__('help', False, 'Print this text and exit.', short_name='h')

  def parse(self, argument: Any) -> None:
    super().parse(argument)
    if self.value:
      _, _, of_program = flags.FLAGS.main_module_help().partition(':\n')
      try:
        sys.stdout.write(f'{_USAGE}\n{of_program}\n')
        sys.stdout.flush()
      except BrokenPipeError:  # as by `| head`; nothing is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(0)


flags.DEFINE_flag(_Help())


def open_streams() -> None:
  """Makes standard output and error usable: one that is closed goes nowhere, and one in ASCII escapes other characters.

  Otherwise the next file to be opened would get the number of a closed stream, and libraries would print into it.
  """
  for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(number, 'r' if number == 0 else 'w', closefd=False))  # noqa: SIM115  for good
    elif number and hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')
      for method in ('write', 'flush'):
        if not isinstance(getattr(stream, method), functools.partial):
          setattr(stream, method, functools.partial(_naming, getattr(stream, method), _STREAMS[number - 1]))


def _naming(call: Callable[..., Any], stream: str, *arguments: Any) -> Any:
  try:
    return call(*arguments)
  except OSError as error:  # which would name nothing
    error.filename = stream
    raise


def system_error(error: BaseException | None) -> OSError | None:
  """The error of the system behind `error`: itself, what caused it, or what TensorStore or Orbax report as text."""
  while error is not None:
    if isinstance(error, OSError) and error.errno is not None:
      return error
    if isinstance(error, Exception) and (hidden := as_os_error(error, '')) is not None:
      return hidden
    error = error.__cause__ if error.__cause__ is not error else None  # by `raise error from error`
  return None


def cannot_use(error: OSError, workdir: str | None) -> str:
  """The message for an error of the system, in one line."""
  if isinstance(error, StoreError):
    return str(error)
  remedy = _REMEDIES.get(error.errno or 0, 'resolve that')
  if error.filename in _STREAMS or (error.errno == errno.EPIPE and not error.filename):
    return (
      f'cannot write {error.filename or "standard output or error"}: {os.strerror(error.errno or 0)}; start the same '
      'command again with one that stays open and has room: work on disk is kept'
    )
  return (
    f'cannot use {error.filename or workdir}: {os.strerror(error.errno or 0)}; {remedy}, or use another folder, and '
    'start the same command again: finished stages are kept'
  )


def exit_code(error: Exception, program: str, workdir: Callable[[], str | None]) -> int:
  """Prints an error that the user can resolve in one line, and returns the exit code; raises other errors.

  Where standard output goes into a pipe whose reader has ended, as by `| head`, nothing is printed, and the code is a
  shell's for SIGPIPE.
  """
  stopping.wait_if_stopped()
  if isinstance(error, UserError):
    report(f'{program}: {error}')
    return error.exit_code
  if (found := system_error(error)) is None:
    raise error
  if found.errno == errno.EPIPE and found.filename == _STREAMS[0]:
    _drop_unwritten()
    return 128 + signal.SIGPIPE
  report(f'{program}: {cannot_use(found, workdir())}')
  return 2


def report(text: str) -> None:
  """Prints an error as one line on standard error, where that is open."""
  with contextlib.suppress(OSError, ValueError):
    sys.stderr.write(f'{visible(text)}\n')
    sys.stderr.flush()
  _drop_unwritten()


def _drop_unwritten() -> None:
  """What cannot be written now must not fail at exit."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, ValueError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def explain(error: Exception, argv: Sequence[str]) -> str:
  """The message for an `error` from parsing `argv`: the flag and the reason.

  A config file is a program, and an override assigns to a key, so both may raise anything; the error names at most the
  last part of a key.
  """
  reason = error.args[0] if isinstance(error, KeyError) and error.args else error
  plain = str(reason).replace('\\n', ' ').replace("\\'", "'").replace("''", "'")  # some quote a message twice
  text = ' '.join(plain.split()) or type(error).__name__
  hint = 'see docs/keys.md for all keys, --help for all flags'
  if isinstance(error, flags.Error):  # these name the flag
    return f'{text}; {hint}'
  given = [argument for argument in argv[1:] if argument.startswith('--config')]
  for argument in given:
    _, dot, key = argument.partition('=')[0].rpartition('.')
    if dot and any(f'{quote}{key}{quote}' in text for quote in ('"', "'")):
      return f'{argument}: {text}; {hint}'
  where = next((argument for argument in given if argument.startswith('--config=')), 'the command line')
  return f'{where}: {type(error).__name__}: {text}; correct that file, or start from configs/quickstart.py'

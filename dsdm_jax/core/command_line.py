"""Errors of the command line and of the disk as one line, and --help."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

# Errors that a user can resolve.
DISK = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


_USAGE = """usage: python -m dsdm_jax.main --config=FILE --workdir=FOLDER [--stage=STAGE] [--config.KEY=VALUE ...]

configs/quickstart.py is the place to begin, and configs/base.py has every key with its unit.
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


def cannot_write(error: OSError, workdir: str | None) -> str:
  """The message for a file that cannot be written."""
  return (
    f'cannot write {error.filename or workdir}: {os.strerror(error.errno or 0)}; resolve that or use another --workdir '
    'and start the same command again: finished stages are kept'
  )


def explain(error: Exception, argv: Sequence[str]) -> str:
  """The message for an `error` from parsing `argv`: the flag and the reason.

  A config file is a program, and an override assigns to a key, so both may raise anything; the error names at most the
  last part of a key.
  """
  reason = error.args[0] if isinstance(error, KeyError) and error.args else error
  plain = str(reason).replace('\\n', ' ').replace("\\'", "'").replace("''", "'")  # some quote a message twice
  text = ' '.join(plain.split()) or type(error).__name__
  hint = 'see configs/base.py for all keys, --help for all flags'
  if isinstance(error, flags.Error):  # these name the flag
    return f'{text}; {hint}'
  given = [argument for argument in argv[1:] if argument.startswith('--config')]
  for argument in given:
    _, dot, key = argument.partition('=')[0].rpartition('.')
    if dot and any(f'{quote}{key}{quote}' in text for quote in ('"', "'")):
      return f'{argument}: {text}; {hint}'
  where = next((argument for argument in given if argument.startswith('--config=')), 'the command line')
  return f'{where}: {type(error).__name__}: {text}; correct that file, or start from configs/quickstart.py'

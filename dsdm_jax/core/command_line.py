"""What is wrong with a command line, or with the disk, in one line; and --help."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

# What an OSError may be about that a user can mend.
DISK = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


_USAGE = """usage: python -m dsdm_jax.main --config=FILE --workdir=FOLDER [--stage=STAGE] [--config.KEY=VALUE ...]

configs/quickstart.py is the place to begin, and configs/base.py has every key with its unit.
"""


class _Help(flags.BooleanFlag):
  """--help, which says what the flags are and ends the program with code 0."""

  def __init__(self) -> None:
    super().__init__('help', False, 'Say this, and do nothing.', short_name='h')

  def parse(self, argument: Any) -> None:
    super().parse(argument)
    if self.value:
      _, _, of_program = flags.FLAGS.main_module_help().partition(':\n')
      try:
        sys.stdout.write(f'{_USAGE}\n{of_program}\n')
        sys.stdout.flush()
      except BrokenPipeError:  # head has seen enough; so that nothing is flushed when the program ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(0)


flags.DEFINE_flag(_Help())


def cannot_write(error: OSError, workdir: str | None) -> str:
  """Says what could not be written, and that nothing is lost."""
  return (
    f'cannot write {error.filename or workdir}: {os.strerror(error.errno or 0)}; mend that or take another --workdir '
    'and start the same command again: finished stages are kept'
  )


def explain(error: Exception, argv: Sequence[str]) -> str:
  """Says what `error`, which came from parsing `argv`, is about: the flag and the reason.

  A config file is a program, and its overrides are assignments to its keys, so either may fail in any way; what they
  raise names the last part of a key at most.
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
  return f'{where}: {type(error).__name__}: {text}; mend that file, or begin from configs/quickstart.py'

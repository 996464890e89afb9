"""The exception whose text is a message to the user, and system errors inside the exceptions of other packages.

Text of users and of files (records, keys, names, paths) goes to a terminal or a log only through `visible`.
"""

import errno
import os
import re

_MOST, _LAST = 2_000, 500  # characters of a line, and those of its end that remain if it is cut


def visible(text: str) -> str:
  r"""`text` in one line of at most 2,000 characters, safe to print; calling it again changes nothing.

  What a terminal would obey or not show (control characters, line ends, invisible characters, changes of direction)
  becomes an escape such as \x1b. The middle of a longer text is left out, because its end says what to do.
  """
  if not text.isprintable():
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
  if len(text) <= _MOST:
    return text
  mark = f' … ({len(text) - _MOST:,} characters more) … '
  return f'{text[: _MOST - _LAST - len(mark)]}{mark}{text[-_LAST:]}'


def visible_lines(text: str) -> str:
  """`visible` for each line of a text whose line ends are the program's own."""
  return '\n'.join(map(visible, text.split('\n')))


class UserError(ValueError):
  """Bad input or a state that the user has to resolve.

  The text is one line: what happened, where (key, file, line), what to do. `main` prints it on stderr and
  exits with `exit_code`, without a traceback.
  """

  exit_code: int = 2

  def __init__(self, message: str):
    super().__init__(visible(message))


class StoreError(OSError):
  """An object store that cannot be used. The text is one line like that of a `UserError`."""

  def __init__(self, message: str):
    super().__init__(errno.EIO, visible(message))

  def __str__(self) -> str:
    return str(self.strerror)


class Stopped(UserError):  # noqa: N818  not an error: the work is saved
  """A signal asked the process to stop, and its work is saved. The exit code is a shell's for that signal."""

  def __init__(self, message: str, number: int):
    super().__init__(message)
    self.exit_code = 128 + number


class Diverged(UserError):  # noqa: N818  as Stopped
  """A metric of a training is not finite."""


def as_os_error(error: Exception, path: str | os.PathLike) -> OSError | None:
  """The OSError behind an error of TensorStore, Orbax or ArrayRecord, which report its number or name only as text.

  Args:
    path: what it is about, where the text does not say so.
  """
  if code := re.search(r"os_error_code='(\d+)'", str(error)):
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path))
  if failed := re.search(r'\w\(\) failed: ([^;]+); \w+ing (?:to )?([^;]+)', str(error)):
    numbers = [number for number in errno.errorcode if os.strerror(number) == failed[1]]
    return OSError(numbers[0], failed[1], failed[2]) if numbers else None
  return None

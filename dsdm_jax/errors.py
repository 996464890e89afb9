"""The exception whose text is a message to the user, and system errors inside the exceptions of other packages."""

import os
import re


class UserError(ValueError):
  """Bad input or a state that the user has to resolve.

  The text is one line: what happened, where (key, file, line), what to do. `main` prints it on stderr and
  exits with `exit_code`, without a traceback.
  """

  exit_code = 2


class Stopped(UserError):  # noqa: N818  not an error: the work is saved
  """The process was asked to stop (SIGTERM), and has saved its work. The exit code is a shell's for that signal."""

  exit_code = 128 + 15


def as_os_error(error: Exception, path: str | os.PathLike) -> OSError | None:
  """The OSError about `path` behind a failed write of TensorStore or Orbax, which report its number only as text."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else None

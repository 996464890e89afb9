"""The one exception that is a message to a person."""


class UserError(ValueError):
  """Bad input or a state that the user has to resolve.

  The text is one line: what happened, where (key, file, line), what to do. `main` prints it on stderr and
  exits with code 2, without a traceback.
  """

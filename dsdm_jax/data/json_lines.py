"""Lines of JSON from files that nobody vouches for: bounded in memory, and each slip has a name."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

LONGEST = 128 * 2**20  # bytes of one line; text of `readers.LARGEST` bytes that is all escapes takes 96 MiB


class BadLineError(ValueError):
  """What is wrong with a line, in a few words."""


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
  """(number from 1, line) of every line; of one above `LONGEST` the first byte beyond it too, and no more."""
  number = 0
  while line := file.readline(LONGEST + 1):
    number += 1
    whole = line
    while len(line) > LONGEST and not line.endswith(b'\n'):  # a packed file of a few MB may hold one line of many GB
      line = file.readline(LONGEST + 1)
    yield number, whole


def parse(line: bytes) -> dict[str, Any]:
  """The JSON object that a line holds.

  Raises:
    BadLineError: it holds none.
  """
  if len(line) > LONGEST:
    raise BadLineError(f'a line of more than {LONGEST:,} bytes')
  try:
    record = json.loads(line.decode())
    if b'\\ud' in line.lower():  # half of a pair: no text, and nothing can write it
      json.dumps(record, ensure_ascii=False).encode()
  except UnicodeDecodeError as error:
    raise BadLineError(f'not UTF-8 ({error.reason} at byte {error.start})') from error
  except UnicodeEncodeError as error:
    raise BadLineError(f'not valid Unicode (a lone surrogate {error.object[error.start]!a})') from error
  except json.JSONDecodeError as error:
    raise BadLineError(f'not JSON ({error.msg} at column {error.colno})') from error
  except RecursionError as error:
    raise BadLineError('not JSON that can be read (brackets within brackets, too deep)') from error
  except ValueError as error:  # a whole number of thousands of digits
    raise BadLineError(f'not JSON that can be read ({str(error).partition(";")[0]})') from error
  if not isinstance(record, dict):
    raise BadLineError(f'a JSON object is needed, found {type(record).__name__}')
  return record

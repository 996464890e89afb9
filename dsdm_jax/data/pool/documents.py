"""One text of the pool, and what all sources do with texts."""

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Document:
  """One text of the pool.

  Attributes:
    id: unique in the pool, '/'-separated, begins with the source: 'docs/numpy/numpy/random/LICENSE.md'.
    source: the class it is counted under in cards, selections and reports ('docs').
    text: valid Unicode that holds at least one character that is not white space.
  """

  id: str
  source: str
  text: str


class Duplicates:
  """Remembers texts by a 16-byte hash. `duplicates(text)` says whether it has seen the text before."""

  def __init__(self) -> None:
    self._seen: set[bytes] = set()
    self.count = 0

  def __call__(self, text: str) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if digest in self._seen:
      self.count += 1
      return True
    self._seen.add(digest)
    return False


def cut(data: bytes, limit: int) -> bytes:
  """At most `limit` bytes of UTF-8, ending where a line ends.

  A first line longer than `limit` ends where a character ends instead.
  """
  if len(data) <= limit:
    return data
  end = data.rfind(b'\n', 0, limit) + 1
  if end:
    return data[:end]
  end = limit
  while end and data[end] & 0xC0 == 0x80:  # a continuation byte: its character began before the limit
    end -= 1
  return data[:end]

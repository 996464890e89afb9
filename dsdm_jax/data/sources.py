"""Document sources: where the text of the candidate pool comes from.

A source is a generator function registered under a name, or any function given as 'package.module:function';
`config.pool.source` picks one. It yields whole documents in an order that depends on nothing but the settings and the
text itself.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from dsdm_jax.core.errors import UserError


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


Source = Callable[[ConfigDict, int], Iterator[Document]]
_SOURCES: dict[str, Source] = {}


def register(name: str) -> Callable[[Source], Source]:
  """Decorator: makes `function(pool_config, seed)` the source called `name`.

  Raises:
    ValueError: the name is taken by another function.
  """

  def add(function: Source) -> Source:
    if _SOURCES.get(name, function) is not function:
      raise ValueError(f'document source {name!r} is registered twice')
    _SOURCES[name] = function
    return function

  return add


def documents(config: ConfigDict, seed: int) -> Iterator[Document]:
  """Documents of `config.source`.

  Args:
    config: the `pool` part of the config.
    seed: the root seed; sources draw their order from it.

  Raises:
    UserError: no such source.
  """
  if ':' in config.source:
    module, function = config.source.split(':')
    try:
      source = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
      raise UserError(f'pool.source is {config.source!r}, which cannot be imported: {error}') from error
    return source(config, seed)
  # The built-in sources register themselves when they are imported.
  from dsdm_jax.data import installed_packages  # noqa: F401

  if config.source not in _SOURCES:
    raise UserError(f'pool.source is {config.source!r}, but the registered sources are {", ".join(sorted(_SOURCES))}')
  return _SOURCES[config.source](config, seed)


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

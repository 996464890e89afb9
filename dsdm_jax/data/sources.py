"""Where the text of the candidate pool comes from.

A source is a function (pool config, seed) → documents, in an order that depends on nothing but the settings and the
text itself. `config.pool.source` names one of `SOURCES`, or any other as 'package.module:function'.
"""

from collections.abc import Callable, Iterator, Mapping

from ml_collections import ConfigDict

from dsdm_jax.core.config import load_callable
from dsdm_jax.core.errors import UserError
from dsdm_jax.data.documents import Document
from dsdm_jax.data.installed_packages import installed_packages

Source = Callable[[ConfigDict, int], Iterator[Document]]
SOURCES: Mapping[str, Source] = {'installed_packages': installed_packages}


def documents(config: ConfigDict, seed: int) -> Iterator[Document]:
  """Documents of `config.source`.

  Args:
    config: the `pool` part of the config.
    seed: the root seed; sources draw their order from it.

  Raises:
    UserError: no such source.
  """
  if ':' in config.source:
    return load_callable(config.source, 'pool.source')(config, seed)
  if config.source not in SOURCES:
    raise UserError(f'pool.source is {config.source!r}, but the sources here are {", ".join(sorted(SOURCES))}')
  return SOURCES[config.source](config, seed)

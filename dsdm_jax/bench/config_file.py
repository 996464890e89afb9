"""A config file of the command line, loaded as the Python that it is."""

import importlib.util
from pathlib import Path
from types import ModuleType

from dsdm_jax.errors import UserError


def load(path: str, example: str) -> ModuleType:
  """The module in the file of `--config`; `example` is one that a person could give.

  Raises:
    UserError: there is no such Python file, or it has no `get_config`.
  """
  spec = importlib.util.spec_from_file_location('config_of_bench', path)
  if not Path(path).is_file() or spec is None or spec.loader is None:
    raise UserError(f'--config={path} is no Python file; give one such as {example}')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise UserError(f'--config={path} has no get_config(); see {example}')
  return module

"""Configs of this project. They live in `configs/` of the repository; Python imports them as `dsdm_jax.configs`."""

import importlib.util
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from dsdm_jax.errors import UserError


def find(name: str) -> str:
  """The path of the config that `--config` names.

  A file that exists is returned as it is. Otherwise `quickstart`, or `study:damping_1` with an argument for
  `get_config`, is the packaged config of that name. Any other name is returned unchanged, and fails where it is loaded.
  """
  file, colon, argument = name.partition(':')
  if Path(file).is_file() or not re.fullmatch(r'\w+', file):
    return name
  packaged = Path(__file__).with_name(f'{file}.py')
  return f'{packaged}{colon}{argument}' if packaged.is_file() else name


def find_in(argv: Sequence[str]) -> list[str]:
  """`argv` with `find(name)` in place of the name in `--config=name` or `--config name`."""
  result = list(argv[:1])
  for before, argument in itertools.pairwise(argv):
    flag, equals, name = argument.partition('=')
    if flag in ('--config', '-config') and equals:
      result.append(f'{flag}={find(name)}')
    else:
      result.append(find(argument) if before in ('--config', '-config') else argument)
  return result


def names() -> list[str]:
  """Names of the packaged configs; `base`, which has all keys and is not meant to run, is not among them."""
  return sorted(path.stem for path in Path(__file__).parent.glob('*.py') if path.stem not in ('__init__', 'base'))


def load(name: str, example: str) -> ModuleType:
  """The module of a config, for commands that need more of it than `get_config()`.

  Args:
    name: value of `--config`: a file, or the name of a packaged config.
    example: a value that the error message suggests.

  Raises:
    UserError: there is no such Python file, it raises an error, or it has no `get_config`.
  """
  path = find(name)
  spec = importlib.util.spec_from_file_location('loaded_config', path)
  if not Path(path).is_file() or spec is None or spec.loader is None:
    raise UserError(f'--config={name} is no Python file; give one such as {example}')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # a config is a program and may raise anything
    raise UserError(f'--config={name}: {type(error).__name__}: {error}; correct it, or start from {example}') from error
  if not hasattr(module, 'get_config'):
    raise UserError(f'--config={name} has no get_config(); see {example}')
  return module

"""`python -m dsdm_jax.study run` trains and compares the arms of a study.

`results` makes its tables and figures, and `items` its questions.
"""

import argparse
import sys
from collections.abc import Sequence

from dsdm_jax.core.command_line import exit_code
from dsdm_jax.study import items, results, study


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 after one line on stderr about an error that the user can fix."""
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.study', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  modules = {'run': study, 'results': results, 'items': items}
  for name, module in modules.items():
    summary = str(module.__doc__).partition('\n')[0]
    module.add_flags(commands.add_parser(name, help=summary, description=module.__doc__))
  flags = parser.parse_args(argv)
  try:
    modules[flags.command].run(flags)
  except Exception as error:  # noqa: BLE001  raises what the user cannot resolve
    return exit_code(error, 'dsdm_jax', lambda: getattr(flags, 'workdir', None) or getattr(flags, 'out', None))
  return 0


if __name__ == '__main__':
  sys.exit(main())

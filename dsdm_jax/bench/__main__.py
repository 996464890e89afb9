"""What is measured, as commands: `python -m dsdm_jax.bench features --help`."""

import argparse
import sys

from dsdm_jax.bench import (
  data,
  derivative,
  evaluation,
  features,
  load,
  loop,
  near_duplicates,
  peers,
  report,
  selection,
  train,
)
from dsdm_jax.errors import UserError
from dsdm_jax.study import results, study

_BENCHES = {
  'data': data, 'derivative': derivative, 'evaluation': evaluation, 'features': features, 'load': load, 'loop': loop,
  'near_duplicates': near_duplicates, 'peers': peers, 'report': report, 'results': results, 'selection': selection,
  'study': study, 'train': train,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr about what the user can mend."""
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.bench')
  commands = parser.add_subparsers(dest='bench', required=True)
  for name, module in _BENCHES.items():
    summary = str(module.__doc__).partition('\n')[0]
    module.add_flags(commands.add_parser(name, help=summary, description=module.__doc__))
  flags = parser.parse_args(argv)
  try:
    _BENCHES[flags.bench].run(flags)
  except UserError as error:
    print(f'dsdm_jax: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())

"""Benchmarks: `python -m dsdm_jax.bench NAME`. Its modules are not commands."""

import sys

if sys.argv[:1] == ['-m']:  # set while Python looks for the module to run, for which it imports this package
  _name = next((arg for arg in sys.orig_argv if arg.startswith(f'{__name__}.')), '').rpartition('.')[2]
  if _name not in ('', '__main__'):
    print(f'dsdm_jax: {__name__}.{_name} is not a command; run python -m {__name__} {_name}', file=sys.stderr)
    sys.exit(2)

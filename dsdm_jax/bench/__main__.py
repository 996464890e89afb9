"""Runs a benchmark: `python -m dsdm_jax.bench features --help`.

Benchmarks on CPU should run with huge pages, as `launch/setup.sh` sets them: `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.
XLA allocates the temporary buffers of a step each time, and the kernel clears every new page. For `features` and
`peers` add one arena for all threads, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1`: seconds may
pass before a case runs again, in which memory would go back to the system.
"""

import argparse
import importlib
import sys

from dsdm_jax.errors import UserError

BENCHES = {
  'data': 'speed from text to batches',
  'datamodel': 'speed and memory of Gram matrix, solve and scores',
  'derivative': 'the oracle of the validation against finite differences',
  'device': 'results and speed of a TPU or GPU, against the CPU and the plan',
  'evaluation': 'speed of evaluation on benchmark items',
  'features': 'features and scores against a training step',
  'host': 'unit costs of the host for features, scores and selection',
  'load': 'time, memory and files of a large pool in every stage',
  'loop': 'cost of input, and time to the first step',
  'near_duplicates': 'precision and recall of SemDeDup on planted near duplicates',
  'peers': 'features and training steps beside other packages',
  'processes': 'control messages between the processes of a run',
  'report': 'size and speed of the report',
  'selection': 'speed and memory of selection',
  'train': 'speed and memory of a training step',
}


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 after one line on stderr about an error that the user can fix."""
  argv = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.bench', description=__doc__)
  commands = parser.add_subparsers(dest='bench', required=True)
  for name, summary in BENCHES.items():
    command = commands.add_parser(name, help=summary)
    if name in argv[:1]:  # only the chosen module is imported
      module = importlib.import_module(f'dsdm_jax.bench.{name}')
      command.description = module.__doc__
      module.add_flags(command)
  flags = parser.parse_args(argv)
  try:
    module.run(flags)
  except UserError as error:
    print(f'dsdm_jax: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())

# PYTHON_ARGCOMPLETE_OK
"""The `dsdm` command.

`dsdm run --config=quickstart --workdir=DIR` is `python -m dsdm_jax.main` with the same flags. The other commands call
the modules that they are named after. Complete arguments in bash with: eval "$(register-python-argcomplete dsdm)"
"""

import argparse
import collections
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import argcomplete

from dsdm_jax import configs
from dsdm_jax.core import stopping
from dsdm_jax.core.command_line import exit_code, open_streams
from dsdm_jax.errors import UserError, visible

REPOSITORY = 'https://github.com/dsdm-jax/dsdm_jax'
_COMMANDS = {
  'run': 'run the pipeline, or one stage of it',
  'plan': 'print the time, memory and price of a config on TPUs; needs no TPU',
  'export': "write an arm's rows for other programs; export documents: scores; export model: for transformers",
  'sample': 'draw from any file of scores: the highest, by Gumbel noise, or by Boltzmann weights',
  'verify': 'say what in a workdir is whole, damaged, superfluous or foreign',
  'study': 'run many arms of a config and compare them',
  'bench': 'measure speed and memory (in a checkout of the repository)',
}


def _configs(**given: Any) -> list[str]:
  return [*configs.names(), *argcomplete.completers.FilesCompleter(['py'])(**given)]


def _stages(**_: Any) -> list[str]:
  from dsdm_jax import pipeline  # only to complete --stage: it imports JAX

  return [stage.name for stage in pipeline.STAGES]


def parser() -> argparse.ArgumentParser:
  """The commands, and the flags of `run` and `plan`; the other commands parse their own."""
  result = argparse.ArgumentParser(
    prog='dsdm', description='Select training data with datamodels (DsDm).', allow_abbrev=False
  )
  commands = result.add_subparsers(dest='command', required=True, metavar='COMMAND')
  for name, text in _COMMANDS.items():
    own = name in ('run', 'plan')
    command = commands.add_parser(name, help=text, description=text, add_help=own, allow_abbrev=False)
    if not own:
      continue
    command.epilog = '--config.KEY=VALUE overrides a key; docs/keys.md lists all keys.'
    config = command.add_argument('--config', metavar='CONFIG', help=f'a file, or one of {", ".join(configs.names())}')
    config.completer = _configs  # type: ignore[attr-defined]
    command.add_argument(
      '--workdir',
      metavar='DIR',
      help='folder or address (gs://, s3://) of the run; start again with the same one to resume',
    )
    if name == 'run':
      stage = command.add_argument('--stage', metavar='STAGE', help='run this stage only')
      stage.completer = _stages  # type: ignore[attr-defined]
      command.add_argument('--rerun', action='store_true', help='replace stages whose settings have changed')
  return result


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command. Returns 0, or 2 after one line on stderr that says what to change."""
  open_streams()
  stopping.install()
  arguments = list(sys.argv[1:] if argv is None else argv)
  commands = parser()
  argcomplete.autocomplete(commands)
  command, rest = commands.parse_known_args(arguments)[0].command, arguments[1:]
  try:
    code = _run(command, rest)
    sys.stdout.flush()
  except Exception as error:  # noqa: BLE001  raises what the user cannot resolve
    return exit_code(error, 'dsdm', lambda: None)
  return code


def _run(command: str, rest: list[str]) -> int:
  if command in ('run', 'plan'):
    from dsdm_jax import main as pipeline_main
    from dsdm_jax.core import processes

    # ml_collections reads overrides of config keys from sys.argv.
    sys.argv = [f'dsdm {command}', *rest, *(['--stage=plan'] if command == 'plan' else [])]
    processes.leave(pipeline_main.main())  # does not return
  if command == 'export' and rest[:1] == ['model']:
    from dsdm_jax.evaluation import model_export

    return model_export.main(rest[1:])
  if command == 'export' and rest[:1] == ['documents']:
    from dsdm_jax.selection import documents

    return documents.main(rest[1:])
  if command == 'export':
    from dsdm_jax.selection import export

    return export.main(rest)
  if command == 'sample':
    from dsdm_jax.selection import sample

    return sample.main(rest)
  if command == 'verify':
    flags = argparse.ArgumentParser(prog='dsdm verify', description=_verify.__doc__)
    flags.add_argument('workdir', metavar='RUN', help='folder or address of a run')
    return _verify(flags.parse_args(rest).workdir)
  if command == 'study':
    from dsdm_jax.study import study

    flags = argparse.ArgumentParser(prog='dsdm study', description=study.__doc__)
    study.add_flags(flags)
    study.run(flags.parse_args(rest))
    return 0
  if importlib.util.find_spec('dsdm_jax.bench') is None:
    raise UserError(f'benches are not installed; run python -m dsdm_jax.bench in a checkout of {REPOSITORY}')
  bench = importlib.import_module('dsdm_jax.bench.__main__')
  return int(bench.main(rest))


def _verify(workdir: str) -> int:
  """Reads all files of a run and says what is whole, unfinished, damaged, superfluous or foreign. Nothing is changed.

  The exit code is 2 if something is damaged, else 0.
  """
  from dsdm_jax.core import artifacts, storage

  folder = storage.locate(workdir)
  if not storage.is_folder(folder):
    raise UserError(f'{workdir} is not a folder; give the --workdir of a run')
  kinds = collections.Counter[str]()
  for finding in artifacts.inspect(folder):
    kinds[finding.kind] += 1
    sys.stdout.write(visible(f'{finding.kind:12}{storage.relative(finding.path, folder)}: {finding.text}') + '\n')
  if not kinds:
    raise UserError(f'{workdir} has no stage; give the --workdir of a run')
  sys.stdout.write(visible(', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))) + '\n')
  return 2 if kinds['damaged'] else 0


if __name__ == '__main__':
  sys.exit(main())

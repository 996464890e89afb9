"""Command line: flags → config → pipeline. Short on purpose: logic lives where tests and notebooks can import it."""

import sys

from dsdm_jax.core import stopping

if __name__ == '__main__':
  stopping.install()  # the imports below take a second

from absl import flags
from ml_collections import config_flags

from dsdm_jax import configs, pipeline
from dsdm_jax.config.validate import whole_numbers
from dsdm_jax.core import processes
from dsdm_jax.core.command_line import exit_code, explain, open_streams
from dsdm_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file with get_config(), or a packaged config: quickstart.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run, or its address (gs://bucket/run, s3://bucket/run).')
_STAGES = (*(stage.name for stage in pipeline.STAGES), pipeline.CHECK, 'plan')
_STAGE = flags.DEFINE_enum('stage', None, _STAGES, 'Run one stage only; check: find mistakes; plan: cost on TPUs.')
_RERUN = flags.DEFINE_bool('rerun', False, 'Run stages again that are finished with other settings.')


def _parse(argv: list[str]) -> None:
  try:
    extra = flags.FLAGS(whole_numbers(configs.find_in(argv)))[1:]
    if _CONFIG.value is not None:
      _CONFIG.value.keys()  # a file that cannot be loaded raises here
  except Exception as error:  # a config file is a program and may raise anything
    raise UserError(explain(error, argv)) from error
  wanted = {'--config': (_CONFIG.value, 'configs/quickstart.py'), '--workdir': (_WORKDIR.value, 'runs/quickstart')}
  for name, (value, example) in wanted.items():
    if value is None and (name, _STAGE.value) != ('--workdir', 'plan'):
      raise UserError(f'{name} is missing; give one, such as {name}={example}')
  if extra:
    raise UserError(f'argument {extra[0]!r} is not understood; flags begin with --')


def main(argv: list[str] | None = None) -> int:
  """Returns exit code 0, or 2 after one line on stderr about an error that the user can resolve."""
  open_streams()
  stopping.install()
  try:
    _parse(sys.argv if argv is None else argv)
    if _STAGE.value == 'plan':
      from dsdm_jax.plan import plan

      plan.run(_CONFIG.value, _WORKDIR.value)
    else:
      pipeline.run(_CONFIG.value, str(_WORKDIR.value), _STAGE.value, _RERUN.value)
    sys.stdout.flush()
  except Exception as error:  # noqa: BLE001  raises what the user cannot resolve
    return exit_code(error, 'dsdm_jax', lambda: _WORKDIR.value)
  return 0


if __name__ == '__main__':
  processes.leave(main())

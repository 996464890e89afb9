"""Makes features and scores on two processes; test_processes.py calls `main` with ADDRESS PROCESS DIR… in each.

Each DIR is a run that stands as far as the proxies; the settings of each come from its name (see SETTINGS).
"""

from pathlib import Path

from dsdm_jax import pipeline
from dsdm_jax.config import validate as checks
from dsdm_jax.core import processes
from tests.pipeline.tiny import get_config

SETTINGS = {
  'store': {'basis': 'eigenvectors', 'basis_rows': 40, 'precondition': 'adam'},
  'jvp': {'projection': 'dense', 'mode': 'jvp', 'gram_rows': 64, 'precondition': 'adam', 'dimension': 48},
  'ekfac': {'projection': 'ekfac', 'mode': 'jvp', 'basis_rows': 41},
}  # of features


def begin():
  """A smaller pool than that of other tests: each step of two processes waits for both, several times."""
  config = get_config()
  config.pool.max_bytes, config.features.batch_size, config.features.shard_rows = 16_000, 64, 128
  return config


def settings(name: str):
  config = begin()
  config.features.update(SETTINGS[name])
  config.datamodel.bootstrap, config.datamodel.groups, config.datamodel.examples = 0, 1, 0
  return config


def run(config, folder: Path, stages: tuple[str, ...] = ('features', 'target_features', 'datamodel')) -> None:
  for stage in stages:
    pipeline.run_connected(pipeline.runner_config(config), folder, stage)


def main(argv: list[str]) -> int:
  address, process, folders = argv[1], int(argv[2]), [Path(name) for name in argv[3:]]
  wanted = {'coordinator': address, 'processes': 2, 'process': process, 'heartbeat_seconds': 20}
  config = begin()
  config.distributed.update(wanted)
  with processes.running(config, checks.flatten(config)):
    for folder in folders:
      run(settings(folder.name), folder)
  return 0

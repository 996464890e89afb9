"""A pool from Apache Beam equals one from local processes, row by row."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax.config.validate import flatten
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from tests.helpers.data import RECORDS, lines, run_pool, small_config

# What --stage=pool runs.
IN_THE_OTHER_PYTHON = """
import json, sys
from configs.base import get_config
from dsdm_jax import pipeline
config = get_config()
for key, value in json.load(open(sys.argv[1])).items():
  config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
pipeline.run(config, sys.argv[2], only='pool')
"""
# The distributions whose modules are imported.
IMPORTED = """
import importlib.metadata, sys
from dsdm_jax import pipeline
from dsdm_jax.data.pool import build
of = importlib.metadata.packages_distributions()
print(*{distribution for module in sys.modules for distribution in of.get(module.partition('.')[0], ())})
"""


def test_without_beam_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  import sys

  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  config = small_config(sources=(f'jsonl:{tmp_path}/*.jsonl',), max_bytes=0)
  (tmp_path / '0.jsonl').write_bytes(lines(RECORDS))
  config.host.beam = '--runner=DirectRunner'
  with pytest.raises(UserError, match='apache_beam is not installed; install requirements-beam.txt'):
    run_pool(config, tmp_path / 'beam')


def test_the_direct_runner_gives_the_same_rows(beam: Path, repo_root: Path, tmp_path: Path):
  for i in range(3):
    (tmp_path / f'{i}.jsonl').write_bytes(lines(RECORDS[i::3] + RECORDS[:1]))
  config = small_config(
    sources=(f'jsonl:{tmp_path}/*.jsonl',), max_bytes=15_000, max_document_bytes=0, vocabulary='bytes', plant_targets=2
  )
  config.host.workers = 1
  here = Pool(run_pool(config, tmp_path / 'here'))
  config.host.beam = '--runner=DirectRunner'
  (tmp_path / 'config.json').write_text(json.dumps(flatten(config)))
  values = subprocess.run(
    [beam, '-W', 'ignore', '-c', IN_THE_OTHER_PYTHON, tmp_path / 'config.json', tmp_path / 'there'],
    cwd=repo_root,
    capture_output=True,
    text=True,
    check=False,
  )
  assert values.returncode == 0, values.stderr[-2_000:]
  there = Pool(tmp_path / 'there' / 'pool')
  assert here.num_rows == there.num_rows > 50
  np.testing.assert_array_equal(there.tokens(range(there.num_rows)), here.tokens(range(here.num_rows)))
  assert list(there.documents) == list(here.documents)
  assert there.card == here.card and there.card['lost']['duplicates']['documents'] == 3
  assert there.card['lost']['above_caps']['documents'] > 0
  for name in ('document_N', 'offset_N', 'source_N', 'planted_N'):
    np.testing.assert_array_equal(getattr(there, name), getattr(here, name))


def test_its_environment_has_all_that_a_pool_imports(repo_root: Path):
  """CI has no such environment, so a package that the pool needs of late would be missing there."""
  printed = subprocess.run(
    [repo_root / '.venv' / 'bin' / 'python', '-W', 'ignore', '-c', IMPORTED],
    cwd=repo_root,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  lock = {line.partition('==')[0] for line in (repo_root / 'requirements-beam.lock').read_text().splitlines()}
  found = {re.sub('[-_.]+', '-', name).lower() for name in printed.split()}
  assert {'ml-collections', 'pydantic'} <= found
  assert found - {re.sub('[-_.]+', '-', name).lower() for name in lock} <= {'pip', 'setuptools'}

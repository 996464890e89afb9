"""The pool on Apache Beam is the pool made here, row by row."""

from pathlib import Path

import numpy as np
import pytest

from dsdm_jax.core.errors import UserError
from dsdm_jax.data.pool import Pool
from tests.data.conftest import run_pool, small_config
from tests.data.test_sources import RECORDS, lines


def test_without_beam_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  import sys

  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  config = small_config(sources=(f'jsonl:{tmp_path}/*.jsonl',), max_bytes=0)
  (tmp_path / '0.jsonl').write_bytes(lines(RECORDS))
  config.host.beam = '--runner=DirectRunner'
  with pytest.raises(UserError, match='apache_beam is not installed; install requirements-beam.txt'):
    run_pool(config, tmp_path / 'beam')


@pytest.mark.filterwarnings('ignore')
def test_the_direct_runner_gives_the_same_rows(tmp_path: Path):
  pytest.importorskip('apache_beam', reason='apache_beam is not installed (requirements-beam.txt)')
  for i in range(3):
    (tmp_path / f'{i}.jsonl').write_bytes(lines(RECORDS[i::3] + RECORDS[:1]))
  pools = []
  for options in ('', '--runner=DirectRunner'):
    config = small_config(sources=(f'jsonl:{tmp_path}/*.jsonl',), max_bytes=0, vocabulary='bytes', plant_targets=2)
    config.host.beam, config.host.workers = options, 1
    pools.append(Pool(run_pool(config, tmp_path / f'run{options}')))
  here, beam = pools
  assert here.num_rows == beam.num_rows > 100
  np.testing.assert_array_equal(beam.tokens(range(beam.num_rows)), here.tokens(range(here.num_rows)))
  assert list(beam.documents) == list(here.documents)
  assert beam.card == here.card
  for name in ('document_N', 'offset_N', 'source_N', 'planted_N'):
    np.testing.assert_array_equal(getattr(beam, name), getattr(here, name))

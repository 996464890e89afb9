"""The work of hosts: the paper's pool within its limits, and how it changes with hosts and features."""

import pytest

from configs import c4_dsdm
from dsdm_jax.plan import host, topology

ROWS, HOUR = 216_948_746, 3_600
MATRICES, COLUMNS, OF_VECTORS = 50, 306, 321  # blocks of the Gram matrix, and columns of each
J, ENTRIES = MATRICES * COLUMNS + OF_VECTORS, MATRICES * COLUMNS**2 + OF_VECTORS**2


EKFAC = 500_000_000, 38_612_736  # entries of the factors and of the largest matrix, a table of 50,277 × 768


def _works(hosts: int, rows: int = ROWS, dimension: int = J, **features) -> dict[str, host.HostWork]:
  config = c4_dsdm.get_config()
  config.features.update(features)
  return {work.stage: work for work in host.works(config, hosts, rows, dimension, ENTRIES, 4 * 81, EKFAC)}


def test_the_papers_pool_on_256_chips():
  works = _works(topology.hosts('v5e:16x16'))
  # The chips take at most 5.3 hours (docs/scale.md); reading and writing overlap with them.
  assert works['features'].seconds < 8 * HOUR - 5.3 * HOUR
  assert works['start after a preemption'].seconds <= 300
  assert all(work.memory_bytes <= 64e9 for work in works.values())
  assert works['selection'].memory_bytes <= 16e9
  # All features are written once: one byte for each of four proxies, rows and columns, as the largest host's share.
  assert works['features'].disk_bytes * 64 == pytest.approx(4 * ROWS * J, rel=0.02)


def test_hosts_share_the_work_but_for_selection():
  one, four = _works(1), _works(4)
  for stage in ('features', 'gram', 'scores'):
    assert one[stage].seconds == pytest.approx(4 * four[stage].seconds, rel=0.01)
  assert one['selection'] == four['selection']


def test_without_stored_features_hosts_read_tokens_and_write_scores():
  works = _works(64, dimension=124_000_000, projection='ekfac', mode='jvp')
  assert works.keys() == {'scores', 'selection', 'start after a preemption'}
  assert works['scores'].memory_bytes <= 64e9, 'at the default numbers of groups and examples'
  assert works['scores'].seconds < _works(64)['scores'].seconds + _works(64)['features'].seconds


@pytest.mark.parametrize(
  ('slice_of', 'hosts'), [('v5e:2x4', 1), ('v5e:4x4', 4), ('v5e:16x16', 64), ('v5p:8x8x16', 256), ('v4:2x2x1', 1)]
)
def test_hosts_of_slices(slice_of, hosts):
  assert topology.hosts(slice_of) == hosts

"""Features, scores and partial results in object stores, as on a disk."""

import numpy as np
import pytest

from dsdm_jax.attribution import score_arrays
from dsdm_jax.attribution.accumulators import Accumulator
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core import storage
from dsdm_jax.core.mesh import Team
from dsdm_jax.errors import UserError

ROWS, J, SHARD = 10, 8, 4


def _chunk(store: FeatureStore, shard: int) -> storage.Location:
  return store._chunks(shard)[0]


@pytest.mark.parametrize('address', ['s3', 'gs'], indirect=True)
def test_shards_scores_and_partial_results(address):
  phi_NJ = np.random.default_rng(0).normal(size=(ROWS, J)).astype(np.float32)
  store = FeatureStore(address / 'features_0.zarr', ROWS, J, SHARD, 'int8', ((0, 4), (4, 8)))
  assert store.missing() == [0, 1, 2]
  for shard in (2, 0, 1):
    store.write(shard, phi_NJ[slice(*store.bounds(shard))])
  again = FeatureStore(address / 'features_0.zarr', ROWS, J, SHARD, 'int8', ((0, 4), (4, 8)))
  assert again.missing() == []
  read_NJ = np.concatenate([phi_BJ for _, _, phi_BJ in again])
  np.testing.assert_array_equal(read_NJ, store.quantizer.round_trip(phi_NJ))
  storage.write_bytes(_chunk(store, 1), b'x' * storage.size(_chunk(store, 1)))
  assert again.missing() == [1]
  storage.unlink(_chunk(store, 2))
  assert again.missing() == [1, 2]
  with pytest.raises(UserError, match='rows 8 to 9 .* cannot be read'):
    again.read(2)
  score_arrays.write(address, 'docs', {'score_N': phi_NJ[:, 0]})
  np.testing.assert_array_equal(score_arrays.ScoreArrays(address)['score_docs_N'], phi_NJ[:, 0])

  def parts(row):
    for start in range(row, ROWS, SHARD):
      stop = min(start + SHARD, ROWS)
      yield (start, stop), (start, stop), {'phi_BJ': phi_NJ[start:stop]}

  accumulator = Accumulator(address)
  accumulator._due = -np.inf  # saves the first shard at once, and the others in a minute
  chunks = accumulator.columns('a', Team(), parts)
  assert [chunk.bounds for chunk in chunks] == [((0, 4),), ((4, 8), (8, 10))]
  np.testing.assert_array_equal(np.concatenate([chunk.arrays['phi_BJ'] for chunk in chunks]), phi_NJ)
  saved, row = accumulator._saved_chunks(address, 'a')
  assert row == 4 and saved[0].bounds == ((0, 4),)
  accumulator.clear()
  assert not [name for name in storage.files(address) if 'partial' in name]

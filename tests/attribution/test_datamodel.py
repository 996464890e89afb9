"""The closed form against NumPy in float64, and what it must not share with others' defects."""

import numpy as np
import pytest

from dsdm_jax.attribution import datamodel, scores
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core.errors import UserError

N, J, T = 70, 24, 3


def _store(folder, phi_NJ, shard_rows=16, dtype='float32'):
  store = FeatureStore(folder / 'f.zarr', *phi_NJ.shape, shard_rows, dtype)
  for shard in store.missing():
    start, stop = store.bounds(shard)
    store.write(shard, phi_NJ[start:stop])
  return store


def _random(shape, seed=0, scale=1.0):
  return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


@pytest.mark.parametrize('damping', [1e-3, 0.1, 10.0])
def test_scores_against_numpy_float64(tmp_path, damping):
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)
  store = _store(tmp_path, phi_NJ)
  gram_JJ = datamodel.gram(store)
  got = datamodel.scores(store, datamodel.solve(gram_JJ, target_TJ, damping))
  phi = phi_NJ.astype(np.float64)
  gram = phi.T @ phi / N
  u = np.linalg.solve(gram + damping * np.trace(gram) / J * np.eye(J), target_TJ.T.astype(np.float64))
  np.testing.assert_allclose(got, phi @ u, rtol=1e-4, atol=1e-5 * np.abs(phi @ u).max())


def test_gram_loses_nothing_to_many_rows(tmp_path):
  """A long sum of one large constant and small noise: float32 partial sums alone would drop the noise."""
  rows = 20_000
  phi_NJ = _random((rows, 4)) * 1e-2 + 10
  gram_JJ = datamodel.gram(_store(tmp_path, phi_NJ, shard_rows=500))
  phi = phi_NJ.astype(np.float64)
  np.testing.assert_allclose(gram_JJ, phi.T @ phi / rows, rtol=3e-7)


@pytest.mark.parametrize('scale', [1e-12, 1e12])
def test_scores_do_not_change_when_features_are_scaled(tmp_path, scale):
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)

  def rank(folder, factor):
    folder.mkdir()
    store = _store(folder, (phi_NJ * factor).astype(np.float32))
    u_JT = datamodel.solve(datamodel.gram(store), target_TJ * factor, 0.1)
    return datamodel.scores(store, u_JT)

  np.testing.assert_allclose(rank(tmp_path / 'b', scale), rank(tmp_path / 'a', 1.0), rtol=2e-3, atol=1e-4)


def test_fewer_rows_than_columns(tmp_path):
  phi_NJ, target_TJ = _random((5, J)), _random((1, J), 1)
  store = _store(tmp_path, phi_NJ)
  assert np.isfinite(datamodel.scores(store, datamodel.solve(datamodel.gram(store), target_TJ, 0.1))).all()


def test_zero_features_are_a_clear_error(tmp_path):
  store = _store(tmp_path, np.zeros((N, J), np.float32))
  with pytest.raises(UserError, match='features of the whole pool are zero'):
    datamodel.solve(datamodel.gram(store), np.ones((1, J)), 0.1)


def test_a_flipped_bit_in_the_store_is_found(tmp_path):
  store = _store(tmp_path, _random((N, J)))
  chunk = max((tmp_path / 'f.zarr' / 'c').rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
  content = bytearray(chunk.read_bytes())
  content[100] ^= 1
  chunk.write_bytes(bytes(content))
  with pytest.raises(UserError, match='features of rows .* cannot be read'):
    list(store)


def test_a_shard_that_was_never_written_is_not_read_as_zeros(tmp_path):
  store = FeatureStore(tmp_path / 'f.zarr', N, J, 16, 'float32')
  store.write(0, _random((16, J)))
  assert store.missing() == [1, 2, 3, 4]
  with pytest.raises(UserError, match='rows 16 to 31'):
    store.read(1)


@pytest.mark.parametrize('rule', ['mean', 'zscore', 'rank'])
def test_mixes(rule):
  score_TN = np.array([[0.0, 1.0, 2.0], [30.0, 10.0, 20.0]], np.float32)
  expected = {
    'mean': [15.0, 5.5, 11.0],
    'zscore': [0.0, -np.sqrt(1.5) / 2, np.sqrt(1.5) / 2],
    'rank': [0.5, 0.25, 0.75],
  }[rule]
  np.testing.assert_allclose(scores.mix(score_TN, rule), expected, atol=1e-6)

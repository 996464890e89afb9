"""The closed form against NumPy in float64, and against known defects of the reference implementation."""

import jax
import numpy as np
import pytest

from dsdm_jax.attribution import accumulators, datamodel, scores, sources
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core.mesh import MODEL
from dsdm_jax.errors import UserError

N, J, T = 70, 24, 3
BLOCKS = ((0, 10), (10, 16), (16, 24))


class Rows(sources.RowSource):
  """A source in memory; `repeat` times the same rows."""

  def __init__(self, phi_NJ, shard_rows=16, repeat=1):
    self._phi_NJ, self._shard_rows, self._repeat = phi_NJ, shard_rows, repeat
    self.rows, self.dimension = repeat * len(phi_NJ), phi_NJ.shape[1]

  def from_row(self, row):
    assert row == 0
    for turn in range(self._repeat):
      for start in range(0, len(self._phi_NJ), self._shard_rows):
        part = self._phi_NJ[start : start + self._shard_rows]
        first = turn * len(self._phi_NJ) + start
        yield first, first + len(part), part


def _store(folder, phi_NJ, shard_rows=16, dtype='float32'):
  store = FeatureStore(folder / 'f.zarr', *phi_NJ.shape, shard_rows, dtype)
  for shard in store.missing():
    start, stop = store.bounds(shard)
    store.write(shard, phi_NJ[start:stop])
  return store


def _random(shape, seed=0, scale=1.0):
  return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def _scores(source, targets, damping, blocks=None, **options):
  blocks = blocks or datamodel.whole(source.dimension)
  parts = datamodel.gram(source, blocks)
  return datamodel.scores(source, datamodel.solve(parts, blocks, targets, damping, **options).u_JK)


def _damped(gram_JJ, damping):
  return gram_JJ + damping * np.trace(gram_JJ) / len(gram_JJ) * np.eye(len(gram_JJ))


def _oracle(phi_NJ, targets_TJ, damping):
  phi, targets = phi_NJ.astype(np.float64), targets_TJ.astype(np.float64)
  return phi @ np.linalg.solve(_damped(phi.T @ phi / len(phi), damping), targets.T)


def _close(got, expected, rtol=1e-4):
  np.testing.assert_allclose(got, expected, rtol=rtol, atol=0.1 * rtol * np.abs(expected).max())


@pytest.mark.parametrize('damping', [1e-3, 0.1, 10.0])
def test_scores_against_numpy_float64(tmp_path, damping):
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)
  _close(_scores(_store(tmp_path, phi_NJ), target_TJ, damping), _oracle(phi_NJ, target_TJ, damping))


def test_one_block_per_layer_adds_up_the_layers_own_datamodels():
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)
  expected = sum(_oracle(phi_NJ[:, a:b], target_TJ[:, a:b], 0.1) for a, b in BLOCKS)
  _close(_scores(Rows(phi_NJ), target_TJ, 0.1, BLOCKS), expected)


def test_blocks_make_the_scale_of_a_layer_irrelevant():
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)
  before = _scores(Rows(phi_NJ), target_TJ, 0.1, BLOCKS)
  for array in (phi_NJ, target_TJ):
    array[:, :10] *= 1024  # a power of two, so that nothing is rounded
  np.testing.assert_allclose(_scores(Rows(phi_NJ), target_TJ, 0.1, BLOCKS), before, rtol=1e-4, atol=1e-5)


def test_unit_norm():
  phi_NJ = _random((N, J))
  phi_NJ[3] = 0
  phi_NJ[4] *= 1e30  # its square leaves float32
  source = sources.UnitNorm(Rows(phi_NJ))
  got = np.concatenate([phi for _, _, phi in source])
  norm = np.linalg.norm(phi_NJ.astype(np.float64), axis=1, keepdims=True)
  expected = phi_NJ / np.where(norm > 0, norm, 1)
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)
  target_TJ = sources.unit_rows(_random((T, J), 1))
  _close(_scores(source, target_TJ, 0.1), _oracle(expected, target_TJ, 0.1))


def test_recentring_divides_the_inverse_by_its_mean_absolute_entry():
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)
  phi = phi_NJ.astype(np.float64)
  inverse = np.linalg.inv(_damped(phi.T @ phi / N, 0.1))
  expected = phi @ (inverse / np.abs(inverse).mean()) @ target_TJ.T
  _close(_scores(Rows(phi_NJ), target_TJ, 0.1, recentre=True), expected)
  _close(_scores(Rows(phi_NJ * 4), target_TJ * 4, 0.1, recentre=True), 16 * expected)


def test_recentring_with_blocks_counts_the_zeros_between_them():
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)
  phi, inverse = phi_NJ.astype(np.float64), np.zeros((J, J))
  for a, b in BLOCKS:
    inverse[a:b, a:b] = np.linalg.inv(_damped(phi[:, a:b].T @ phi[:, a:b] / N, 0.1))
  expected = phi @ (inverse / np.abs(inverse).mean()) @ target_TJ.T
  _close(_scores(Rows(phi_NJ), target_TJ, 0.1, BLOCKS, recentre=True), expected)


def test_joint_gram_over_checkpoints():
  """Columns side by side, each checkpoint brought to mean square one."""
  phi = [_random((N, J)), 30 * _random((N, 10), 2)]
  target = [_random((T, J), 1), 30 * _random((T, 10), 3)]
  joint = sources.Concatenated([Rows(p) for p in phi])
  assert (joint.rows, joint.dimension) == (N, J + 10)
  parts = datamodel.gram(joint)
  scale_J = datamodel.equalise(parts[0], ((0, J), (J, J + 10)))
  u_JK = datamodel.solve(parts, datamodel.whole(J + 10), np.concatenate(target, axis=1) * scale_J, 0.1).u_JK
  got = datamodel.scores(joint, u_JK * scale_J[:, None])
  rms = [np.sqrt(np.mean(p.astype(np.float64) ** 2)) for p in phi]
  scaled = [np.concatenate([a / rms[0], b / rms[1]], axis=1) for a, b in (phi, target)]
  _close(got, _oracle(*scaled, 0.1))


def test_a_joint_gram_of_twice_the_same_checkpoint_counts_it_once():
  """At vanishing damping, so the joint score is on the scale of one datamodel, not of the sum."""
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)
  joint = sources.Concatenated([Rows(phi_NJ), Rows(phi_NJ)])
  got = _scores(joint, np.concatenate([target_TJ, target_TJ], axis=1), 1e-7)
  _close(got, _oracle(phi_NJ, target_TJ, 1e-9), rtol=1e-3)


def test_sources_with_different_shards_cannot_be_concatenated():
  with pytest.raises(ValueError, match='other shards'):
    list(sources.Concatenated([Rows(_random((N, 2))), Rows(_random((N, 2)), 10)]))


@pytest.mark.parametrize('blocks', [((0, J),), BLOCKS])
@pytest.mark.parametrize('share', [0.0, 0.3, 0.99])
def test_mixed_gram_of_pool_and_targets(share, blocks):
  phi_NJ, targets = _random((N, J)), [_random((T, J), 1), 10 * _random((8, J), 2)]
  parts = datamodel.gram(Rows(phi_NJ), blocks)
  datamodel.blend(parts, blocks, targets, share)
  phi = phi_NJ.astype(np.float64)
  pool = phi.T @ phi / N
  moment = np.mean([t.astype(np.float64).T @ t / len(t) for t in targets], axis=0)
  for part, (a, b) in zip(parts, blocks, strict=True):
    p, m = pool[a:b, a:b], moment[a:b, a:b]
    expected = (1 - share) * p + share * m * np.trace(p) / np.trace(m)
    np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.trace(part), np.trace(p), rtol=1e-6)


def test_factoring_in_place_gives_the_same_bits_and_destroys_the_gram():
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)
  parts = datamodel.gram(Rows(phi_NJ))
  before = parts[0].copy()
  copied = datamodel.solve(parts, datamodel.whole(J), target_TJ, 0.1)
  np.testing.assert_array_equal(parts[0], before)
  in_place = datamodel.solve(parts, datamodel.whole(J), target_TJ, 0.1, overwrite=True)
  np.testing.assert_array_equal(in_place.u_JK, copied.u_JK)
  assert not np.array_equal(parts[0], before)
  assert in_place.damping == pytest.approx((0.1 * np.trace(before) / J,))


def test_cholesky_by_panels(monkeypatch):
  monkeypatch.setattr(datamodel, '_STRIPE', 7)
  phi = _random((N, J)).astype(np.float64)
  gram_JJ = phi.T @ phi
  factor = gram_JJ.copy()
  datamodel.cholesky(factor)
  np.testing.assert_allclose(np.tril(factor), np.linalg.cholesky(gram_JJ), rtol=1e-10, atol=1e-12)
  # Sums of absolute entries of the inverse, some columns at a time.
  assert datamodel._inverse_entries(factor.T) == pytest.approx(np.abs(np.linalg.inv(gram_JJ)).sum())


def test_condition_number_and_spectrum():
  phi_NJ = _random((N, J)) * np.geomspace(1, 100, J, dtype=np.float32)
  parts = datamodel.gram(Rows(phi_NJ))
  eigenvalues = np.linalg.eigvalsh(parts[0])
  for exact in (J, J - 1):  # all eigenvalues, or the largest by Lanczos
    found = datamodel.spectrum(parts[0], exact)
    assert found['largest_over_mean'] == pytest.approx(eigenvalues[-1] / eigenvalues.mean(), rel=1e-4)
    assert found['effective_rank'] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
  assert datamodel.spectrum(parts[0])['smallest_over_mean'] == pytest.approx(eigenvalues[0] / eigenvalues.mean())
  condition = datamodel.solve(parts, datamodel.whole(J), _random((1, J)), 1e-3).condition[0]
  # LAPACK's estimate, in the 1-norm, of which the true one in that norm is at most a small factor away.
  assert condition == pytest.approx(np.linalg.cond(_damped(parts[0], 1e-3), 1), rel=0.5)


def test_gram_of_many_rows_is_accurate(tmp_path):
  """A long sum of one large constant and small noise: float32 partial sums alone would drop the noise."""
  rows = 20_000
  phi_NJ = _random((rows, 4)) * 1e-2 + 10
  (gram_JJ,) = datamodel.gram(_store(tmp_path, phi_NJ, shard_rows=500))
  phi = phi_NJ.astype(np.float64)
  np.testing.assert_allclose(gram_JJ, phi.T @ phi / rows, rtol=3e-7)


def test_gram_of_a_hundred_million_rows():
  """1e8 rows of mean 3 and noise 1. A float32 sum, row by row, would stop growing at 2^24 · 2."""
  phi_NJ = _random((200_000, 4)) + 3
  source = Rows(phi_NJ, shard_rows=200_000, repeat=500)
  assert source.rows == 10**8
  phi = phi_NJ.astype(np.float64)
  (gram_JJ,) = datamodel.gram(source)
  # One float32 matmul over 200,000 rows: √rows roundings of 6e-8, and 500 sums in float64 add none.
  np.testing.assert_allclose(gram_JJ, phi.T @ phi / len(phi), rtol=np.sqrt(200_000) * 6e-8)


@pytest.mark.parametrize('blocks', [((0, J),), BLOCKS])
def test_gram_on_eight_devices(eight_devices, blocks, monkeypatch):
  phi_NJ = _random((N, J))
  arrays = []
  add = accumulators._add
  monkeypatch.setattr(accumulators, '_add', lambda totals, parts: (arrays.extend(parts), add(totals, parts)))
  sharded = datamodel.gram(Rows(phi_NJ), blocks, eight_devices)
  model = eight_devices.shape[MODEL]
  rows = {(b - a) // model if (b - a) % model == 0 else b - a for a, b in blocks}
  assert all(isinstance(x, jax.Array) and x.addressable_shards[0].data.shape[0] in rows for x in arrays)
  for one, eight in zip(datamodel.gram(Rows(phi_NJ), blocks), sharded, strict=True):
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('scale', [1e-12, 1e12])
def test_scores_do_not_change_when_features_are_scaled(tmp_path, scale):
  phi_NJ, target_TJ = _random((N, J)), _random((T, J), 1)

  def rank(folder, factor):
    folder.mkdir()
    return _scores(_store(folder, (phi_NJ * factor).astype(np.float32)), target_TJ * factor, 0.1)

  np.testing.assert_allclose(rank(tmp_path / 'b', scale), rank(tmp_path / 'a', 1.0), rtol=2e-3, atol=1e-4)


def test_fewer_rows_than_columns():
  """N < J: the push-through identity gives the same scores from an N×N matrix."""
  phi_NJ, target_TJ = _random((5, J)), _random((1, J), 1)
  phi = phi_NJ.astype(np.float64)
  kernel, damping = phi @ phi.T / 5, 0.1 * np.trace(phi.T @ phi / 5) / J
  _close(_scores(Rows(phi_NJ), target_TJ, 0.1), np.linalg.solve(kernel + damping * np.eye(5), phi @ target_TJ.T))


def test_rank_deficient_features_have_finite_scores():
  phi_NJ = _random((N, 3)) @ _random((3, J), 2)
  target_TJ = _random((T, J), 1)
  _close(_scores(Rows(phi_NJ), target_TJ, 0.1), _oracle(phi_NJ, target_TJ, 0.1), rtol=1e-3)


def test_all_rows_equal_gives_equal_scores():
  phi_NJ, target_TJ = np.repeat(_random((1, J)), N, axis=0), _random((T, J), 1)
  got = _scores(Rows(phi_NJ), target_TJ, 0.1)
  u_JT = np.linalg.solve(_damped(phi_NJ.T @ phi_NJ / N, 0.1), target_TJ.T)
  # The J products of a row may be added in another order at another place of a batch.
  rounding = J * np.finfo(np.float32).eps * np.abs(phi_NJ[0]) @ np.abs(u_JT)
  assert np.all(np.ptp(got, axis=0) <= rounding)
  with pytest.raises(UserError, match=r'all rows have the same score for target docs.*features.layers'):
    scores._check_range('docs', *scores._range('docs', np.full(N, got[0, 0])), N)


def test_zero_features_are_a_clear_error(tmp_path):
  store = _store(tmp_path, np.zeros((N, J), np.float32))
  with pytest.raises(UserError, match='features of the whole pool are zero'):
    _scores(store, np.ones((1, J)), 0.1)


def test_a_layer_without_features_is_named():
  phi_NJ = _random((N, J))
  phi_NJ[:, 10:16] = 0
  with pytest.raises(UserError, match='zero in columns 10 to 15'):
    _scores(Rows(phi_NJ), np.ones((1, J)), 0.1, BLOCKS)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_features_that_are_not_finite_are_a_clear_error(bad):
  phi_NJ = _random((N, J))
  phi_NJ[7, 12] = bad
  with pytest.raises(UserError, match='columns 0 to 23 is not finite'):
    _scores(Rows(phi_NJ), np.ones((1, J)), 0.1)


def test_damping_too_small_for_a_singular_gram_is_refused():
  phi_NJ = np.repeat(_random((N, J // 2)), 2, axis=1)
  with pytest.raises(UserError, match=r'singular at datamodel.damping=1e-20; raise datamodel.damping'):
    _scores(Rows(phi_NJ), np.ones((1, J)), 1e-20)


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_scores_that_are_not_finite_are_refused(value):
  score_N = np.array([1.0, 2.0, float(value)])
  with pytest.raises(UserError, match='row 2 for target docs'):
    scores._range('docs', score_N)


class TestDefectsOfTheReference:
  """Defects of traker 0.3.2, each with inputs that trigger it there."""

  def test_no_overflow_in_half_precision(self, tmp_path):
    """There, ΦᵀΦ of 50,000 rows overflows float16 (65,504) at features of size 2; here they are stored in bfloat16."""
    rows = 50_000
    phi_NJ = 2 + 0.1 * _random((rows, 4))
    (gram_JJ,) = datamodel.gram(_store(tmp_path, phi_NJ, shard_rows=10_000, dtype='bfloat16'))
    assert gram_JJ[0, 0] * rows > np.finfo(np.float16).max
    np.testing.assert_allclose(gram_JJ, phi_NJ.astype(np.float64).T @ phi_NJ / rows, rtol=1e-3)

  def test_damping_does_not_vanish(self):
    """There, λ is added in half precision; 1e-5 of the diagonal is less than half a unit in the last place of it."""
    phi_NJ = np.repeat(_random((N, J // 2)), 2, axis=1)  # singular but for λ
    (gram_JJ,) = parts = datamodel.gram(Rows(phi_NJ))
    half = np.float16(np.diagonal(gram_JJ))
    assert np.array_equal(half + np.float16(1e-5 * np.diagonal(gram_JJ).mean()), half)
    # Along (1, −1, 0, …) the Gram matrix is zero, so u is the target over λ.
    target_TJ = np.zeros((1, J))
    target_TJ[0, :2] = 1, -1
    found = datamodel.solve(parts, datamodel.whole(J), target_TJ, 1e-5)
    np.testing.assert_allclose(found.u_JK[:2, 0] * found.damping[0], [1, -1], rtol=1e-6)

  @pytest.mark.parametrize('shard_rows', [7, 16])
  def test_a_partial_store_is_completed(self, tmp_path, shard_rows):
    """There, a batch with some finished rows crashes. Here batches stay within a shard, which is finished or not."""
    phi_NJ = _random((N, J))
    store = FeatureStore(tmp_path / 'f.zarr', N, J, shard_rows, 'float32')
    for shard in (0, 2):
      start, stop = store.bounds(shard)
      store.write(shard, phi_NJ[start:stop])
    again = _store(tmp_path, phi_NJ, shard_rows)
    assert again.missing() == []
    np.testing.assert_array_equal(np.concatenate([phi for _, _, phi in again]), phi_NJ)


def test_a_flipped_bit_in_the_store_is_detected(tmp_path):
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

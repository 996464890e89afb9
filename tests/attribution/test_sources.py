"""Stored features, recomputed features and directional derivatives give the same scores."""

import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.extractor import not_finite, step_rows
from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
from dsdm_jax.attribution.quantization import Quantizer, column_blocks
from dsdm_jax.attribution.sources import DirectionalSource, PoolPass, Recomputed, ahead
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.errors import UserError
from dsdm_jax.lm import outputs

from .conftest import LENGTH, VOCAB, make_problem

ROWS, SHARD, BATCH, J = 45, 16, 8, 96


@dataclasses.dataclass
class Rows:
  """The part of a pool that a pass reads; counts the rows read."""

  tokens_NL: np.ndarray
  length: int = LENGTH
  num_rows: int = ROWS
  read: int = 0
  counted_NL: np.ndarray | None = None

  @property
  def counts_some(self):
    return self.counted_NL is not None

  def weights(self, rows):
    weights_BL = np.ones((len(rows), self.length), np.float32) if self.counted_NL is None else self.counted_NL[rows]
    return weights_BL * (np.arange(self.length) > 0)

  def tokens(self, rows):
    self.read += len(rows)
    return self.tokens_NL[rows]


@pytest.fixture
def rows() -> Rows:
  return Rows(np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32))


def test_a_pass_gives_each_row_its_own_weights(rows, one_device):
  step = _step('two_sided', one_device)
  rows.counted_NL = np.random.default_rng(1).integers(0, 2, (ROWS, LENGTH)).astype(np.float32)
  rows.counted_NL[7] = 0
  ((_, _, (phi_BJ, _, _)),) = _source(step, rows, one_device, 'float32').ranges([(4, 15)])
  prepared, chosen = step.prepare(make_problem().params, 0), np.r_[4:12]
  wanted = np.asarray(step(prepared, rows.tokens_NL[chosen], rows.weights(chosen)))
  np.testing.assert_allclose(phi_BJ[:8], wanted, atol=1e-6)
  assert not phi_BJ[3].any() and phi_BJ[2].any()
  rows.counted_NL = None
  ((_, _, (whole_BJ, _, _)),) = _source(step, rows, one_device, 'float32').ranges([(4, 15)])
  assert not np.allclose(whole_BJ, phi_BJ)


def _source(step, rows, mesh, dtype='bfloat16', flop=lambda _: None):
  rows_pass = PoolPass(step, step.prepare(make_problem().params, 0), rows, BATCH, mesh, flop)
  return Recomputed(
    rows_pass, ROWS, step.dimension, SHARD, Quantizer(dtype, column_blocks(step.describe(), step.dimension))
  )


@functools.cache  # compiles once for all tests
def _step(kind, mesh):
  model = make_problem().model
  if kind == 'dense':
    return DenseFeatures(model, outputs.margin, J, 0, mesh, microbatch=4)
  return TwoSidedFeatures(model, outputs.margin, '.*', J, 0, mesh)


@pytest.mark.parametrize(('kind', 'dtype'), [('two_sided', 'bfloat16'), ('two_sided', 'int8'), ('dense', 'bfloat16')])
def test_stored_and_recomputed_features_are_the_same_bits(kind, dtype, rows, one_device, tmp_path):
  step = _step(kind, one_device)
  source, columns = _source(step, rows, one_device, dtype), column_blocks(step.describe(), step.dimension)
  store = FeatureStore(tmp_path / 'f.zarr', ROWS, source.dimension, SHARD, dtype, columns)
  for shard in (2, 0, 1):  # as a resumed run may
    ((_, _, encoded),) = source.ranges([store.bounds(shard)])
    store.write(shard, encoded)
  for (*bounds, phi_BJ), (*stored_bounds, stored_BJ) in zip(source, store, strict=True):
    assert bounds == stored_bounds and phi_BJ.dtype == stored_BJ.dtype
    np.testing.assert_array_equal(phi_BJ, stored_BJ)
  u_JT = np.random.default_rng(1).normal(size=(source.dimension, 2))
  np.testing.assert_array_equal(datamodel.gram(source)[0], datamodel.gram(store)[0])
  np.testing.assert_array_equal(datamodel.scores(source, u_JT), datamodel.scores(store, u_JT))


@pytest.mark.parametrize(
  ('devices', 'batch', 'microbatch', 'wanted'),
  [(1, 8, 0, (8, 0)), (3, 8, 0, (9, 0)), (3, 8, 4, (12, 6)), (4, 2, 0, (4, 0)), (2, 8, 3, (8, 4)), (1, 8, 3, (9, 3))],
)
def test_batch_sizes_are_rounded_up_to_the_device_count(devices, batch, microbatch, wanted):
  config = base.get_config()
  config.features.update({'batch_size': batch, 'microbatch': microbatch})
  assert step_rows(config.features, make_mesh(config.mesh, jax.devices()[:devices])) == wanted


def test_features_do_not_depend_on_the_device_count(rows, one_device):
  """45 rows in shards of 16 and batches of 12: the last batch of every shard is padded."""
  mesh, found = make_mesh(base.get_config().mesh, jax.devices()[:3]), []
  for place, batch in ((one_device, BATCH), (mesh, 12)):
    step = _step('two_sided', place)
    rows_pass = PoolPass(step, step.prepare(make_problem().params, 0), rows, batch, place, lambda _: None)
    found.append(np.concatenate([phi for _, _, phi in rows_pass.ranges([(0, 16), (16, 32), (32, 45)])]))
  one_NJ, three_NJ = found
  assert three_NJ.shape == (ROWS, step.dimension)
  assert np.all(np.linalg.norm(three_NJ - one_NJ, axis=1) < 1e-5 * np.linalg.norm(one_NJ, axis=1))


def test_scores_by_jvp_are_those_of_features(rows, one_device):
  step, params = _step('dense', one_device), make_problem().params
  features = _source(step, rows, one_device, dtype='float32')
  scorer = DirectionalScores(make_problem().model, outputs.margin, 0, one_device)

  def start(u_JT):
    return PoolPass(scorer, scorer.prepare(params, u_JT, 0), rows, BATCH, one_device, lambda _: None)

  source = DirectionalSource(features, 20, start)
  (gram_JJ,) = datamodel.gram(source)
  phi_NJ = np.concatenate([phi for _, _, phi in features]).astype(np.float64)
  np.testing.assert_allclose(gram_JJ, phi_NJ[:20].T @ phi_NJ[:20] / 20, rtol=0, atol=1e-5 * np.abs(gram_JJ).max())
  u_JT = np.random.default_rng(1).normal(size=(J, 3)) * 1e9
  seen = []
  got_NT = datamodel.scores(source, u_JT, seen.append)
  assert sum(seen) == ROWS
  assert np.abs(got_NT - phi_NJ @ u_JT).max() < 1e-5 * np.abs(phi_NJ @ u_JT).max()


def test_a_range_is_counted_and_read_once(rows, one_device):
  flop = []
  step = _step.__wrapped__('two_sided', one_device)
  source = _source(step, rows, one_device, flop=flop.append)
  assert [stop - start for start, stop, _ in source] == [16, 16, 13]
  assert step.jitted._cache_size() == 1  # the last shard is short and runs the same program
  assert rows.read == ROWS
  (whole,) = flop
  list(source.from_row(32))  # as where an earlier attempt read the rows before
  assert flop == [whole, whole] and whole > 0


def test_errors_of_reads_are_raised(rows, one_device):
  rows.tokens_NL = rows.tokens_NL[:40]
  with pytest.raises(IndexError):
    list(_source(_step('two_sided', one_device), rows, one_device))


@pytest.mark.parametrize(('value', 'dtype'), [(np.nan, 'bfloat16'), (np.inf, 'int8')])
def test_a_feature_that_is_not_finite_is_named_and_its_shard_is_not_written(value, dtype, rows, one_device, tmp_path):
  """Row 21, in shard 1, in the second layer of a scanned stack."""
  step = TwoSidedFeatures(
    make_problem(scan_layers=True).model, outputs.margin, 'attention/out/kernel', J, 0, one_device
  )
  (layer,) = step.layers
  assert layer.stack == (2,)

  class Broken:
    apply = step.apply

    def __call__(self, prepared, tokens_BL, weights_BL):
      phi_BJ = step(prepared, tokens_BL, weights_BL)
      bad_B = (tokens_BL == rows.tokens_NL[21][None]).all(axis=1)
      first = layer.start + layer.a * layer.b
      return phi_BJ.at[:, first:].set(jnp.where(bad_B[:, None], value, phi_BJ[:, first:]))

  params = make_problem(scan_layers=True).params
  rows_pass = PoolPass(Broken(), step.prepare(params, 3), rows, BATCH, one_device, lambda _: None)
  columns = column_blocks(step.describe(), step.dimension)
  refuse = functools.partial(not_finite, step, proxy=3)
  source = Recomputed(rows_pass, ROWS, step.dimension, SHARD, Quantizer(dtype, columns), refuse)
  store = FeatureStore(tmp_path / 'f.zarr', ROWS, step.dimension, SHARD, dtype, columns)
  words = rf'row 21 is {value} in blocks/attention/out/kernel, layer 1 of the stack of proxy 3'
  with pytest.raises(UserError, match=words):
    list(store.fill(source.ranges(map(store.bounds, range(3)))))
  assert store.missing() == [1, 2]
  assert not (tmp_path / 'f.zarr/c/1').exists()


def test_ahead_keeps_the_order():
  assert list(ahead(iter(range(50)))) == list(range(50))
  assert list(ahead(iter([None, False, ()]))) == [None, False, ()]
  assert list(ahead(iter(()))) == []


def test_ahead_is_one_ahead():
  read, second = [], threading.Event()

  def items():
    for item in range(4):
      read.append(item)
      if item == 1:
        second.set()
      yield item

  coming = ahead(items())
  assert next(coming) == 0
  assert second.wait(60), 'the second is read while the first is used'
  time.sleep(0.05)
  assert read == [0, 1], 'and not the third'
  assert list(coming) == [1, 2, 3]


def test_ahead_raises_errors_in_order():
  def items():
    yield 0
    yield 1
    raise OSError('torn')

  coming = ahead(items())
  assert [next(coming), next(coming)] == [0, 1]
  with pytest.raises(OSError, match='torn'):
    next(coming)

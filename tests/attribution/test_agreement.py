"""Scores agree over numbers of devices and over dtypes: features, Gram, solution, scores, as the stages make them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.stats

from configs import base
from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
from dsdm_jax.attribution.sources import RowSource
from dsdm_jax.core.mesh import batch_sharding, make_mesh
from dsdm_jax.lm import outputs

from .conftest import LENGTH, VOCAB, make_problem

ROWS, TARGETS, BATCH, TOP = 384, 32, 32, 64


@dataclasses.dataclass
class Rows(RowSource):
  phi_NJ: np.ndarray

  def __post_init__(self):
    self.rows, self.dimension = self.phi_NJ.shape

  def from_row(self, row):
    assert row == 0
    yield 0, self.rows, self.phi_NJ


@functools.cache
def score_N(kind: str, dtype: str, devices: int) -> np.ndarray:
  """Scores of ROWS random rows for the mean of TARGETS others."""
  problem = make_problem(layers=1, compute_dtype=dtype)
  mesh = make_mesh(base.get_config().mesh, jax.devices()[:devices])
  if kind == 'dense':
    step = DenseFeatures(problem.model, outputs.margin, 96, 0, mesh)
  else:
    step = TwoSidedFeatures(problem.model, outputs.margin, '.*', 96, 0, mesh)
  prepared = step.prepare(problem.params, 0)
  # Tokens of a narrow range in some rows and of a wide one in others: scores with something to tell.
  rng = np.random.default_rng(0)
  high_N = rng.integers(4, VOCAB + 1, ROWS + TARGETS)
  tokens_NL = (rng.random((ROWS + TARGETS, LENGTH)) * high_N[:, None]).astype(np.int32)
  weights_BL = np.ones((BATCH, LENGTH), np.float32)
  weights_BL[:, 0] = 0
  parts = [
    step(prepared, *jax.device_put((tokens_NL[i : i + BATCH], weights_BL), batch_sharding(mesh)))
    for i in range(0, ROWS + TARGETS, BATCH)
  ]
  phi_NJ = np.concatenate([np.asarray(part) for part in parts])
  source = Rows(phi_NJ[:ROWS])
  parts = datamodel.gram(source, mesh=mesh)
  found = datamodel.solve(parts, datamodel.whole(source.dimension), phi_NJ[ROWS:].mean(axis=0)[None], 0.1)
  return datamodel.scores(source, found.u_JK)[:, 0]


@pytest.mark.parametrize('kind', ['two_sided', 'dense'])
def test_the_same_rows_are_chosen_on_one_and_eight_devices(kind):
  """At least 0.999 of the top: with 64 of 384 rows, all of them."""
  one_N = score_N(kind, 'float32', 1)
  top = set(np.argsort(one_N)[-TOP:])
  found_N = score_N(kind, 'float32', 8)
  assert np.linalg.norm(found_N - one_N) < 1e-4 * np.linalg.norm(one_N)
  assert len(top & set(np.argsort(found_N)[-TOP:])) >= 0.999 * TOP


@pytest.mark.parametrize('kind', ['two_sided', 'dense'])
def test_scores_in_bfloat16_order_rows_as_those_in_float32(kind):
  """Spearman correlation at least 0.99."""
  found = scipy.stats.spearmanr(score_N(kind, 'bfloat16', 1), score_N(kind, 'float32', 1)).statistic
  assert found >= 0.99, found

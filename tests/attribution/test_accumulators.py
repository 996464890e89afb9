"""A pass over the pool that is stopped goes on at a shard, and gives the same bits."""

import numpy as np
import pytest

from dsdm_jax.attribution import accumulators, datamodel
from dsdm_jax.attribution.accumulators import Partials

ROWS, SHARD, J = 40, 8, 6


class Killed(BaseException):
  pass


class Rows:
  """Features that cost something: tells which shards were made, and is killed before one."""

  rows, dimension = ROWS, J

  def __init__(self, killed_at: int = ROWS):
    self.phi_NJ = np.random.default_rng(0).normal(size=(ROWS, J)).astype(np.float32)
    self.killed_at, self.made = killed_at, []

  def __iter__(self):
    return self.starting(0)

  def starting(self, row):
    for start in range(row, ROWS, SHARD):
      if start >= self.killed_at:
        raise Killed
      self.made.append(start)
      yield start, start + SHARD, self.phi_NJ[start : start + SHARD]


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
  monkeypatch.setattr(accumulators, 'SAVE_SECONDS', 0.0)
  clock = iter(range(10**6))
  monkeypatch.setattr(accumulators.time, 'monotonic', lambda: next(clock) * 1e6)


def _normed(source):
  return datamodel.UnitNorm(datamodel.Concatenated([source, source]))


@pytest.mark.parametrize('wrap', [lambda source: source, _normed], ids=['plain', 'wrapped'])
def test_gram_goes_on_from_the_last_shard(tmp_path, wrap):
  (wanted,) = datamodel.gram(wrap(Rows()))
  killed = Rows(killed_at=24)
  with pytest.raises(Killed):
    datamodel.gram(wrap(killed), partials=Partials(tmp_path))
  again, seen = Rows(), []
  (found,) = datamodel.gram(wrap(again), progress=seen.append, partials=Partials(tmp_path))
  np.testing.assert_array_equal(found, wanted)
  assert again.made[0] in (8, 16) and sum(seen) == ROWS  # the shards in flight are lost
  third = Rows(killed_at=0)
  (found,) = datamodel.gram(wrap(third), partials=Partials(tmp_path))
  np.testing.assert_array_equal(found, wanted)


def test_scores_go_on_from_the_last_shard(tmp_path):
  u_JK = np.random.default_rng(1).normal(size=(J, 3))

  def scores(source, folder):
    return list(Partials(folder).kept('a', lambda row: datamodel.score_shards(source, u_JK, row)))

  wanted = scores(Rows(), None)
  with pytest.raises(Killed):
    scores(Rows(killed_at=32), tmp_path)
  again = Rows()
  found = scores(again, tmp_path)
  assert again.made == [32]
  assert [shard[:2] for shard in found] == [shard[:2] for shard in wanted]
  for (*_, a), (*_, b) in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(a, b)
  Partials(tmp_path).clear()
  assert list(tmp_path.iterdir()) == []


def test_short_passes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.undo()
  datamodel.gram(Rows(), partials=Partials(tmp_path))
  list(Partials(tmp_path).kept('a', lambda row: Rows().starting(row)))
  assert list(tmp_path.iterdir()) == []

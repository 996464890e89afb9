"""A killed pass over the pool resumes at a shard and gives the same bits."""

import contextlib
import os

import numpy as np
import pytest

from dsdm_jax.attribution import accumulators, datamodel
from dsdm_jax.attribution.accumulators import Accumulator
from dsdm_jax.attribution.sources import Concatenated, RowSource, UnitNorm

ROWS, SHARD, J = 40, 8, 6


class Killed(BaseException):
  pass


class Rows(RowSource):
  """Notes which shards were computed, and raises before one."""

  rows, dimension = ROWS, J

  def __init__(self, killed_at: int = ROWS):
    self.phi_NJ = np.random.default_rng(0).normal(size=(ROWS, J)).astype(np.float32)
    self.killed_at, self.computed = killed_at, []

  def from_row(self, row):
    for start in range(row, ROWS, SHARD):
      if start >= self.killed_at:
        raise Killed
      self.computed.append(start)
      yield start, start + SHARD, self.phi_NJ[start : start + SHARD]


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
  monkeypatch.setattr(Accumulator, '_is_due', lambda _: True)


def _normed(source):
  return UnitNorm(Concatenated([source, source]))


@pytest.mark.parametrize('wrap', [lambda source: source, _normed], ids=['plain', 'wrapped'])
def test_gram_resumes_at_the_last_saved_shard(tmp_path, wrap):
  (wanted,) = datamodel.gram(wrap(Rows()))
  killed = Rows(killed_at=24)
  with pytest.raises(Killed):
    datamodel.gram(wrap(killed), accumulator=Accumulator(tmp_path))
  again, seen = Rows(), []
  (result,) = datamodel.gram(wrap(again), progress=seen.append, accumulator=Accumulator(tmp_path))
  np.testing.assert_array_equal(result, wanted)
  assert again.computed[0] in (8, 16) and sum(seen) == ROWS  # the shards in flight are lost
  third = Rows(killed_at=0)
  (result,) = datamodel.gram(wrap(third), accumulator=Accumulator(tmp_path))
  np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize('at', range(1, 13))
def test_kill_while_sums_are_saved_loses_the_last_save_only(tmp_path, monkeypatch, at):
  """Before each rename and deletion."""
  (wanted,) = datamodel.gram(Rows())
  with pytest.raises(Killed):
    datamodel.gram(Rows(killed_at=24), accumulator=Accumulator(tmp_path))
  saved = max(int(np.load(file)['row']) for file in tmp_path.glob('*.npz'))
  left = iter(range(at - 1, -1, -1))

  def killed_in(function):
    def act(*arguments, **options):
      if not next(left, 1):
        raise Killed
      return function(*arguments, **options)

    return act

  with monkeypatch.context() as patched, contextlib.suppress(Killed):
    patched.setattr(os, 'replace', killed_in(os.replace))
    patched.setattr(accumulators.storage, 'unmark', killed_in(accumulators.storage.unmark))
    datamodel.gram(Rows(), accumulator=Accumulator(tmp_path))
  again = Rows(killed_at=ROWS)
  np.testing.assert_array_equal(datamodel.gram(again, accumulator=Accumulator(tmp_path))[0], wanted)
  assert not again.computed or again.computed[0] >= saved
  Accumulator(tmp_path).clear()
  assert list(tmp_path.iterdir()) == []


def test_weighted_sums_resume_at_the_last_saved_shard(tmp_path):
  weight_CN = np.random.default_rng(1).random((2, ROWS)) < 0.5
  wanted = datamodel.sums(Rows(), weight_CN)
  with pytest.raises(Killed):
    datamodel.sums(Rows(killed_at=24), weight_CN, Accumulator(tmp_path))
  again = Rows()
  np.testing.assert_array_equal(datamodel.sums(again, weight_CN, Accumulator(tmp_path)), wanted)
  assert again.computed[0] in (8, 16)


def _columns(source, folder, progress=lambda rows: None):
  """Shard → its features, through the chunks of a pass."""

  def parts(row):
    for bounds, (start, stop, phi_BJ) in source.rounds(row):
      yield bounds, (start, stop), {'phi_BJ': phi_BJ, 'sum_1J': phi_BJ.sum(axis=0)[None]}

  result = {}
  for chunk in Accumulator(folder).columns('a', source.team, parts, progress):
    ends = np.cumsum([stop - start for start, stop in chunk.bounds])
    parts_S = np.split(chunk.arrays['phi_BJ'], ends[:-1])
    assert chunk.overlaps(chunk.bounds[0][0], ROWS) and not chunk.overlaps(ROWS, ROWS + 1)
    for bounds, phi_BJ, sum_J in zip(chunk.bounds, parts_S, chunk.select(['sum_1J'])['sum_1J'], strict=True):
      result[bounds] = phi_BJ, sum_J
  return result


def test_columns_resume_at_the_last_saved_shard(tmp_path):
  wanted, seen = _columns(Rows(), None), []
  with pytest.raises(Killed):
    _columns(Rows(killed_at=32), tmp_path)
  again = Rows()
  result = _columns(again, tmp_path, seen.append)
  assert again.computed == [32] and sum(seen) == ROWS
  assert sorted(result) == sorted(wanted) == [(start, start + SHARD) for start in range(0, ROWS, SHARD)]
  for bounds, arrays in wanted.items():
    for a, b in zip(result[bounds], arrays, strict=True):
      np.testing.assert_array_equal(a, b)
  Accumulator(tmp_path).clear()
  assert list(tmp_path.iterdir()) == []


def test_damaged_partial_results_are_computed_again(tmp_path):
  """Of a sum all of it; of shards those from the damaged file on."""
  (gram,), shards = datamodel.gram(Rows()), _columns(Rows(), None)
  for act in (
    lambda: _columns(Rows(killed_at=32), tmp_path),
    lambda: datamodel.gram(Rows(32), accumulator=Accumulator(tmp_path)),
  ):
    with pytest.raises(Killed):
      act()
  files = sorted(tmp_path.glob('partial_a.*.npz'))
  for file in (files[1], next(tmp_path.glob('sum_g*.npz'))):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
  again = Rows()
  for bounds, (phi_BJ, _) in _columns(again, tmp_path).items():
    np.testing.assert_array_equal(phi_BJ, shards[bounds][0])
  assert again.computed == [8, 16, 24, 32]
  again = Rows()
  np.testing.assert_array_equal(datamodel.gram(again, accumulator=Accumulator(tmp_path))[0], gram)
  assert again.computed[0] == 0


def test_short_passes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.undo()
  datamodel.gram(Rows(), accumulator=Accumulator(tmp_path))
  _columns(Rows(), tmp_path)
  assert list(tmp_path.iterdir()) == []

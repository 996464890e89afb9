"""A selection checks itself, and comes back from disk as it was."""

from pathlib import Path

import numpy as np
import pytest

from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError


def select(rows: list[int], weights: list[float] | None = None) -> Selection:
  values = np.ones(len(rows)) if weights is None else weights
  return Selection(
    'dsdm--mix--0', np.array(rows, np.int64), np.array(values, np.float32), {'method': 'dsdm', 'seed': 0}
  )


def test_save_and_load(tmp_path: Path):
  chosen = select([5, 2, 9], [1, 0.5, 2])
  chosen.save(tmp_path)
  result = Selection.load(tmp_path, 'dsdm--mix--0')
  np.testing.assert_array_equal(result.rows, chosen.rows)
  np.testing.assert_array_equal(result.weights, chosen.weights)
  assert (result.rows.dtype, result.weights.dtype) == (np.int64, np.float32)
  assert (result.name, result.provenance, result.size) == (chosen.name, chosen.provenance, 3)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  chosen.save(tmp_path)
  assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_missing(tmp_path: Path):
  with pytest.raises(UserError, match=r"no selection 'x' in .*x\.npz is missing"):
    Selection.load(tmp_path, 'x')


def test_check():
  select([0, 9]).check(10)
  select([4, 4]).check(10, cap=2)
  with pytest.raises(ValueError, match='row 10 of a pool of 10 rows'):
    select([0, 10]).check(10)
  with pytest.raises(ValueError, match='row 4 occurs 2 times, more than 1'):
    select([4, 3, 4]).check(10)
  with pytest.raises(ValueError, match='is empty'):
    select([]).check(10)


@pytest.mark.parametrize(
  ('rows', 'weights', 'expected'),
  [
    (np.array([-1]), np.ones(1, np.float32), 'row -1 is negative'),
    (np.array([1], np.int32), np.ones(1, np.float32), 'rows must be int64'),
    (np.array([[1]]), np.ones((1, 1), np.float32), 'rows must be int64'),
    (np.array([1]), np.ones(2, np.float32), 'weights must be float32'),
    (np.array([1]), np.ones(1), 'weights must be float32'),
    (np.array([1]), np.array([np.nan], np.float32), 'finite'),
    (np.array([1]), np.array([-1], np.float32), 'not negative'),
  ],
)
def test_malformed(rows: np.ndarray, weights: np.ndarray, expected: str):
  with pytest.raises(ValueError, match=expected):
    Selection('x', rows, weights, {})

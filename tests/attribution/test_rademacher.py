import jax
import numpy as np

from dsdm_jax.attribution import rademacher


def test_signs_are_balanced_and_uncorrelated():
  key = jax.random.key(1)
  signs = np.asarray(rademacher.signs(key, 0, 256), np.float64)
  assert set(np.unique(signs)) == {-1.0, 1.0}
  n = signs.size
  assert abs(signs.mean()) < 5 / np.sqrt(n)
  products = signs.T @ signs / len(signs) - np.eye(256)
  # 32,640 pairs of columns of 1,024 signs: the largest correlation of independent ones stays below 6/√1024.
  assert np.abs(products).max() < 6 / np.sqrt(len(signs))


def test_no_column_returns_in_another_block_or_at_any_dimension():
  key = jax.random.key(2)
  columns = np.concatenate([np.asarray(rademacher.signs(key, block, 512)).T for block in range(3)])
  assert len(np.unique(columns, axis=0)) == len(columns)


def test_a_dimension_that_is_no_multiple_of_32_is_cut_not_padded():
  key = jax.random.key(3)
  np.testing.assert_array_equal(rademacher.signs(key, 4, 70), np.asarray(rademacher.signs(key, 4, 96))[:, :70])


def test_no_column_returns_in_another_checkpoint():
  """The reference adds 10,000 to its seed from one checkpoint to the next, so beyond that J columns come again."""
  dimension = 20_480
  parameters = {'kernel': np.zeros((2, 2))}
  columns = [
    np.packbits(np.asarray(rademacher.signs(rademacher.keys(parameters, 0, c)[0], 0, dimension)) > 0, axis=0).T
    for c in (0, 1)
  ]
  assert len(np.unique(np.concatenate(columns), axis=0)) == 2 * dimension

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
  # 32,640 pairs of columns of 8,192 signs: the largest correlation of independent ones stays below 6/√8192.
  assert np.abs(products).max() < 6 / np.sqrt(len(signs))


def test_no_column_returns_in_another_block_or_at_any_dimension():
  key = jax.random.key(2)
  columns = np.concatenate([np.asarray(rademacher.signs(key, block, 512)).T for block in range(3)])
  assert len(np.unique(columns, axis=0)) == len(columns)


def test_no_column_returns_in_another_checkpoint():
  """The reference adds 10,000 to its seed from one checkpoint to the next, so beyond that J columns come again."""
  dimension = 20_480
  parameters = {'kernel': np.zeros((2, 2))}
  draws = [np.asarray(rademacher._bits(rademacher.keys(parameters, 0, c)[0], 0, dimension)).T for c in (0, 1)]
  assert len(np.unique(np.concatenate(draws), axis=0)) == 2 * dimension


def test_every_bit_of_a_draw_serves_another_slice():
  rows = np.asarray(rademacher.signs(jax.random.key(3), 4, 64)).reshape(rademacher.SLICES, -1)
  agree = (rows @ rows.T) / rows.shape[1]
  assert np.abs(agree - np.eye(rademacher.SLICES)).max() < 6 / np.sqrt(rows.shape[1])

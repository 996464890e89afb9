"""Named streams: fixed for ever, and apart from each other."""

import itertools

import jax
import numpy as np
import pytest

from dsdm_jax.core import prng

NAMES = [
  (),
  ('a',),
  ('b',),
  ('a', 'b'),
  ('ab',),
  ('a', 1),
  ('a', '1'),
  ('a', 1, 1),
  ('a', 11),
  ("a', 'b",),
  ('a\x1fb',),
]


def test_values_are_those_of_the_first_release():
  """A change here changes every run of everybody: results of older versions could not be had again."""
  assert jax.random.key_data(prng.stream(0, 'projection', 1)).tolist() == STREAM
  assert prng.numpy_stream(0, 'proxy_subset', 0).integers(0, 1_000, 4).tolist() == NUMPY
  assert prng.derive(0, 'order', 2) == DERIVED


STREAM = [2387892221, 2350625873]
NUMPY = [654, 391, 960, 121]
DERIVED = 7828250161109519748


@pytest.mark.parametrize(
  'draw',
  [
    lambda seed, names: tuple(jax.random.key_data(prng.stream(seed, *names)).tolist()),
    lambda seed, names: tuple(prng.numpy_stream(seed, *names).integers(0, 2**62, 2).tolist()),
    lambda seed, names: prng.derive(seed, *names),
  ],
  ids=['stream', 'numpy_stream', 'derive'],
)
def test_streams_are_apart(draw):
  found = {(seed, names): draw(seed, names) for seed, names in itertools.product((0, 1, 10), NAMES)}
  assert len(set(found.values())) == len(found)


def test_streams_do_not_depend_on_what_was_drawn_before():
  first = prng.numpy_stream(3, 'x').normal(size=3)
  prng.numpy_stream(3, 'y').normal(size=100)
  np.testing.assert_array_equal(prng.numpy_stream(3, 'x').normal(size=3), first)


def test_child_seed_is_a_seed():
  for names in NAMES:
    assert 0 <= prng.derive(5, *names) < 2**63
    prng.stream(prng.derive(5, *names), 'again')

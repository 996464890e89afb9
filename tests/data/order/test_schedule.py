"""The order of training: a permutation in each epoch, fixed rates, and random access."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.data.order.schedule import BLOCK, Part, Schedule
from dsdm_jax.data.pool.permutation import permute
from dsdm_jax.errors import UserError


def key(seed: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 2**64, 8, np.uint64)


@given(st.integers(1, 700), st.integers(0, 2**32))
def test_permute_is_a_permutation(size: int, seed: int):
  assert sorted(permute(np.arange(size), size, key(seed)).tolist()) == list(range(size))


@given(st.integers(1, 2**40), st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True))
def test_permute_of_huge_sizes_one_to_one_without_being_stored(size: int, places: list[int]):
  place_B = np.unique(np.array(places) % size)
  image_B = permute(place_B, size, key(1))
  assert len(np.unique(image_B)) == len(place_B)
  assert ((image_B >= 0) & (image_B < size)).all()
  np.testing.assert_array_equal(permute(place_B[-1:], size, key(1)), image_B[-1:])


def test_permutations_of_few_are_all_about_equally_likely():
  draws = 12_000
  count = collections.Counter(tuple(permute(np.arange(4), 4, key(s))) for s in range(draws))
  assert len(count) == 24
  expected = draws / 24
  # Chi-squared with 23 degrees of freedom: 49.7 is exceeded once in a thousand.
  assert sum((n - expected) ** 2 / expected for n in count.values()) < 49.7


@given(st.integers(1, 60), st.integers(0, 400), st.integers(0, 9))
def test_each_epoch_visits_each_row_once(size: int, length: int, seed: int):
  rows = np.arange(size) * 10 + 7
  part_B, row_B, weight_B = Schedule.single('a', rows, length, seed).at(np.arange(length))
  assert not part_B.any()
  assert (weight_B == 1).all()
  for start in range(0, length, size):
    epoch = row_B[start : start + size]
    assert len(set(epoch.tolist())) == len(epoch)
    assert set(epoch.tolist()) <= set(rows.tolist())


def test_epochs_and_seeds_have_orders_of_their_own():
  _, row_B, _ = Schedule.single('a', np.arange(100), 300, 0).at(np.arange(300))
  orders = {tuple(row_B[i : i + 100]) for i in (0, 100, 200)}
  _, other_B, _ = Schedule.single('a', np.arange(100), 100, 1).at(np.arange(100))
  assert len(orders | {tuple(other_B)}) == 4
  # No longer a schedule changes what a shorter one began with.
  np.testing.assert_array_equal(Schedule.single('a', np.arange(100), 50, 0).at(np.arange(50))[1], row_B[:50])


def test_no_position_prefers_a_row():
  """Rows at position 0 over many seeds are uniform: chi-squared, 19 degrees of freedom, once in a thousand."""
  draws = 4_000
  first = [int(Schedule.single('a', np.arange(20), 20, seed).at(np.array([0]))[1][0]) for seed in range(draws)]
  count = np.bincount(first, minlength=20)
  assert ((count - draws / 20) ** 2 / (draws / 20)).sum() < 43.8


def mixed(length: int = 3_000, **keys) -> Schedule:
  parts = (
    Part('a', np.arange(50), 1.0),
    Part('b', np.arange(100, 1_000), 2.5, np.linspace(0, 1, 900).astype(np.float32)),
    Part('c', np.arange(2_000, 2_003), 1e-9),
  )
  return Schedule(parts, length, 4, **keys)


def test_rates_hold_in_every_block():
  schedule = mixed()
  part_B, _, _ = schedule.at(np.arange(3_000))
  assert schedule.counts.sum() == BLOCK
  np.testing.assert_allclose(schedule.counts[:2] / BLOCK, [1 / 3.5, 2.5 / 3.5], atol=2 / BLOCK)
  assert schedule.counts[2] == 1  # a rate above zero is seen
  for block in range(2):
    in_block = np.bincount(part_B[block * BLOCK : (block + 1) * BLOCK], minlength=3)
    np.testing.assert_array_equal(in_block, schedule.counts)
  assert (part_B[:BLOCK] != part_B[BLOCK : 2 * BLOCK]).any()


def test_parts_go_through_their_epochs():
  schedule = mixed()
  part_B, row_B, weight_B = schedule.at(np.arange(3_000))
  for part in range(3):
    rows = schedule.parts[part].rows
    mine = row_B[part_B == part]
    for start in range(0, len(mine), len(rows)):
      epoch = mine[start : start + len(rows)].tolist()
      assert len(set(epoch)) == len(epoch)
      assert set(epoch) <= set(rows.tolist())
  in_b = part_B == 1
  np.testing.assert_array_equal(weight_B[in_b], schedule.parts[1].weights[row_B[in_b] - 100])
  assert (weight_B[~in_b] == 1).all()


@given(st.lists(st.integers(0, 2_999), max_size=30))
def test_random_access_is_the_stream(positions: list[int]):
  schedule = mixed()
  everything = schedule.at(np.arange(3_000))
  for result, whole in zip(schedule.at(np.array(positions, np.int64)), everything, strict=True):
    np.testing.assert_array_equal(result, whole[positions])


@given(st.integers(0, 3_000))
def test_visits_count_what_came_before(stop: int):
  schedule = mixed()
  part_B, index_B = schedule.part_and_index(np.arange(stop))
  np.testing.assert_array_equal(schedule.visits(stop), np.bincount(part_B, minlength=3))
  for part in range(3):
    np.testing.assert_array_equal(index_B[part_B == part], np.arange((part_B == part).sum()))


def test_far_positions_cost_no_more():
  schedule = Schedule((Part('a', np.arange(1_000)), Part('b', np.arange(7))), 2**40, 0)
  part_B, row_B, _ = schedule.at(np.array([2**40 - 1, 2**39]))
  assert len(row_B) == 2
  assert set(part_B.tolist()) <= {0, 1}


def test_digest_names_the_stream():
  digests = {
    mixed().digest,
    mixed(2_999).digest,
    Schedule.single('a', np.arange(5), 9, 0).digest,
    Schedule.single('a', np.arange(5)[::-1], 9, 0).digest,
    Schedule.single('a', np.arange(5), 9, 0, np.ones(5, np.float32)).digest,
    Schedule.single('b', np.arange(5), 9, 0).digest,
    Schedule.single('a', np.arange(5), 9, 1).digest,
  }
  assert len(digests) == 7
  assert mixed().digest == mixed().digest


@given(
  st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 9), st.integers(1, 5_000)), min_size=1, max_size=4),
  st.integers(0, 4_000),
  st.integers(0, 5),
)
def test_a_part_that_runs_out_leaves_its_place_to_the_others(parts, length: int, seed: int):
  values = tuple(Part(f'{i}', np.arange(size) + 100 * i, rate, most=most) for i, (size, rate, most) in enumerate(parts))
  values += (Part('endless', np.arange(7) + 1_000, 0.5),)
  schedule = Schedule(values, length, seed, 'drop')
  part_B, index_B = schedule.part_and_index(np.arange(length))
  count_S = np.bincount(part_B, minlength=len(values))
  assert all(part.most is None or count <= part.most for part, count in zip(values, count_S, strict=True))
  for part in range(len(values)):  # each gives its examples in order and without a gap, phase after phase
    np.testing.assert_array_equal(index_B[part_B == part], np.arange(count_S[part]))
  for stop in (0, length // 3, length):
    np.testing.assert_array_equal(schedule.visits(stop), np.bincount(part_B[:stop], minlength=len(values)))
  middle = np.arange(length // 2, length)
  np.testing.assert_array_equal(schedule.part_and_index(middle)[0], part_B[middle])


def test_rates_among_those_that_are_left_stay():
  parts = (Part('a', np.arange(5), 1.0, most=100), Part('b', np.arange(9), 1.0), Part('c', np.arange(9), 2.0))
  part_B, _ = Schedule(parts, 9_000, 0, 'drop').part_and_index(np.arange(9_000))
  assert (part_B == 0).sum() == 100
  last = int(np.flatnonzero(part_B == 0)[-1])
  after = np.bincount(part_B[last + 1 :][: 5 * BLOCK], minlength=3)
  assert after.sum() == 5 * BLOCK
  # Whole blocks of the second phase hold b and c as 1 to 2; the phase may begin some positions after `last`.
  assert abs(after[1] - 5 * BLOCK / 3) <= 10
  part_B, _ = Schedule(parts, 9_000, 0, 'repeat').part_and_index(np.arange(9_000))
  assert (part_B == 0).sum() > 2_000


def test_bad_schedules():
  rows = np.arange(3)
  with pytest.raises(UserError, match="'a' of a schedule has no rows"):
    Schedule.single('a', rows[:0], 5, 0)
  with pytest.raises(UserError, match="two parts of a schedule are named 'a'"):
    Schedule((Part('a', rows), Part('a', rows)), 5, 0)
  with pytest.raises(UserError, match='has rate 0'):
    Schedule((Part('a', rows, 0.0),), 5, 0)
  with pytest.raises(UserError, match='3 rows and 2 weights'):
    Schedule.single('a', rows, 5, 0, np.ones(2, np.float32))
  twice = Part('a', rows, most=6)
  for when_empty in ('refuse', 'drop'):  # alone, it has nobody to take its place
    with pytest.raises(UserError, match="'a' has 3 rows and is asked for 7 examples, but at most 6 are allowed"):
      Schedule((twice,), 7, 0, when_empty)
    Schedule((twice,), 6, 0, when_empty)
  Schedule((twice,), 7, 0, 'repeat')
  with pytest.raises(UserError, match='may give 20 of 21 examples'):
    Schedule((twice, Part('b', rows, most=14)), 21, 0, 'drop')
  assert Schedule((twice, Part('b', rows, most=14)), 20, 0, 'drop').visits(20).tolist() == [6, 14]
  with pytest.raises(IndexError):
    Schedule.single('a', rows, 5, 0).at(np.array([5]))

"""What seqio streams is the schedule, from any position on, with tokens as the pool has them."""

import gc
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax.data.order import batches as batches_lib
from dsdm_jax.data.order.batches import AHEAD, row_range_batches, training_batches
from dsdm_jax.data.order.schedule import Part, Schedule
from dsdm_jax.data.pool.pool import Pool
from tests.helpers.data import run_pool, small_config


def stream(name: str) -> list[dict]:
  """The mixture as any user of seqio would read it."""
  import seqio

  dataset = seqio.get_mixture_or_task(name).get_dataset(
    sequence_length={'tokens': 48}, split='train', shuffle=False, num_epochs=1, passthrough_features=('row', 'weight')
  )
  return list(dataset.as_numpy_iterator())


def two_parts(pool: Pool, length: int = 1_500) -> Schedule:
  half = pool.num_rows // 2
  weights = np.linspace(0.5, 2, half).astype(np.float32)
  return Schedule(
    (Part('first ü', np.arange(half), 1.0, weights), Part('2', np.arange(half, half + 9), 0.3)), length, 3
  )


@pytest.mark.parametrize('start', [0, 1, 700, 1_024, 1_499, 1_500])
def test_stream_is_the_schedule_from_any_position(tiny_pool: Pool, start: int):
  schedule = two_parts(tiny_pool)
  _, row_B, weight_B = schedule.at(np.arange(start, schedule.length))
  result = stream(batches_lib.register(schedule, tiny_pool, start))
  assert [example['row'] for example in result] == row_B.tolist()
  np.testing.assert_array_equal([example['weight'] for example in result], weight_B)
  if result:
    tokens = np.stack([example['tokens'] for example in result])
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, tiny_pool.tokens(row_B))


def test_seqio_sees_tasks_and_a_mixture(tiny_pool: Pool):
  import seqio

  schedule = two_parts(tiny_pool)
  name = batches_lib.register(schedule, tiny_pool)
  mixture = seqio.MixtureRegistry.get(name)
  assert [task.name.split('.')[-1] for task in mixture.tasks] == ['first__', '2']
  # Each task alone is its part's examples, in their order in the schedule.
  part_B, row_B, _ = schedule.at(np.arange(schedule.length))
  for part, task in enumerate(mixture.tasks):
    dataset = task.get_dataset(split='train', shuffle=False)
    rows = [example['row'] for example in dataset.as_numpy_iterator()]
    assert rows == row_B[part_B == part].tolist()


def test_registering_again_is_the_same_name_and_another_stream_is_another(tiny_pool: Pool):
  schedule = two_parts(tiny_pool, 300)
  name = batches_lib.register(schedule, tiny_pool, 5)
  assert batches_lib.register(two_parts(tiny_pool, 300), tiny_pool.path, 5) == name
  assert batches_lib.register(schedule, tiny_pool, 6) != name
  with pytest.raises(ValueError, match='start is 301'):
    batches_lib.register(schedule, tiny_pool, 301)


def test_a_replaced_pool_is_read_again(tmp_path: Path):
  """Two pools of one shape at one path, one after the other in one process, with vocabularies of their own."""
  import seqio

  rows, seen, vocabularies = 40, [], []
  for seed in (0, 1):
    config = small_config()
    config.seed = seed
    pool = Pool(run_pool(config, tmp_path))
    schedule = Schedule.single('arm', np.arange(rows), rows, 8)
    before = {*seqio.MixtureRegistry.names()}, {*seqio.TaskRegistry.names()}
    for _ in range(2):
      (batch,) = training_batches(pool, schedule, rows)
      np.testing.assert_array_equal(batch['tokens_BL'], pool.tokens(batch['row_B']))
    # Nothing is left behind in seqio, which would keep the pool.
    assert before == ({*seqio.MixtureRegistry.names()}, {*seqio.TaskRegistry.names()})
    assert pool.vocabulary.encode('river stone') == pool.encoder.encode('river stone')
    # By name, as a user of seqio reads it, with what was registered before still there.
    result = stream(batches_lib.register(schedule, pool))
    np.testing.assert_array_equal(np.stack([e['tokens'] for e in result]), pool.tokens([int(e['row']) for e in result]))
    seen.append(pool.tokens(np.arange(rows)))
    vocabularies.append(pool.vocabulary.sp_model)
    shutil.rmtree(pool.path)
  assert (seen[0] != seen[1]).any()
  assert vocabularies[0] != vocabularies[1]


def test_what_a_user_registered_stays(tiny_pool: Pool):
  import seqio

  schedule = Schedule.single('arm', np.arange(6), 6, 1)
  name = batches_lib.register(schedule, tiny_pool)
  assert len(list(training_batches(tiny_pool, schedule, 1))) == 6
  assert name in seqio.MixtureRegistry.names()
  assert len(stream(name)) == 6


def test_shuffling_is_refused(tiny_pool: Pool):
  import seqio

  name = batches_lib.register(two_parts(tiny_pool, 64), tiny_pool)
  with pytest.raises(ValueError, match='order of a schedule is fixed'):
    seqio.get_mixture_or_task(name).get_dataset(split='train', shuffle=True, num_epochs=1)


def test_training_batches_resume_anywhere(tiny_pool: Pool):
  schedule = Schedule.single('arm', np.arange(3, 103), 270, 8)
  whole = list(training_batches(tiny_pool, schedule, 8))
  assert len(whole) == 33  # the last six examples fill no batch
  _, row_B, _ = schedule.at(np.arange(264))
  np.testing.assert_array_equal(np.concatenate([batch['row_B'] for batch in whole]), row_B)
  for start in (1, 20, 33):
    resumed = list(training_batches(tiny_pool, schedule, 8, start))
    assert len(resumed) == 33 - start
    for a, b in zip(resumed, whole[start:], strict=True):
      assert a.keys() == b.keys() == {'tokens_BL', 'row_B', 'weight_B'}
      for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])
  batch = whole[0]
  assert (batch['tokens_BL'].dtype, batch['row_B'].dtype, batch['weight_B'].dtype) == (np.int32, np.int64, np.float32)
  np.testing.assert_array_equal(batch['tokens_BL'], tiny_pool.tokens(batch['row_B']))
  with pytest.raises(ValueError, match='start_step is 34'):
    next(training_batches(tiny_pool, schedule, 8, 34))


def halves_and_thirds(batch_size: int) -> list[list[int]]:
  """Shares of two processes, and of one whose devices do not lie side by side."""
  first = list(range(batch_size // 2))
  return [first, [i for i in range(batch_size) if i not in first], list(range(1, batch_size, 3))]


@pytest.mark.parametrize('start', [0, 11])
def test_a_process_reads_its_share_of_each_batch_and_no_other_row(
  tiny_pool: Pool, start: int, monkeypatch: pytest.MonkeyPatch
):
  schedule = two_parts(tiny_pool, 1_000)
  whole = list(training_batches(tiny_pool, schedule, 6, start))
  assert len(whole) == 166 - start
  for within in halves_and_thirds(6):
    read: list[int] = []
    tokens = Pool.tokens
    with monkeypatch.context() as patch:
      patch.setattr(
        Pool, 'tokens', lambda pool, rows, read=read, tokens=tokens: read.extend(rows) or tokens(pool, rows)
      )
      mine = list(training_batches(tiny_pool, schedule, 6, start, np.array(within)))
    for a, b in zip(mine, whole, strict=True):
      for name in b:
        np.testing.assert_array_equal(a[name], b[name][within])
    assert sorted(read) == sorted(np.concatenate([batch['row_B'] for batch in mine]).tolist())


def test_a_process_reads_its_share_of_a_row_range(tiny_pool: Pool, monkeypatch: pytest.MonkeyPatch):
  whole = list(row_range_batches(tiny_pool, 3, 50, 6))
  for within in halves_and_thirds(6):
    read: list[int] = []
    tokens = Pool.tokens
    with monkeypatch.context() as patch:
      patch.setattr(
        Pool, 'tokens', lambda pool, rows, read=read, tokens=tokens: read.extend(rows) or tokens(pool, rows)
      )
      mine = list(row_range_batches(tiny_pool, 3, 50, 6, np.array(within)))
    for (tokens_BL, rows_B, valid_B), (wanted_BL, wanted_B, wanted_valid_B) in zip(mine, whole, strict=True):
      np.testing.assert_array_equal(tokens_BL, wanted_BL[within])
      np.testing.assert_array_equal(rows_B, wanted_B)
      np.testing.assert_array_equal(valid_B, wanted_valid_B)
    assert read == sorted(set(np.concatenate([rows_B[within] for _, rows_B, _ in whole]).tolist()))


def test_the_next_batches_are_read_before_they_are_asked_for(tiny_pool: Pool, monkeypatch: pytest.MonkeyPatch):
  """With one batch taken, the stream goes on reading while its reader does nothing."""
  read: list[int] = []
  tokens = Pool.tokens
  monkeypatch.setattr(Pool, 'tokens', lambda pool, rows: read.extend(rows) or tokens(pool, rows))
  monkeypatch.setattr(batches_lib, 'CHUNK', 4)
  batches = training_batches(tiny_pool, Schedule.single('ahead', np.arange(50), 400, 8), 8)
  next(batches)
  deadline = time.monotonic() + 60
  while len(read) < 8 * (1 + AHEAD) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert 8 * (1 + AHEAD) <= len(read) < 400


def test_a_schedule_is_freed_with_its_batches(tiny_pool: Pool):
  """TensorFlow's default graph keeps each function that NumPy runs, and would keep every schedule's rows with it."""
  schedule = two_parts(tiny_pool)
  held = weakref.ref(schedule)
  assert len(list(training_batches(tiny_pool, schedule, 16))) == schedule.length // 16
  del schedule
  gc.collect()
  assert held() is None


def test_a_stream_that_ends_early_is_noticed(tiny_pool: Pool, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(batches_lib, '_choose', lambda datasets, *_: datasets[0].take(20))
  schedule = Schedule.single('short', np.arange(10), 80, 8)
  with pytest.raises(RuntimeError, match='ended at step 2 of 10'):
    list(training_batches(tiny_pool, schedule, 8))


@pytest.mark.parametrize(('start', 'stop', 'batch_size'), [(0, 10, 4), (5, 5, 4), (3, 700, 33), (0, 8, 4), (2, 3, 512)])
def test_row_range_batches(tiny_pool: Pool, start: int, stop: int, batch_size: int):
  stop = min(stop, tiny_pool.num_rows)
  seen = []
  for tokens_BL, rows_B, valid_B in row_range_batches(tiny_pool, start, stop, batch_size):
    assert tokens_BL.shape == (batch_size, tiny_pool.length)
    assert (tokens_BL.dtype, rows_B.dtype, valid_B.dtype) == (np.int32, np.int64, np.bool_)
    np.testing.assert_array_equal(tokens_BL, tiny_pool.tokens(rows_B))
    seen += rows_B[valid_B].tolist()
    assert (rows_B[~valid_B] == stop - 1).all()
  assert seen == list(range(start, stop))
  with pytest.raises(IndexError):
    next(row_range_batches(tiny_pool, 0, tiny_pool.num_rows + 1, 4))

"""Batches of a pool: a schedule's through a seqio Mixture for training, or a range of rows for features."""

import contextlib
import dataclasses
import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdm_jax.core import tensorflow_start
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.pool.pool import Pool, PoolRows

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

AHEAD = 8  # prefetched batches
CHUNK = 512  # examples per read; single reads take four times as long per example
PASSTHROUGH = ('row', 'weight')
_registering = threading.Lock()


def training_batches(
  pool: Pool, schedule: Schedule, batch_size: int, start_step: int = 0, share: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of `schedule` from step `start_step` on, prefetched through its seqio Mixture.

  Args:
    pool: source of the rows.
    schedule: their order.
    batch_size: global batch size, over all processes.
    start_step: the first batch; earlier ones are not read.
    share: positions in each batch that this process reads, ascending, see `core.mesh.share`; None for all.

  Yields:
    {'tokens_BL': int32, 'row_B': int64, 'weight_B': float32}: the share of each batch, and 'weight_BL' of
    `token_weights` where the loss is on some tokens alone. An incomplete last batch is dropped.

  Raises:
    ValueError: `start_step` is after the end.
    RuntimeError: the stream ended before the schedule did.
  """
  tensorflow_start.start()
  import seqio

  steps = schedule.length // batch_size
  if not 0 <= start_step <= steps:
    raise ValueError(f'start_step is {start_step}, but the schedule has {steps} steps of {batch_size}')
  positions = np.arange(batch_size) if share is None else share
  share_of_each = Share(batch_size, tuple(positions.tolist()))
  with registered(schedule, pool, start_step * batch_size, share_of_each) as name:
    dataset = seqio.get_mixture_or_task(name).get_dataset(
      sequence_length=None,
      split='train',
      shuffle=False,
      num_epochs=1,
      passthrough_features=PASSTHROUGH,
      trim_output_features=False,
      try_in_mem_cache=False,
    )
  iterator = dataset.batch(len(positions), drop_remainder=True).prefetch(AHEAD).as_numpy_iterator()
  step = start_step
  for step, batch in zip(range(start_step, steps), iterator):  # noqa: B905 - checked below
    arrays = {'tokens_BL': batch['tokens'], 'row_B': batch['row'], 'weight_B': batch['weight']}
    if pool.counts_some:
      arrays['weight_BL'] = token_weights(pool.weights(batch['row']), batch['weight'])
    yield arrays
    step += 1
  if step != steps:
    raise RuntimeError(f'the stream of mixture {name} ended at step {step} of {steps}')


def token_weights(counted_BL: np.ndarray, weight_B: np.ndarray) -> np.ndarray:
  """The weight of each row spread over its counted tokens, float32 [B, L]; zero for a row without any."""
  total_B1 = np.maximum(counted_BL.sum(axis=1, keepdims=True), 1)
  return (weight_B[:, None] * counted_BL / total_B1).astype(np.float32)


def row_range_batches(
  pool: Pool | PoolRows, start: int, stop: int, batch_size: int, share: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Rows `start` to `stop` − 1 in order, without seqio.

  Args:
    pool: source of the rows.
    start, stop: the range.
    batch_size: global batch size, over all processes.
    share: positions in each batch whose tokens this process reads, ascending, see `core.mesh.share`; None for all.

  Yields:
    (tokens_BL int32 of the share, rows_B int64, valid_B bool of the whole batch); the last batch is padded with its
    last row, marked as not valid.

  Raises:
    IndexError: the range exceeds the pool.
  """
  if not 0 <= start <= stop <= pool.num_rows:
    raise IndexError(f'rows {start} to {stop} of a pool of {pool.num_rows}')
  # Reads span several batches: reads of a few rows take several times as long per row.
  batches = max(1, CHUNK // batch_size)
  for begin in range(start, stop, batches * batch_size):
    end = min(begin + batches * batch_size, stop)
    rows_SB = np.arange(begin, end, batch_size, dtype=np.int64)[:, None] + np.arange(batch_size)
    valid_SB = rows_SB < stop
    rows_SB = np.minimum(rows_SB, stop - 1)
    mine_SB = rows_SB if share is None else rows_SB[:, share]
    read = np.unique(mine_SB)  # a row that pads the last batch is read once
    tokens = pool.tokens(read)[np.searchsorted(read, mine_SB)]
    yield from zip(tokens, rows_SB, valid_SB, strict=True)


@dataclasses.dataclass(frozen=True)
class Share:
  """The positions in each batch that one process reads. An incomplete last batch is dropped.

  Attributes:
    batch_size: positions of a batch.
    within: the positions of the share, ascending.
  """

  batch_size: int = 1
  within: tuple[int, ...] = (0,)

  def count(self, positions: int) -> int:
    """Number of the first `positions` positions that are in the share."""
    return positions // self.batch_size * len(self.within)

  def positions(self, first: int, stop: int) -> np.ndarray:
    """The share's positions number `first` to `stop` − 1: int64."""
    batch, place = np.divmod(np.arange(first, stop, dtype=np.int64), len(self.within))
    return batch * self.batch_size + np.asarray(self.within, np.int64)[place]


WHOLE = Share()


def register(schedule: Schedule, pool: Pool | str | os.PathLike, start: int = 0, share: Share = WHOLE) -> str:
  """Registers a seqio Mixture whose stream is `schedule` from position `start` on, and returns its name.

  Each part of the schedule becomes a Task whose source yields exactly that part's examples, in order; the Mixture
  picks from them by the schedule's own choices. So a resume seeks instead of replaying. With a `share` of each batch,
  the first of which begins at `start`, no other rows are read.

  `seqio.get_mixture_or_task(name).get_dataset(sequence_length=None, split='train', shuffle=False, num_epochs=1,
  passthrough_features=('row', 'weight'))` yields {'tokens': int32 [L], 'row': int64, 'weight': float32}. Tokens are
  those of the pool: nothing is appended or trimmed. The name depends on everything that the stream depends on, and
  registering the same stream again does nothing.

  Raises:
    ValueError: `start` is not in [0, schedule.length].
  """
  tensorflow_start.start()
  import seqio

  if not 0 <= start <= schedule.length:
    raise ValueError(f'start is {start}, but the schedule has {schedule.length} positions')
  pool = pool if isinstance(pool, Pool) else Pool(pool)
  name = _name(schedule, pool, start, share)
  if name in seqio.MixtureRegistry.names():
    return name
  subtasks = []
  for index, part in enumerate(schedule.parts):
    # Choices are indices into the mixture's tasks sorted by name: hence the leading number.
    task = f'{name}.{index:04d}.{re.sub(r"[^A-Za-z0-9_]", "_", part.name)}'
    _add_task(task, schedule, pool, index, start, share)
    subtasks.append((task, float(schedule.counts[index])))

  def choose(datasets: list['tf.data.Dataset'], rates: Any, seed: Any) -> 'tf.data.Dataset':
    del rates, seed  # the schedule holds both
    return _choose(datasets, schedule, start, share)

  seqio.MixtureRegistry.add(name, subtasks, sample_fn=choose)
  return name


def _name(schedule: Schedule, pool: Pool, start: int, share: Share) -> str:
  # The path too: rows are read late, and an equal pool elsewhere may be deleted by then.
  parts = (schedule.digest, pool.digest, pool.path, start, share)
  return f'dsdm_jax.{hashlib.sha256(chr(0x1F).join(map(str, parts)).encode()).hexdigest()[:16]}'


@contextlib.contextmanager
def registered(schedule: Schedule, pool: Pool, start: int, share: Share) -> Iterator[str]:
  """`register` until the end of the block: otherwise seqio's registry keeps the pool alive.

  Earlier registrations stay. A dataset from the block can be read after it.
  """
  tensorflow_start.start()
  import seqio

  with _registering:
    existed = _name(schedule, pool, start, share) in seqio.MixtureRegistry.names()
    name = register(schedule, pool, start, share)
    try:
      yield name
    finally:
      if not existed:
        for task in seqio.MixtureRegistry.get(name).tasks:
          seqio.TaskRegistry.remove(task.name)
        seqio.MixtureRegistry.remove(name)


def _add_task(name: str, schedule: Schedule, pool: Pool, part: int, start: int, share: Share) -> None:
  import seqio
  import tensorflow as tf

  if name in seqio.TaskRegistry.names():  # left by a registration that was interrupted before its mixture
    return
  features = {'tokens': seqio.Feature(vocabulary=pool.vocabulary, add_eos=False, required=True, dtype=tf.int32, rank=1)}
  source = _source(schedule, pool, part, start, share)
  seqio.TaskRegistry.add(name, source=source, output_features=features, shuffle_buffer_size=None)


def _chunks(schedule: Schedule, start: int, share: Share) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
  """(number of chunks, chunk → positions in the schedule) of the share, from `start` on."""
  count = share.count(schedule.length - start)
  size = CHUNK * min(len(schedule.parts), 8)  # so that each part has enough rows for a read

  def positions(chunk: np.ndarray) -> np.ndarray:
    first = int(chunk) * size
    return start + share.positions(first, min(first + size, count))

  return -(-count // size), positions


def _chunkwise(
  count: int, read: Callable[[np.ndarray], Any], dtypes: Any, finish: Callable[..., Any]
) -> 'tf.data.Dataset':
  """A dataset of `finish(read(chunk))` for chunks 0 to `count` − 1; `read` returns arrays of `dtypes`.

  TensorFlow's default graph never frees a function of `tf.numpy_function`. So that function only has a weak reference,
  and the dataset owns `read`: a schedule's rows and the files of its pool are freed with the dataset.
  """
  import tensorflow as tf

  reference = weakref.ref(read)

  def call(chunk: np.ndarray) -> Any:
    function = reference()
    assert function is not None, 'the dataset was freed before it was read'
    return function(chunk)

  dataset = tf.data.Dataset.range(count).map(
    lambda chunk: finish(tf.numpy_function(call, [chunk], dtypes)), num_parallel_calls=1, deterministic=True
  )
  dataset.read = read
  return dataset


def _source(schedule: Schedule, pool: Pool, part: int, start: int, share: Share) -> 'seqio.DataSource':
  """Examples of a part at the positions of the share, in order, read in chunks."""
  import seqio
  import tensorflow as tf

  count, positions = _chunks(schedule, start, share)

  def read(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    part_B, index_B = schedule.part_and_index(positions(chunk))
    row_B, weight_B = schedule.examples(part, index_B[part_B == part])
    return pool.tokens(row_B), row_B, weight_B

  def named(arrays: Sequence['tf.Tensor']) -> dict[str, 'tf.Tensor']:
    tokens_BL, row_B, weight_B = arrays
    return {
      'tokens': tf.ensure_shape(tokens_BL, (None, pool.length)),
      'row': tf.ensure_shape(row_B, (None,)),
      'weight': tf.ensure_shape(weight_B, (None,)),
    }

  def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> 'tf.data.Dataset':
    del split, seed
    if shuffle_files:
      raise ValueError('the order of a schedule is fixed; set shuffle=False')
    return _chunkwise(count, read, (tf.int32, tf.int64, tf.float32), named).prefetch(1).unbatch()

  return seqio.FunctionDataSource(dataset_fn, splits=('train',), caching_permitted=False)


def _choose(datasets: list['tf.data.Dataset'], schedule: Schedule, start: int, share: Share) -> 'tf.data.Dataset':
  import tensorflow as tf

  if len(datasets) == 1:
    return datasets[0]

  count, positions = _chunks(schedule, start, share)

  def read(chunk: np.ndarray) -> np.ndarray:
    return schedule.part_and_index(positions(chunk))[0]

  choices = _chunkwise(count, read, tf.int64, lambda part_B: tf.ensure_shape(part_B, (None,))).unbatch()
  # Each task has exactly as many examples as it is chosen for. One that ends early is an error in the schedule: the
  # stream would end, which `training_batches` reports.
  chosen = tf.data.Dataset.choose_from_datasets(datasets, choices, stop_on_empty_dataset=True)
  chosen.read = read  # `chosen` does not keep `choices`, which owns `read`
  return chosen

"""Schedules as seqio tasks and mixtures.

Each part of a schedule becomes a Task whose source yields exactly that part's examples, in order; the Mixture picks
from them by the schedule's own choices. So the Mixture's stream is the schedule, from any position on, and a resume
seeks instead of replaying.
"""

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
from dsdm_jax.data.pool.pool import Pool

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# Examples of one read: single reads cost four times as much an example as reads of hundreds.
CHUNK = 512
PASSTHROUGH = ('row', 'weight')
_registering = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Share:
  """Some positions of every batch: what one of several processes reads. Positions that fill no batch are left out.

  Attributes:
    batch_size: positions of a batch.
    within: those of the share, ascending.
  """

  batch_size: int = 1
  within: tuple[int, ...] = (0,)

  def count(self, positions: int) -> int:
    """How many of so many positions, from the beginning of a batch on, are in it."""
    return positions // self.batch_size * len(self.within)

  def positions(self, first: int, stop: int) -> np.ndarray:
    """Those numbered `first` to `stop` − 1 of the share, counted from the beginning of a batch: int64."""
    batch, place = np.divmod(np.arange(first, stop, dtype=np.int64), len(self.within))
    return batch * self.batch_size + np.asarray(self.within, np.int64)[place]


WHOLE = Share()


def register(schedule: Schedule, pool: Pool | str | os.PathLike, start: int = 0, share: Share = WHOLE) -> str:
  """Registers a Mixture whose stream is `schedule` from position `start` on, and returns its name.

  A process that takes a `share` of each batch, the first of which begins at `start`, reads no other rows.

  `seqio.get_mixture_or_task(name).get_dataset(sequence_length=None, split='train', shuffle=False, num_epochs=1,
  passthrough_features=('row', 'weight'))` yields {'tokens': int32 [L], 'row': int64, 'weight': float32}. Tokens come as
  the pool has them: nothing is appended or trimmed. The name depends on everything that the stream depends on, and
  registering the same again does nothing.

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
    # A mixture sorts its tasks by name, and choices are indices into that order: hence the leading number.
    task = f'{name}.{index:04d}.{re.sub(r"[^A-Za-z0-9_]", "_", part.name)}'
    _add_task(task, schedule, pool, index, start, share)
    subtasks.append((task, float(schedule.counts[index])))

  def choose(datasets: list['tf.data.Dataset'], rates: Any, seed: Any) -> 'tf.data.Dataset':
    del rates, seed  # the schedule holds both
    return _choose(datasets, schedule, start, share)

  seqio.MixtureRegistry.add(name, subtasks, sample_fn=choose)
  return name


def _name(schedule: Schedule, pool: Pool, start: int, share: Share) -> str:
  # The path too: a pool is read when its rows are asked for, and an equal one elsewhere may be gone by then.
  parts = (schedule.digest, pool.digest, pool.path.absolute(), start, share)
  return f'dsdm_jax.{hashlib.sha256(chr(0x1F).join(map(str, parts)).encode()).hexdigest()[:16]}'


@contextlib.contextmanager
def registered(schedule: Schedule, pool: Pool, start: int, share: Share) -> Iterator[str]:
  """What `register` does, until the end of the block: seqio keeps what is registered, and the pool with it, for ever.

  What was registered before stays. Threads take turns. A dataset made in the block may be read after it.
  """
  tensorflow_start.start()
  import seqio

  with _registering:
    stood = _name(schedule, pool, start, share) in seqio.MixtureRegistry.names()
    name = register(schedule, pool, start, share)
    try:
      yield name
    finally:
      if not stood:
        for task in seqio.MixtureRegistry.get(name).tasks:
          seqio.TaskRegistry.remove(task.name)
        seqio.MixtureRegistry.remove(name)


def _add_task(name: str, schedule: Schedule, pool: Pool, part: int, start: int, share: Share) -> None:
  import seqio
  import tensorflow as tf

  if name in seqio.TaskRegistry.names():  # left by a registration that was broken off before its mixture
    return
  features = {'tokens': seqio.Feature(vocabulary=pool.vocabulary, add_eos=False, required=True, dtype=tf.int32, rank=1)}
  source = _source(schedule, pool, part, start, share)
  seqio.TaskRegistry.add(name, source=source, output_features=features, shuffle_buffer_size=None)


def _chunks(schedule: Schedule, start: int, share: Share) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
  """(number of chunks, chunk → positions in the schedule) of the share of what is left from `start` on."""
  count = share.count(schedule.length - start)
  size = CHUNK * min(len(schedule.parts), 8)  # so that what falls to one part is worth a read

  def positions(chunk: np.ndarray) -> np.ndarray:
    first = int(chunk) * size
    return start + share.positions(first, min(first + size, count))

  return -(-count // size), positions


def _chunkwise(
  count: int, read: Callable[[np.ndarray], Any], dtypes: Any, finish: Callable[..., Any]
) -> 'tf.data.Dataset':
  """`finish` of what `read` returns, arrays of `dtypes`, for each chunk from 0 to `count` − 1.

  TensorFlow's default graph keeps every function that NumPy runs for ever. It is given one that holds nothing, and the
  dataset holds `read`: so a schedule's rows, and the files of its pool, go with the dataset.
  """
  import tensorflow as tf

  held = weakref.ref(read)

  def call(chunk: np.ndarray) -> Any:
    function = held()
    assert function is not None, 'a dataset is gone, and is read'
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
      raise ValueError('the order of a schedule is fixed; ask for the dataset with shuffle=False')
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
  # Each task holds exactly as many examples as it is chosen for: one that ends early is an error in the schedule, and
  # would cut the stream short, which `batches.training_batches` notices.
  chosen = tf.data.Dataset.choose_from_datasets(datasets, choices, stop_on_empty_dataset=True)
  chosen.read = read  # it does not keep `choices`, which does
  return chosen

"""Schedules as seqio tasks and mixtures.

Each part of a schedule becomes a Task whose source yields exactly that part's examples, in order; the Mixture picks
from them by the schedule's own choices. So the Mixture's stream is the schedule, from any position on, and a resume
seeks instead of replaying.
"""

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdm_jax.core import tensorflow_start
from dsdm_jax.data.pool import Pool
from dsdm_jax.data.schedule import Schedule

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# Examples of one read: single reads cost four times as much an example as reads of hundreds.
CHUNK = 512
PASSTHROUGH = ('row', 'weight')


def register(schedule: Schedule, pool: Pool | str | os.PathLike, start: int = 0) -> str:
  """Registers a Mixture whose stream is `schedule` from position `start` on, and returns its name.

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
  identity = hashlib.sha256(f'{schedule.digest}\x1f{pool.path.absolute()}\x1f{start}'.encode()).hexdigest()[:16]
  name = f'dsdm_jax.{identity}'
  if name in seqio.MixtureRegistry.names():
    return name
  from_visit_S, to_visit_S = schedule.visits(start), schedule.visits(schedule.length)
  subtasks = []
  for index, part in enumerate(schedule.parts):
    # A mixture sorts its tasks by name, and choices are indices into that order: hence the leading number.
    task = f'{name}.{index:04d}.{re.sub(r"[^A-Za-z0-9_]", "_", part.name)}'
    _add_task(task, schedule, pool, index, int(from_visit_S[index]), int(to_visit_S[index]))
    subtasks.append((task, float(schedule.counts[index])))

  def choose(datasets: list['tf.data.Dataset'], rates: Any, seed: Any) -> 'tf.data.Dataset':
    del rates, seed  # the schedule holds both
    return _choose(datasets, schedule, start)

  seqio.MixtureRegistry.add(name, subtasks, sample_fn=choose)
  return name


def _add_task(name: str, schedule: Schedule, pool: Pool, part: int, first: int, stop: int) -> None:
  import seqio
  import tensorflow as tf

  if name in seqio.TaskRegistry.names():  # left by a registration that was broken off before its mixture
    return
  features = {'tokens': seqio.Feature(vocabulary=pool.vocabulary, add_eos=False, required=True, dtype=tf.int32, rank=1)}
  source = _source(schedule, pool, part, first, stop)
  seqio.TaskRegistry.add(name, source=source, output_features=features, shuffle_buffer_size=None)


def _source(schedule: Schedule, pool: Pool, part: int, first: int, stop: int) -> 'seqio.DataSource':
  """Examples number `first` to `stop` − 1 of a part, in order, read in chunks."""
  import seqio
  import tensorflow as tf

  def read(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    begin = first + int(chunk) * CHUNK
    row_B, weight_B = schedule.examples(part, np.arange(begin, min(begin + CHUNK, stop)))
    return pool.tokens(row_B), row_B, weight_B

  def in_chunks(chunk: 'tf.Tensor') -> dict[str, 'tf.Tensor']:
    tokens_BL, row_B, weight_B = tf.numpy_function(read, [chunk], (tf.int32, tf.int64, tf.float32))
    return {
      'tokens': tf.ensure_shape(tokens_BL, (None, pool.length)),
      'row': tf.ensure_shape(row_B, (None,)),
      'weight': tf.ensure_shape(weight_B, (None,)),
    }

  def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> 'tf.data.Dataset':
    del split, seed
    if shuffle_files:
      raise ValueError('the order of a schedule is fixed; ask for the dataset with shuffle=False')
    chunks = tf.data.Dataset.range(-(-(stop - first) // CHUNK))
    return chunks.map(in_chunks, num_parallel_calls=1, deterministic=True).prefetch(1).unbatch()

  return seqio.FunctionDataSource(dataset_fn, splits=('train',), caching_permitted=False)


def _choose(datasets: list['tf.data.Dataset'], schedule: Schedule, start: int) -> 'tf.data.Dataset':
  import tensorflow as tf

  if len(datasets) == 1:
    return datasets[0]

  def read(chunk: np.ndarray) -> np.ndarray:
    begin = start + int(chunk) * CHUNK
    return schedule.part_and_index(np.arange(begin, min(begin + CHUNK, schedule.length)))[0]

  def in_chunks(chunk: 'tf.Tensor') -> 'tf.Tensor':
    return tf.ensure_shape(tf.numpy_function(read, [chunk], tf.int64), (None,))

  choices = tf.data.Dataset.range(-(-(schedule.length - start) // CHUNK)).map(in_chunks).unbatch()
  # Each task holds exactly as many examples as it is chosen for: one that ends early is an error in the schedule, and
  # would cut the stream short, which `batches.training_batches` notices.
  return tf.data.Dataset.choose_from_datasets(datasets, choices, stop_on_empty_dataset=True)

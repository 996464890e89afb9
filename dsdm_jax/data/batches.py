"""Batches for training and for features."""

from collections.abc import Iterator

import numpy as np

from dsdm_jax.core import tensorflow_start
from dsdm_jax.data import mixtures
from dsdm_jax.data.pool import Pool
from dsdm_jax.data.schedule import Schedule


def training_batches(
  pool: Pool, schedule: Schedule, batch_size: int, start_step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of `schedule` from step `start_step` on, read through its seqio Mixture ahead of their use.

  Yields:
    {'tokens_BL': int32, 'row_B': int64, 'weight_B': float32} for each whole batch; positions left over at the end that
    do not fill a batch are not visited.

  Raises:
    ValueError: `start_step` is past the end.
    RuntimeError: the stream ended before the schedule did.
  """
  tensorflow_start.start()
  import seqio

  steps = schedule.length // batch_size
  if not 0 <= start_step <= steps:
    raise ValueError(f'start_step is {start_step}, but the schedule has {steps} steps of {batch_size}')
  name = mixtures.register(schedule, pool, start_step * batch_size)
  dataset = seqio.get_mixture_or_task(name).get_dataset(
    sequence_length=None,
    split='train',
    shuffle=False,
    num_epochs=1,
    passthrough_features=mixtures.PASSTHROUGH,
    trim_output_features=False,
    try_in_mem_cache=False,
  )
  iterator = dataset.batch(batch_size, drop_remainder=True).prefetch(8).as_numpy_iterator()
  step = start_step
  for step, batch in zip(range(start_step, steps), iterator):  # noqa: B905 - checked below
    yield {'tokens_BL': batch['tokens'], 'row_B': batch['row'], 'weight_B': batch['weight']}
    step += 1
  if step != steps:
    raise RuntimeError(f'the stream of mixture {name} ended at step {step} of {steps}')


def row_range_batches(
  pool: Pool, start: int, stop: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Rows `start` to `stop` − 1 in order, without seqio.

  Yields:
    (tokens_BL int32, rows_B int64, valid_B bool); the last batch is filled up with its last row, not valid.

  Raises:
    IndexError: the range leaves the pool.
  """
  if not 0 <= start <= stop <= pool.num_rows:
    raise IndexError(f'rows {start} to {stop} of a pool of {pool.num_rows}')
  # Reads span several batches: a read of a few rows costs several times as much a row.
  batches = max(1, mixtures.CHUNK // batch_size)
  for begin in range(start, stop, batches * batch_size):
    end = min(begin + batches * batch_size, stop)
    tokens = pool.tokens(np.arange(begin, end))
    for first in range(begin, end, batch_size):
      rows_B = np.arange(first, first + batch_size, dtype=np.int64)
      valid_B = rows_B < stop
      rows_B = np.minimum(rows_B, stop - 1)
      yield tokens[rows_B - begin], rows_B, valid_B

"""Batches for training and for features."""

from collections.abc import Iterator

import numpy as np

from dsdm_jax.core import tensorflow_start
from dsdm_jax.data.order import mixtures
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.pool.pool import Pool

AHEAD = 8  # batches that are ready before they are asked for


def training_batches(
  pool: Pool, schedule: Schedule, batch_size: int, start_step: int = 0, share: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of `schedule` from step `start_step` on, read through its seqio Mixture ahead of their use.

  Args:
    pool: whose rows they are.
    schedule: their order.
    batch_size: examples of a batch, over all processes.
    start_step: the first batch; which examples it holds is arithmetic, nothing before it is read.
    share: positions in each batch that this process reads, ascending, see `core.mesh.share`; None for all.

  Yields:
    {'tokens_BL': int32, 'row_B': int64, 'weight_B': float32} for each whole batch, of which they hold the share;
    positions left over at the end that do not fill a batch are not visited.

  Raises:
    ValueError: `start_step` is past the end.
    RuntimeError: the stream ended before the schedule did.
  """
  tensorflow_start.start()
  import seqio

  steps = schedule.length // batch_size
  if not 0 <= start_step <= steps:
    raise ValueError(f'start_step is {start_step}, but the schedule has {steps} steps of {batch_size}')
  positions = np.arange(batch_size) if share is None else share
  share_of_each = mixtures.Share(batch_size, tuple(positions.tolist()))
  with mixtures.registered(schedule, pool, start_step * batch_size, share_of_each) as name:
    dataset = seqio.get_mixture_or_task(name).get_dataset(
      sequence_length=None,
      split='train',
      shuffle=False,
      num_epochs=1,
      passthrough_features=mixtures.PASSTHROUGH,
      trim_output_features=False,
      try_in_mem_cache=False,
    )
  iterator = dataset.batch(len(positions), drop_remainder=True).prefetch(AHEAD).as_numpy_iterator()
  step = start_step
  for step, batch in zip(range(start_step, steps), iterator):  # noqa: B905 - checked below
    yield {'tokens_BL': batch['tokens'], 'row_B': batch['row'], 'weight_B': batch['weight']}
    step += 1
  if step != steps:
    raise RuntimeError(f'the stream of mixture {name} ended at step {step} of {steps}')


def row_range_batches(
  pool: Pool, start: int, stop: int, batch_size: int, share: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Rows `start` to `stop` − 1 in order, without seqio.

  Args:
    pool: whose rows they are.
    start, stop: the range.
    batch_size: rows of a batch, over all processes.
    share: positions in each batch whose tokens this process reads, ascending, see `core.mesh.share`; None for all.

  Yields:
    (tokens_BL int32 of the share, rows_B int64, valid_B bool of the whole batch); the last batch is filled up with its
    last row, not valid.

  Raises:
    IndexError: the range leaves the pool.
  """
  if not 0 <= start <= stop <= pool.num_rows:
    raise IndexError(f'rows {start} to {stop} of a pool of {pool.num_rows}')
  # Reads span several batches: a read of a few rows costs several times as much a row.
  batches = max(1, mixtures.CHUNK // batch_size)
  for begin in range(start, stop, batches * batch_size):
    end = min(begin + batches * batch_size, stop)
    rows_SB = np.arange(begin, end, batch_size, dtype=np.int64)[:, None] + np.arange(batch_size)
    valid_SB = rows_SB < stop
    rows_SB = np.minimum(rows_SB, stop - 1)
    mine_SB = rows_SB if share is None else rows_SB[:, share]
    read = np.unique(mine_SB)  # a row that fills up the last batch is read once
    tokens = pool.tokens(read)[np.searchsorted(read, mine_SB)]
    yield from zip(tokens, rows_SB, valid_SB, strict=True)

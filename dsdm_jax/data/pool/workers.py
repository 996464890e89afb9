"""Runs independent tasks on several processes; results come in the order of the tasks, whoever was first."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tqdm

Task = TypeVar('Task')
Result = TypeVar('Result')
_counter: Any = None  # progress of all processes together


def count(workers: int) -> int:
  """Processes to use: `workers`, or one for each core that this process may use where that is 0."""
  return workers or len(os.sched_getaffinity(0))


def tick(amount: int) -> None:
  """Reports progress from inside a task."""
  if _counter is not None:
    with _counter.get_lock():
      _counter.value += amount


def _start(counter: Any) -> None:
  global _counter
  _counter = counter


def run(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, bar: tqdm.tqdm) -> list[Result]:
  """`[function(task) for task in tasks]`, on `workers` processes where there are more than one and several tasks.

  The bar moves by what tasks report to `tick`. Processes are started afresh and not forked, because a fork of a
  process that runs XLA's threads may hang.

  Raises:
    The first error of a task, in the order of tasks.
  """
  if workers == 1 or len(tasks) <= 1:
    return [_alone(function, task, bar) for task in tasks]
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['dsdm_jax.data.pool.passes'])
  counter = context.Value('q', 0)
  with concurrent.futures.ProcessPoolExecutor(
    min(workers, len(tasks)), mp_context=context, initializer=_start, initargs=(counter,)
  ) as pool:
    futures = [pool.submit(function, task) for task in tasks]
    left = set(futures)
    try:
      while left:
        done, left = concurrent.futures.wait(left, 0.3, concurrent.futures.FIRST_EXCEPTION)
        bar.update(counter.value - bar.n)
        if any(future.exception() for future in done):
          break
      return [future.result() for future in futures]
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


def _alone(function: Callable[[Task], Result], task: Task, bar: tqdm.tqdm) -> Result:
  global _counter
  counter, _counter = _counter, multiprocessing.get_context('spawn').Value('q', 0)
  try:
    result = function(task)
    bar.update(_counter.value)
    return result
  finally:
    _counter = counter

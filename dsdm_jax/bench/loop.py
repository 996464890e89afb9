"""Costs around a training step: its input, and the time of a new process to its first step.

`python -m dsdm_jax.bench loop --config=configs/quickstart.py` builds the pool of that config in a temporary folder and
prints JSON lines. `first_step`: seconds from the start of `python -m dsdm_jax.main --stage=proxies` to the end of its
first step, with an empty and with a warm compilation cache, and the processor time of that run until it has stopped.
`input`: the loop on a mixture of random rows that is read from the pool, and on the same batches in memory, in turns.
`cost` is the share of a step that reading adds, `starved` the share of time in which the device waited for its batch,
`wait_s` the wait for a batch, whether or not the device was busy, and `cpu_s` the processor time to read one batch.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dsdm_jax import configs
from dsdm_jax.config.validate import resolve, validate
from dsdm_jax.core import prng, processes
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.mesh import make_mesh, share
from dsdm_jax.core.progress import Bar, Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.batches import training_batches
from dsdm_jax.data.order.schedule import Part, Schedule
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.lm import hugging_face
from dsdm_jax.training import loop
from dsdm_jax.training.metrics import WARM_STEPS
from dsdm_jax.training.step import trainer

CASES = ('first_step', 'input')
_ALONE = 10  # times as many steps to time the reader alone, so that prefetching does not matter
_CACHE = 'cache'  # of programs that the measured runs compile


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', default='configs/quickstart.py', help='file with get_config()')
  parser.add_argument('--cases', default=','.join(CASES), help=f'comma-separated names from {", ".join(CASES)}')
  parser.add_argument('--parts', type=int, default=1, help='parts of the mixture')
  parser.add_argument('--repeats', type=int, default=3, help='rounds')
  parser.add_argument('--folder', default=None, help='for temporary files; default: that of the system')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  wanted = flags.cases.split(',')
  for name in wanted:
    if name not in CASES:
      raise UserError(f'--cases={flags.cases}: {name} is unknown; cases are {", ".join(CASES)}')
  config = configs.load(flags.config, 'configs/quickstart.py').get_config()
  validate(config)
  with tempfile.TemporaryDirectory(prefix='dsdm_loop_', dir=flags.folder) as folder:
    workdir = Path(folder) / 'run'
    with _started(flags.config, workdir, 'pool') as process:
      process.wait()
    _check(process, workdir)
    if 'first_step' in wanted:
      for line in _first_steps(flags, workdir):
        print(json.dumps(line), flush=True)
    if 'input' in wanted:
      print(json.dumps(_input(flags, resolve(config, hugging_face.model_keys), workdir)), flush=True)


def _started(config: str, workdir: Path, stage: str) -> subprocess.Popen[bytes]:
  command = [sys.executable, '-m', 'dsdm_jax.main', f'--config={config}', f'--workdir={workdir}', f'--stage={stage}']
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  environment['XDG_CACHE_HOME'] = str(workdir / _CACHE)
  with open(workdir.with_name('output'), 'wb') as output:
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def _check(process: subprocess.Popen[bytes], workdir: Path) -> None:
  if process.returncode in (0, 128 + signal.SIGTERM):
    return
  last = workdir.with_name('output').read_text('utf-8', 'replace').strip().splitlines()[-1:]
  raise UserError(f'the measured run ended with exit code {process.returncode}: {"".join(last)}')


def _first_steps(flags: argparse.Namespace, workdir: Path) -> Iterator[dict[str, Any]]:
  measured: dict[str, list[tuple[float, float]]] = {'cold': [], 'warm': []}
  for _ in range(flags.repeats):
    shutil.rmtree(workdir / _CACHE, ignore_errors=True)
    for runs in measured.values():
      runs.append(_first_step(flags.config, workdir))
  for cache, runs in measured.items():
    seconds, cpu_s = zip(*runs, strict=True)
    line = {'case': 'first_step', 'config': flags.config, 'cache': cache}
    numbers = {'seconds': statistics.median(seconds), 'least_s': min(seconds), 'most_s': max(seconds)}
    numbers['cpu_s'] = statistics.median(cpu_s)
    yield line | {name: round(number, 2) for name, number in numbers.items()}


def _first_step(config: str, workdir: Path) -> tuple[float, float]:
  events = workdir / 'events.jsonl'
  used, seen, began = sum(os.times()[2:4]), events.stat().st_size, time.time()
  process = _started(config, workdir, 'proxies')
  try:
    while True:
      ended = process.poll() is not None
      with open(events, 'rb') as file:
        file.seek(seen)
        times = [event['time'] for event in map(json.loads, file.read().splitlines()) if event['event'] == 'first_step']
      if times or ended:
        break
      time.sleep(0.02)
  finally:
    process.terminate()
    process.wait()
  _check(process, workdir)
  shutil.rmtree(workdir / 'proxies', ignore_errors=True)  # the next run starts from the beginning
  return times[0] - began, sum(os.times()[2:4]) - used


def _input(flags: argparse.Namespace, config: ConfigDict, workdir: Path) -> dict[str, Any]:
  if jax.default_backend() == 'cpu':
    processes.keep_freed_memory()  # as a run does
  pool, train = Pool(workdir / 'pool'), config.pretraining.train
  steps = config.selection.examples * config.selection.epochs // train.batch_size
  if steps <= WARM_STEPS:
    raise UserError(
      f'--config={flags.config}: a budget of {steps} steps is too short to measure; raise selection.epochs'
    )
  compiled = trainer(config.model, train, pool.vocab_size, pool.length, make_mesh(config.mesh))
  mine = share(compiled.batch_sharding, train.batch_size)
  rows = prng.numpy_stream(0, 'bench', 'rows').choice(pool.num_rows, config.selection.examples, replace=False)
  parts = tuple(Part(f'part_{i}', rows_K) for i, rows_K in enumerate(np.array_split(rows, flags.parts)))
  waits: list[float] = []

  def reader(times: int = 1) -> Iterator[dict[str, np.ndarray]]:
    schedule = Schedule(parts, times * steps * train.batch_size, seed=0)
    return training_batches(pool, schedule, train.batch_size, share=mine)

  def read(start: int) -> Iterator[dict[str, np.ndarray]]:
    del start  # no run here is resumed
    batches = reader()
    for step in range(steps):
      began = time.perf_counter()
      batch = next(batches)
      if step >= WARM_STEPS:
        waits.append(time.perf_counter() - began)
      yield batch

  in_memory = list(reader())
  cases: dict[str, loop.Batches] = {'read': read, 'in_memory': lambda start: iter(in_memory)}
  log = Log(workdir, 'bench')
  speeds: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
  for number in range(flags.repeats):
    for name, batches in cases.items():
      out = workdir / f'{name}_{number}'
      out.mkdir()
      context = Context(config, out, {}, log, Cost(out))
      bar = Bar(None, None, None, 'step')
      loop.train(context, compiled, loop.Run(out.name, prng.stream(0, 'bench', 'init'), batches, steps), train, bar)
      speeds[name].append(_speed(workdir, out.name))
  log.close()
  tokens = train.batch_size * pool.length
  seconds = {name: [tokens / speed['tokens_per_second'] for speed in runs] for name, runs in speeds.items()}
  costs = [1 - memory_s / read_s for read_s, memory_s in zip(seconds['read'], seconds['in_memory'], strict=True)]
  return {
    'case': 'input',
    'config': flags.config,
    'batch': train.batch_size,
    'length': pool.length,
    'steps': steps,
    'parts': flags.parts,
    'pool_rows': pool.num_rows,
    'step_s': round(statistics.median(seconds['read']), 5),
    'step_in_memory_s': round(statistics.median(seconds['in_memory']), 5),
    'cost': round(statistics.median(costs), 4),
    'starved': statistics.median(speed['input_share'] for speed in speeds['read']),
    'wait_s': round(statistics.median(waits), 6),
    'cpu_s': round(_reader_cpu_s(reader(_ALONE)), 6),
  }


def _speed(workdir: Path, name: str) -> dict[str, Any]:
  events = map(json.loads, (workdir / 'events.jsonl').read_text().splitlines())
  return next(event for event in events if event['event'] == 'speed' and event['run'] == name)


def _reader_cpu_s(batches: Iterator[dict[str, np.ndarray]]) -> float:
  """Processor time to read one batch."""
  next(batches)
  began, count = time.process_time(), sum(1 for _ in batches)
  return (time.process_time() - began) / count

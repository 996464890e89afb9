"""A large pool in every step that reads all rows: time, memory, files and open handles of each step.

Builds a pool of random text with the code of the pool stage, fills a store with random features in place of gradients,
and runs Gram matrix, solve, scores, selection, mixture and batches as the stages do. Prints one JSON line per step with
the peaks of memory and open handles. Temporary files are deleted.
"""

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.configs import base
from dsdm_jax.core import prng
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.batches import training_batches
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool import build
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.selection import ranking

_LENGTH = 64
_SHARD_ROWS = 1_024
_DOCUMENT_BYTES = 320
_RANK = 32  # of the common component of the random features, so that the Gram matrix has a spectrum
_EPOCHS = 4
_BATCH = 64


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--rows', type=int, default=1_000_000, help='N (default: 1e6)')
  parser.add_argument('--dimension', type=int, default=1_024, help='J (default: 1,024)')
  parser.add_argument('--folder', default=None, help='for temporary files; default: that of the system')


def run(flags: argparse.Namespace) -> None:
  with tempfile.TemporaryDirectory(prefix='dsdm_load_', dir=flags.folder) as folder:
    _run_steps(Path(folder), flags.rows, flags.dimension)


def _run_steps(folder: Path, rows: int, dimension: int) -> None:
  with _measured('text', folder):
    _write_text(folder / 'text.jsonl', rows)
  with _measured('pool', folder):
    pool = _build(folder, rows)
  store = FeatureStore(folder / 'features_0.zarr', pool.num_rows, dimension, _SHARD_ROWS, 'bfloat16')
  with _measured('features', folder):
    for _ in store.fill(_random_features(store)):
      pass
  with _measured('gram', folder):
    gram = datamodel.gram(store)
  right_KJ = prng.numpy_stream(0, 'bench', 'targets').standard_normal((3, dimension))
  with _measured('solve', folder):
    solution = datamodel.solve(gram, datamodel.whole(dimension), right_KJ, 0.1)
  with _measured('scores', folder):
    score_NK = datamodel.scores(store, solution.u_JK)
  with _measured('selection', folder):
    rows_K = np.sort(ranking.top(score_NK.mean(axis=1).astype(np.float32), pool.num_rows // 4))
    Selection('dsdm--mix', rows_K, np.ones(len(rows_K), np.float32), {}).save(folder)
    selection = Selection.load(folder, 'dsdm--mix')
  with _measured('mixture', folder):
    schedule = Schedule.single('dsdm', selection.rows, _EPOCHS * len(selection.rows), seed=0)
    schedule.at(np.arange(_EPOCHS * len(selection.rows)))
  with _measured('batches', folder):
    batches = training_batches(pool, schedule, _BATCH)
    for _ in range(min(1_000, len(selection.rows) * _EPOCHS // _BATCH)):
      next(batches)


@contextlib.contextmanager
def _measured(step: str, folder: Path) -> Iterator[None]:
  """Prints the costs of the block; memory and handles are sampled twenty times a second."""
  most = {'gib': 0.0, 'handles': 0}
  ended = threading.Event()

  def watch() -> None:
    while True:
      most['gib'] = max(most['gib'], resident_bytes() / 2**30)
      most['handles'] = max(most['handles'], open_handles())
      if ended.wait(0.05):
        return

  watcher = threading.Thread(target=watch, daemon=True)
  began, used = time.perf_counter(), sum(os.times()[:4])
  watcher.start()
  yield
  seconds, cpu_seconds = time.perf_counter() - began, sum(os.times()[:4]) - used
  ended.set()
  watcher.join()
  files = [p for p in folder.rglob('*') if p.is_file()]
  disk_gib = sum(p.stat().st_size for p in files) / 2**30
  line = {
    'step': step,
    'seconds': round(seconds, 2),
    'cpu_seconds': round(cpu_seconds, 2),
    'gib': round(most['gib'], 2),
  }
  line |= {'handles': most['handles'], 'files': len(files), 'disk_gib': round(disk_gib, 3)}
  print(json.dumps(line), flush=True)


def resident_bytes() -> int:
  """Resident memory of this process."""
  return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def open_handles() -> int:
  return len(os.listdir('/proc/self/fd'))


def _write_text(file: Path, rows: int) -> None:
  """Documents of random words, with as many bytes as `rows` rows of `_LENGTH` bytes need."""
  rng = prng.numpy_stream(0, 'bench', 'text')
  words = [''.join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(3, 9))) for _ in range(4_096)]
  wanted, written = rows * _LENGTH, 0
  with open(file, 'w') as out:
    while written <= wanted + _LENGTH:
      for words_W in rng.integers(0, len(words), (1_024, _DOCUMENT_BYTES // 6)):
        text = ' '.join(words[i] for i in words_W)[: _DOCUMENT_BYTES - 1]
        out.write(json.dumps({'text': text}) + '\n')
        written += len(text) + 1  # with the end mark
        if written > wanted + _LENGTH:
          break


def _build(folder: Path, rows: int) -> Pool:
  config = base.get_config()
  c = config.pool
  c.sources, c.max_bytes, c.max_document_bytes = (f'jsonl:{folder}/text.jsonl',), 0, 0
  c.length, c.vocabulary = _LENGTH, 'bytes'
  out = folder / 'pool'
  out.mkdir()
  build.run(Context(config, out, {}, Log(folder, 'pool', enabled=False), Cost(out)))
  pool = Pool(out)
  if not rows <= pool.num_rows <= rows + _DOCUMENT_BYTES:
    raise ValueError(f'{pool.num_rows} rows were built instead of {rows}')
  return pool


def _random_features(store: FeatureStore) -> Iterator[tuple[int, int, np.ndarray]]:
  """Shards of [rows, J] float32: a common component plus noise; each shard has its own random stream."""
  common_RJ = prng.numpy_stream(0, 'bench', 'common').standard_normal((_RANK, store.dimension), np.float32)
  for shard in range(store.shards):
    start, stop = store.bounds(shard)
    rng = prng.numpy_stream(0, 'bench', 'features', shard)
    phi_BJ = rng.standard_normal((stop - start, store.dimension), np.float32)
    phi_BJ += rng.standard_normal((stop - start, _RANK), np.float32) @ common_RJ
    yield start, stop, phi_BJ

"""From text to batches: megabytes of text per second, and tokens per second.

Floors on two idle cores: 10 MB/s with a given vocabulary, 6 MB/s with the leakage guard as well.

Builds a pool from JSONL.gz files (--files, or the text of the installed packages) with a SentencePiece unigram
vocabulary. Then reads batches on one core: rows in order, as for features, and in a seeded permutation through seqio,
as for training. Prints one JSON line for each, with CPU seconds as well, for machines that others use too.
"""

import argparse
import contextlib
import gzip
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dsdm_jax.configs import base
from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order import batches
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.pool import build, passes, readers, sources
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets import masked


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--files', default='', help='glob of JSONL files to build from; default: installed packages')
  parser.add_argument('--megabytes', type=float, default=20, help='of text taken from the installed packages')
  parser.add_argument('--length', type=int, default=1_024, help='L, tokens of a row')
  parser.add_argument('--vocabulary', default='train', help='train, bytes, or a path, as pool.vocabulary')
  parser.add_argument('--workers', type=int, default=0, help='processes; 0 for one per core')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--seconds', type=float, default=5, help='seconds of each way of reading')
  parser.add_argument('--guard', action='store_true', help='also run the leakage guard against the built-in targets')


def run(flags: argparse.Namespace) -> None:
  with tempfile.TemporaryDirectory() as folder:
    files = flags.files or _installed(Path(folder), flags.megabytes)
    pool = _build(Path(folder), files, flags)
    _read(pool, flags)


def _installed(folder: Path, megabytes: float) -> str:
  config = base.get_config().pool
  config.max_bytes, config.max_document_bytes = int(megabytes * 1e6), 0
  documents = list(readers.generate(sources.parse('installed_packages'), config, 0))
  for part in range(8):
    with gzip.open(folder / f'{part}.jsonl.gz', 'wt', compresslevel=6) as file:
      for d in documents[part::8]:
        file.write(json.dumps({'id': d.id, 'source': d.source, 'text': d.text}) + '\n')
  return f'{folder}/*.jsonl.gz'


def _build(folder: Path, files: str, flags: argparse.Namespace) -> Pool:
  config = base.get_config()
  c = config.pool
  c.sources, c.max_bytes, c.max_document_bytes = (f'jsonl:{files}',), 0, 0
  c.length, c.vocabulary, c.vocab_size = flags.length, flags.vocabulary, 8_192
  config.leakage.benchmarks = ()
  config.host.workers = flags.workers
  out = folder / 'pool'
  out.mkdir()
  began, used = time.perf_counter(), time.process_time()  # of this process: compare CPU seconds with --workers=1
  with memory_watched() as most:
    semantics = build.run(Context(config, out, {}, Log(folder, 'pool', enabled=False), Cost(out)))
    if flags.guard:
      found = folder / 'leakage'
      found.mkdir()
      inputs = {'pool': Artifact(out, {'semantics': semantics})}
      masked.run(Context(config, found, inputs, Log(folder, 'leakage', enabled=False), Cost(found)))
  seconds = time.perf_counter() - began
  pool = Pool(out)
  megabytes, cpu_seconds = pool.card['bytes'] / 1e6, time.process_time() - used
  speed = {'megabytes_per_second': megabytes / seconds, 'seconds': seconds, 'cpu_seconds': cpu_seconds}
  size = {'megabytes': megabytes, 'rows': pool.num_rows, 'tokens': pool.card['tokens']}
  memory = {'gigabytes_of_all_processes': max(most) / 1e9}
  _print(case='build', **speed, workers=passes.worker_count(flags.workers), **size, **memory)
  return pool


@contextlib.contextmanager
def memory_watched() -> Iterator[list[int]]:
  """Yields a list of `family_bytes`: at the start, and four times a second while the block runs."""
  seen, ended = [family_bytes()], threading.Event()

  def watch() -> None:
    while not ended.wait(0.25):
      seen.append(family_bytes())

  watcher = threading.Thread(target=watch, daemon=True)
  watcher.start()
  try:
    yield seen
  finally:
    ended.set()
    watcher.join()


def family_bytes() -> int:
  """Memory of this process and all its descendants; shared memory counts once (PSS)."""
  parent: dict[int, int] = {}
  for stat in Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process has ended
      parent[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
  family: set[int] = set()
  generation = {os.getpid()}
  while generation:
    family |= generation
    generation = {pid for pid, its_parent in parent.items() if its_parent in generation}
  return sum(map(_proportional_bytes, family))


def _proportional_bytes(pid: int) -> int:
  try:
    lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
  except (FileNotFoundError, ProcessLookupError):
    return 0
  return next((int(line.split()[1]) * 1_024 for line in lines if line.startswith('Pss:')), 0)


def _read(pool: Pool, flags: argparse.Namespace) -> None:
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  in_order = (tokens_BL for tokens_BL, _, _ in batches.row_range_batches(pool, 0, pool.num_rows, flags.batch_size))
  _time('rows_in_order', in_order, flags)
  schedule = Schedule.single('all', np.arange(pool.num_rows), 10**9, seed=0)
  permuted = (batch['tokens_BL'] for batch in batches.training_batches(pool, schedule, flags.batch_size))
  _time('seeded_permutation', permuted, flags)


def _time(case: str, tokens_of_batches: Iterable[np.ndarray], flags: argparse.Namespace) -> None:
  """Tokens per second from the second batch on, until time or rows run out."""
  began, used, tokens, seconds = 0.0, 0.0, 0, 0.0
  for batch_BL in tokens_of_batches:
    if not began:
      began, used = time.perf_counter(), time.process_time()  # of this process: compare CPU seconds with --workers=1
      continue
    tokens += batch_BL.size
    seconds = time.perf_counter() - began
    if seconds > flags.seconds:
      break
  _print(
    case=case,
    tokens_per_second=tokens / seconds,
    tokens_per_cpu_second=tokens / (time.process_time() - used),
    tokens=tokens,
    length=flags.length,
    cores=1,
  )


def _print(**fields: object) -> None:
  print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)

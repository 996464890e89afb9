"""The pool's way from text to batches: megabytes of text and tokens a second.

Builds a pool from JSONL.gz files (those of --files, or the text of the installed packages written out as such) with a
SentencePiece unigram vocabulary, then reads batches of it on one core: rows in their order, as features want them, and
in a seeded permutation through seqio, as training does. One JSON line for each; seconds of CPU time stand beside those
of the clock, for machines that others use too.
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

from configs import base
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order import batches
from dsdm_jax.data.order.schedule import Schedule
from dsdm_jax.data.pool import build, passes, readers, sources
from dsdm_jax.data.pool.pool import Pool


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--files', default='', help='glob of JSONL files to build from; default: installed packages')
  parser.add_argument('--megabytes', type=float, default=20, help='of text taken from the installed packages')
  parser.add_argument('--length', type=int, default=1_024, help='L, tokens of a row')
  parser.add_argument('--vocabulary', default='train', help='train, bytes, or a path, as pool.vocabulary')
  parser.add_argument('--workers', type=int, default=0, help='processes; 0 takes one for each core')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--seconds', type=float, default=5, help='how long each way of reading is timed')
  parser.add_argument('--guard', action='store_true', help='with the leakage guard, against the built-in targets')


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
  c.length, c.vocabulary, c.vocab_size, c.leakage_guard = flags.length, flags.vocabulary, 8_192, flags.guard
  config.host.workers = flags.workers
  out = folder / 'pool'
  out.mkdir()
  began, used = time.perf_counter(), _cpu_seconds()
  with memory_watched() as most:
    build.run(Context(config, out, {}, Log(folder, 'pool', enabled=False), Cost(out)))
  seconds = time.perf_counter() - began
  pool = Pool(out)
  _print(
    case='build', megabytes_per_second=pool.card['bytes'] / seconds / 1e6, seconds=seconds,
    cpu_seconds=_cpu_seconds() - used, workers=passes.worker_count(
      flags.workers), megabytes=pool.card['bytes'] / 1e6, rows=pool.num_rows, tokens=pool.card['tokens'],
    gigabytes_of_all_processes=max(most) / 1e9,
  )  # fmt: skip
  return pool


@contextlib.contextmanager
def memory_watched() -> Iterator[list[int]]:
  """Yields a list of `family_bytes`, looked at four times a second while the block runs, and once at its beginning."""
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
  """Memory of this process and of all below it, what several of them share counted once (PSS)."""
  parent: dict[int, int] = {}
  for stat in Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
      parent[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
  family: set[int] = set()
  found = {os.getpid()}
  while found:
    family |= found
    found = {pid for pid, its in parent.items() if its in found}
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


def _cpu_seconds() -> float:
  """Of this process; those of other workers are not in it, so compare with `--workers=1`."""
  return time.process_time()


def _time(case: str, found: Iterable[np.ndarray], flags: argparse.Namespace) -> None:
  """Tokens a second from the second batch on, until the time is over or the rows are."""
  began, used, tokens, seconds = 0.0, 0.0, 0, 0.0
  for batch_BL in found:
    if not began:
      began, used = time.perf_counter(), _cpu_seconds()
      continue
    tokens += batch_BL.size
    seconds = time.perf_counter() - began
    if seconds > flags.seconds:
      break
  _print(
    case=case,
    tokens_per_second=tokens / seconds,
    tokens_per_cpu_second=tokens / (_cpu_seconds() - used),
    tokens=tokens,
    length=flags.length,
    cores=1,
  )


def _print(**fields: object) -> None:
  print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)

"""The four passes over a pool, each a function of one unit or shard, and `run_parallel`, which runs them on processes.

`scan` reads a unit and records for each document a hash, its size and source. `encode` reads the unit again and writes
the ids and the document table, with the text, of the selected documents. `scatter` copies ids to their places
among the rows. `write_shard` writes a range of rows to an ArrayRecord file. Passes communicate through files, so memory
does not grow with the pool, and the result does not depend on which process did what.
"""

import array
import collections
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from dsdm_jax.core import prng, storage
from dsdm_jax.core.progress import Bar
from dsdm_jax.data.pool import readers, vocabulary
from dsdm_jax.data.pool.permutation import Shuffle
from dsdm_jax.data.pool.readers import Place, Problem
from dsdm_jax.data.pool.sources import Document, Unit, cut
from dsdm_jax.errors import UserError

LOSSES = ('cut', 'bad_input', 'duplicates', 'above_caps', 'without_tokens')
KEPT = 'kept'  # the status of a document without losses; a document that is cut remains
_LISTED = 1_000  # problems of a unit that are listed; all are counted
_DOCUMENTS, _TEXT = 4_096, 2**24  # documents, and bytes of their text, that fill a row group of the document table
_TRIED = 2**18  # characters of a document whose round trip is tried
_TOKENS = 2**22  # tokens that `fragments` joins at once

T = TypeVar('T')
Result = TypeVar('Result')
_counter: Any = None  # progress of all processes


def worker_count(workers: int) -> int:
  """Number of processes: `workers`, or one for each available core if that is 0."""
  return workers or len(os.sched_getaffinity(0))


def report_progress(amount: int) -> None:
  """Moves the bar of `run_parallel` from inside a pass."""
  if _counter is not None:
    with _counter.get_lock():
      _counter.value += amount


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
  """Blocks SIGINT, also in processes that are started inside, and in theirs."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_counter(counter: Any) -> None:
  global _counter
  _counter = counter


def run_parallel(function: Callable[[T], Result], jobs: Sequence[T], workers: int, bar: Bar) -> list[Result]:
  """`[function(job) for job in jobs]`, on `workers` processes.

  Processes are started by a fork server: a fork of a process that runs XLA's threads may hang.

  Raises:
    UserError: a process was killed, or memory ran out.
    The first error of a job, in the order of jobs.
  """
  try:
    return _run_parallel(function, jobs, workers, bar)
  except (concurrent.futures.process.BrokenProcessPool, MemoryError) as error:
    killed = not isinstance(error, MemoryError)
    what = 'a worker process was killed, probably because memory ran out' if killed else 'memory ran out'
    raise UserError(f'{what}; lower --config.host.workers, or set --config.pool.max_document_bytes') from error


def _run_parallel(function: Callable[[T], Result], jobs: Sequence[T], workers: int, bar: Bar) -> list[Result]:
  if workers == 1 or len(jobs) <= 1:
    outer = _counter
    counter = multiprocessing.get_context('spawn').Value('q', 0)
    results = []
    _set_counter(counter)
    try:
      for job in jobs:
        results.append(function(job))
        bar.update(counter.value - bar.n)
    finally:
      _set_counter(outer)
    return results
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([__name__])
  with _without_interrupts():  # which a terminal sends to all; the run itself ends its workers
    multiprocessing.forkserver.ensure_running()
  counter = context.Value('q', 0)
  with concurrent.futures.ProcessPoolExecutor(
    min(workers, len(jobs)), mp_context=context, initializer=_set_counter, initargs=(counter,)
  ) as pool:
    futures = [pool.submit(function, job) for job in jobs]
    running = set(futures)
    try:
      while running:
        done, running = concurrent.futures.wait(running, 0.3, concurrent.futures.FIRST_EXCEPTION)
        bar.update(counter.value - bar.n)
        if any(future.exception() for future in done):
          break
      return [future.result() for future in futures]
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Job:
  """One unit and what the passes need to know about it.

  Attributes:
    unit: what to read.
    index: of the unit, in the order of the pool.
    work: folder for files between the passes. Each attempt has its own, so caches can be keyed by its path.
    max_bytes: documents are cut to this size, 0 for no limit.
    skip: whether bad input is counted and left out, rather than an error.
    first: number of the unit's first selected document.
    begin, end: range of its documents among all that were read.
    out: folder of the pool.
    row: tokens of a row that holds one document alone; 0 where rows are cut from joined documents.
    tried: characters of text whose round trip through a given vocabulary is tried, a sample of documents; 0 for none.
  """

  unit: Unit
  index: int
  work: Path
  max_bytes: int
  skip: bool
  first: int = 0
  begin: int = 0
  end: int = 0
  out: Path = Path()
  tried: int = 0
  row: int = 0

  def file(self, pass_name: str, ending: str) -> Path:
    return self.work / f'{pass_name}-{self.index:06d}.{ending}'


@dataclasses.dataclass(frozen=True)
class Scanned:
  """Totals of a unit; `scan-*.npz` has arrays with one entry per document.

  `bytes` were read in all: those of the documents, `cut_bytes` off the ends of `cut` documents, and `problem_bytes`.
  `trips` are sums of `vocabulary.round_trip` over the sample, scaled to all documents, except for its `documents`.
  """

  documents: int
  problems: int
  bytes: int
  cut: int
  cut_bytes: int
  problem_bytes: int
  trips: dict[str, float] = dataclasses.field(default_factory=dict)


def fail(problem: Problem) -> UserError:
  return UserError(f'{problem}; fix it, or skip such documents with --config.pool.on_error=skip')


def scan(job: Job) -> Scanned:
  """Reads a unit; writes hashes of text [M, 2] and ids [M], sizes and sources of its M documents.

  Raises:
    UserError: bad input, unless `job.skip`; the message names file and line.
  """
  # 37 bytes a document; lists of Python objects would take four times that.
  hashes, ids, sizes, sources = bytearray(), bytearray(), array.array('q'), array.array('i')
  names: dict[str, int] = {}
  problems: list[dict[str, Any]] = []
  count, total, shortened, cut_bytes, problem_bytes = 0, 0, 0, 0, 0
  # The documents with the least hashes of their text, so that the sample does not depend on their order.
  sample: list[tuple[int, str]] = []
  room, stop = job.tried, 2**64

  def good() -> Iterator[Document]:
    nonlocal count, total, problem_bytes
    for document in readers.read(job.unit, job.max_bytes):
      if not isinstance(document, Problem):
        yield document
        continue
      if not job.skip:
        raise fail(document)
      count += 1
      total += document.bytes
      problem_bytes += document.bytes
      if len(problems) < _LISTED:
        problems.append(document.listed())

  for document in good():
    data = document.text.encode()
    total += len(data) + document.lost
    shortened += document.lost > 0
    cut_bytes += document.lost
    digest = hashlib.blake2b(data, digest_size=16).digest()
    hashes.extend(digest)
    if job.tried and (place := int.from_bytes(digest[:8], 'little')) < stop:
      heapq.heappush(sample, (-place, document.text[:_TRIED]))
      room -= min(len(document.text), _TRIED)
      while room < 0 and len(sample) > 1:
        place, text = heapq.heappop(sample)
        stop, room = -place, room + len(text)
    ids.extend(hashlib.blake2b(document.id.encode(), digest_size=8).digest())
    sizes.append(len(data))
    sources.append(names.setdefault(document.source, len(names)))
    report_progress(len(data))
  storage.save_npz(
    job.file('scan', 'npz'),
    hash_M2=np.frombuffer(bytes(hashes), '<u8').reshape(-1, 2),
    id_M=np.frombuffer(bytes(ids), '<u8'),
    bytes_M=np.array(sizes, np.int64),
    source_M=np.array(sources, np.int32),
  )
  storage.write_json(job.file('scan', 'json'), {'sources': list(names), 'problems': problems})
  trips: collections.Counter[str] = collections.Counter()
  for _, text in sample:
    with contextlib.suppress(UserError):  # `encode` reports it, if the document is selected
      trips.update(vocabulary.round_trip(_encoder(job.out, job.work), text))
  weighted = {name: number * 2**64 / stop for name, number in trips.items() if name != 'documents'}
  weighted['documents'] = trips['documents']
  return Scanned(len(sizes), count, total, shortened, cut_bytes, problem_bytes, weighted)


@functools.lru_cache(maxsize=1)
def _lost(work: Path) -> np.ndarray:
  return np.load(work / 'lost.npy', mmap_mode='r')  # noqa: TID251  mapped


def records(job: Job) -> Iterator[tuple[Place, Document | Problem, str]]:
  """(place, document, status) of all that a unit holds, in order; the status is `KEPT` or one of `LOSSES`."""
  lost_M = np.asarray(_lost(job.work)[job.begin : job.end])
  number = 0
  for where, document in readers.read_with_places(job.unit, job.max_bytes):
    if isinstance(document, Problem):
      yield where, document, 'bad_input'
      continue
    if number >= len(lost_M):
      raise UserError(f'{job.unit.paths or job.unit.entry.target} changed while it was read; start again')
    whole = 'cut' if document.lost else KEPT
    yield where, document, whole if lost_M[number] < 0 else LOSSES[lost_M[number]]
    number += 1


def place(job_number: tuple[Job, int]) -> tuple[Place, str]:
  """(place, id) of a document by its number in the unit; both are for messages."""
  job, number = job_number
  documents = (x for x in readers.read_with_places(job.unit, job.max_bytes) if not isinstance(x[1], Problem))
  where, document = next(itertools.islice(documents, number, None))
  return where, document.id


def texts(job_numbers: tuple[Job, np.ndarray, int]) -> list[str]:
  """Texts of the given ones of a unit's selected documents, cut to so many bytes; the numbers ascend from 0."""
  job, numbers, most = job_numbers
  wanted = set(numbers.tolist())
  every = (document for _, document, status in records(job) if status in (KEPT, 'cut'))
  selected = (document for document in every if isinstance(document, Document))
  chosen = (document for number, document in enumerate(selected) if number in wanted)
  return [cut(document.text.encode(), most).decode() for document in chosen]


@functools.lru_cache(maxsize=1)
def _encoder(out: Path, work: Path) -> vocabulary.Encoder:
  del work  # part of the key: another attempt may have replaced the vocabulary in `out`
  return vocabulary.open_encoder(out)


class _Table:
  """The document table of one unit, a Parquet file written in row groups."""

  def __init__(self, path: Path):
    import pyarrow as pa

    texts, numbers = (
      ('id', 'source', 'status', 'file', 'text'),
      ('bytes', 'characters', 'tokens', 'number', 'begin', 'end'),
    )
    fields = dict.fromkeys(texts, pa.string()) | dict.fromkeys(numbers, pa.int64())
    self._schema = pa.schema(list(fields.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    self._writer = storage.parquet_writer(path, self._schema, compression='zstd')
    self._rows: list[dict[str, Any]] = []
    self._bytes = 0

  def add(self, **row: Any) -> None:
    self._rows.append(row)
    self._bytes += row['bytes']
    if len(self._rows) == _DOCUMENTS or self._bytes > _TEXT:
      self._flush()

  def _flush(self) -> None:
    import pyarrow as pa

    self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
    self._rows, self._bytes = [], 0

  def close(self) -> None:
    if self._rows:
      self._flush()
    self._writer.close()


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
  """Writes a small document table of documents that are in the pool."""
  table = _Table(path)
  for row in rows:
    table.add(**{'status': KEPT, 'file': '', 'number': 0, 'characters': 0} | row)
  table.close()


def encode(job: Job) -> int:
  """Writes the ids of selected documents, their counts and the document table; returns the number of ids.

  A document begins with the begin mark, if the vocabulary has one; in a conversation the chat template writes it.
  Documents without tokens that count, and those that the vocabulary cannot encode, are left out. If the loss is on some
  tokens alone, `counted-*.bin` has a byte for each id and end mark that says whether it counts. `encode-*.json` has the
  numbers of what is left out among the unit's selected documents, and the bytes of the others. The table has every
  record of the unit, and `records-*.npy` the numbers in it of the documents that were encoded.

  Raises:
    UserError: there is such a document, unless `job.skip`; the message names file and line.
  """
  encoder = _encoder(job.out, job.work)
  dtype = vocabulary.dtype_of(encoder.size)
  table = _Table(job.out / 'documents' / f'{job.index:06d}.parquet')
  counts, encoded = array.array('q'), array.array('q')
  empty: list[int] = []
  total, selected, record = 0, 0, -1
  problems: list[dict[str, Any]] = []
  some = False
  with open(job.file('tokens', 'bin'), 'wb') as file, open(job.file('counted', 'bin'), 'wb') as marks:
    for record, (where, document, status) in enumerate(records(job)):
      at = {'file': where.file, 'number': where.number, 'begin': where.begin, 'end': where.end}
      at |= {'id': document.id, 'source': document.source}
      if isinstance(document, Problem):
        table.add(**at, status=status, bytes=document.bytes, characters=0, tokens=0)
        continue
      ids, what, data = np.empty(0, dtype), 'a document of zero tokens', document.text.encode()
      size = {'bytes': len(data), 'characters': len(document.text)}
      if status not in (KEPT, 'cut'):
        table.add(**at, **size, status=status, tokens=0)
        continue
      selected += 1
      try:
        its = encoder
        if document.templated and isinstance(encoder, vocabulary.HuggingFaceEncoder):
          its = encoder.templated
        ids = np.array(its.encode(document.text), dtype)
        front = [] if document.templated or encoder.begin == encoder.eos or not len(ids) else [encoder.begin]
        counted = np.ones(len(front) + len(ids) + 1, np.bool_)
        if document.spans is not None:
          some, counted[: len(front)] = True, False
          counted[len(front) : -1] = vocabulary.counted(its, document.text, document.spans)
          counted[-1] = not document.templated  # a template ends its answers itself
        if not document.templated and np.isin(ids, [encoder.begin, encoder.eos]).any():
          mark = 'end' if (ids == encoder.eos).any() else 'begin'
          what, ids = f'its text gives the {mark} mark of pool.vocabulary', ids[:0]
        elif len(ids) and not counted[1 : job.row or None].any():
          what, ids = f'no token that the loss counts{" fits into pool.length" if job.row else ""}', ids[:0]
        else:
          ids = np.array([*front, *ids], dtype)
      except UserError as error:
        what = str(error)
      if not len(ids):
        problem = Problem(where, what, len(data))
        if not job.skip:
          raise fail(problem)
        empty.append(selected - 1)
        problems += [problem.listed()] * (len(problems) < _LISTED)
        table.add(**at, **size, status='without_tokens', tokens=0)
        continue
      file.write(ids.tobytes())
      marks.write(counted.tobytes())
      counts.append(len(ids))
      encoded.append(record)
      total += len(data)
      table.add(**at, **size, status=status, tokens=len(ids), text=document.text)
      report_progress(len(data))
  table.close()
  if not some:
    job.file('counted', 'bin').unlink()
  storage.save_npy(job.file('counts', 'npy'), np.array(counts, np.int64))
  storage.save_npy(job.file('records', 'npy'), np.array(encoded, np.int64))
  notes = {'empty': empty, 'problems': problems, 'bytes': total, 'records': record + 1}
  storage.write_json(job.file('encode', 'json'), notes)
  return sum(counts)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The rows of the pool: `rows` of `length` tokens cut from the joined documents, then `planted` ones.

  Tokens have type `dtype`, `eos` follows each document, and `seed` determines the order of the rows of the stream. With
  `pad`, each document has a row of its own, cut or filled up with that id. `counts`: the loss is on some tokens alone.
  """

  rows: int
  planted: int
  length: int
  dtype: str
  eos: int
  seed: int
  pad: int | None = None
  counts: bool = False

  def flat(self, work: Path, mode: Literal['r', 'r+', 'w+']) -> np.ndarray:
    """All rows end to end, in the order of the pool, as a file that processes share."""
    return np.memmap(work / 'rows.bin', self.dtype, mode, shape=((self.rows + self.planted) * self.length,))

  def counted(self, work: Path, mode: Literal['r', 'r+', 'w+']) -> np.ndarray:
    """Whether each of these tokens counts, likewise."""
    return np.memmap(work / 'counted.bin', np.bool_, mode, shape=((self.rows + self.planted) * self.length,))


@functools.lru_cache(maxsize=1)
def row_order(rows: int, seed: int) -> Shuffle:
  """Row of the joined stream → row of the pool."""
  return Shuffle(rows, prng.numpy_stream(seed, 'pool', 'rows'))


def fragments(job: Job, plan: Plan) -> Any:
  """Yields (row_B, column_B, size_B, place_B, tokens, counted): the pieces of rows that the unit's documents fill.

  A fragment begins at `row`, `column` of the stream and at `place` in tokens. It lies in one row. End marks included.
  """
  counts_M = storage.load(job.file('counts', 'npy'))
  starts_M = np.load(job.work / 'starts.npy', mmap_mode='r')[job.first : job.first + len(counts_M)]  # noqa: TID251  mapped
  ids = np.memmap(job.file('tokens', 'bin'), plan.dtype, 'r') if counts_M.sum() else np.empty(0, plan.dtype)
  bounds = np.concatenate([[0], np.cumsum(counts_M)])
  file = job.file('counted', 'bin')
  marks = np.memmap(file, np.bool_, 'r') if file.is_file() and len(counts_M) else None
  begin = 0
  while begin < len(counts_M):
    end = max(begin + 1, int(np.searchsorted(bounds, bounds[begin] + _TOKENS, side='right')) - 1)
    size_M = counts_M[begin:end] + 1
    joined = np.full(int(size_M.sum()), plan.eos, plan.dtype)
    last_M = np.cumsum(size_M)
    is_id = np.ones(len(joined), np.bool_)
    is_id[last_M - 1] = False
    joined[is_id] = ids[bounds[begin] : bounds[end]]
    counted = np.ones(len(joined), np.bool_) if marks is None else marks[bounds[begin] + begin : bounds[end] + end]
    if plan.pad is not None:
      joined, counted = (_filled(x, size_M, plan.length, fill) for x, fill in ((joined, plan.pad), (counted, 0)))
      size_M = np.full(len(size_M), plan.length)
      last_M = np.cumsum(size_M)
    yield (*_cut(np.asarray(starts_M[begin:end]), size_M, last_M - size_M, plan), joined, counted)
    begin = end


def _filled(joined: np.ndarray, size_M: np.ndarray, length: int, fill: int) -> np.ndarray:
  """Documents of the sizes `size_M`, end to end, each cut or filled up to `length`."""
  rows_ML = np.full((len(size_M), length), fill, joined.dtype)
  kept_M = np.minimum(size_M, length)
  column = np.arange(kept_M.sum()) - np.repeat(np.cumsum(kept_M) - kept_M, kept_M)
  rows_ML[np.repeat(np.arange(len(size_M)), kept_M), column] = joined[
    np.repeat(np.cumsum(size_M) - size_M, kept_M) + column
  ]
  return rows_ML.reshape(-1)


def _cut(
  start_M: np.ndarray, size_M: np.ndarray, place_M: np.ndarray, plan: Plan
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Cuts documents that begin at `start_M` of the stream where rows end, and drops what lies after the last row."""
  length = plan.length
  first_M = start_M // length
  count_M = (start_M + size_M - 1) // length - first_M + 1
  owner_B = np.repeat(np.arange(len(size_M)), count_M)
  nth_B = np.arange(len(owner_B)) - np.repeat(np.cumsum(count_M) - count_M, count_M)
  row_B = first_M[owner_B] + nth_B
  begin_B = np.maximum(row_B * length, start_M[owner_B])
  end_B = np.minimum((row_B + 1) * length, (start_M + size_M)[owner_B])
  inside = row_B < plan.rows
  column_B, size_B = begin_B - row_B * length, end_B - begin_B
  place_B = place_M[owner_B] + begin_B - start_M[owner_B]
  return row_B[inside], column_B[inside], size_B[inside], place_B[inside]


def scatter(job_plan: tuple[Job, Plan]) -> None:
  """Copies the ids of a unit to their rows."""
  job, plan = job_plan
  flat, order = plan.flat(job.work, 'r+'), row_order(plan.rows, plan.seed)
  marks = plan.counted(job.work, 'r+') if plan.counts else None
  for row_B, column_B, size_B, place_B, joined, counted in fragments(job, plan):
    to_B = order.place(row_B) * plan.length + column_B
    ascending = np.argsort(to_B)  # for sequential writes
    for to, size, place in zip(*(x[ascending].tolist() for x in (to_B, size_B, place_B)), strict=True):
      flat[to : to + size] = joined[place : place + size]
      if marks is not None:
        marks[to : to + size] = counted[place : place + size]
    report_progress(len(joined))
  for mapped in (flat, marks):
    if mapped is not None:
      mapped.flush()  # type: ignore[attr-defined] # a memmap


@dataclasses.dataclass(frozen=True)
class Shard:
  """Rows `first` to `stop` − 1 of the pool and their file; a record is `head` followed by the bytes of a row."""

  path: str
  first: int
  stop: int
  head: bytes
  work: Path
  plan: Plan


def write_shard(shard: Shard) -> int:
  """Writes an ArrayRecord file; returns the bytes of its records."""
  from array_record.python import array_record_module

  flat = shard.plan.flat(shard.work, 'r')
  writer = array_record_module.ArrayRecordWriter(shard.path, 'group_size:1')
  length, total = shard.plan.length, 0
  for row in range(shard.first, shard.stop):
    record = shard.head + flat[row * length : (row + 1) * length].tobytes()
    writer.write(record)
    total += len(record)
    report_progress(length)
  writer.close()
  return total


def read_json(path: Path) -> Any:
  return json.loads(path.read_text())

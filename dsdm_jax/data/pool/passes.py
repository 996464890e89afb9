"""The four passes over a pool, each a function of one unit or shard, run on any number of processes.

`scan` reads a unit and notes of each document a hash, its size and source, and whether it leaks. `encode` reads it
again and writes the ids and the document table of what is kept. `scatter` copies them to where they stand among the
rows. `write_shard` puts a range of rows into an ArrayRecord file. What they hand on lies in files, so memory does not
grow with the pool, and nothing depends on which process did what.
"""

import array
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsdm_jax.core import prng, storage
from dsdm_jax.data.pool import encoders, readers, workers
from dsdm_jax.data.pool.documents import Document
from dsdm_jax.data.pool.permutation import Shuffle
from dsdm_jax.data.pool.readers import Problem
from dsdm_jax.data.pool.sources import Unit
from dsdm_jax.data.targets.leakage import Guard
from dsdm_jax.errors import UserError

_LISTED = 1_000  # problems of a unit that are named; all are counted
_DOCUMENTS = 4_096  # rows of a row group of the document table
_TOKENS = 2**22  # that scatter joins at once


@dataclasses.dataclass(frozen=True)
class Task:
  """One unit and what the passes must know of it.

  Attributes:
    unit: what to read.
    index: of the unit, in the order of the pool.
    work: folder that the passes hand files on in.
    most: bytes that documents are cut to, 0 for none.
    skip: whether bad input is counted and left out, rather than an error.
    guard: file of the leakage guard, '' for none.
    first: number of the unit's first document that is kept.
    begin, end: its documents among all that were read.
    out: folder of the pool.
  """

  unit: Unit
  index: int
  work: Path
  most: int
  skip: bool
  guard: str = ''
  first: int = 0
  begin: int = 0
  end: int = 0
  out: Path = Path()

  def file(self, pass_name: str, ending: str) -> Path:
    return self.work / f'{pass_name}-{self.index:06d}.{ending}'


@dataclasses.dataclass(frozen=True)
class Scanned:
  """What a unit holds: per document in `scan-*.npz`, and in sum here."""

  documents: int
  problems: int


@functools.lru_cache(maxsize=1)
def _guard(path: str) -> Guard:
  return Guard.load(path)


def fail(problem: Problem) -> UserError:
  return UserError(f'{problem}; mend it, or leave such documents out with --config.pool.on_error=skip')


def scan(task: Task) -> Scanned:
  """Reads a unit once; writes hashes [M, 2], sizes, sources and leaks of its M documents.

  Raises:
    UserError: bad input, unless `task.skip`; it names file and line.
  """
  guard = _guard(task.guard) if task.guard else None
  # 29 bytes a document, where lists of Python's objects would take four times that.
  hashes, sizes, sources, leaking = bytearray(), array.array('q'), array.array('i'), bytearray()
  names: dict[str, int] = {}
  leaks: list[dict[str, Any]] = []
  problems: list[dict[str, str]] = []
  count = 0
  for found in readers.read(task.unit, task.most):
    if isinstance(found, Problem):
      if not task.skip:
        raise fail(found)
      count += 1
      if len(problems) < _LISTED:
        problems.append(dataclasses.asdict(found))
      continue
    data = found.text.encode()
    hashes.extend(hashlib.blake2b(data, digest_size=16).digest())
    sizes.append(len(data))
    sources.append(names.setdefault(found.source, len(names)))
    leak = guard.leak(found) if guard else None
    leaking.append(leak is not None)
    if leak:
      leaks.append({'document': len(sizes) - 1, 'id': leak.id, 'task': leak.task, 'words': leak.words})
    workers.tick(len(data))
  storage.save_npz(
    task.file('scan', 'npz'),
    hash_M2=np.frombuffer(bytes(hashes), '<u8').reshape(-1, 2),
    bytes_M=np.array(sizes, np.int64),
    source_M=np.array(sources, np.int32),
    leak_M=np.frombuffer(bytes(leaking), np.bool_),
  )
  storage.write_json(task.file('scan', 'json'), {'sources': list(names), 'leaks': leaks, 'problems': problems})
  return Scanned(len(sizes), count)


@functools.lru_cache(maxsize=1)
def _kept(work: Path) -> np.ndarray:
  return np.load(work / 'keep.npy', mmap_mode='r')


def kept_documents(task: Task) -> Iterator[tuple[str, Document]]:
  """Documents of a unit that are kept, in order, each with where it stands."""
  keep_M = np.asarray(_kept(task.work)[task.begin : task.end])
  number = 0
  for where, found in readers.placed(task.unit, task.most):
    if isinstance(found, Problem):
      continue
    if number >= len(keep_M):
      raise UserError(f'{task.unit.paths or task.unit.entry.target} has changed while it was read; start again')
    if keep_M[number]:
      yield where, found
    number += 1


def texts(task_numbers: tuple[Task, np.ndarray]) -> list[str]:
  """Texts of the kept documents of a unit whose numbers within it are given, in ascending order."""
  task, wanted = task_numbers
  left = set(wanted.tolist())
  return [document.text for number, (_, document) in enumerate(kept_documents(task)) if number in left]


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path) -> encoders.Encoder:
  return encoders.open_encoder(folder)


class _Table:
  """The document table of one unit, a Parquet file written in row groups."""

  def __init__(self, path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {'id': pa.string(), 'source': pa.string(), 'bytes': pa.int64(), 'tokens': pa.int64()}
    self._schema = pa.schema(list(fields.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    self._writer = pq.ParquetWriter(path, self._schema)
    self._rows: list[dict[str, Any]] = []

  def add(self, **row: Any) -> None:
    self._rows.append(row)
    if len(self._rows) == _DOCUMENTS:
      self._flush()

  def _flush(self) -> None:
    import pyarrow as pa

    self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
    self._rows = []

  def close(self) -> None:
    if self._rows:
      self._flush()
    self._writer.close()


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
  """A document table of few rows."""
  table = _Table(path)
  for row in rows:
    table.add(**row)
  table.close()


def encode(task: Task) -> int:
  """Writes ids of the kept documents one after another, how many each has, and the document table; gives their sum.

  Documents without tokens are in none of these; `encode-*.json` has their numbers among the kept ones of the unit.

  Raises:
    UserError: there is such a document, unless `task.skip`; it names file and line.
  """
  encoder = _encoder(task.out)
  dtype = encoders.dtype_of(encoder.size)
  table = _Table(task.out / 'documents' / f'{task.index:06d}.parquet')
  counts = array.array('q')
  empty: list[int] = []
  problems: list[dict[str, str]] = []
  with open(task.file('tokens', 'bin'), 'wb') as file:
    for number, (where, document) in enumerate(kept_documents(task)):
      ids = encoder.encode(document.text)
      if not ids:
        problem = Problem(where, 'a document of zero tokens')
        if not task.skip:
          raise fail(problem)
        empty.append(number)
        problems += [dataclasses.asdict(problem)] * (len(problems) < _LISTED)
        continue
      file.write(np.array(ids, dtype).tobytes())
      counts.append(len(ids))
      size = len(document.text.encode())
      table.add(id=document.id, source=document.source, bytes=size, tokens=len(ids))
      workers.tick(size)
  table.close()
  storage.save_npy(task.file('counts', 'npy'), np.array(counts, np.int64))
  storage.write_json(task.file('encode', 'json'), {'empty': empty, 'problems': problems})
  return sum(counts)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the rows lie: `rows` of L tokens cut from the stream, then `planted` ones.

  Tokens are of `dtype`, `eos` stands after each document, and `seed` names the order of the rows of the stream.
  """

  rows: int
  planted: int
  length: int
  dtype: str
  eos: int
  seed: int

  def flat(self, work: Path, mode: Literal['r', 'r+', 'w+']) -> np.ndarray:
    """All rows end to end, in the order of the pool, in a file that processes share."""
    return np.memmap(work / 'rows.bin', self.dtype, mode, shape=((self.rows + self.planted) * self.length,))


@functools.lru_cache(maxsize=1)
def row_order(rows: int, seed: int) -> Shuffle:
  """Where the rows of the joined stream come to stand in the pool."""
  return Shuffle(rows, prng.numpy_stream(seed, 'pool', 'rows'))


def fragments(task: Task, plan: Plan) -> Any:
  """What the unit's documents give to rows of the stream: (row B, column B, size B, place B in tokens, tokens).

  `row`, `column` say where a fragment begins in the stream; it never leaves its row. End marks are in it.
  """
  counts_M = np.load(task.file('counts', 'npy'))
  starts_M = np.load(task.work / 'starts.npy', mmap_mode='r')[task.first : task.first + len(counts_M)]
  ids = np.memmap(task.file('tokens', 'bin'), plan.dtype, 'r') if counts_M.sum() else np.empty(0, plan.dtype)
  bounds = np.concatenate([[0], np.cumsum(counts_M)])
  begin = 0
  while begin < len(counts_M):
    end = max(begin + 1, int(np.searchsorted(bounds, bounds[begin] + _TOKENS, side='right')) - 1)
    size_M = counts_M[begin:end] + 1
    joined = np.full(int(size_M.sum()), plan.eos, plan.dtype)
    last_M = np.cumsum(size_M)
    is_id = np.ones(len(joined), np.bool_)
    is_id[last_M - 1] = False
    joined[is_id] = ids[bounds[begin] : bounds[end]]
    yield (*_cut(np.asarray(starts_M[begin:end]), size_M, last_M - size_M, plan), joined)
    begin = end


def _cut(
  start_M: np.ndarray, size_M: np.ndarray, place_M: np.ndarray, plan: Plan
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Documents that begin at `start_M` of the stream, cut where rows end; what falls behind the last row is left out."""
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


def scatter(task_plan: tuple[Task, Plan]) -> None:
  """Copies the ids of a unit into the rows where they belong."""
  task, plan = task_plan
  flat, order = plan.flat(task.work, 'r+'), row_order(plan.rows, plan.seed)
  for row_B, column_B, size_B, place_B, joined in fragments(task, plan):
    to_B = order.place(row_B) * plan.length + column_B
    turn = np.argsort(to_B)  # ascending writes are kinder to a disk
    for to, size, place in zip(to_B[turn].tolist(), size_B[turn].tolist(), place_B[turn].tolist(), strict=True):
      flat[to : to + size] = joined[place : place + size]
    workers.tick(len(joined))
  flat.flush()  # type: ignore[attr-defined] # a memmap


@dataclasses.dataclass(frozen=True)
class Shard:
  """Rows `first` to `stop` − 1 of the pool, and the file they go to; `head` stands before a row's bytes in a record."""

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
    workers.tick(length)
  writer.close()
  return total


def read_json(path: Path) -> Any:
  return json.loads(path.read_text())


def forget() -> None:
  """Drops what this process remembers of files of an earlier pool in the same place."""
  for cached in (_guard, _kept, _encoder, row_order):
    cached.cache_clear()

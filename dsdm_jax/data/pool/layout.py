"""Decisions between the passes: which documents are selected and where they go. Uses 8 to 16 bytes per document."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsdm_jax.core import prng, storage
from dsdm_jax.data.pool.passes import LOSSES, Job, Plan, Scanned, read_json, row_order
from dsdm_jax.data.pool.permutation import Shuffle
from dsdm_jax.data.pool.sources import Entry
from dsdm_jax.errors import UserError

_GROUP = 2**22  # documents whose hashes are compared at once
_LONG = 0.1  # of a limit in bytes; longer documents are drawn last
_ROWS = 2**16  # rows whose origin is computed at once
_SOURCES = np.iinfo(np.int16).max  # indices of int16, one of which is for planted rows


@dataclasses.dataclass
class Selected:
  """The documents that go into the pool.

  Attributes:
    keep_M: bool, for every document in the order of units.
    lost_M: int8, index into `LOSSES`, of every document; -1 for those that were kept.
    first: number of each unit's first selected document, and the number of selected documents at the end.
    names: sources of selected documents, sorted.
    source_K: int16, for each selected document, index into `names`.
    bytes: of selected text.
    problems: those that are listed.
    lost: documents and bytes of each kind of `LOSSES`.
  """

  keep_M: np.ndarray
  lost_M: np.ndarray
  first: list[int]
  names: list[str]
  source_K: np.ndarray
  bytes: int
  problems: list[dict]
  lost: dict[str, dict[str, int]]

  @property
  def count(self) -> int:
    return self.first[-1]


def bounds(scanned: Sequence[Scanned]) -> list[int]:
  """Number of the first document of each unit, and the number of documents at the end."""
  return [0, *np.cumsum([s.documents for s in scanned]).tolist()]


def repeated(jobs: Sequence[Job], begin: Sequence[int]) -> np.ndarray:
  """bool [M]: whether an earlier document has the same text. Hashes are compared in groups, to save memory."""
  total = begin[-1]
  again_M = np.zeros(total, np.bool_)
  groups = -(-total // _GROUP) or 1
  for group in range(groups):
    hashes, numbers = [], []
    for job, first in zip(jobs, begin, strict=False):
      with storage.load(job.file('scan', 'npz')) as arrays:
        hash_M2 = arrays['hash_M2']
      mine = np.flatnonzero(hash_M2[:, 0] % np.uint64(groups) == group) if groups > 1 else np.arange(len(hash_M2))
      hashes.append(hash_M2[mine])
      numbers.append(first + mine)
    hash_G2, number_G = np.concatenate(hashes), np.concatenate(numbers)
    order = np.lexsort((hash_G2[:, 1], hash_G2[:, 0]))  # stable: the first of several equal ones stays first
    same = np.all(hash_G2[order[1:]] == hash_G2[order[:-1]], axis=1)
    again_M[number_G[order[1:]][same]] = True
  return again_M


def shares(entries: Sequence[Entry], supply: Sequence[int], budget: int) -> list[float]:
  """Bytes that each source may contribute: limited by its cap, and by weight to its share of `budget` (0 for none).

  What a source cannot fill goes to the others, in proportion to their weights. A single `sized` source has respected
  the budget itself, except for one document.
  """
  limit = [float(min(s, e.max_bytes or s)) for e, s in zip(entries, supply, strict=True)]
  if not budget or sum(limit) <= budget or (len(entries) == 1 and entries[0].sized):
    return limit
  given, left = limit.copy(), float(budget)
  # In the order of need per weight: what a source leaves goes to those after it.
  order = sorted(range(len(entries)), key=lambda i: limit[i] / entries[i].weight)
  for place, i in enumerate(order):
    given[i] = min(limit[i], left * entries[i].weight / sum(entries[j].weight for j in order[place:]))
    left -= given[i]
  return given


def loss(documents: int = 0, bytes: int = 0) -> dict[str, int]:
  """An entry of `Selected.lost`."""
  return {'documents': int(documents), 'bytes': int(bytes)}


def repeated_id(jobs: Sequence[Job], keep_M: np.ndarray) -> tuple[int, int] | None:
  """Numbers of two selected documents with the same id (by its 64-bit hash), or None."""
  hashes = [np.empty(0, np.uint64)]
  for job in jobs:
    with storage.load(job.file('scan', 'npz')) as arrays:
      hashes.append(arrays['id_M'][keep_M[job.begin : job.end]])
  hash_K = np.concatenate(hashes)
  ordered = np.sort(hash_K)
  same = np.flatnonzero(ordered[1:] == ordered[:-1])
  if not len(same):
    return None
  first = hash_K[np.flatnonzero(np.isin(hash_K, ordered[same]))[0]]
  one, other = np.flatnonzero(keep_M)[np.flatnonzero(hash_K == first)[:2]].tolist()
  return one, other


def decide(
  entries: Sequence[Entry],
  jobs: Sequence[Job],
  scanned: Sequence[Scanned],
  duplicates: bool,
  budget: int,
  seed: int,
) -> Selected:
  """Drops duplicates as configured, then documents above caps and budget, as `_cap` chooses them.

  Raises:
    UserError: more sources than int16 has indices.
  """
  begin = bounds(scanned)
  again_M = repeated(jobs, begin) if duplicates else np.zeros(begin[-1], np.bool_)
  keep_M = ~again_M
  lost_M = np.where(again_M, LOSSES.index('duplicates'), -1).astype(np.int8)
  problems: list[dict] = []
  names: dict[str, int] = {}
  supply = [0] * len(entries)
  lost = {name: loss() for name in LOSSES}
  lost['cut'] = loss(sum(s.cut for s in scanned), sum(s.cut_bytes for s in scanned))
  lost['bad_input'] = loss(sum(s.problems for s in scanned), sum(s.problem_bytes for s in scanned))
  owner = {id(entry): index for index, entry in enumerate(entries)}
  for job, first in zip(jobs, begin, strict=False):
    notes = read_json(job.file('scan', 'json'))
    problems += notes['problems']
    with storage.load(job.file('scan', 'npz')) as arrays:
      bytes_M = arrays['bytes_M']
    of_unit = slice(first, first + len(bytes_M))
    _add(lost['duplicates'], bytes_M[again_M[of_unit]])
    supply[owner[id(job.unit.entry)]] += int(bytes_M[keep_M[of_unit]].sum())
  before_M = keep_M.copy()
  _cap(entries, jobs, begin, keep_M, supply, budget, seed)
  lost_M[before_M & ~keep_M] = LOSSES.index('above_caps')
  sources, total, counts = [], 0, [0]
  for job, first in zip(jobs, begin, strict=False):
    unit_names = read_json(job.file('scan', 'json'))['sources']
    with storage.load(job.file('scan', 'npz')) as arrays:
      mine = keep_M[first : first + job.end - job.begin]
      present, code = np.unique(arrays['source_M'][mine], return_inverse=True)
      mapping = np.array([names.setdefault(unit_names[i], len(names)) for i in present], np.int64)
      if len(names) > _SOURCES:
        raise UserError(
          f'{entries[owner[id(job.unit.entry)]].target} gives the pool more than {_SOURCES:,} sources; '
          'choose a coarser field with | source=FIELD'
        )
      sources.append(mapping[code].astype(np.int16) if len(present) else np.empty(0, np.int16))
      total += int(arrays['bytes_M'][mine].sum())
      _add(lost['above_caps'], arrays['bytes_M'][before_M[first : first + len(mine)] & ~mine])
      counts.append(counts[-1] + int(mine.sum()))
  ordered = sorted(names)
  place = {name: index for index, name in enumerate(ordered)}
  rank = np.array([place[name] for name in names], np.int16)
  source_K = rank[np.concatenate(sources)] if len(names) else np.empty(0, np.int16)
  return Selected(keep_M, lost_M, counts, ordered, source_K, total, problems, lost)


def _add(of: dict[str, int], bytes_M: np.ndarray) -> None:
  of['documents'] += len(bytes_M)
  of['bytes'] += int(bytes_M.sum())


def without_tokens(jobs: Sequence[Job], selected: Selected) -> tuple[list[Job], Selected]:
  """`jobs` and `selected` without the documents for which `encode` found no tokens."""
  keep_M, removed, problems = selected.keep_M.copy(), [np.empty(0, np.int64)], list(selected.problems)
  lost, total, first = loss(), 0, [0]
  for job in jobs:
    notes = read_json(job.file('encode', 'json'))
    empty_E = np.array(notes['empty'], np.int64)
    place_E = np.flatnonzero(keep_M[job.begin : job.end])[empty_E]
    with storage.load(job.file('scan', 'npz')) as arrays:
      _add(lost, arrays['bytes_M'][place_E])
    total += notes['bytes']
    keep_M[job.begin + place_E] = False
    removed.append(job.first + empty_E)
    problems += notes['problems']
    first.append(first[-1] + int(keep_M[job.begin : job.end].sum()))
  removed_E = np.concatenate(removed)
  changed = dataclasses.replace(
    selected,
    keep_M=keep_M,
    first=first,
    source_K=np.delete(selected.source_K, removed_E),
    bytes=total,
    problems=problems,
    lost=selected.lost | {'without_tokens': lost},
  )
  return [dataclasses.replace(job, first=begin) for job, begin in zip(jobs, first, strict=False)], changed


def _cap(
  entries: Sequence[Entry],
  jobs: Sequence[Job],
  begin: Sequence[int],
  keep_M: np.ndarray,
  supply: Sequence[int],
  budget: int,
  seed: int,
) -> None:
  """Reduces `keep_M` for sources that exceed their limits, which are their `shares` and numbers of documents.

  Documents come in the order of a seeded hash of their text, so neither files nor their order matter. Those that do not
  fit into what is left are passed over. Documents of more than `_LONG` of the limit come after all others: one of them
  cannot replace many. What a source leaves of its share because of its number of documents goes to the others.
  """
  supply, left = list(supply), set(range(len(entries)))

  def draw(index: int, limit: float) -> _Draw:
    return _draw(entries[index], jobs, begin, keep_M, supply[index], limit, seed)

  def keep(drawn: _Draw) -> None:
    keep_M[drawn.number_K] = False
    keep_M[drawn.chosen_X] = True

  while True:
    allowed = shares(entries, supply, budget)
    drawn = {i: draw(i, allowed[i]) for i in sorted(left) if entries[i].max_documents}
    # A share only grows when another source has less than its own, so these keep what they drew.
    full = {i: d for i, d in drawn.items() if len(d.chosen_X) == entries[i].max_documents and d.bytes < allowed[i]}
    if not full:
      break
    for index, of_source in full.items():
      keep(of_source)
      supply[index] = of_source.bytes
    left -= full.keys()
  for index in left:
    keep(draw(index, allowed[index]))


@dataclasses.dataclass(frozen=True)
class _Draw:
  """Numbers of all documents of a source, and of those that are drawn, whose bytes are counted."""

  number_K: np.ndarray
  chosen_X: np.ndarray
  bytes: int


def _draw(
  entry: Entry, jobs: Sequence[Job], begin: Sequence[int], keep_M: np.ndarray, supply: int, limit: float, seed: int
) -> _Draw:
  """What `_cap` draws from a source of `supply` bytes for at most `limit` bytes."""
  mine = [(job, first) for job, first in zip(jobs, begin, strict=False) if job.unit.entry is entry]
  numbers = [first + np.flatnonzero(keep_M[first : first + job.end - job.begin]) for job, first in mine]
  number_K = np.concatenate([np.empty(0, np.int64), *numbers])
  most = entry.max_documents or len(number_K)
  if supply <= limit and len(number_K) <= most:
    return _Draw(number_K, number_K, supply)
  salt = np.frombuffer(hashlib.blake2b(f'{seed}\x1f{entry.name}'.encode(), digest_size=8).digest(), '<u8')[0]
  draws, sizes = [], []
  for job, first in mine:
    with storage.load(job.file('scan', 'npz')) as arrays:
      keep = keep_M[first : first + job.end - job.begin]
      draws.append(arrays['hash_M2'][keep, 1] ^ salt)
      sizes.append(arrays['bytes_M'][keep])
  draw_K, size_K = np.concatenate(draws), np.concatenate(sizes)
  order_K = np.lexsort((draw_K, size_K > limit * _LONG))
  taken = order_K[fitting(size_K[order_K], int(limit), most)]
  return _Draw(number_K, number_K[taken], int(size_K[taken].sum()))


def fitting(size_K: np.ndarray, limit: int, most: int) -> np.ndarray:
  """Places of at most `most` sizes, taken in order, each if it fits into what is left of `limit`."""
  taken = [np.empty(0, np.int64)]
  left_K = np.arange(len(size_K))
  while most and len(left_K := left_K[size_K[left_K] <= limit]):
    used = np.cumsum(size_K[left_K])
    count = min(int(np.searchsorted(used, limit, side='right')), most)
    taken.append(left_K[:count])
    limit, most, left_K = limit - int(used[count - 1]), most - count, left_K[count:]
  return np.concatenate(taken)


@dataclasses.dataclass(frozen=True)
class Order:
  """The joined stream: documents in a seeded order, each followed by an end mark.

  Attributes:
    shuffle: number of a selected document → its place in the stream.
    begin: int64 [K + 1], first token of the document at each place, and the length of the stream at the end.
  """

  shuffle: Shuffle
  begin: np.ndarray


def document_order(count: int, seed: int) -> Shuffle:
  """Number of a selected document → its place in the joined stream."""
  return Shuffle(count, prng.numpy_stream(seed, 'pool', 'documents'))


def join(jobs: Sequence[Job], count: int, seed: int, work: Path, length: int = 0) -> Order:
  """Joins documents; writes `starts.npy` for the workers: where each selected document begins.

  With a `length`, each document takes so many tokens: a row of its own.
  """
  shuffle = document_order(count, seed)
  begin = np.zeros(count + 1, np.int64)
  for job in jobs:
    counts_M = storage.load(job.file('counts', 'npy'))
    begin[1 + shuffle.place(np.arange(job.first, job.first + len(counts_M)))] = length or counts_M + 1
  np.cumsum(begin, out=begin)
  starts = np.lib.format.open_memmap(work / 'starts.npy', 'w+', np.int64, (count,))
  for first in range(0, count, _GROUP):
    number = np.arange(first, min(first + _GROUP, count))
    starts[number] = begin[shuffle.place(number)]
  starts.flush()
  return Order(shuffle, begin)


def origins(order: Order, source_K: np.ndarray, sources: int, plan: Plan) -> Iterator[tuple[np.ndarray, ...]]:
  """Yields (row of the pool, document, offset, source), each [B], for blocks of rows of the stream.

  `document` is the place of the document with the row's first token; `source` has most of the row's tokens, and the
  lowest index among equals.
  """
  place_of_source = np.empty(len(source_K), np.int16)
  for first in range(0, len(source_K), _GROUP):
    number = np.arange(first, min(first + _GROUP, len(source_K)))
    place_of_source[order.shuffle.place(number)] = source_K[number]
  step = max(1, min(_ROWS, 2**23 // max(sources, 1)))
  for first in range(0, plan.rows, step):
    stop = min(first + step, plan.rows)
    token_B = np.arange(first, stop, dtype=np.int64) * plan.length
    document_B = np.searchsorted(order.begin, token_B, side='right') - 1
    low, high = int(document_B[0]), int(np.searchsorted(order.begin, stop * plan.length, side='left'))
    source_B = _majority(order.begin[low : high + 1], place_of_source[low:high], first, stop, plan.length, sources)
    to_B = row_order(plan.rows, plan.seed).place(np.arange(first, stop))
    yield to_B, document_B, token_B - order.begin[document_B], source_B


def _majority(
  begin_D: np.ndarray, source_D: np.ndarray, first: int, stop: int, length: int, sources: int
) -> np.ndarray:
  """The source with most tokens in each of the rows `first` to `stop` − 1."""
  edges = np.unique(np.concatenate([begin_D, np.arange(first, stop + 1) * length]))
  edges = edges[(edges >= first * length) & (edges <= stop * length)]
  row = edges[:-1] // length - first
  source = source_D[np.searchsorted(begin_D, edges[:-1], side='right') - 1]
  share_BS = np.bincount(row * sources + source, np.diff(edges), (stop - first) * sources)
  return share_BS.reshape(stop - first, sources).argmax(axis=1)

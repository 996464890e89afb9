"""The leakage guard: no document of the pool may hold text of a target, be it of the target or the holdout split.

Two texts share something when they have `n` words in a row in common. Words are runs of word characters of the case
folded text, so layout and punctuation do not hide a copy. A target text of 6 to n−1 words counts when all of it
occurs; a shorter one says too little to be called a copy.

Text that at least two licence documents of the pool share with targets is boilerplate that got into both, not a leak
of one into the other: such n-grams drop nothing, and are counted.

Words and runs of words are 64-bit hashes computed over whole documents at once, and looked up first in a table of bits
and only on a hit in the sorted list. The guard's size goes with the targets, never with the pool.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dsdm_jax.data.pool.documents import Document

SHORTEST = 6  # words
BOILERPLATE_KINDS = ('licences',)
_WORD = re.compile(r'\w+')
_BASE = 0x9E3779B97F4A7C17  # odd, and one less is 2 modulo 4: no early power of it is 1 in many low bits


@dataclasses.dataclass(frozen=True)
class TargetText:
  """A text that the pool must not hold."""

  task: str
  text: str


@dataclasses.dataclass(frozen=True)
class Leak:
  """Why a document was dropped: it holds `words`, which task `task` holds too."""

  id: str
  task: str
  words: str


def words(text: str) -> list[str]:
  return _WORD.findall(text.casefold())


def _mix(x: np.ndarray) -> np.ndarray:
  """SplitMix64's finalizer, in place."""
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    x ^= x >> np.uint64(shift)
    x *= np.uint64(factor)
  x ^= x >> np.uint64(31)
  return x


@functools.cache
def _characters() -> tuple[np.ndarray, np.ndarray]:
  """(whether a code point is part of a word, its 64-bit number) for all code points."""
  points = range(0x110000)
  is_word = np.fromiter((c.isalnum() or c == '_' for c in map(chr, points)), np.bool_, len(points))
  return is_word, _mix(np.arange(1, len(points) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


@functools.cache
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
  """(B⁰ … , B⁻⁰ …) modulo 2⁶⁴, `size` of each."""
  found = []
  for base in (_BASE, pow(_BASE, -1, 2**64)):
    steps = np.full(size, base, np.uint64)
    steps[0] = 1
    found.append(np.multiply.accumulate(steps))
  return found[0], found[1]


def _powers_for(length: int) -> tuple[np.ndarray, np.ndarray]:
  return _powers(1 << max(12, int(length).bit_length()))


def word_hashes(text: str) -> np.ndarray:
  """A 64-bit number for each word of `text`, the same in every process: uint64."""
  folded = text.casefold()
  if folded.isascii():
    code = np.frombuffer(folded.encode('ascii'), np.uint8)
  else:
    code = np.frombuffer(folded.encode('utf-32-le', 'surrogatepass'), np.uint32)
  is_word, number = _characters()
  inside = np.zeros(len(code) + 2, np.bool_)
  inside[1:-1] = is_word[code]
  edges = np.flatnonzero(inside[1:] != inside[:-1])
  start, stop = edges[::2], edges[1::2]
  power, inverse = _powers_for(len(code) + 1)
  # The sum over a word of number·B^place, brought back to the word's own beginning.
  prefix = np.zeros(len(code) + 1, np.uint64)
  np.cumsum(number[code] * power[: len(code)], out=prefix[1:])
  return _mix((prefix[stop] - prefix[start]) * inverse[start])


def run_hashes(ids: np.ndarray, n: int) -> np.ndarray:
  """Hash of each run of `n` words: uint64 [len(ids) − n + 1], empty where the text is shorter."""
  return _runs(_run_prefix(ids), n)


def _run_prefix(ids: np.ndarray) -> np.ndarray:
  """Sums of the words' numbers times B^place up to each word: what runs of every length are read from."""
  power, _ = _powers_for(len(ids) + 1)
  prefix = np.zeros(len(ids) + 1, np.uint64)
  np.cumsum(ids * power[: len(ids)], out=prefix[1:])
  return prefix


def _runs(prefix: np.ndarray, n: int) -> np.ndarray:
  # Words' numbers are mixed and B is odd, so sums of them are as even in their high bits as another mixing makes them.
  if len(prefix) <= n:
    return np.empty(0, np.uint64)
  _, inverse = _powers_for(len(prefix))
  runs = prefix[n:] - prefix[:-n]
  runs *= inverse[: len(runs)]
  return runs


class Guard:
  """Finds documents that hold target text.

  Args:
    targets: the texts of all tasks, both splits.
    n: words in a row that make a copy; at least 2.
    boilerplate: documents whose word runs are no leak, see the module's docstring.
  """

  def __init__(self, targets: Sequence[TargetText], n: int, boilerplate: Iterable[Document] = ()):
    if n < 2:
      raise ValueError(f'n is {n}; the guard compares at least 2 words')
    self.tasks = sorted({target.task for target in targets})
    number = {task: index for index, task in enumerate(self.tasks)}
    runs: dict[int, list[np.ndarray]] = {}
    owners: dict[int, list[np.ndarray]] = {}
    for target in targets:
      ids = word_hashes(target.text)
      length = min(n, len(ids))
      if length >= min(SHORTEST, n):
        found = run_hashes(ids, length)
        runs.setdefault(length, []).append(found)
        owners.setdefault(length, []).append(np.full(len(found), number[target.task], np.int32))
    common = _boilerplate(boilerplate, sorted(runs))
    self.boilerplate_runs = 0
    self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for length in sorted(runs, reverse=True):
      table, first = np.unique(np.concatenate(runs[length]), return_index=True)
      owner = np.concatenate(owners[length])[first]
      kept = ~np.isin(table, common[length])
      self.boilerplate_runs += int((~kept).sum())
      self._tables[length] = table[kept], owner[kept]
    self._mark()

  def _mark(self) -> None:
    self._marks: dict[int, np.ndarray] = {}
    for length, (table, _) in self._tables.items():
      bits = min(24, len(table).bit_length() + 4)
      marks = np.zeros(1 << bits, np.bool_)
      marks[(table >> np.uint64(64 - bits)).astype(np.int64)] = True
      self._marks[length] = marks

  def save(self, path: str | os.PathLike) -> None:
    """Writes an npz that `load` opens, for other processes."""
    arrays: dict[str, Any] = {f't_{length}': table for length, (table, _) in self._tables.items()}
    arrays |= {f'o_{length}': owner for length, (_, owner) in self._tables.items()}
    np.savez(path, tasks=np.array(self.tasks, np.str_), lengths=np.array(list(self._tables), np.int64), **arrays)

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Guard':
    guard = cls([], 2)
    with np.load(path) as arrays:
      guard.tasks = [str(task) for task in arrays['tasks']]
      guard._tables = {int(k): (arrays[f't_{k}'], arrays[f'o_{k}']) for k in arrays['lengths']}
    guard._mark()
    return guard

  def leak(self, document: Document) -> Leak | None:
    """The first of the longest copies in `document`, or None."""
    if not self._tables:
      return None
    prefix = _run_prefix(word_hashes(document.text))
    for length, (table, owner) in self._tables.items():
      runs = _runs(prefix, length)
      if not len(table) or not len(runs):
        continue
      marks = self._marks[length]
      maybe = np.flatnonzero(marks[(runs >> np.uint64(65 - len(marks).bit_length())).view(np.int64)])
      if not len(maybe):
        continue
      place = np.minimum(np.searchsorted(table, runs[maybe]), len(table) - 1)
      hits = np.flatnonzero(table[place] == runs[maybe])
      if len(hits):
        at = int(maybe[hits[0]])
        task = self.tasks[owner[place[hits[0]]]]
        return Leak(document.id, task, ' '.join(words(document.text)[at : at + length]))
    return None


def _boilerplate(documents: Iterable[Document], lengths: list[int]) -> dict[int, np.ndarray]:
  found: dict[int, list[np.ndarray]] = {length: [np.empty(0, np.uint64)] for length in lengths}
  for document in documents:
    ids = word_hashes(document.text)
    for length in lengths:
      found[length].append(np.unique(run_hashes(ids, length)))
  common = {}
  for length, group in found.items():
    run, documents_with_it = np.unique(np.concatenate(group), return_counts=True)
    common[length] = run[documents_with_it >= 2]
  return common


def sift(
  documents: Sequence[Document], targets: Sequence[TargetText], n: int
) -> tuple[list[Document], list[Leak], int]:
  """Documents without a leak, in their order; what was dropped and why; how many word runs were boilerplate."""
  guard = Guard(targets, n, [d for d in documents if d.source in BOILERPLATE_KINDS])
  kept, leaks = [], []
  for document in documents:
    leak = guard.leak(document)
    if leak is None:
      kept.append(document)
    else:
      leaks.append(leak)
  return kept, leaks, guard.boilerplate_runs

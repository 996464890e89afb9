"""The leakage guard: the pool must not contain text of a target, neither of its target nor of its holdout split.

Two texts match if they share `n` consecutive words. Words are runs of word characters of the case-folded text, so
layout and punctuation do not hide a copy. A target text of 6 to n−1 words matches as a whole; shorter texts are too
common to call a copy.

Word runs that at least two licence documents of the pool share with targets are boilerplate that occurs in both; they
are no leak, and are counted.

Words and word runs are 64-bit hashes, computed for whole documents at once. A lookup reads a bit table first and the
sorted list of hashes only on a hit. The guard's size depends on the targets and not on the pool.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dsdm_jax.data.pool.sources import Document

SHORTEST = 6  # words
BOILERPLATE_KINDS = ('licences',)
_WORD = re.compile(r'\w+')
_BASE = 0x9E3779B97F4A7C17  # odd, and 3 modulo 4: small powers differ from 1 in their low bits


@dataclasses.dataclass(frozen=True)
class TargetText:
  """A text that the pool must not contain."""

  task: str
  text: str


@dataclasses.dataclass(frozen=True)
class Leak:
  """Why a document is dropped: it shares `words` with task `task`."""

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
  """(whether it is part of a word, its 64-bit number) for every code point."""
  points = range(0x110000)
  is_word = np.fromiter((c.isalnum() or c == '_' for c in map(chr, points)), np.bool_, len(points))
  return is_word, _mix(np.arange(1, len(points) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


@functools.cache
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
  """The first `size` powers of B and of its inverse, modulo 2⁶⁴."""
  powers = []
  for base in (_BASE, pow(_BASE, -1, 2**64)):
    steps = np.full(size, base, np.uint64)
    steps[0] = 1
    powers.append(np.multiply.accumulate(steps))
  return powers[0], powers[1]


def _powers_for(length: int) -> tuple[np.ndarray, np.ndarray]:
  return _powers(1 << max(12, int(length).bit_length()))


def word_hashes(text: str) -> np.ndarray:
  """A 64-bit number for each word of `text`, equal in all processes: uint64."""
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
  # The sum over a word of number·B^place, shifted to begin at place 0.
  prefix = np.zeros(len(code) + 1, np.uint64)
  np.cumsum(number[code] * power[: len(code)], out=prefix[1:])
  return _mix((prefix[stop] - prefix[start]) * inverse[start])


def run_hashes(ids: np.ndarray, n: int) -> np.ndarray:
  """Hash of each run of `n` words: uint64 [len(ids) − n + 1], empty if the text is shorter."""
  return _runs(_run_prefix(ids), n)


def _run_prefix(ids: np.ndarray) -> np.ndarray:
  """Sums of the words' numbers times B^place up to each word, which give the runs of every length."""
  power, _ = _powers_for(len(ids) + 1)
  prefix = np.zeros(len(ids) + 1, np.uint64)
  np.cumsum(ids * power[: len(ids)], out=prefix[1:])
  return prefix


def _runs(prefix: np.ndarray, n: int) -> np.ndarray:
  # Words' numbers are mixed and B is odd, so the high bits of their sums need no further mixing.
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
    n: consecutive words that make a copy; at least 2.
    boilerplate: documents whose common word runs are no leak, see the module's docstring.
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
        hashes = run_hashes(ids, length)
        runs.setdefault(length, []).append(hashes)
        owners.setdefault(length, []).append(np.full(len(hashes), number[target.task], np.int32))
    common = _boilerplate(boilerplate, sorted(runs))
    self.boilerplate_runs = 0
    self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for length in sorted(runs, reverse=True):
      table, first = np.unique(np.concatenate(runs[length]), return_index=True)
      owner = np.concatenate(owners[length])[first]
      is_target = ~np.isin(table, common[length])
      self.boilerplate_runs += int((~is_target).sum())
      self._tables[length] = table[is_target], owner[is_target]
    self._mark()

  def _mark(self) -> None:
    self._marks: dict[int, np.ndarray] = {}
    for length, (table, _) in self._tables.items():
      bits = min(24, len(table).bit_length() + 4)
      marks = np.zeros(1 << bits, np.bool_)
      marks[(table >> np.uint64(64 - bits)).astype(np.int64)] = True
      self._marks[length] = marks

  def save(self, path: str | os.PathLike) -> None:
    """Writes an npz file for `load` in other processes."""
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
  """Word runs of each length that at least two documents have."""
  runs: dict[int, list[np.ndarray]] = {length: [np.empty(0, np.uint64)] for length in lengths}
  for document in documents:
    ids = word_hashes(document.text)
    for length in lengths:
      runs[length].append(np.unique(run_hashes(ids, length)))
  common = {}
  for length, group in runs.items():
    run, documents_with_it = np.unique(np.concatenate(group), return_counts=True)
    common[length] = run[documents_with_it >= 2]
  return common

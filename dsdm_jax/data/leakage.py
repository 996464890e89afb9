"""The leakage guard: no document of the pool may hold text of a target, be it of the target or the holdout split.

Two texts share something when they have `n` words in a row in common. Words are runs of word characters, case
folded, so layout and punctuation do not hide a copy. A target text of 6 to n−1 words counts when all of it occurs;
a shorter one says too little to be called a copy.

Text that at least two licence documents of the pool share with targets is boilerplate that got into both, not a leak
of one into the other: such n-grams drop nothing, and are counted.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from dsdm_jax.data.documents import Document

SHORTEST = 6  # words
BOILERPLATE_KINDS = ('licences',)
_WORD = re.compile(r'\w+')


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
  return [w.casefold() for w in _WORD.findall(text)]


class _Hasher:
  """Hashes of runs of words: 64 bits, the same in every process."""

  def __init__(self) -> None:
    self._of_word: dict[str, int] = {}

  def runs(self, ids: np.ndarray, n: int) -> np.ndarray:
    """Hash of each run of `n` words: uint64 [len(ids) − n + 1], empty where the text is shorter."""
    if len(ids) < n:
      return np.empty(0, np.uint64)
    # A polynomial in an odd number, modulo 2⁶⁴ by overflow.
    multipliers = np.array([pow(0x9E3779B97F4A7C15, i, 2**64) for i in range(1, n + 1)], np.uint64)
    return (np.lib.stride_tricks.sliding_window_view(ids, n) * multipliers).sum(axis=1, dtype=np.uint64)

  def ids(self, text: str) -> np.ndarray:
    """A random-looking odd number for each word: uint64."""
    numbers = []
    for word in words(text):
      number = self._of_word.get(word)
      if number is None:
        digest = hashlib.blake2b(word.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
        number = self._of_word[word] = int.from_bytes(digest, 'little') | 1
      numbers.append(number)
    return np.array(numbers, np.uint64)


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
    self._hasher = _Hasher()
    self.tasks = sorted({target.task for target in targets})
    runs: dict[int, list[np.ndarray]] = {}
    owners: dict[int, list[np.ndarray]] = {}
    for target in targets:
      ids = self._hasher.ids(target.text)
      length = min(n, len(ids))
      if length >= min(SHORTEST, n):
        found = self._hasher.runs(ids, length)
        runs.setdefault(length, []).append(found)
        owners.setdefault(length, []).append(np.full(len(found), self.tasks.index(target.task), np.int32))
    common = self._boilerplate(boilerplate, sorted(runs))
    self.boilerplate_runs = 0
    self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for length in sorted(runs, reverse=True):
      table, first = np.unique(np.concatenate(runs[length]), return_index=True)
      owner = np.concatenate(owners[length])[first]
      kept = ~np.isin(table, common[length])
      self.boilerplate_runs += int((~kept).sum())
      self._tables[length] = table[kept], owner[kept]

  def _boilerplate(self, documents: Iterable[Document], lengths: list[int]) -> dict[int, np.ndarray]:
    found: dict[int, list[np.ndarray]] = {length: [np.empty(0, np.uint64)] for length in lengths}
    for document in documents:
      ids = self._hasher.ids(document.text)
      for length in lengths:
        found[length].append(np.unique(self._hasher.runs(ids, length)))
    common = {}
    for length, group in found.items():
      run, documents_with_it = np.unique(np.concatenate(group), return_counts=True)
      common[length] = run[documents_with_it >= 2]
    return common

  def leak(self, document: Document) -> Leak | None:
    """The first of the longest copies in `document`, or None."""
    ids = self._hasher.ids(document.text)
    for length, (table, owner) in self._tables.items():
      runs = self._hasher.runs(ids, length)
      if not len(table) or not len(runs):
        continue
      place = np.minimum(np.searchsorted(table, runs), len(table) - 1)
      hits = np.flatnonzero(table[place] == runs)
      if len(hits):
        at = int(hits[0])
        task = self.tasks[owner[place[at]]]
        return Leak(document.id, task, ' '.join(words(document.text)[at : at + length]))
    return None


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

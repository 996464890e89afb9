"""The leakage guard: the pool must not contain text of a target, neither of its target nor of its holdout split.

Texts are compared as units. A unit is a word, or one character of a script that is written without spaces: two
characters of Chinese or Japanese, or three of Thai, Khmer and the like (with their marks), count as one word. Text is
folded first (NFKC, case, no invisible characters), so layout, punctuation, width and accents in two code points do not
hide a copy.

Two texts match if they share a run of `n` words. A target text of 6 to n−1 words matches as a whole; shorter texts are
too common to call a copy. Two kinds of match are no leak, and are counted apart: word runs that at least two licence
documents of the pool share with targets, and common phrases (see `common_phrases`).

The guard does not see paraphrases, translations, other spellings or numbers, look-alike letters, words that are
hyphenated at the end of a line, encoded text (HTML entities, base64), or copies shorter than the above.

Words and runs are 64-bit hashes, computed for whole documents at once. A lookup reads a bit table first and the sorted
list of hashes only on a hit. The guard's size depends on the targets and not on the pool.
"""

import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dsdm_jax.core import storage
from dsdm_jax.core.storage import Location
from dsdm_jax.data.pool.sources import Document

SHORTEST = 6  # words
BOILERPLATE_KINDS = ('licences',)
BATCH = 2**16  # characters of documents that are worth a call of `Guard.leaks`
_SPANS = 8  # of a document that are listed
# Texts of fewer than n words: their first words, all of them, their length, and whose they are.
_SHORT = {'head': np.uint64, 'short': np.uint64, 'short_units': np.int64, 'short_owner': np.int32}
_SHOWN = 200  # characters of a span
_WHOLE = 0.25  # of a target text's runs: a document that has so many is never a common phrase
_WORD = 6  # weight of a word; characters of other scripts have shares of it
# Kinds of character. Marks of dense scripts belong to the letter before them, other marks are letters of words.
_NONE, _LETTER, _HALF, _THIRD, _MARK = range(5)
_WEIGHT = np.array([0, _WORD, _WORD // 2, _WORD // 3, _WORD])
# Chinese, Japanese, Yi, Tangut; and Thai, Lao, Burmese, Khmer, Tai, Balinese, Javanese.
_HALVES = re.compile(
  '[\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff'
  '\U00017000-\U00018d8f\U0001b000-\U0001b2ff\U00020000-\U0003ffff]'
)
_THIRDS = re.compile(
  '[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaa7f]'
)
_INVISIBLE = re.compile(
  '[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0'
  '\U000e0000-\U000e0fff]'
)
# (first, end, kind) of code points that folding leaves as they are: Han, Hangul, no text, Han, unassigned planes.
_UNIFORM = (
  (0x3400, 0x4DC0, _HALF),
  (0x4E00, 0xA000, _HALF),
  (0xAC00, 0xD7A4, _LETTER),
  (0xD800, 0xF900, _NONE),
  (0x20000, 0x2F800, _HALF),
  (0x30000, 0x40000, _HALF),
  (0x40000, 0x110000, _NONE),
)
_BLOCK = 2**14  # characters that are hashed at once, which stay in the cache; the rest of a longer word is ignored
_BASE = 0x9E3779B97F4A7C17  # odd, and 3 modulo 4: small powers differ from 1 in their low bits

Text = TypeVar('Text', 'TargetText', Document)


@dataclasses.dataclass(frozen=True)
class TargetText:
  """A text that the pool must not contain: `item` of `task`."""

  task: str
  text: str
  item: str = ''


@dataclasses.dataclass(frozen=True)
class Span:
  """A passage that a document shares with an item of a task.

  Attributes:
    words: the passage as the target has it, in one line, at most 200 characters.
    in_document, in_target: first character and end in both texts; the target's is context, a space and the answer.
  """

  task: str
  item: str
  words: str
  in_document: tuple[int, int]
  in_target: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Leak:
  """What a document shares with targets.

  Attributes:
    spans: the first eight passages, in the document's order.
    count: number of passages.
    short: whether all are whole texts of less than n words.
    whole: whether the document has a quarter of a target text of at least n words.
    runs: numbers of the distinct runs, for `common_phrases`.
  """

  id: str
  spans: tuple[Span, ...]
  count: int
  short: bool
  whole: bool
  runs: np.ndarray

  def record(self) -> dict[str, Any]:
    """For JSON: the first passage, their number, and under `more` the other ones that are listed."""
    first, *more = map(dataclasses.asdict, self.spans)
    return {'id': self.id, **first, 'passages': self.count, 'short': self.short, 'whole': self.whole, 'more': more}


def fold(text: str) -> str:
  """`text` in NFKC and case-folded, without invisible characters."""
  text = unicodedata.normalize('NFKC', _INVISIBLE.sub('', text)).casefold()
  return unicodedata.normalize('NFKC', text)


def words(text: str) -> list[str]:
  """The units of `text`, folded."""
  folded = fold(text)
  start, stop, _ = _edges(_coded(folded)[1])
  return [folded[i:j] for i, j in zip(start.tolist(), stop.tolist(), strict=True)]


def _mix(x: np.ndarray) -> np.ndarray:
  """SplitMix64's finalizer, in place."""
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    x ^= x >> np.uint64(shift)
    x *= np.uint64(factor)
  x ^= x >> np.uint64(31)
  return x


def _in_words(character: str) -> bool:
  return character.isalnum() or character == '_' or unicodedata.category(character)[0] == 'M'


@functools.cache
def _characters(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(kind, number, use of `fold`) of the first `count` code points.

  The number is that of the folded character, and 0 for those that are in no word. `fold` is needed for 2; for 1, such
  as …, it changes the length of the text only.
  """
  kind, folded, special = np.zeros(count, np.uint8), np.arange(count), np.zeros(count, np.uint8)
  begin = 0
  for first, stop, of_range in _UNIFORM:
    kind[first:stop] = of_range
    for point in range(begin, min(first, count)):
      character, category = chr(point), unicodedata.category(chr(point))
      if category in ('Cn', 'Co', 'Cs'):
        continue
      form = fold(character)
      if len(form) > 1 and not any(map(_in_words, form)):
        special[point] = 1
        continue
      mark = 'M' in (category[0], unicodedata.category(form[:1] or ' ')[0])
      # Marks and the letters that make up Hangul may be composed with what is before them.
      special[point] = 2 * (mark or len(form) != 1 or 0x1100 <= ord(form) < 0x1200)
      if len(form) == 1:
        folded[point] = ord(form)
      if form and _in_words(form[0]):
        kind[point] = _HALF if _HALVES.match(form) else _THIRD if _THIRDS.match(form) else _LETTER
        if mark and kind[point] != _LETTER:
          kind[point] = _MARK
    begin = stop
  special[0xE0000:0xE1000] = 2  # invisible
  number = _mix((folded.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
  number[kind == _NONE] = 0
  return kind, number, special


def _coded(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
  """(code points, their kinds, numbers of all code points, use of `fold` for those of the text; None for none)."""
  if text.isascii():
    code = np.frombuffer(text.encode(), np.uint8)
    kind, number, _ = _characters(128)
    return code, kind.take(code), number, None
  code = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
  kind, number, special = _characters(0x110000)
  use = special.take(code)
  return code, kind.take(code), number, use if use.max(initial=0) > 1 else None


def _edges(kind: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """(first character, end, kind of the first character) of each unit; None for the kinds if all are words."""
  around = np.zeros(len(kind) + 2, np.uint8)
  around[1:-1] = kind
  before, here = around[:-1], around[1:]
  if around.max() <= _LETTER:
    edges = np.flatnonzero(here != before)
    return edges[::2], edges[1::2], None
  starts = (here == _HALF) | (here == _THIRD) | ((here == _LETTER) & (before != _LETTER))
  starts |= (here == _MARK) & (before == _NONE)
  start = np.flatnonzero(starts)
  return start, np.flatnonzero((before != _NONE) & (starts | (here == _NONE))), here[start]


def _places(text: str) -> tuple[np.ndarray, np.ndarray]:
  """First character and end of each unit in `text`, which `fold` may lengthen or shorten."""
  _, kind, _, use = _coded(text)
  if use is None:
    return _edges(kind)[:2]
  needs = use > 0
  # Folding works on one character at a time, except where special ones follow: these it takes with the one before.
  length = np.ones(len(text), np.int64)
  edges = np.flatnonzero(np.diff(needs, prepend=False, append=False))
  for first, end in edges.reshape(-1, 2).tolist():
    whole = len(fold(text[max(first - 1, 0) : end]))
    length[first:end] = 0
    length[first] = whole - (first > 0)
  origin = np.repeat(np.arange(len(text)), length)
  start, stop, _ = _edges(_coded(fold(text))[1])
  end = origin[stop - 1] + 1
  following = np.append(np.flatnonzero(~needs), len(text))  # marks belong to what they follow
  return origin[start], following[np.searchsorted(following, end)]


@functools.cache
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
  """The first `size` powers of B and of its inverse, modulo 2⁶⁴."""
  powers = []
  for base in (_BASE, pow(_BASE, -1, 2**64)):
    steps = np.full(size, base, np.uint64)
    steps[0] = 1
    powers.append(np.multiply.accumulate(steps))
  return powers[0], powers[1]


class _Units:
  """Units of texts that lie behind each other, and hashes of their runs.

  Attributes:
    ids: a 64-bit number for each unit, equal in all processes: uint64 [U].
    bounds: first unit of each text, and U.
    weights: sum of the weights before each unit, and that of all; None if all are words.
  """

  def __init__(self, texts: Sequence[str]):
    code, kind, number, use = _coded('\n'.join(texts))
    begin = np.cumsum([0, *(len(text) + 1 for text in texts)])
    if use is not None:
      places = zip(texts, begin[:-1].tolist(), begin[1:].tolist(), strict=True)
      texts = [fold(text) if (use[i:j] > 1).any() else text for text, i, j in places]
      code, kind, number, _ = _coded('\n'.join(texts))
      begin = np.cumsum([0, *(len(text) + 1 for text in texts)])
    start, stop, of_unit = _edges(kind)
    self.bounds = np.searchsorted(start, begin)
    self.ids = np.empty(len(start), np.uint64)
    power, inverse = _powers(2 * _BLOCK)
    first = 0
    while first < len(start):
      place = int(start[first])
      end = int(np.searchsorted(start, place + _BLOCK))
      sums = number.take(code[place : min(int(stop[end - 1]), int(start[end - 1]) + _BLOCK)])
      sums *= power[: len(sums)]
      # The sum over a unit of number·B^place, shifted to begin at place 0. Other characters add 0.
      at = start[first:end] - place
      self.ids[first:end] = _mix(np.add.reduceat(sums, at) * inverse.take(at))
      first = end
    self.weights: np.ndarray | None = None
    if of_unit is not None:
      self.weights = np.zeros(len(start) + 1, np.int64)
      np.cumsum(_WEIGHT[of_unit], out=self.weights[1:])
    self._power, self._inverse = _powers(1 << max(12, len(start).bit_length()))
    # Sums of the units' numbers times B^place up to each unit, which give the runs of every length.
    self._prefix = np.zeros(len(start) + 1, np.uint64)
    np.cumsum(self.ids * self._power[: len(start)], out=self._prefix[1:])

  def runs(self, n: int) -> tuple[np.ndarray, np.ndarray | slice]:
    """(hash, end) of the shortest run of at least `n` words from each unit on, as long as there are so many."""
    ends: np.ndarray | slice
    if self.weights is None:
      ends = slice(n, None) if len(self.ids) >= n else slice(0, 0)
    else:
      begin = self.weights[: int(np.searchsorted(self.weights, self.weights[-1] - _WORD * n, side='right'))]
      ends = np.searchsorted(self.weights, begin + _WORD * n)
    # Units' numbers are mixed and B is odd, so the high bits of their sums need no further mixing.
    result = self._prefix[ends]
    result = result - self._prefix[: len(result)]
    result *= self._inverse[: len(result)]
    return result, ends

  def between(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Hashes of the runs from `begin` to `end` − 1."""
    return (self._prefix[end] - self._prefix[begin]) * self._inverse[begin]

  def owner(self, unit: np.ndarray) -> np.ndarray:
    """The text that has a unit."""
    return np.searchsorted(self.bounds, unit, side='right') - 1

  def words(self) -> np.ndarray:
    """Length of each text in words, times `_WORD`."""
    return np.diff(self.weights[self.bounds] if self.weights is not None else _WORD * self.bounds)


class _Table:
  """Sorted 64-bit hashes, repeats allowed, and a bit table that excludes nearly all others."""

  def __init__(self, hashes: np.ndarray):
    self.hashes = hashes
    bits = min(24, len(hashes).bit_length() + 4)
    self._shift = np.uint64(64 - bits)
    self._marks = np.zeros(1 << bits, np.bool_)
    self._marks[(hashes >> self._shift).view(np.int64)] = True

  def find(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place in `runs`, number in the table) of each hit."""
    maybe = np.flatnonzero(self._marks.take((runs >> self._shift).view(np.int64)))
    low, high = (np.searchsorted(self.hashes, runs[maybe], side=side) for side in ('left', 'right'))
    count = high - low
    return np.repeat(maybe, count), np.arange(count.sum()) + np.repeat(low - np.cumsum(count) + count, count)


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
    long, owner = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    short: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in _SHORT.items()}
    first = 0
    for batch in batches(targets, 2**20):
      units = _Units([target.text for target in batch])
      runs, ends = units.runs(n)
      at = np.arange(len(runs))
      stop = at + n if isinstance(ends, slice) else ends
      inside = stop <= units.bounds[(text := units.owner(at)) + 1]
      long.append(runs[inside])
      owner.append(first + text[inside])
      size = units.words()
      text = np.flatnonzero((size >= _WORD * SHORTEST) & (size < _WORD * n))
      begin, end = units.bounds[text], units.bounds[text + 1]
      of_text = units.runs(SHORTEST)[0][begin], units.between(begin, end), end - begin, first + text
      for name, array in zip(_SHORT, of_text, strict=True):
        short[name].append(array.astype(_SHORT[name]))
      first += len(batch)
    hashes, number = np.unique(np.concatenate(long), return_index=True)
    shorts = {name: np.concatenate(arrays) for name, arrays in short.items()}
    order = np.argsort(shorts['head'], kind='stable')
    self._texts: Sequence[TargetText] | None = targets
    self._path: Location = Path()  # of the texts, if they are not in memory
    self._set(
      n=np.array(n),
      long=hashes,
      long_owner=np.concatenate(owner)[number].astype(np.int32),
      **{name: array[order] for name, array in shorts.items()},
    )
    self.boilerplate_runs = self._leave_out(boilerplate)

  def _set(self, **arrays: np.ndarray) -> None:
    self._arrays = arrays
    self._n = int(arrays['n'])
    self._long, self._head = _Table(arrays['long']), _Table(arrays['head'])
    self._owner = np.concatenate([arrays['long_owner'], arrays['short_owner']])
    self._runs_of = np.bincount(arrays['long_owner'], minlength=1)

  def _leave_out(self, boilerplate: Iterable[Document]) -> int:
    """Forgets the runs that at least two of the documents have; returns their number."""
    seen = [np.unique(self._hits(_Units([document.text]))[0]) for document in boilerplate]
    run, documents = np.unique(np.concatenate([np.empty(0, np.int64), *seen]), return_counts=True)
    keep = np.ones(len(self._owner), np.bool_)
    keep[run[documents >= 2]] = False
    parts = np.split(keep, [len(self._long.hashes)])
    self._set(
      **{
        name: array if not array.ndim else array[parts[not name.startswith('long')]]
        for name, array in self._arrays.items()
      }
    )
    return int((~keep).sum())

  def save(self, path: Location) -> None:
    """Writes an npz file for `load` in other processes."""
    texts = json.dumps([dataclasses.astuple(text) for text in self._texts or ()]).encode()
    storage.save_npz(path, texts=np.frombuffer(texts, np.uint8), **self._arrays)

  @classmethod
  def load(cls, path: Location) -> 'Guard':
    guard = cls([], 2)
    with storage.load(path) as arrays:
      guard._set(**{name: arrays[name] for name in arrays.files if name != 'texts'})
    guard._texts, guard._path = None, path
    return guard

  def _text(self, number: int) -> TargetText:
    if self._texts is None:  # read for the first leak only
      with storage.load(self._path) as arrays:
        self._texts = [TargetText(*fields) for fields in json.loads(arrays['texts'].tobytes())]
    return self._texts[number]

  def _hits(self, units: _Units) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(number, first unit, end) of each run that one of the texts shares with targets, in their order."""
    runs, ends = units.runs(self._n)
    at, run = self._long.find(runs)
    stop = at + self._n if isinstance(ends, slice) else ends[at]
    if len(self._head.hashes):
      begin, short = self._head.find(units.runs(SHORTEST)[0])
      end = begin + self._arrays['short_units'][short]
      inside = end <= len(units.ids)
      begin, short, end = begin[inside], short[inside], end[inside]
      same = units.between(begin, end) == self._arrays['short'][short]
      at, stop = np.concatenate([at, begin[same]]), np.concatenate([stop, end[same]])
      run = np.concatenate([run, len(self._long.hashes) + short[same]])
    order = np.argsort(at, kind='stable')
    order = order[units.owner(at[order]) == units.owner(stop[order] - 1)]
    return run[order], at[order], stop[order]

  def leaks(self, documents: Sequence[Document]) -> dict[int, Leak]:
    """Index of a document → what it shares with targets, for those that share something."""
    if not len(self._owner):
      return {}
    units = _Units([document.text for document in documents])
    run, at, stop = self._hits(units)
    text = units.owner(at)
    result = {}
    for index in np.unique(text).tolist():
      mine = text == index
      first = int(units.bounds[index])
      ids = units.ids[first : units.bounds[index + 1]]
      result[index] = self._leak(documents[index], ids, run[mine], at[mine] - first, stop[mine] - first)
    return result

  def _leak(self, document: Document, ids: np.ndarray, run: np.ndarray, at: np.ndarray, stop: np.ndarray) -> Leak:
    owner, runs = self._owner[run], np.unique(run)
    shared = np.bincount(self._owner[runs[runs < len(self._long.hashes)]], minlength=len(self._runs_of))
    # A passage is hits of one target text at neighbouring units.
    first = np.flatnonzero(np.r_[True, (owner[1:] != owner[:-1]) | (at[1:] != at[:-1] + 1)])
    last = np.r_[first[1:], len(run)] - 1
    spans = []
    start, end = _places(document.text)
    for i, j in zip(first[:_SPANS].tolist(), last[:_SPANS].tolist(), strict=True):
      target = self._text(int(owner[i]))
      there, (begin_there, end_there) = _Units([target.text]).ids, _places(target.text)
      length = int(stop[j] - at[i])
      place = _find(there, ids[at[i] : stop[j]])
      if place < 0:  # neighbouring copies of different parts
        length = int(stop[i] - at[i])
        place = _find(there, ids[at[i] : stop[i]])
      in_target = int(begin_there[place]), int(end_there[place + length - 1])
      words = ' '.join(target.text[slice(*in_target)].split())[:_SHOWN]
      in_document = int(start[at[i]]), int(end[at[i] + length - 1])
      spans.append(Span(target.task, target.item, words, in_document, in_target))
    whole = (shared > 0) & (shared >= _WHOLE * self._runs_of)
    short = bool((runs >= len(self._long.hashes)).all())
    return Leak(document.id, tuple(spans), len(first), short, bool(whole.any()), runs)


def _find(ids: np.ndarray, part: np.ndarray) -> int:
  """Where `part` begins in `ids`, −1 if nowhere."""
  for at in np.flatnonzero(ids[: max(len(ids) - len(part) + 1, 0)] == part[0]).tolist():
    if (ids[at : at + len(part)] == part).all():
      return at
  return -1


def batches(texts: Iterable[Text], characters: int = BATCH) -> Iterator[list[Text]]:
  """Lists of objects with a `text`, each of about so many characters."""
  batch: list[Text] = []
  size = 0
  for text in texts:
    batch.append(text)
    size += len(text.text)
    if size >= characters:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def common_phrases(document: np.ndarray, run: np.ndarray, most: int) -> np.ndarray:
  """The documents whose matches are all common phrases: runs that more than `most` documents have.

  GPT-3's authors ignore runs that more than ten documents have; most are idioms and legal boilerplate.

  Args:
    document, run: pairs of a document's number and a run that it has, each pair once.
    most: documents; 0 knows no common phrases, so the result is empty.
  """
  _, which, count = np.unique(run, return_inverse=True, return_counts=True)
  return np.setdiff1d(document, document[count[which] <= most]) if most else document[:0]

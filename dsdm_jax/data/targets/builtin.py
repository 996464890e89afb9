"""Target tasks that need no download: documentation and code of Python's standard library, and generated questions.

The standard library is on every machine and never in the pool. Its source is parsed with `ast` and never imported.

In the questions about code, a model reads three lines of code after each of four passages, of which they continue one.
The right passage is where they have a higher probability than after the others, so it does not matter how likely they
are by themselves. Passages end with a line break. Counts of n-grams see the few tokens before it and know little more.
In the questions about brackets, a closing bracket comes after a passage and after the same passage in which it has
another partner. The partner is at least 12 characters before, where most 5-grams do not reach.

The algorithm questions follow the description of BIG-bench's cs_algorithms, in other words and with other items.
Longest common subsequence: two strings of capitals, the answer is a length. Bracket validity: a sequence of (, [, {
and their partners, the answer is Valid or Invalid. Answers are balanced, and valid and invalid sequences have the same
lengths.
"""

import ast
import collections
import contextlib
import dataclasses
import functools
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsdm_jax.core import prng

_SKIPPED_FOLDERS = set(
  'site-packages dist-packages __pycache__ test tests idlelib idle_test lib2to3 turtledemo ensurepip pydoc_data '
  'lib-dynload __phello__ encodings'.split()
)
_LICENCE_WORDS = re.compile(
  r'(?i)copyright|licen[cs]e|warrant(y|ies)|permission (to use|is hereby)|all rights reserved'
)
_SENTENCE_END = re.compile(r'(?<![A-Z])(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s|$)')
_LONG_DOCSTRING = 200  # characters; shorter ones are captions rather than prose
LCS_ANSWERS = (1, 2, 3, 4, 5)
_PASSAGE_LINES, _NEXT_LINES = 5, 3
_PASSAGE_CHARACTERS, _NEXT_CHARACTERS = range(60, 171), range(30, 101)  # at most 128 tokens of a small vocabulary
_PASSAGES = 8  # of a module
_DRAWN = 24  # passages, of which the three that are as long as the right one are wrong answers
_PAIRS = {'(': ')', '[': ']', '{': '}'}
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'')  # on one line
_BRACKET_LINES, _BRACKETS_OF_A_KIND = 4, 3  # lines that are searched at once; brackets of each kind in a module
_BRACKET_DISTANCE, _BEFORE_BRACKET = 12, range(60, 171)  # characters from the opening one, and of the passage
_LENGTHS = (4, 6, 8, 10, 12)


@dataclasses.dataclass(frozen=True)
class Prose:
  """A text of prose. Target and holdout never share a `document`."""

  document: str
  id: str
  text: str


@dataclasses.dataclass(frozen=True)
class Entry:
  """A documented function, method or class: `kind` 'Function', 'Method' or 'Class'."""

  module: str
  kind: str
  name: str
  signature: str
  summary: str

  @property
  def id(self) -> str:
    return f'{self.module}.{self.name}'


@dataclasses.dataclass(frozen=True)
class Passage:
  """Lines of code and the lines that follow: `text` ends with a line break, `after` has none at its end."""

  module: str
  id: str
  text: str
  after: str


@dataclasses.dataclass(frozen=True)
class Bracket:
  """Lines of code up to a closing bracket, whose partner is the character `opened` of `text`."""

  module: str
  id: str
  text: str
  opened: int

  @property
  def closing(self) -> str:
    return _PAIRS[self.text[self.opened]]


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
  """(dotted name, file) of every public module below `root`, sorted by name."""
  result = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith('config-')]
    for name in files:
      file = Path(folder, name)
      if file.suffix != '.py':
        continue
      parts = file.relative_to(root).with_suffix('').parts
      if parts[-1] == '__init__':
        parts = parts[:-1]
      if parts and not any(part.startswith('_') for part in parts):
        result.append(('.'.join(parts), file))
  yield from sorted(result)


def first_sentence(docstring: str) -> str:
  """First sentence of the first paragraph on one line; '' if it is unusable (4 to 40 words are needed)."""
  paragraph = ' '.join(inspect.cleandoc(docstring).split('\n\n', 1)[0].split())
  end = _SENTENCE_END.search(paragraph)
  sentence = paragraph[: end.end()] if end else paragraph
  words = sentence.split()
  # A call at the beginning or an arrow is a signature in the docstring; dashes are a list on one line.
  if not 4 <= len(words) <= 40 or not sentence[0].isupper() or '->' in sentence or '(' in words[0]:
    return ''
  if words.count('-') > 1:
    return ''
  return sentence


def without_licences(text: str) -> str:
  """The text without paragraphs of licences or copyright lines."""
  paragraphs = [p for p in re.split(r'\n[ \t]*\n', text) if p.strip() and not _LICENCE_WORDS.search(p)]
  return '\n\n'.join(p.rstrip() for p in paragraphs)


def _definitions(
  body: list[ast.stmt], prefix: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
  """Public classes and functions with their qualified names, also inside if and try; classes before members."""
  for node in body:
    if isinstance(node, ast.If | ast.Try):
      handlers = [s for h in getattr(node, 'handlers', []) for s in h.body]
      yield from _definitions([*node.body, *handlers, *node.orelse], prefix)
    elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith('_'):
      yield prefix + node.name, node
      if isinstance(node, ast.ClassDef):
        yield from _definitions(node.body, f'{prefix}{node.name}.')


def read_module(name: str, source: str) -> tuple[list[Prose], list[Entry]]:
  """Prose and entries of one module.

  Raises:
    SyntaxError: the source is not Python.
  """
  tree = ast.parse(source)
  prose, entries, seen = [], [], set()

  def add_prose(id: str, docstring: str | None) -> None:
    text = without_licences(docstring or '')
    if len(text) >= _LONG_DOCSTRING:
      prose.append(Prose(name, id, text))

  add_prose(name, ast.get_docstring(tree))
  for qualified, node in _definitions(tree.body, ''):
    docstring = ast.get_docstring(node)
    if qualified in seen or not docstring:
      continue
    seen.add(qualified)
    if isinstance(node, ast.ClassDef):
      add_prose(f'{name}.{qualified}', docstring)
      bases = ', '.join(ast.unparse(base) for base in node.bases)
      kind, signature = 'Class', f'{qualified}({bases})' if bases else qualified
    else:
      kind, signature = 'Method' if '.' in qualified else 'Function', f'{qualified}({ast.unparse(node.args)})'
    summary = first_sentence(without_licences(docstring))
    if summary:
      entries.append(Entry(name, kind, qualified, signature, summary))
  return prose, entries


def _plain(lines: Sequence[str]) -> list[bool]:
  """Whether each line is code alone, without comments and strings of several lines."""
  plain, in_string = [], False
  for line in lines:
    ends = line.count('"""') + line.count("'''")
    plain.append(not (in_string or ends or '#' in line))
    in_string ^= ends % 2 == 1
  return plain


def read_passages(name: str, source: str) -> list[Passage]:
  """At most `_PASSAGES` passages of one module, in order, without comments and strings of several lines."""
  lines, found = source.split('\n'), []
  plain, size = _plain(lines), _PASSAGE_LINES + _NEXT_LINES
  for start in range(0, len(lines) - size, size):
    middle = start + _PASSAGE_LINES
    text, after = '\n'.join(lines[start:middle]) + '\n', '\n'.join(lines[middle : start + size])
    fits = len(text) in _PASSAGE_CHARACTERS and len(after) in _NEXT_CHARACTERS
    if fits and all(plain[start : start + size]) and lines[middle - 1].strip() and lines[middle].strip():
      found.append(Passage(name, f'{name}:{start + 1}', text, after))
  return found[:_PASSAGES]


def read_brackets(name: str, source: str) -> list[Bracket]:
  """At most three closing brackets of each kind of one module, in order, not in strings."""
  lines = source.split('\n')
  plain, found, count = _plain(lines), [], collections.Counter[str]()
  for start in range(0, len(lines) - _BRACKET_LINES + 1, _BRACKET_LINES):
    if not all(plain[start : start + _BRACKET_LINES]):
      continue
    text = '\n'.join(lines[start : start + _BRACKET_LINES])
    opened: list[int] = []
    for place, c in enumerate(_STRING.sub(lambda string: ' ' * len(string[0]), text)):
      if c in _PAIRS:
        opened.append(place)
      elif opened and c == _PAIRS[text[opened[-1]]]:
        partner = opened.pop()
        far = place - partner >= _BRACKET_DISTANCE and place in _BEFORE_BRACKET
        if far and count[c] < _BRACKETS_OF_A_KIND:
          count[c] += 1
          found.append(Bracket(name, f'{name}:{start + 1}:{place}', text[:place], partner))
          break  # the next ones would have almost the same text before them
      elif c in _PAIRS.values():
        opened.clear()  # its partner is in a line before
  return found


def read_topics(source: str) -> list[Prose]:
  """Sections of the language reference that `help()` shows, from the source of `pydoc_data/topics.py`."""
  for node in ast.parse(source).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      topics = ast.literal_eval(node.value)
      return [
        Prose(f'topics/{key}', f'topics/{key}', without_licences(inspect.cleandoc(text)))
        for key, text in sorted(topics.items())
        if len(text) >= _LONG_DOCSTRING
      ]
  return []


def _sources(root: str | None) -> Iterator[tuple[str, str]]:
  """(dotted name, source) of every public module, of the standard library unless tests set `root`."""
  for name, file in _modules(Path(root or sysconfig.get_paths()['stdlib'])):
    with contextlib.suppress(UnicodeDecodeError):  # files in other encodings, all of them test data
      yield name, file.read_text(encoding='utf-8')


@functools.lru_cache(maxsize=2)
def documentation(root: str | None = None) -> tuple[tuple[Prose, ...], tuple[Entry, ...]]:
  """All prose and entries of the standard library, in a fixed order. Tests set `root`."""
  prose, entries = [], []
  topics = Path(root or sysconfig.get_paths()['stdlib'], 'pydoc_data', 'topics.py')
  if topics.is_file():
    prose += read_topics(topics.read_text(encoding='utf-8'))
  for name, source in _sources(root):
    with contextlib.suppress(SyntaxError):  # files for other versions, all of them test data
      of_module = read_module(name, source)
      prose += of_module[0]
      entries += of_module[1]
  return tuple(prose), tuple(entries)


@functools.cache
def passages() -> tuple[Passage, ...]:
  """All passages of the standard library, in a fixed order."""
  return tuple(passage for name, source in _sources(None) for passage in read_passages(name, source))


@functools.cache
def brackets() -> tuple[Bracket, ...]:
  """All brackets of the standard library, in a fixed order."""
  return tuple(bracket for name, source in _sources(None) for bracket in read_brackets(name, source))


def options(passages: Sequence[Passage], seed: int) -> list[tuple[tuple[str, ...], int]]:
  """For each passage four texts, its own and three of other modules that are about as long, and the place of its own.

  Wrong texts may come from the other split: they are read when models are evaluated, and have no part in scores.
  """
  rng = prng.numpy_stream(seed, 'next_code')
  found = []
  for passage in passages:
    drawn = [passages[i] for i in rng.choice(len(passages), min(_DRAWN, len(passages)), replace=False)]
    others = [other.text for other in drawn if other.module != passage.module and other.text != passage.text]
    texts = sorted(others, key=lambda text: abs(len(text) - len(passage.text)))[:3]
    gold = int(rng.integers(len(texts) + 1))
    found.append(((*texts[:gold], passage.text, *texts[gold:]), gold))
  return found


def partners(brackets: Sequence[Bracket], seed: int) -> list[tuple[tuple[str, str], int]]:
  """For each bracket two texts, its own and one in which its partner is of another kind, and the place of its own."""
  rng = prng.numpy_stream(seed, 'brackets')
  found = []
  for bracket in brackets:
    text, place = bracket.text, bracket.opened
    other = str(rng.choice([opening for opening in _PAIRS if opening != text[place]]))
    wrong, gold = text[:place] + other + text[place + 1 :], int(rng.integers(2))
    found.append(((text, wrong) if gold == 0 else (wrong, text), gold))
  return found


@dataclasses.dataclass(frozen=True)
class Question:
  """A generated question."""

  context: str
  answer: str


def longest_common_subsequence(first: str, second: str) -> int:
  """Length of the longest string that both contain, with gaps."""
  best = [0] * (len(second) + 1)
  for a in first:
    diagonal = 0
    for j, b in enumerate(second, 1):
      diagonal, best[j] = best[j], diagonal + 1 if a == b else max(best[j], best[j - 1])
  return best[-1]


def brackets_valid(sequence: str) -> bool:
  """Whether each bracket is closed by its partner, in order."""
  closers: list[str] = []
  for c in sequence:
    if c in _PAIRS:
      closers.append(_PAIRS[c])
    elif not closers or closers.pop() != c:
      return False
  return not closers


def _letters(rng: np.random.Generator) -> str:
  alphabet = list('ABCDEFGHIJKLMNOPQRSTUVWXYZ')
  chosen = rng.choice(alphabet, size=rng.integers(3, 7), replace=False)
  return ''.join(rng.choice(chosen, size=rng.integers(5, 11)))


def _lcs(rng: np.random.Generator, answer: int) -> Question:
  while True:
    first = _letters(rng)
    # Derived from the first string: unrelated strings have too little in common.
    second = ''.join(rng.permutation(list(first + _letters(rng)))[: rng.integers(5, 11)])
    if longest_common_subsequence(first, second) == answer:
      context = f'Strings: {first} and {second}\nQuestion: How long is their longest common subsequence?\nAnswer:'
      return Question(context, str(answer))


def _balanced(rng: np.random.Generator, length: int) -> str:
  """A valid sequence: each place opens or closes a bracket at random, as far as the length allows."""
  opened: list[str] = []
  text = ''
  while len(text) < length:
    must_open, must_close = not opened, len(opened) == length - len(text)
    if must_open or (not must_close and rng.random() < 0.5):
      opened.append(str(rng.choice(list(_PAIRS))))
      text += opened[-1]
    else:
      text += _PAIRS[opened.pop()]
  return text


def _brackets(rng: np.random.Generator, valid: bool) -> Question:
  length = int(rng.choice(_LENGTHS))
  while True:
    text = list(_balanced(rng, length))
    if not valid:
      # Shuffled, or with one bracket changed, so that neither length nor counts reveal the answer.
      if rng.random() < 0.5:
        text = list(rng.permutation(text))
      else:
        text[rng.integers(len(text))] = str(rng.choice(list('()[]{}')))
    sequence = ''.join(text)
    if brackets_valid(sequence) == valid:
      context = f'Brackets: {" ".join(sequence)}\nQuestion: Is every bracket closed in order?\nAnswer:'
      return Question(context, 'Valid' if valid else 'Invalid')


def generate_questions(count: int, seed: int) -> list[Question]:
  """`count` different questions: subsequences and brackets alternate, and so do the answers of each.

  A longer list begins with the shorter one of the same seed.
  """
  rng = prng.numpy_stream(seed, 'cs_algorithms')
  items: list[Question] = []
  seen: set[str] = set()
  while len(items) < count:
    turn = len(items) // 2
    if len(items) % 2 == 0:
      item = _lcs(rng, LCS_ANSWERS[turn % len(LCS_ANSWERS)])
    else:
      item = _brackets(rng, turn % 2 == 0)
    if item.context not in seen:
      seen.add(item.context)
      items.append(item)
  return items

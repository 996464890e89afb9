"""Documentation of Python's standard library, read with `ast` and never imported.

The standard library is on every machine and never in the pool, so it makes targets that need no download.
"""

import ast
import dataclasses
import functools
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {
  'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idlelib', 'idle_test', 'lib2to3', 'turtledemo',
  'ensurepip', 'pydoc_data', 'lib-dynload', '__phello__', 'encodings',
}  # fmt: skip
_LICENCE_WORDS = re.compile(
  r'(?i)copyright|licen[cs]e|warrant(y|ies)|permission (to use|is hereby)|all rights reserved'
)
_SENTENCE_END = re.compile(r'(?<![A-Z])(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s|$)')
_LONG_DOCSTRING = 200  # characters: from here on it is prose rather than a caption


@dataclasses.dataclass(frozen=True)
class Prose:
  """A document of prose. `document` is the unit that is never split between target and holdout."""

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
class Library:
  prose: tuple[Prose, ...]
  entries: tuple[Entry, ...]


def modules(root: Path) -> Iterator[tuple[str, Path]]:
  """(dotted name, file) of every public module below `root`, in the order of their names."""
  found = []
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
        found.append(('.'.join(parts), file))
  yield from sorted(found)


def first_sentence(docstring: str) -> str:
  """First sentence of the first paragraph on one line; '' where there is none worth asking for (4 to 40 words)."""
  paragraph = ' '.join(inspect.cleandoc(docstring).split('\n\n', 1)[0].split())
  end = _SENTENCE_END.search(paragraph)
  sentence = paragraph[: end.end()] if end else paragraph
  words = sentence.split()
  # A call at the beginning or an arrow is a signature written into the docstring, dashes are a list run together.
  if not 4 <= len(words) <= 40 or not sentence[0].isupper() or '->' in sentence or '(' in words[0]:
    return ''
  if words.count('-') > 1:
    return ''
  return sentence


def without_licences(text: str) -> str:
  """The text without paragraphs that read like a licence or a copyright line: they are nobody's target."""
  kept = [p for p in re.split(r'\n[ \t]*\n', text) if p.strip() and not _LICENCE_WORDS.search(p)]
  return '\n\n'.join(p.rstrip() for p in kept)


def _definitions(
  body: list[ast.stmt], prefix: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
  """Public classes and functions with their qualified names, also those below if and try, classes before members."""
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


def read_topics(source: str) -> list[Prose]:
  """Sections of the language reference that `help()` shows, from the text of `pydoc_data/topics.py`."""
  for node in ast.parse(source).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      topics = ast.literal_eval(node.value)
      return [
        Prose(f'topics/{key}', f'topics/{key}', without_licences(inspect.cleandoc(text)))
        for key, text in sorted(topics.items())
        if len(text) >= _LONG_DOCSTRING
      ]
  return []


@functools.lru_cache(maxsize=2)
def read(root: str | None = None) -> Library:
  """Everything, in a fixed order; two to three seconds. `root` is for tests: the folder of another library."""
  folder = Path(root or sysconfig.get_paths()['stdlib'])
  prose, entries = [], []
  topics = folder / 'pydoc_data' / 'topics.py'
  if topics.is_file():
    prose += read_topics(topics.read_text(encoding='utf-8'))
  for name, file in modules(folder):
    try:
      found = read_module(name, file.read_text(encoding='utf-8'))
    except (SyntaxError, UnicodeDecodeError):
      continue  # the library ships files in other encodings and for other versions, all of them test data
    prose += found[0]
    entries += found[1]
  return Library(tuple(prose), tuple(entries))

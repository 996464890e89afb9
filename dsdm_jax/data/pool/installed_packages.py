"""The default source: text of the installed Python packages. Needs no download.

Files are listed by the RECORD of each distribution; only as many are read as the byte budget needs. Left out are files
that differ between two installations of the same packages (RECORD, INSTALLER, direct_url.json, byte code, scripts),
installers, this package, and copies of the standard library, because the default targets come from the standard
library.
"""

import collections
import csv
import dataclasses
import hashlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ml_collections import ConfigDict

from dsdm_jax.data.pool.sources import LARGEST, Document, cut
from dsdm_jax.errors import UserError

KINDS = ('source', 'docs', 'licences', 'metadata', 'data')

# A package gives at most this share of a kind's bytes, unless the others cannot fill the rest.
PACKAGE_SHARE = 0.1
_UNLIMITED = 2**40  # bytes

_EXTENSIONS = {
  'source': (
    '.py .pyi .pyx .pxd .pxi .h .hpp .hh .hxx .c .cc .cpp .cxx .cu .cuh .inc .inl .td .js .mjs .ts .css .html .sh .f90'
  ).split(),
  'docs': '.md .rst .txt .adoc .bib .ipynb'.split(),
  'metadata': '.toml .cfg .ini .in .pc'.split(),
  'data': '.json .jsonl .csv .tsv .dat .yaml .yml .po .pot .proto .pbtxt .xml .arff .afm .tab .svg .textproto'.split(),
}
_KIND_OF = {extension: kind for kind, group in _EXTENSIONS.items() for extension in group}
_LICENCE = re.compile(
  r'(?i)(licen[cs]es?|notices?|copying|authors|contributors|copyright|third.?party.*|patents)([-._].*)?'
)

# Installers belong to the environment.
_LEFT_OUT = {'pip', 'setuptools', 'wheel', 'distribute', 'uv', 'virtualenv', 'dsdm-jax', 'pkg-resources'}
# Distributions that copy parts of the standard library.
_COPIES = re.compile(
  r'typing-extensions|importlib-(metadata|resources)|zipp|tomli|exceptiongroup|backports[-.].*|.*[-.]backport|'
  r'(contextlib|pathlib|unittest|subprocess|functools)\d+|enum34|futures|argparse|dataclasses|configparser|mock|'
  r'legacy-cgi|standard-.*|pickle5|singledispatch|ipaddress|python-future|future'
)
_VOLATILE_NAMES = {'RECORD', 'INSTALLER', 'REQUESTED', 'direct_url.json', 'SOURCES.txt'}
_VENDORS = {'_vendor', 'vendor', 'vendored', '_vendored', 'third_party', 'extern', '_extern', 'externals', 'compat'}


@dataclasses.dataclass(frozen=True)
class _File:
  kind: str
  package: str
  path: str  # POSIX, relative to the folder of the installation
  size: int  # bytes according to RECORD; 0 if it does not say
  root: Path
  part: str = ''  # 'header' or 'body' of a METADATA file

  @property
  def id(self) -> str:
    return '/'.join(p for p in (self.kind, self.package, self.path, self.part) if p)


def normalised(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


def kind_of(path: str) -> str | None:
  """The kind of a file by its path, or None if the file is left out."""
  pure = PurePosixPath(path)
  name, parent = pure.name, pure.parts[0] if len(pure.parts) > 1 else ''
  if pure.is_absolute() or '..' in pure.parts or '__pycache__' in pure.parts or name in _VOLATILE_NAMES:
    return None
  if name.startswith(('uv_', '__editable__')) or name.endswith(('.pyc', '.pth')):
    return None
  if is_standard_library_copy(pure):
    return None
  extension = pure.suffix.lower()
  if _LICENCE.fullmatch(name) and _KIND_OF.get(extension) != 'source':
    return 'licences'
  if parent.endswith(('.dist-info', '.egg-info')):
    return 'licences' if 'licenses' in pure.parts or 'license_files' in pure.parts else 'metadata'
  if name.lower().startswith('requirements') and extension == '.txt':
    return 'metadata'
  return _KIND_OF.get(extension)


def is_standard_library_copy(path: PurePosixPath) -> bool:
  parts = path.parts
  if '_distutils' in parts or 'backports' in parts:
    return True
  if 'typeshed' in parts and 'stdlib' in parts:
    return True
  vendors = [i for i, part in enumerate(parts[:-1]) if part in _VENDORS]
  if not vendors:
    return False
  inside = parts[vendors[0] + 1]
  return PurePosixPath(inside).stem in sys.stdlib_module_names


def _distributions() -> Iterator[tuple[str, importlib.metadata.Distribution]]:
  """First distribution of each name on the path, sorted by normalised name."""
  distributions: dict[str, importlib.metadata.Distribution] = {}
  for distribution in importlib.metadata.distributions():
    if distribution.metadata['Name']:
      distributions.setdefault(normalised(distribution.metadata['Name']), distribution)
  for name in sorted(distributions):
    if name not in _LEFT_OUT and not _COPIES.fullmatch(name):
      yield name, distributions[name]


def _files() -> Iterator[_File]:
  """Every candidate file. A distribution without a RECORD (a system package) has none."""
  for package, distribution in _distributions():
    root = Path(str(distribution.locate_file('')))
    for row in csv.reader((distribution.read_text('RECORD') or '').splitlines()):
      if not row or (kind := kind_of(row[0])) is None:
        continue
      size = int(row[2]) if len(row) > 2 and row[2] else 0
      if row[0].endswith('.dist-info/METADATA'):
        yield _File('metadata', package, row[0], size, root, 'header')
        yield _File('docs', package, row[0], size, root, 'body')
      else:
        yield _File(kind, package, row[0], size, root)


def _read(file: _File, most: int, excerpt: bool) -> tuple[str, int] | None:
  """Text of at most `most` bytes, and how many follow it.

  None for a missing, empty, binary or non-UTF-8 file, and for a longer one if no `excerpt` is wanted.
  """
  try:
    with open(file.root / file.path, 'rb') as f:
      # One byte beyond the limit shows that the file is longer. The header of METADATA has unknown length.
      data = f.read() if file.part else f.read(most + 1)
      size = os.fstat(f.fileno()).st_size
  except OSError:
    return None
  if file.part:
    header, _, body = data.replace(b'\r\n', b'\n').partition(b'\n\n')
    data = header + b'\n' if file.part == 'header' else body
    size = len(data)
  if len(data) > most and not excerpt:
    return None
  data = _excerpt(data, most)
  if b'\0' in data:
    return None
  try:
    text = data.decode()
  except UnicodeDecodeError:
    return None
  return (text, size - len(data)) if text.strip() else None


def _excerpt(data: bytes, most: int) -> bytes:
  """At most `most` bytes: whole lines, or whole characters if lines would leave less than half."""
  if len(data) <= most:
    return data
  end = data.rfind(b'\n', 0, most) + 1
  return data[:end] if end > most // 2 else cut(data, most)


def installed_packages(config: ConfigDict, seed: int) -> Iterator[Document]:
  """Documents of the installed packages, `config.max_bytes` bytes of UTF-8 in total; 0 takes everything.

  With `config.max_document_bytes`, longer files give an excerpt of whole lines, and the last file of a kind one that
  fills the budget. Without it, files that do not fit are passed over, as are those above `LARGEST`.
  The bytes are shared evenly over `config.kinds`; what a kind cannot fill goes to the others. Within a kind, files come
  in the order of a seeded hash of (kind, package, path), so neither file system nor installer matters.

  Raises:
    UserError: `config.kinds` names an unknown kind.
  """
  for kind in config.kinds:
    if kind not in KINDS:
      raise UserError(f'pool.kinds has {kind!r}; the kinds are {", ".join(KINDS)}')

  def place(file: _File) -> bytes:
    return hashlib.blake2b(f'{seed}\x1f{file.id}'.encode(), digest_size=16).digest()

  limit, left = config.max_document_bytes, config.max_bytes or _UNLIMITED
  files: dict[str, list[_File]] = {kind: [] for kind in config.kinds}
  for file in _files():
    if file.kind in files:
      files[file.kind].append(file)
  supply = {kind: sum(min(file.size, limit or LARGEST) for file in group) for kind, group in files.items()}
  seen: set[bytes] = set()
  # Water-filling: the scarcest kind first; each gets an even share of what is left.
  for index, kind in enumerate(sorted(files, key=lambda kind: (supply[kind], kind))):
    budget = left // (len(files) - index)
    for document in _of_kind(sorted(files[kind], key=place), budget, limit, seen):
      left -= len(document.text.encode())
      yield document


def _of_kind(files: list[_File], budget: int, limit: int, seen: set[bytes]) -> Iterator[Document]:
  """Documents in order until `budget` bytes are used: at first a limited share of each package, then the rest."""
  fair = max(limit, int(budget * PACKAGE_SHARE))
  taken: collections.Counter[str] = collections.Counter()
  deferred: list[_File] = []

  def in_turn() -> Iterator[_File]:
    for file in files:
      if taken[file.package] >= fair or (not limit and file.size > fair):
        deferred.append(file)
      else:
        yield file
    yield from deferred

  for file in in_turn():
    if budget <= 0:
      return
    if not limit and file.size > min(budget, LARGEST):
      continue
    found = _read(file, min(limit or LARGEST, budget), excerpt=bool(limit))
    if found is None:
      continue
    text, lost = found
    data = text.encode()
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if digest in seen:
      continue
    seen.add(digest)
    size = len(data)
    taken[file.package] += size
    budget -= size
    yield Document(file.id, file.kind, text, lost)

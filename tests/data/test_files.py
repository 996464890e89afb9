"""Packed files: nothing of one is lost without an error. Patterns: Python's glob decides, also behind an address."""

import bz2
import contextlib
import glob
import gzip
import lzma
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.data import files

TEXT = np.random.default_rng(0).integers(32, 127, 300_000, np.uint8).tobytes()
PACK = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress, 'zst': zstandard.compress}
MAGIC = {'gz': 2, 'bz2': 3, 'xz': 6, 'zst': 4}  # bytes by which a format is known


@pytest.mark.parametrize('ending', [*PACK, 'GZ'])
def test_packed_files(ending: str, tmp_path: Path):
  pack = PACK[ending.lower()]
  one, two = pack(TEXT), pack(TEXT[::-1])
  path = tmp_path / f'a.jsonl.{ending}'

  def read(packed: bytes) -> bytes:
    path.write_bytes(packed)
    return files.read_bytes(str(path))

  assert read(one) == read(one + bytes(512)) == TEXT
  assert read(one + two) == read(one + bytes(5_000) + two + bytes(3)) == TEXT + TEXT[::-1]
  assert read(pack(b'') + two + pack(b'')) == TEXT[::-1]
  for length in (0, 1, MAGIC[ending.lower()], 20, len(one) // 2, len(one) - 1):
    for before in (b'', two, two + bytes(9)):
      if before and not length:
        continue
      with pytest.raises(EOFError):
        read(before + one[:length])
  damaged = bytearray(two)
  damaged[0] ^= 1
  for garbage in (b'{"text": "a"}\n', b'\n', bytes(9) + b'x' * 5_000, bytes(damaged), bytes(range(1, 200))):
    with pytest.raises((OSError, EOFError)):
      read(one + garbage)
    with pytest.raises((OSError, EOFError)):
      read(garbage + one)
  flipped = bytearray(one)
  flipped[len(one) // 2] ^= 16
  if ending != 'zst':  # its checksum is optional, and zstandard writes none
    with pytest.raises((OSError, EOFError)):
      read(bytes(flipped))


NAMES = st.sampled_from(['a', 'b', 'ab', '.a', '.b', 'a.c', '[a]', 'a b', 'é', 'a-1', '*'])
PARTS = st.sampled_from(
  ['*', '**', 'a*', '.*', '?', '[ab]', '[!a]', '*.c', 'a', '.a', 'ab', '**b', 'a**', '***', '[[]a]']
)


@given(
  paths=st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=8),
  pattern=st.lists(PARTS, min_size=1, max_size=4),
  link=st.booleans(),
  end=st.sampled_from(['', '/']),
)
def test_patterns_match_as_in_python(paths, pattern, link, end, tmp_path_factory):
  """Locally, through a link to a folder, and in fsspec's in-memory file system."""
  folder = tmp_path_factory.mktemp('tree')
  memory = fsspec.filesystem('memory')
  for parts in paths:
    with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
      file = folder.joinpath('tree', *parts)
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(b'')
      memory.pipe(f'/{folder.name}/{"/".join(parts)}', b'')
  if link:
    (folder / 'linked').symlink_to(folder / 'tree')
  wanted = '/'.join(pattern) + end
  found = {p for p in glob.glob(f'{folder}/tree/{wanted}', recursive=True) if os.path.isfile(p)}
  if not glob.has_magic(wanted):
    return
  got = files.glob(f'{folder}/tree/{wanted}')
  assert len(got) == len(set(got)) and set(got) == found
  there = files.glob(f'memory://{folder.name}/{wanted}')
  inside = [files.below(path, f'memory://{folder.name}/*') for path in there]
  assert inside == [files.below(path, f'{folder}/tree/*') for path in got]
  as_address = files.glob(f'file://{folder}/tree/{wanted}')
  assert as_address == [f'file://{path}' for path in got]
  if link:
    everything = files.glob(f'{folder}/*/{wanted}')
    assert set(everything) == {p for p in glob.glob(f'{folder}/*/{wanted}', recursive=True) if os.path.isfile(p)}


def test_order_of_files_and_links(tmp_path: Path):
  names = ['part-10', 'part-2', 'part-1', 'part-02', 'part-1/x-3', 'part-1/x-12', 'a']
  for name in names:
    file = tmp_path / f'{name}.txt'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('x')
  (tmp_path / 'gone.txt').symlink_to(tmp_path / 'nowhere')
  found = [files.below(path, f'{tmp_path}/**') for path in files.glob(f'{tmp_path}/**/*.txt')]
  assert found == [
    *('a.txt', 'gone.txt', 'part-1.txt', 'part-1/x-3.txt', 'part-1/x-12.txt', 'part-02.txt', 'part-2.txt'),
    'part-10.txt',
  ]
  with pytest.raises(FileNotFoundError):
    files.read_bytes(str(tmp_path / 'gone.txt'))


@pytest.mark.parametrize(
  ('path', 'pattern', 'below'),
  [
    ('/data/web/a/part-0.jsonl', '/data/web/*/part-*.jsonl', 'a/part-0.jsonl'),
    ('/data/x.jsonl', '/data/x.jsonl', 'x.jsonl'),
    ('x.jsonl', '*.jsonl', 'x.jsonl'),
    ('gs://bucket/a/b/c.parquet', 'gs://bucket/a/**/*.parquet', 'b/c.parquet'),
    ('memory:///bucket/a/c', 'memory://bucket/a/*', 'c'),
    ('https://host/a/x.jsonl?download=true', 'https://host/a/x.jsonl?download=true', 'x.jsonl?download=true'),
  ],
)
def test_path_from_the_first_wildcard_on(path: str, pattern: str, below: str):
  assert files.below(path, pattern) == below

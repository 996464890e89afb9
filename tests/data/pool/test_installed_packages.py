"""Which files of installed packages are taken, and that the choice depends on nothing but them and the seed."""

import importlib.metadata
import os
from pathlib import Path, PurePosixPath

import pytest

from configs.base import get_config
from dsdm_jax.data.pool import readers, sources
from dsdm_jax.data.pool.installed_packages import is_standard_library_copy, kind_of
from dsdm_jax.errors import UserError


@pytest.mark.parametrize(
  ('path', 'kind'),
  [
    ('numpy/core.py', 'source'),
    ('jaxlib/include/x.h', 'source'),
    ('pkg/README.md', 'docs'),
    ('pkg/notes.txt', 'docs'),
    ('pkg/LICENSE.txt', 'licences'),
    ('pkg/THIRD_PARTY_NOTICES', 'licences'),
    ('pkg-1.dist-info/licenses/anything.xyz', 'licences'),
    ('pkg-1.dist-info/METADATA', 'metadata'),
    ('pkg-1.dist-info/entry_points.txt', 'metadata'),
    ('pkg/requirements.txt', 'metadata'),
    ('pkg/table.csv', 'data'),
    ('pkg/license.py', 'source'),  # a module, not a licence
    # What an installer makes up, and what is not text.
    ('pkg-1.dist-info/RECORD', None),
    ('pkg-1.dist-info/INSTALLER', None),
    ('pkg-1.dist-info/REQUESTED', None),
    ('pkg-1.dist-info/direct_url.json', None),
    ('pkg-1.dist-info/uv_cache.json', None),
    ('pkg/__pycache__/core.cpython-311.pyc', None),
    ('../../bin/tool.py', None),
    ('/usr/share/x.py', None),
    ('pkg/lib.so', None),
    ('pkg/libx.so.2', None),
    # Copies of the standard library.
    ('setuptools/_distutils/core.py', None),
    ('backports/tarfile.py', None),
    ('mypy/typeshed/stdlib/os.pyi', None),
    ('pkg/_vendor/argparse.py', None),
    ('pkg/_vendor/requests.py', 'source'),
  ],
)
def test_kind_of(path: str, kind: str | None):
  assert kind_of(path) == kind


def test_vendored_package_named_like_a_module_is_a_copy():
  assert is_standard_library_copy(PurePosixPath('a/third_party/json/decoder.py'))
  assert not is_standard_library_copy(PurePosixPath('a/json/decoder.py'))


def install(site: Path, name: str, files: dict[str, bytes], shuffle: bool = False) -> None:
  """Writes a fake installation of a distribution."""
  info = f'{name}-1.0.dist-info'
  files = {
    **files,
    f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\n# {name}\nAbout {name}.\n'.encode(),
  }
  record = [f'{path},sha256=x,{len(data)}' for path, data in files.items()]
  record += [f'{info}/RECORD,,', f'{info}/INSTALLER,sha256=x,4']
  if shuffle:
    record.reverse()
  files[f'{info}/RECORD'] = '\n'.join(record).encode()
  files[f'{info}/INSTALLER'] = b'pip\n' if shuffle else b'uv\n'
  for path, data in files.items():
    (site / path).parent.mkdir(parents=True, exist_ok=True)
    (site / path).write_bytes(data)


def show(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
  """Makes the distributions in `folder` the installed ones."""
  discover = importlib.metadata.Distribution.discover
  monkeypatch.setattr(importlib.metadata, 'distributions', lambda: discover(path=[str(folder)]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  folder = tmp_path / 'site'
  folder.mkdir()
  show(monkeypatch, folder)
  return folder


def read(seed: int = 0, **keys) -> list[sources.Document]:
  config = get_config().pool
  config.update(keys)
  return list(readers.generate(sources.parse('installed_packages'), config, seed))


def text(mark: str, size: int) -> bytes:
  line = f'{mark} line of text\n'.encode()
  return line * (size // len(line))


def test_takes_text_and_says_where_it_is_from(site: Path):
  install(site, 'one', {'one/a.py': b'a = 1\n', 'one/LICENSE': b'Do what you like.\n', 'one/d.csv': b'1,2\n'})
  result = {d.id: d.text for d in read()}
  assert result == {
    'source/one/one/a.py': 'a = 1\n',
    'licences/one/one/LICENSE': 'Do what you like.\n',
    'data/one/one/d.csv': '1,2\n',
    'metadata/one/one-1.0.dist-info/METADATA/header': 'Metadata-Version: 2.1\nName: one\nVersion: 1.0\n',
    'docs/one/one-1.0.dist-info/METADATA/body': '# one\nAbout one.\n',
  }


def test_leaves_out_what_is_no_text_and_what_it_has_seen(site: Path):
  files = {
    'one/binary.py': b'a\0b',
    'one/latin.py': 'caf\xe9 = 1'.encode('latin-1'),
    'one/empty.py': b'',
    'one/blank.py': b'\n \n',
    'one/first.py': b'same\n',
    'one/second.py': b'same\n',
  }
  install(site, 'one', files)
  install(site, 'setuptools', {'setuptools/a.py': b'installer\n'})
  install(site, 'dsdm_jax', {'dsdm_jax/a.py': b'itself\n'})
  install(site, 'typing_extensions', {'typing_extensions.py': b'copied\n'})
  assert [d.text for d in read(kinds=('source',))] == ['same\n']


def test_order_depends_on_seed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  orders = []
  for index, reverse in enumerate((False, True)):
    folder = tmp_path / str(index)
    names = [f'p{i}' for i in range(9)]
    for name in reversed(names) if reverse else names:
      install(folder, name, {f'{name}/{i}.py': f'{name} {i}\n'.encode() for i in range(5)}, shuffle=reverse)
    show(monkeypatch, folder)
    orders.append([d.id for d in read()])
    other = [d.id for d in read(seed=1)]
    assert sorted(other) == sorted(orders[-1])
    assert other != orders[-1]
  assert orders[0] == orders[1]


def test_scarce_kinds_leave_their_share_to_the_others(site: Path):
  install(site, 'one', {f'one/{i}.py': text(f's{i}', 5_000) for i in range(20)} | {'one/a.csv': text('d', 2_000)})
  result = read(kinds=('source', 'data'), max_bytes=40_000, max_document_bytes=8_192)
  size = {k: sum(len(d.text.encode()) for d in result if d.source == k) for k in ('source', 'data')}
  assert size['data'] == len(text('d', 2_000))
  assert 40_000 - 100 <= size['source'] + size['data'] <= 40_000  # less than a line is lost at the cut


def test_no_package_fills_a_kind(site: Path):
  install(site, 'big', {f'big/{i}.py': text(f'b{i}', 1_000) for i in range(200)})
  for name in [f'small{i}' for i in range(20)]:
    install(site, name, {f'{name}/{i}.py': text(f'{name} {i}', 1_000) for i in range(10)})
  result = read(kinds=('source',), max_bytes=50_000, max_document_bytes=2_000)
  big = sum(len(d.text.encode()) for d in result if '/big/' in d.id)
  assert big <= 0.1 * 50_000 + 2_000
  # But where there is nothing else it may.
  alone = read(kinds=('source',), max_bytes=500_000, max_document_bytes=2_000)
  assert sum('/big/' in d.id for d in alone) == 200


def test_long_documents_end_with_a_line(site: Path):
  install(site, 'one', {'one/a.py': text('é', 9_000)})
  (document,) = read(kinds=('source',), max_document_bytes=1_000)
  assert document.text.endswith('\n')
  assert 900 < len(document.text.encode()) <= 1_000
  assert len(document.text.encode()) + document.lost == len(text('é', 9_000))


def test_a_title_before_one_long_line_is_not_all_that_remains(site: Path):
  install(site, 'one', {'one/a.md': b'# Title\n' + 'é'.encode() * 9_000})
  (document,) = [d for d in read(kinds=('docs',), max_document_bytes=1_000) if d.id.endswith('a.md')]
  assert len(document.text.encode()) == 1_000 and document.lost == 8 + 18_000 - 1_000


def test_without_a_limit_whole_files_fill_the_budget(site: Path):
  """A long file neither takes the budget nor ends the filling."""
  install(site, 'one', {f'one/{i}.py': text(f's{i}', 1_000) for i in range(30)} | {'one/long.py': text('long', 18_000)})
  for seed in range(4):
    result = read(seed, kinds=('source',), max_bytes=20_000)
    assert all(d.lost == 0 and len(d.text) < 2_000 for d in result)
    assert 19_000 < sum(len(d.text.encode()) for d in result) <= 20_000
  assert len(read(kinds=('source',), max_bytes=0)) == 31


def test_cut_never_splits_a_character():
  data = 'aé€😀'.encode()
  for limit in range(1, len(data)):
    assert sources.cut(data, limit).decode() == 'aé€😀'[: len(sources.cut(data, limit).decode())]
    assert len(sources.cut(data, limit)) <= limit
  assert sources.cut(b'one\ntwo\nthree', 9) == b'one\ntwo\nt'


def test_bad_names():
  with pytest.raises(UserError, match=r"pool\.sources has 'web'.*installed_packages"):
    sources.parse('web')
  with pytest.raises(UserError, match=r"pool\.sources = 'nowhere:f'.*cannot import module nowhere"):
    list(readers.generate(sources.parse('nowhere:f'), get_config().pool, 0))
  with pytest.raises(UserError, match=r"pool\.kinds has 'poems'"):
    read(kinds=('poems',))


def test_real_environment_is_quick_and_clean():
  result = read(max_bytes=200_000)
  assert len({d.id for d in result}) == len(result)
  assert sum(len(d.text.encode()) for d in result) <= 200_000
  names = {os.path.basename(d.id) for d in result}
  assert not names & {'RECORD', 'INSTALLER', 'REQUESTED', 'direct_url.json'}

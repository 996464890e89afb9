"""Files that nobody vouches for, cut, flipped, nested and swollen: readers give data, or one line that names the file.

What a reader may raise is UserError (or, inside the pool, give a Problem); anything else fails here, as does a reader
that takes more memory than its bound or hangs.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsdm_jax.attribution import score_files
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.core import artifacts, lock, storage
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool import readers, sources, vocabulary
from dsdm_jax.data.targets import shapes, tasks
from dsdm_jax.errors import UserError
from tests.conftest import FAULTS, ROOT
from tests.helpers import flips

SECONDS = 20  # for one input; the slowest takes a tenth of a second
BOUND = 640 * 2**20  # bytes of memory that a bomb may take; each unpacks to more, or to so many objects
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def no_hang():
  def give_up(*_):
    raise AssertionError('a reader hangs')

  before = signal.signal(signal.SIGALRM, give_up)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


@pytest.fixture
def tried(count):
  """Counts inputs, and starts the clock of each."""

  def one() -> None:
    signal.alarm(SECONDS)
    count('inputs tried')

  return one


@st.composite
def damaged(draw, whole: bytes) -> bytes:
  """`whole` with bits flipped, cut, with a piece repeated or overwritten; or any bytes."""
  data = bytearray(whole)
  for _ in range(draw(st.integers(0, 4))):
    at = draw(st.integers(0, max(0, len(data) - 1)))
    kind = draw(st.sampled_from(['flip', 'cut', 'insert', 'repeat', 'zeros']))
    if kind == 'flip' and data:
      data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 'cut':
      del data[at:]
    elif kind == 'insert':
      data[at:at] = draw(st.binary(max_size=12))
    elif kind == 'repeat':
      data[at:at] = data[at : at + draw(st.integers(0, 64))]
    else:
      data[at : at + 8] = bytes(8)
  return bytes(data)


def anything(whole: bytes) -> st.SearchStrategy[bytes]:
  return damaged(whole) | st.binary(max_size=300)


# JSON as it may stand in a line: keys that readers look for, values of every kind, some that Python itself refuses.
KEYS = st.sampled_from(['text', 'id', 'source', 'context', 'answer', 'choices', 'gold', 'query', 'answers', 'question',
                        'document', 'category', 'continuation', 'context_options', 'aliases', 'x'])  # fmt: skip
TEXT = st.text(max_size=12) | st.sampled_from(['', ' ', '\u2028', '\x00', 'a\ud800', '<script>', '../..', 'x' * 2_000])
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
  max_leaves=6,
)
_ODD = (
  b'[' * 100_000, b'{"text": ' * 50_000, b'{"text": "a", "id": ' + b'9' * 5_000 + b'}', b'{"text": NaN}', b'[]',
  b'null', b'{"text": "a", "text": 1}', b'\xef\xbb\xbf{}', b'{"text": "\\uD83D"}',
)  # fmt: skip
ODD = st.integers(0, len(_ODD) - 1).map(lambda i: _ODD[i])  # by number: hypothesis writes out what it samples from
SHORT = st.integers(3, len(_ODD) - 1).map(lambda i: _ODD[i])  # hypothesis would print the others in full
LINES = st.lists(
  st.dictionaries(KEYS, VALUES, max_size=5).map(lambda d: json.dumps(d).encode()) | ODD | st.binary(max_size=40),
  max_size=4,
).map(b'\n'.join)
PLAIN = b'\n'.join(json.dumps({'text': f'one two three {i}', 'id': str(i)}).encode() for i in range(20)) + b'\n'


def read_pool(path: Path, kind: str) -> None:
  """As the pool stage reads: documents it can hash and write, problems that name the file."""
  entry = sources.parse(f'{kind}:{path}')
  for found in readers.read(sources.Unit(entry, (str(path),))):
    if isinstance(found, readers.Problem):
      assert str(found).startswith(str(path)) and '\n' not in str(found), found
      assert len(str(found)) < 2_000
    else:
      f'{found.id}{found.source}{found.text}'.encode()
      assert found.text.strip() and len(found.id) < 2_000


def refused_by_name(path: Path, act) -> None:
  try:
    act()
  except UserError as error:
    message = str(error)
    assert path.name.partition('.')[0] in message or 'pool.vocabulary' in message, message
    assert '\n' not in message and len(message) < 2_000, message


@fuzz
@given(data=LINES | anything(PLAIN))
def test_jsonl(data, tmp_path, tried):
  tried()
  path = tmp_path / 'mine.jsonl'
  path.write_bytes(data)
  read_pool(path, 'jsonl')
  refused_by_name(path, lambda: list(shapes.read_jsonl(str(path))))
  refused_by_name(path, lambda: tasks.read_jsonl(str(path)))


@fuzz
@given(data=anything(PLAIN))
def test_text(data, tmp_path, tried):
  tried()
  path = tmp_path / 'mine.txt'
  path.write_bytes(data)
  read_pool(path, 'text')


@pytest.mark.parametrize(('ending', 'pack'), [('gz', gzip.compress), ('zst', zstandard.compress)])
@fuzz
@given(data=st.data())
def test_packed(data, tmp_path, tried, ending, pack):
  tried()
  for kind in ('jsonl', 'txt'):
    path = tmp_path / f'mine.{kind}.{ending}'
    path.write_bytes(data.draw(anything(pack(PLAIN))))
    read_pool(path, 'jsonl' if kind == 'jsonl' else 'text')


def parquet(**columns) -> bytes:
  file = io.BytesIO()
  pq.write_table(pa.table(columns), file)
  return file.getvalue()


@fuzz
@given(data=anything(parquet(text=['one two', None, 'three'], id=[1, 2, 3])) | st.sampled_from([
  parquet(text=[1, 2]), parquet(text=[['a'], []]), parquet(text=[b'\xff']), parquet(other=['a']), parquet(text=[]),
  parquet(text=pa.array(['a', 'b']).dictionary_encode()), parquet(text=pa.array([None, None])),
]))  # fmt: skip
def test_parquet(data, tmp_path, tried):
  tried()
  path = tmp_path / 'mine.parquet'
  path.write_bytes(data)
  read_pool(path, 'parquet')


def arrow() -> bytes:
  file = io.BytesIO()
  text = pa.array(['one two', None, 'three', 'one two'])
  table = pa.table({'text': text, 'id': [1, 2, 3, 4], 'source': text.dictionary_encode()})
  with pa.ipc.new_stream(file, table.schema) as stream:
    stream.write_table(table)
  return file.getvalue()


@fuzz
@given(data=anything(arrow()))
def test_arrow(data, tmp_path, tried):
  tried()
  path = tmp_path / 'mine.arrow'
  path.write_bytes(data)
  read_pool(path, 'hf')


BOMB = """
import itertools, resource, sys
from pathlib import Path
import pyarrow.parquet
from dsdm_jax.core import storage
from dsdm_jax.data.pool import readers, sources
from dsdm_jax.errors import UserError

def used(name):
  status = Path('/proc/self/status').read_text()  # ru_maxrss would begin with the memory of whoever started this
  return int(status.partition(name + ':')[2].split()[0]) * 1024

kind, path, bound = sys.argv[1:]
before = used('VmRSS')
limit = used('VmSize') + 2 * int(bound)  # address space: threads of Arrow reserve some without using it
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
if kind == 'arrays':
  try:
    storage.load(path)
  except UserError:
    found = []
else:
  [unit] = sources.units(sources.parse(f'{kind}:{path}'))
  found = list(itertools.islice(readers.read(unit, 8192), 500))
print([str(x)[:200] if isinstance(x, readers.Problem) else f'document of {len(x.text)}' for x in found[:3]])
print(used('VmHWM') - before)
"""


def repeated(kind: str, path: Path) -> None:
  """1e5 rows of one text of 4 MiB, which a dictionary holds once: 400 GB if they are written out."""
  text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array(['ab ' * (2**22 // 3)]))
  table = pa.table({'text': pa.array(['a' * 2**29]) if kind == 'packed' else text})
  if kind == 'parquet':
    pq.write_table(table, path, compression='zstd')
    return
  options = pa.ipc.IpcWriteOptions(compression='zstd' if kind == 'packed' else None)
  path.mkdir()
  (path / 'state.json').write_text('{"_data_files": [{"filename": "a.arrow"}]}')
  with pa.OSFile(str(path / 'a.arrow'), 'wb') as file, pa.ipc.new_stream(file, table.schema, options=options) as stream:
    stream.write_table(table)


def swollen(path: Path) -> None:
  """Half a GiB or more in a few MB."""
  block, name = b'a' * 2**26, path.name
  if name.startswith('dictionary') or name == 'packed.hf':
    repeated('packed' if name == 'packed.hf' else path.suffix[1:], path)
  elif name == 'one_value.parquet':
    pq.write_table(pa.table({'text': pa.array(['a' * 2**29])}), path, compression='zstd', use_dictionary=False)
  elif name == 'values.jsonl.gz':  # 2e7 lists in a line of 60 MB
    path.write_bytes(gzip.compress(b'{"text": "a", "x": [' + b'[],' * 20_000_000 + b'0]}', 1))
  elif name.startswith('arrays'):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) if path.suffix == '.npz' else io.BytesIO() as file:
      header = np.lib.format.header_data_from_array_1_0(np.zeros(1, np.uint8)) | {'shape': (2**30,)}
      np.lib.format.write_array_header_1_0(head := io.BytesIO(), header)
      if isinstance(file, zipfile.ZipFile):
        file.writestr('a.npy', head.getvalue() + bytes(2**30))
      else:
        path.write_bytes(head.getvalue())
  else:  # streams one after another are one file
    pack = {'.gz': lambda x: gzip.compress(x, 1), '.zst': zstandard.compress, '.bz2': bz2.compress}
    path.write_bytes(pack.get(path.suffix, lambda x: lzma.compress(x, preset=0))(block) * 12)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    *('mine.jsonl.gz', 'mine.txt.zst', 'dictionary.parquet', 'packed.hf', 'arrays.npy'),
    *(
      pytest.param(name, marks=pytest.mark.full)
      for name in ('mine.jsonl.xz mine.txt.bz2 one_value.parquet dictionary.hf values.jsonl.gz arrays.npz'.split())
    ),
  ],
)
def test_memory_has_a_bound(name, tmp_path, tried):
  path = tmp_path / name
  swollen(path)
  assert path.is_dir() or path.stat().st_size < 64 * 2**20
  tried()
  kind = {'jsonl': 'jsonl', 'txt': 'text', 'parquet': 'parquet', 'hf': 'hf', 'npz': 'arrays', 'npy': 'arrays'}[
    name.split('.')[1]
  ]
  signal.alarm(0)
  done = subprocess.run(
    [sys.executable, '-c', BOMB, kind, str(path), str(BOUND)],
    cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert int(done.stdout.splitlines()[-1]) < BOUND, done.stdout


@pytest.fixture(scope='module')
def manifest(tmp_path_factory) -> bytes:
  workdir = tmp_path_factory.mktemp('made')
  identity = artifacts.Identity('pool', 1, {'pool.length': 32}, {'targets': 'ab'})
  part = artifacts.begin(workdir, identity)
  (part / 'file').write_bytes(b'content')
  return (artifacts.commit(workdir, identity, {}, artifacts.Cost(part)).path.parent / artifacts.MANIFEST).read_bytes()


def forged(content: dict[str, Any]) -> bytes:
  """As `artifacts.seal`, which refuses NaN and infinities."""
  return json.dumps(content | {'sha256': artifacts._digest(json.loads(json.dumps(content)))}).encode()


@fuzz
@given(data=st.data())
def test_manifest(data, tmp_path, tried, manifest):
  tried()
  folder = tmp_path / 'pool'
  attempt = folder / json.loads(manifest)['attempt']
  attempt.mkdir(parents=True, exist_ok=True)
  (attempt / 'file').write_bytes(b'content')
  sealed = {key: value for key, value in json.loads(manifest).items() if key != 'sha256'}
  keys = st.sampled_from(['attempt', 'identity', 'files', 'semantics', 'cost', 'versions', 'models'])
  changed = st.dictionaries(keys, VALUES).map(lambda changes: forged(sealed | changes))
  text = data.draw(anything(manifest) | changed | ODD)
  (folder / artifacts.MANIFEST).write_bytes(text)

  def act() -> None:
    found = artifacts.open_stage(tmp_path, 'pool')
    assert found is not None
    artifacts.differences(found.manifest['identity'], json.loads(manifest)['identity'])
    assert found.digest
    found.verify()

  refused_by_name(folder, act)


_NOTE = {
  'stage': 'pool',
  'format': 1,
  'settings': {},
  'inputs': {},
  'versions': {'jax': '0.1'},
  'seconds': 1,
  'flop': 2,
}
NOTE = artifacts.seal(_NOTE)


@fuzz
@given(data=anything(NOTE) | SHORT)
def test_notes_of_an_attempt(data, tmp_path, tried):
  tried()
  part = tmp_path / 'pool' / '0123456789ab-0'
  part.mkdir(parents=True, exist_ok=True)
  for name in ('begun.json', 'cost.json'):
    (part / name).write_bytes(data)

  def act() -> None:
    assert '\n' not in str(artifacts.other_versions(part))
    found = artifacts.begun(tmp_path, 'pool')
    if found is not None:
      artifacts.differences(found, {'format': 1, 'settings': {}, 'inputs': {}})

  refused_by_name(part / 'begun.json', act)
  refused_by_name(part / 'cost.json', lambda: artifacts.Cost(part))
  (tmp_path / lock.LOCK).write_bytes(data)
  with pytest.raises(UserError, match='is no lock of dsdm_jax'):
    lock.hold(tmp_path).__enter__()


def test_every_bit_of_manifests_and_notes(tmp_path, count):
  """A note with one flipped bit is refused, or as good as none; CI tries every 41st bit."""
  identity = artifacts.Identity('pool', 1, {'pool.length': 32}, {'targets': 'ab'})
  part = artifacts.begin(tmp_path, identity)
  storage.write_text(part / 'file', 'content')
  storage.mark(part / 'file')
  cost = artifacts.Cost(part)
  cost.parts['one'] = 1.5
  cost.save()
  artifacts.publish(artifacts.commit(tmp_path, identity, {}, cost))
  readers = {
    part.parent / artifacts.MANIFEST: lambda: artifacts.read(tmp_path, 'pool')['pool'].manifest,
    part.parent / 'published.json': lambda: artifacts._published(part.parent) or None,
    part / 'begun.json': lambda: artifacts._note(part),
    part / 'cost.json': lambda: artifacts._spent(part / 'cost.json'),
    part / 'file.sha256': lambda: storage.is_marked(part / 'file') or None,
  }
  for file, read in readers.items():
    whole, wanted = file.read_bytes(), read()
    for bit in range(0, 8 * len(whole), 1 if FAULTS else 41):
      data = bytearray(whole)
      data[bit // 8] ^= 1 << bit % 8
      file.write_bytes(data)
      with contextlib.suppress(UserError):
        assert read() in (wanted, None), (file, bit)
      count('bits flipped in notes')
    file.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.skipif(not FAULTS, reason='launch/test.sh --faults runs it; tests/pipeline/test_api.py has the short one')
def test_flipped_bits_before_every_reader(copied, tmp_path, count):
  flips.prepare(copied)
  for number, _ in enumerate(flips.flips(copied, tmp_path / 'scratch', 5_000, seed=1)):
    signal.alarm(SECONDS)
    assert number < 5_000
  signal.alarm(0)
  count('bits flipped before readers', 5_000)


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
@fuzz
@given(data=st.data())
def test_store(data, tmp_path_factory, tried, dtype):
  tried()
  folder = tmp_path_factory.mktemp('store')
  phi_NJ = np.arange(80, dtype=np.float32).reshape(10, 8)

  def open_store() -> FeatureStore:
    return FeatureStore(folder / 'features_0.zarr', 10, 8, 4, dtype, ((0, 4), (4, 8)))

  store = open_store()
  for shard in range(store.shards):
    store.write(shard, phi_NJ[slice(*store.bounds(shard))])
  whole = [part for _, _, part in store]
  file = data.draw(st.sampled_from(sorted(p for p in folder.rglob('*') if p.is_file())))
  before = file.read_bytes()
  if data.draw(st.booleans()):
    file.write_bytes(data.draw(anything(before)))
  else:
    file.unlink()

  def act() -> None:
    read = open_store()
    for shard in read.missing():
      read.write(shard, phi_NJ[slice(*read.bounds(shard))])
    for (_, _, part), wanted in zip(read, whole, strict=True):
      np.testing.assert_array_equal(part, wanted)

  refused_by_name(folder / 'features_0', act)


def npy(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def torch_file(member: bytes = bytes(12)) -> bytes:
  """A vector of three float32 as torch.save lays it out."""
  pickled = (
    b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00((X\x07\x00\x00\x00storageq\x01ctorch\nFloatStorage\nq\x02X\x01'
    b'\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04K\x03tq\x05QK\x00K\x03\x85q\x06K\x01\x85q\x07\x89ccollections\n'
    b'OrderedDict\nq\x08)Rq\ttq\nRq\x0b.'
  )
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('a/data.pkl', pickled)
    archive.writestr('a/data/0', member)
  return file.getvalue()


@pytest.mark.parametrize(('ending', 'whole'), [
  ('npy', npy(np.ones(5, np.float32))), ('pt', torch_file()), ('parquet', parquet(score=[1.0, 2.0], row=[1, 0])),
])  # fmt: skip
@fuzz
@given(data=st.data())
def test_scores_of_others(data, tmp_path, tried, ending, whole):
  tried()
  path = tmp_path / f'mine.{ending}'
  path.write_bytes(data.draw(anything(whole)))
  refused_by_name(path, lambda: score_files.read(path))


@fuzz
@given(data=st.data())
def test_selection(data, tmp_path, tried):
  tried()
  Selection('mine', np.arange(4), np.ones(4, np.float32), {'seed': 0}).save(tmp_path)
  file = data.draw(st.sampled_from([tmp_path / 'mine.npz', tmp_path / 'mine.json']))
  file.write_bytes(data.draw(anything(file.read_bytes())))
  try:
    Selection.load(tmp_path, 'mine')
  except ValueError as error:
    message = str(error)
  else:
    message = 'mine'
  assert 'mine' in message and '\n' not in message


@pytest.fixture(scope='module')
def sentencepiece_model() -> bytes:
  return vocabulary.train([(ROOT / 'README.md').read_text()], 400)


def tokenizer_json() -> bytes:
  tokenizers = pytest.importorskip('tokenizers')
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<eos>': 0, 'a': 1, '[UNK]': 2}, unk_token='[UNK]'))
  return made.to_str().encode()


@pytest.mark.parametrize('ending', ['model', 'json'])
@fuzz
@given(data=st.data())
def test_tokenizers(data, tmp_path, tried, ending, sentencepiece_model):
  tried()
  path = tmp_path / f'mine.{ending}'
  path.write_bytes(data.draw(anything(sentencepiece_model if ending == 'model' else tokenizer_json())))
  folder = tmp_path / 'saved'
  folder.mkdir(exist_ok=True)
  for old in folder.iterdir():
    old.unlink()

  def act() -> None:
    vocabulary.save(str(path), folder)
    encoder = vocabulary.open_encoder(folder)
    ids = encoder.encode('a bc <eos> \u2028')
    assert all(0 <= i < encoder.size for i in ids)
    encoder.decode(ids)

  refused_by_name(path, act)

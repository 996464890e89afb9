"""The pool stage: what it leaves on disk, read back in other ways than it was written."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.pool import pool as pool_lib
from dsdm_jax.data.pool.pool import END_OF_DOCUMENT, Pool
from dsdm_jax.data.pool.sources import Document
from dsdm_jax.data.targets import masked, tasks
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.errors import UserError
from tests.helpers.data import contents, invented, run_leakage, run_pool, run_targets, small_config


def test_writing_a_pool_needs_no_tensorflow(tmp_path: Path):
  """Its start would take longer than a small pool."""
  code = (
    'import sys, numpy; from pathlib import Path; from dsdm_jax.data.pool import build, pool; '
    'pool.write_array(Path(sys.argv[1]), numpy.zeros((9, 8), "uint16")); assert "tensorflow" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code, str(tmp_path / 'dataset')], check=True)


def test_plain_tfds_reads_the_rows_in_order(tiny_artifact: Artifact, tiny_pool: Pool):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(str(tiny_artifact.path / 'dataset'))
  assert builder.info.disable_shuffling
  source = builder.as_data_source(split='train')
  assert len(source) == tiny_pool.num_rows
  assert source[3]['tokens'].dtype == np.uint16
  np.testing.assert_array_equal(source[3]['tokens'], tiny_pool.tokens([3])[0])


def test_text_of_the_pool_is_the_documents(tiny_pool: Pool):
  config = small_config()
  texts = {d.id: d.text for d in invented(config.pool, config.seed)}
  in_order = np.lexsort((tiny_pool.offset_N, tiny_pool.document_N))
  assert in_order.tolist() != list(range(tiny_pool.num_rows))  # rows are shuffled
  stream = tiny_pool.tokens(in_order).ravel()
  assert stream.dtype == np.int32
  documents = np.split(stream, np.flatnonzero(stream == 1) + 1)
  # The last one is cut off where the last row ends.
  for entry, ids in zip(tiny_pool.documents, documents[:-1], strict=False):
    assert tiny_pool.encoder.decode(ids) == texts[entry['id']]
    assert entry['tokens'] == len(ids) - 1
    assert entry['bytes'] == len(texts[entry['id']].encode())
  assert {entry['id'] for entry in tiny_pool.documents} == set(texts)
  assert [entry['id'] for entry in tiny_pool.documents] != list(texts)  # shuffled


def test_rows_know_where_they_are_from(tiny_pool: Pool):
  assert tiny_pool.sources == ['code', 'prose']
  texts = {d.id: d.text for d in invented(small_config().pool, 0)}
  for row in range(0, tiny_pool.num_rows, 7):
    entry = tiny_pool.documents[tiny_pool.document_N[row]]
    ids = tiny_pool.encoder.encode(texts[entry['id']])[tiny_pool.offset_N[row] :][:10]
    assert tiny_pool.tokens([row])[0][: len(ids)].tolist() == ids
  assert set(tiny_pool.source_N.tolist()) == {0, 1}
  card = tiny_pool.card
  assert sum(s['rows'] for s in card['sources'].values()) == card['rows'] == tiny_pool.num_rows
  assert card['tokens'] == sum(entry['tokens'] for entry in tiny_pool.documents)


def test_any_rows_in_any_order(tiny_pool: Pool):
  everything = tiny_pool.tokens(range(tiny_pool.num_rows))
  rows = np.array([5, 0, 5, tiny_pool.num_rows - 1])
  np.testing.assert_array_equal(tiny_pool.tokens(rows), everything[rows])
  assert tiny_pool.tokens([]).shape == (0, tiny_pool.length)
  for bad in (-1, tiny_pool.num_rows):
    with pytest.raises(IndexError):
      tiny_pool.tokens([bad])


def test_a_large_pool_is_read_row_by_row(tiny_pool: Pool, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(pool_lib, '_RESIDENT_BYTES', 0)
  large = Pool(tiny_pool.path)
  rows = np.array([5, 0, 5, 17])
  np.testing.assert_array_equal(large.tokens(rows), tiny_pool.tokens(rows))
  assert large._resident_NL is None
  assert tiny_pool._resident_NL is not None


def test_text_of_a_row_shows_where_documents_end(tiny_pool: Pool):
  row = next(n for n in range(tiny_pool.num_rows) if 1 in tiny_pool.tokens([n])[0][1:-1])
  ids = tiny_pool.tokens([row])[0].tolist()
  first = ids[: ids.index(1)]
  assert tiny_pool.text(row).startswith(tiny_pool.encoder.decode(first) + END_OF_DOCUMENT)
  assert tiny_pool.text(row).count(END_OF_DOCUMENT) == ids.count(1)


def test_reading_needs_no_tensorflow(tiny_artifact: Artifact):
  code = (
    'import sys; from dsdm_jax.data.pool.pool import Pool; from dsdm_jax.data.order.batches import row_range_batches; '
    f'p = Pool({str(tiny_artifact.path)!r}); p.text(0); list(row_range_batches(p, 0, 9, 4)); '
    'assert "tensorflow" not in sys.modules and "seqio" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[3])


def test_same_packages_same_bytes(tmp_path: Path):
  """In another process with other hash seeds, of the packages that are really installed, and over a broken attempt."""
  config = small_config(sources=('installed_packages',), max_bytes=120_000)
  here = run_pool(config, tmp_path / 'here')
  there = tmp_path / 'there'
  (there / 'pool' / 'dataset').mkdir(parents=True)
  (there / 'pool' / 'dataset' / 'pool-train.array_record-00007').write_bytes(b'half a file')
  code = (
    'import sys; from pathlib import Path; from tests.helpers.data import run_pool, small_config; '
    'run_pool(small_config(sources=("installed_packages",), max_bytes=120_000), Path(sys.argv[1]))'
  )
  environment = os.environ | {'PYTHONHASHSEED': '77'}
  subprocess.run([sys.executable, '-c', code, str(there)], check=True, cwd=Path(__file__).parents[3], env=environment)
  assert contents(here.path) == contents(there / 'pool')


def test_a_pool_in_an_object_store_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  config, written = small_config(), {}
  for workdir in (tmp_path, storage.locate(f'memory://bucket{tmp_path}')):
    pool = run_pool(config, workdir)
    stages = [pool, run_targets(config, workdir, pool), run_leakage(config, workdir, pool)]
    written[workdir] = [contents(stage.path) for stage in stages]
    opened = Pool(pool)
    read = [opened.tokens(range(opened.num_rows)), opened.document_N, opened.documents.tokens_D]
    read += [np.array(opened.text(3)), Targets(stages[1]).examples('cs_algorithms', 'target').tokens_TL]
    written[workdir] += [x.tobytes() for x in read]
  local, remote = written.values()
  marks = [{name for name in files if name.endswith('.sha256')} for files in local[:3]]
  for here, there, notes in zip(local, remote, marks, strict=False):
    assert {k: v for k, v in here.items() if k not in notes} == {k: v for k, v in there.items() if k not in notes}
  assert local[3:] == remote[3:]


def test_planted_examples_are_found(tmp_path: Path):
  config = small_config(plant_targets=5)
  artifact = run_pool(config, tmp_path)
  pool = Pool(artifact)
  examples = Targets(run_targets(config, tmp_path, artifact)).examples('cs_algorithms', 'target')
  rows = np.flatnonzero(pool.planted_N >= 0)
  assert len(rows) == len(pool.planted) == 5
  assert rows.tolist() == list(range(pool.num_rows - 5, pool.num_rows))
  for row in rows:
    entry = pool.planted[pool.planted_N[row]]
    wanted = examples.tokens_TL[entry['index']]
    wanted = wanted[wanted != 0]
    assert pool.tokens([row])[0][: len(wanted)].tolist() == wanted.tolist()
    assert examples.records[entry['index']]['id'] == entry['id']
    assert pool.sources[pool.source_N[row]] == 'planted'
    assert pool.documents[pool.document_N[row]]['id'] == f'planted/cs_algorithms/{entry["id"]}'
  # Nothing else changes.
  plain = Pool(run_pool(small_config(), tmp_path / 'plain'))
  np.testing.assert_array_equal(plain.tokens(range(plain.num_rows)), pool.tokens(range(plain.num_rows)))


def leaky(config: ConfigDict, seed: int) -> Iterator[Document]:
  """The invented pool with a target in the midst of one document, and one document twice."""
  documents = list(invented(config, seed))
  target = tasks.read_tasks(small_config().targets)[0].items[12]
  yield from documents
  yield Document('prose/leak', 'prose', f'{documents[0].text}{target.context} {target.answer}\n{documents[1].text}')
  yield Document('prose/again', 'prose', documents[3].text)


def test_rows_of_leaks_are_masked_and_duplicates_dropped(tmp_path: Path):
  config = small_config(sources=(f'{__name__}:leaky',))
  artifact = run_pool(config, tmp_path)
  pool, found = Pool(artifact), run_leakage(config, tmp_path, artifact)
  [leak] = listed(found, 'leaks')
  assert (leak['id'], leak['task'], leak['passages']) == ('prose/leak', 'cs_algorithms', 1)
  assert leak['words'].startswith('Strings: ')
  card = json.loads((found.path / 'card.json').read_text())
  assert card['by_task'] == {'cs_algorithms': {'documents': 1, 'rows': leak['rows']}}
  # Independently: the rows of a document in the joined stream, from the text of all rows in its order.
  mask_N, size = np.load(found.path / 'mask.npy'), [d['tokens'] + 1 for d in pool.documents]
  [place] = [i for i, document in enumerate(pool.documents) if document['id'] == 'prose/leak']
  first, stop = sum(size[:place]), sum(size[: place + 1])
  begin_N = np.cumsum([0, *size])[pool.document_N] + pool.offset_N
  np.testing.assert_array_equal(mask_N, (begin_N < stop) & (begin_N + pool.length > first))
  assert 1 < leak['rows'] == card['rows'] == mask_N.sum() < pool.num_rows
  with_text = [row for row in range(pool.num_rows) if 'Strings:' in pool.text(row)]
  assert with_text and mask_N[with_text].all()
  assert 'prose/again' not in {d['id'] for d in pool.documents} and pool.card['lost']['duplicates']['documents'] == 1
  np.testing.assert_array_equal(masked.masked_rows(found), mask_N)
  config.leakage.mask = False
  listed_only = run_leakage(config, tmp_path / 'listed', artifact)
  assert np.load(listed_only.path / 'mask.npy').any() and not masked.masked_rows(listed_only).any()
  config.leakage.guard = False
  assert not np.load(run_leakage(config, tmp_path / 'off', artifact).path / 'mask.npy').any()


def test_no_masked_row_is_drawn_and_others_stay():
  none_N = np.zeros(50, np.bool_)
  rng = np.random.default_rng
  before = masked.draw(none_N, 20, rng(0))
  np.testing.assert_array_equal(before, np.sort(rng(0).choice(50, 20, replace=False)))
  some_N = none_N.copy()
  some_N[before[::4]] = True
  after = masked.draw(some_N, 20, rng(0))
  assert len(set(after)) == 20 and not some_N[after].any() and set(before[~some_N[before]]) <= set(after)
  among = np.arange(0, 50, 2)
  assert set(masked.draw(some_N, 15, rng(1), among)) <= set(among[~some_N[among]])
  counts = sum(np.bincount(masked.draw(some_N, 20, rng(seed)), minlength=50) for seed in range(2_000))
  assert not counts[some_N].any() and np.ptp(counts[~some_N]) < 6 * (2_000 * 20 / 45 * 25 / 45) ** 0.5


ASKED = 'Which of the seven lanterns did the keeper of the green river leave burning last'
CHINESE = '长江是中国最长的河流，全长约六千三百公里，发源于青藏高原的唐古拉山脉，最后在哪一座城市附近流入东海？'
NOTICE = 'you may copy and share this page as long as you name its author'


def asked_about(config: ConfigDict, seed: int) -> Iterator[Document]:
  yield from invented(config, seed)
  yield Document('prose/leak', 'prose', f'It is said: {ASKED} night?\n')
  yield Document('prose/zh', 'prose', f'前言：这里是网页的导航栏{CHINESE}以上内容转载自网络论坛')
  for i in range(11):
    yield Document(f'prose/notice{i}', 'prose', f'Page {i}. {NOTICE.upper()} ({i})')


def test_leaks_of_benchmarks_and_common_phrases_are_found(tmp_path: Path):
  benchmark = tmp_path / 'asked.jsonl'
  passage = f'{ASKED[::-1]} {NOTICE} {NOTICE[::-1]} {ASKED[::-1].upper()[3:]}'
  items = [ASKED, 'night'], [CHINESE, '上海'], [passage, 'x']
  benchmark.write_text('\n'.join(json.dumps({'context': c, 'continuation': a}) for c, a in items))

  config = small_config(sources=(f'{__name__}:asked_about',))
  config.evaluation.tasks = ('targets', str(benchmark))
  pool = run_pool(config, tmp_path)

  def run(name: str, *named: str, **keys: Any) -> Artifact:
    config.leakage.benchmarks = named
    config.leakage.update(keys)
    return run_leakage(config, tmp_path / name, pool)

  def names(found: Artifact, file: str) -> list[tuple[str, str]]:
    return [(leak['id'], leak['task']) for leak in listed(found, file)]

  leaks, common = [('prose/leak', 'asked'), ('prose/zh', 'asked')], [(f'prose/notice{i}', 'asked') for i in range(11)]
  for name, named in (('file', str(benchmark)), ('word', 'evaluated')):
    found = run(name, named)
    assert names(found, 'leaks') == leaks and names(found, 'phrases') == common
    card = json.loads((found.path / 'card.json').read_text())
    assert (card['documents'], card['by_task']['asked']['documents']) == (2, 2)
    assert (card['common_phrases'], card['short_texts']) == (11, 0)
    assert card['guarded'] == ['asked', 'cs_algorithms']
  place = listed(found, 'leaks')[0]
  assert (place['item'], place['in_document'], place['in_target']) == ('line 1', [12, 98], [0, 86])
  assert names(run('none'), 'leaks') == []
  assert names(run('all', 'evaluated', common=0), 'leaks') == leaks + common


def listed(found: Artifact, file: str) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (found.path / f'{file}.jsonl').read_text().splitlines()]


def nothing(config: ConfigDict, seed: int) -> Iterator[Document]:
  del config, seed
  yield from ()


def test_empty_pools(tmp_path: Path):
  with pytest.raises(UserError, match='the pool is empty: pool.sources'):
    run_pool(small_config(sources=(f'{__name__}:nothing',)), tmp_path)
  with pytest.raises(UserError, match='do not fill one row of pool.length 100000'):
    run_pool(small_config(length=100_000), tmp_path)

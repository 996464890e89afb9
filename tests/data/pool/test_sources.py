"""Pools of files: every format gives the same documents, errors name file and line, caps hold."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.config import values
from dsdm_jax.data import files, inputs
from dsdm_jax.data.pool import readers, sources
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from tests.helpers.data import RECORDS, lines, run_pool, small_config


def build(folder: Path, *lines_: str, **keys) -> Pool:
  keys = {'vocabulary': 'bytes', 'max_bytes': 0, 'max_document_bytes': 0} | keys
  return Pool(run_pool(small_config(sources=lines_, **keys), folder))


def bad_inputs(pool: Pool) -> int:
  lost = pool.card['lost']
  return lost['bad_input']['documents'] + lost['without_tokens']['documents']


def texts(pool: Pool) -> dict[str, str]:
  """Text of every document that lies in rows as a whole."""
  order = np.lexsort((pool.offset_N, pool.document_N))
  stream = pool.tokens(order).ravel()
  parts = np.split(stream, np.flatnonzero(stream == pool.encoder.eos) + 1)[:-1]
  return {entry['id']: pool.encoder.decode(part) for entry, part in zip(pool.documents, parts, strict=False)}


def write_jsonl(path: Path, data: bytes) -> None:
  path.write_bytes(data)


def write_gzip(path: Path, data: bytes) -> None:
  path.write_bytes(gzip.compress(data))


def write_zst(path: Path, data: bytes) -> None:
  half = len(data) // 2  # two frames
  path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))


def write_parquet(path: Path, data: bytes) -> None:
  pq.write_table(pa.Table.from_pylist([json.loads(line) for line in data.splitlines()]), path, row_group_size=7)


@pytest.mark.parametrize(
  ('kind', 'ending', 'write'),
  [
    ('jsonl', 'jsonl', write_jsonl),
    ('jsonl', 'jsonl.gz', write_gzip),
    ('jsonl', 'jsonl.zst', write_zst),
    ('parquet', 'parquet', write_parquet),
  ],
)
def test_formats(kind: str, ending: str, write: Callable[[Path, bytes], None], tmp_path: Path):
  half = len(RECORDS) // 2
  write(tmp_path / f'b.{ending}', lines(RECORDS[half:]))
  write(tmp_path / f'a.{ending}', lines(RECORDS[:half]))
  result = texts(build(tmp_path, f'{kind}:{tmp_path}/*.{ending}'))
  wanted = {r['id']: r['text'] for r in RECORDS}
  assert len(result) >= len(wanted) - 1
  assert result == {k: wanted[k] for k in result}


def test_text_files_and_fields_by_name(tmp_path: Path):
  (tmp_path / 'texts').mkdir()
  for i, record in enumerate(RECORDS):
    (tmp_path / 'texts' / f'{i:03d}.txt').write_text(record['text'])
  pool = build(tmp_path / 'a', f'text:{tmp_path}/texts/*.txt | name=books')
  assert pool.sources == ['books']
  assert set(texts(pool).values()) <= {r['text'] for r in RECORDS}
  renamed = [{'url': f'u{i}', 'domain': 'web', 'body': r['text']} for i, r in enumerate(RECORDS)]
  (tmp_path / 'x.jsonl').write_bytes(lines(renamed))
  pool = build(tmp_path / 'b', f'jsonl:{tmp_path}/x.jsonl | text=body | id=url | source=domain')
  assert pool.sources == ['web']
  assert {d['id'] for d in pool.documents} == {f'u{i}' for i in range(len(RECORDS))}


def test_a_folder_of_hugging_face_datasets(tmp_path: Path):
  """In the layout that `save_to_disk` writes: Arrow streams, a state file, one folder a split."""
  folder = tmp_path / 'saved' / 'train'
  folder.mkdir(parents=True)
  (tmp_path / 'saved' / 'dataset_dict.json').write_text('{"splits": ["train"]}')
  (folder / 'state.json').write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
  table = pa.Table.from_pylist(RECORDS)
  with pa.OSFile(str(folder / 'data-00000-of-00001.arrow'), 'wb') as f, pa.ipc.new_stream(f, table.schema) as stream:
    stream.write_table(table)
  pool = build(tmp_path / 'pool', f'hf:{tmp_path}/saved')
  assert {d['id'] for d in pool.documents} == {r['id'] for r in RECORDS}
  with pytest.raises(UserError, match='has no state'):
    build(tmp_path / 'no', f'hf:{tmp_path}')


def test_tfds_and_seqio(tmp_path: Path):
  import seqio
  import tensorflow as tf
  import tensorflow_datasets as tfds

  folder = tmp_path / 'written'
  folder.mkdir()
  identity = tfds.core.dataset_info.DatasetIdentity(
    name='mine', version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name='m'
  )
  features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'url': tfds.features.Text()})
  info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=20, file_format='array_record')
  writer.initialize_splits(['train'])
  writer.add_examples({'train': [{'text': r['text'], 'url': f'u{i}'} for i, r in enumerate(RECORDS)]})
  writer.close_all()
  pool = build(tmp_path / 'a', f'tfds:{folder} | name=c4 | id=url')
  assert [d['id'] for d in sorted(pool.documents, key=lambda d: int(d['id'][1:]))] == [
    f'u{i}' for i in range(len(RECORDS))
  ]
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({'text': [r['text'] for r in RECORDS]}),
    splits=['train'],
  )
  name = 'test_sources_task'
  seqio.TaskRegistry.add(name, source=source, output_features={'text': seqio.Feature(seqio.ByteVocabulary())})
  pool = build(tmp_path / 'b', f'seqio:{name}')
  assert {d['id'] for d in pool.documents} == {f'{name}/train:{i}' for i in range(len(RECORDS))}
  with pytest.raises(UserError, match=r"no seqio task 'other' is registered"):
    build(tmp_path / 'c', 'seqio:other')
  shard = min(folder.glob('*array_record*'))
  whole = shard.read_bytes()
  for damaged in (b'', whole[:10], whole[: 2**16], whole[:-100], whole + b'x'):
    shard.write_bytes(damaged)
    # Cut at 64 KiB, the file opens, and array_record gives empty records.
    with pytest.raises(UserError, match=rf'row 0: cannot be read \({shard.name} is truncated: \d+ records, but'):
      build(tmp_path / 'cut', f'tfds:{folder}')
  shard.write_bytes(whole)
  for line in (f'tfds:{folder}', f'seqio:{name}'):
    with pytest.raises(UserError, match=r"has no split 'test', only train; choose one with \| split=SPLIT"):
      build(tmp_path / 'd', f'{line} | split=test')


def test_bad_records_of_tfds_and_seqio(tmp_path: Path):
  """As in files: an error names the row, or the record is skipped, counted and listed."""
  import seqio
  import tensorflow as tf
  import tensorflow_datasets as tfds

  texts_ = ['river ' * 40, 'café '.encode('latin-1') * 40, ' ', 'stone ' * 40]
  identity = tfds.core.dataset_info.DatasetIdentity(
    name='mine', version=tfds.core.Version('1.0.0'), data_dir=str(tmp_path), module_name='m'
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
    disable_shuffling=True,
  )
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=20, file_format='array_record')
  writer.initialize_splits(['train'])
  writer.add_examples({'train': [{'text': text} for text in texts_]})
  writer.close_all()
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({'text': texts_}), splits=['train']
  )
  name = 'test_bad_records_task'
  seqio.TaskRegistry.add(name, source=source, output_features={'text': seqio.Feature(seqio.ByteVocabulary())})
  for line, kind in ((f'tfds:{tmp_path}', 'tfds'), (f'seqio:{name}', 'seqio')):
    target = line.partition(':')[2]
    with pytest.raises(UserError, match=rf'^{target}:train, row 1: not UTF-8 .*on_error=skip'):
      build(tmp_path / f'{kind}_fail', line)
    pool = build(tmp_path / f'{kind}_skip', line, on_error='skip')
    assert bad_inputs(pool) == 2 and len(pool.documents) == 2
    skipped = [json.loads(entry) for entry in (pool.path / 'skipped.jsonl').read_text().splitlines()]
    assert [s['where'] for s in skipped] == [f'{target}:train, row 1', f'{target}:train, row 2']
  with pytest.raises(UserError, match=rf"^{name}:train, row 0: no field 'body' among text"):
    build(tmp_path / 'field', f'seqio:{name} | text=body')


@pytest.mark.parametrize(
  ('line', 'name'),
  [
    ('tfds:c4/en.noblocklist:3.1.0', 'c4'),
    ('tfds:/data/lines/1.0.0', 'lines'),
    ('tfds:gs://bucket/mine/', 'mine'),
    ('tfds:/', 'tfds'),
    ('tfds:/data/lines/1.0.0 | name=web', 'web'),
    ('seqio:my_task', 'my_task'),
  ],
)
def test_names_of_sources(line: str, name: str):
  assert sources.parse(line).name == name


def broken(tmp_path: Path, name: str) -> str:
  """Writes a malformed file and returns the expected message."""
  good = lines(RECORDS)
  third = lines(RECORDS[:2]) + b'%s\n' + lines(RECORDS[3:])
  cases = {
    'truncated.jsonl.gz': (gzip.compress(good)[:-40], 'line {n}: the compressed file is truncated'),
    'truncated.jsonl.zst': (zstandard.compress(good)[:-40], 'line {n}: the compressed file is truncated'),
    'no_json.jsonl': (third % b'{"text": ', 'line 3: not JSON'),
    'field.jsonl': (third % b'{"body": "a", "id": "1"}', "line 3: no field 'text' among body, id"),
    'number.jsonl': (third % b'{"text": 3}', "line 3: field 'text' is int"),
    'empty.jsonl': (b'', ': the file is empty'),
    'encodings.jsonl': (third % '{"text": "café"}'.encode('latin-1'), 'line 3: not UTF-8'),
    'huge.jsonl': (third % json.dumps({'text': 'ab ' * (50 * 2**20 // 3)}).encode(), 'line 3: a document of 52,428,'),
    'blank.jsonl': (third % b'{"text": " \\n"}', 'line 3: a document without text'),
    'surrogate.jsonl': (third % b'{"text": "a\\ud800"}', 'line 3: not valid Unicode'),
    'latin.txt': ('café'.encode('latin-1'), ': not UTF-8'),
    'no.parquet': (b'PAR1 and nothing', 'row 1: cannot be read'),
  }
  data, expected = cases[name]
  (tmp_path / name).write_bytes(data)
  return expected


CASES = (
  'truncated.jsonl.gz truncated.jsonl.zst no_json.jsonl field.jsonl number.jsonl empty.jsonl encodings.jsonl '
  'huge.jsonl blank.jsonl surrogate.jsonl latin.txt no.parquet'
).split()


@pytest.mark.parametrize('name', CASES)
def test_bad_input(name: str, tmp_path: Path):
  expected = broken(tmp_path, name)
  kind = {'txt': 'text', 'parquet': 'parquet'}.get(name.rpartition('.')[2], 'jsonl')
  line = f'{kind}:{tmp_path}/{name}'
  with pytest.raises(UserError) as caught:
    build(tmp_path / 'a', line)
  message = str(caught.value)
  where, what = expected.split(': ', 1) if expected.startswith(('line', 'row')) else ('', expected[2:])
  assert message.startswith(str(tmp_path / name)), message
  assert where.replace('{n}', '') in message and what in message, message
  assert '--config.pool.on_error=skip' in message and '\n' not in message
  (tmp_path / 'good.jsonl').write_bytes(lines(RECORDS))
  pool = build(tmp_path / 'b', line, f'jsonl:{tmp_path}/good.jsonl', on_error='skip')
  assert bad_inputs(pool) == 1
  [skipped] = [json.loads(entry) for entry in (pool.path / 'skipped.jsonl').read_text().splitlines()]
  assert skipped['where'].startswith(str(tmp_path / name))
  assert {d['id'] for d in pool.documents} >= {r['id'] for r in RECORDS}


def test_a_bar_in_a_path(tmp_path: Path):
  folder = tmp_path / 'a | b' / 'c | d'
  folder.mkdir(parents=True)
  (folder / 'x | y.jsonl').write_bytes(lines(RECORDS))
  for target in (f'{folder}/x | y.jsonl', f'{folder}/*.jsonl'):
    assert values.is_source(f'jsonl:{target} | name=n')
    found = documents(f'jsonl:{target} | name=n | text = text')
    assert [d.text for d in found] == [r['text'] for r in RECORDS]


def test_a_glob_without_files(tmp_path: Path):
  with pytest.raises(UserError, match=r'nothing-\*\.jsonl: matches no file'):
    build(tmp_path / 'a', f'jsonl:{tmp_path}/nothing-*.jsonl')
  (tmp_path / 'good.jsonl').write_bytes(lines(RECORDS))
  pool = build(tmp_path / 'b', f'jsonl:{tmp_path}/nothing-*.jsonl', f'jsonl:{tmp_path}/good.jsonl', on_error='skip')
  assert bad_inputs(pool) == 1
  with pytest.raises(UserError, match='the pool is empty'):
    build(tmp_path / 'c', f'jsonl:{tmp_path}/nothing-*.jsonl', on_error='skip')
  (tmp_path / 'bad.jsonl').write_text('no JSON\n')
  with pytest.raises(UserError, match='the pool is empty: .* gave 0 documents and 1 bad inputs'):
    build(tmp_path / 'd', f'jsonl:{tmp_path}/bad.jsonl', on_error='skip')


def test_unicode_line_separators_stay_in_their_document(tmp_path: Path):
  odd = [{'id': f'a/{i}', 'source': 'a', 'text': f'one\u2028two\u2029three\x85four\x0b {i}' * 9} for i in range(20)]
  (tmp_path / 'odd.jsonl').write_bytes(lines(odd))
  result = texts(build(tmp_path, f'jsonl:{tmp_path}/odd.jsonl'))
  assert len(result) >= 19
  assert set(result.items()) <= {(r['id'], r['text']) for r in odd}


def test_a_document_of_zero_tokens(tmp_path: Path):
  """A tokenizer may drop what it calls no text, such as spaces of zero width: nothing is left of some texts."""
  tokenizers = pytest.importorskip('tokenizers')
  letters = {letter: i for i, letter in enumerate('?abcdefghijklmnopqrstuvwxyz')}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[], unk_token='?'))
  tokenizer.normalizer = tokenizers.normalizers.Replace('\u200b', '')
  tokenizer.add_special_tokens(['<|endoftext|>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  records = [*RECORDS[:5], {'id': 'none/1', 'source': 'none', 'text': '\u200b\u200b'}, *RECORDS[5:]]
  (tmp_path / 'a.jsonl').write_bytes(lines(records))
  (tmp_path / 'b.jsonl').write_bytes(lines([{'id': 'prose/x', 'source': 'prose', 'text': '\u200b'}, *RECORDS[:1]]))
  keys = {'vocabulary': str(tmp_path / 'tokenizer.json'), 'max_unknown_share': 1.0}
  with pytest.raises(UserError, match=r'a\.jsonl, line 6: a document of zero tokens; .*on_error=skip'):
    build(tmp_path / 'fail', f'jsonl:{tmp_path}/*.jsonl', **keys)
  pool = build(tmp_path / 'skip', f'jsonl:{tmp_path}/*.jsonl', on_error='skip', **keys)
  (tmp_path / 'a.jsonl').write_bytes(lines(RECORDS))
  (tmp_path / 'b.jsonl').write_bytes(lines(RECORDS[:1]))
  wanted = build(tmp_path / 'wanted', f'jsonl:{tmp_path}/*.jsonl', **keys)
  np.testing.assert_array_equal(pool.tokens(range(pool.num_rows)), wanted.tokens(range(wanted.num_rows)))
  of = [[(d['id'], d['bytes'], d['tokens'], d['status']) for d in p.documents] for p in (pool, wanted)]
  assert of[0] == of[1]
  assert bad_inputs(pool) == 2 and pool.card['sources'].pop('none') == {'documents': 0, 'bytes': 0, 'rows': 0}
  assert pool.card['vocabulary']['documents'] == wanted.card['vocabulary']['documents'] + 2  # all that were read
  read = {'read': 0, 'lost': 0, 'vocabulary': 0}
  assert pool.card | read == wanted.card | read
  assert pool.card['lost']['without_tokens'] == {'documents': 2, 'bytes': 9}
  skipped = [json.loads(entry) for entry in (pool.path / 'skipped.jsonl').read_text().splitlines()]
  assert [s['where'] for s in skipped] == [f'{tmp_path}/a.jsonl, line 6', f'{tmp_path}/b.jsonl, line 1']
  (tmp_path / 'none.jsonl').write_bytes(lines(records[5:6]))
  with pytest.raises(UserError, match='no document has a token'):
    build(tmp_path / 'empty', f'jsonl:{tmp_path}/none.jsonl', on_error='skip', **keys)


def test_the_source_of_planted_targets_has_no_other_documents(tmp_path: Path):
  (tmp_path / 'a.jsonl').write_bytes(lines([{'source': 'planted', 'text': 'text'}]))
  with pytest.raises(UserError, match="have the source 'planted', which pool.plant_targets needs"):
    build(tmp_path / 'pool', f'jsonl:{tmp_path}/a.jsonl', plant_targets=1)


def test_more_sources_than_can_be_told_apart(tmp_path: Path):
  values = [{'id': str(i), 'source': f's{i}', 'text': 'a'} for i in range(32_768)]
  (tmp_path / 'a.jsonl').write_bytes(lines(values))
  with pytest.raises(UserError, match=r'a\.jsonl gives the pool more than 32,767 sources; .*source=FIELD') as caught:
    build(tmp_path / 'pool', f'jsonl:{tmp_path}/a.jsonl', drop_duplicates=False)
  assert '\n' not in str(caught.value)


def test_caps_and_weights(tmp_path: Path):
  for name in 'ab':
    values = [{'id': f'{name}/{i}', 'source': name, 'text': f'{name} {i} ' + 'word ' * 18} for i in range(300)]
    (tmp_path / f'{name}.jsonl').write_bytes(lines(values))
  a, b = (f'jsonl:{tmp_path}/{name}.jsonl' for name in 'ab')
  size = build(tmp_path / 'all', a, b).card['sources']
  total = size['a']['bytes'] + size['b']['bytes']
  card = build(tmp_path / 'weights', f'{a} | weight=3', b, max_bytes=total // 4).card
  # 300 draws at a share of 3/8 and 1/8: five standard deviations, and never above.
  for name, share in (('a', 3 / 8), ('b', 1 / 8)):
    selected = card['sources'][name]
    assert selected['bytes'] <= share * total / 2 * 1.0 + 1
    assert abs(selected['documents'] - share * 300) <= 5 * (300 * share * (1 - share)) ** 0.5
  assert card['lost']['above_caps']['documents'] == 600 - card['documents']
  card = build(tmp_path / 'caps', f'{a} | max_documents=40', f'{b} | max_bytes=3e3').card
  assert 0 < card['sources']['a']['documents'] <= 40
  assert 0 < card['sources']['b']['bytes'] <= 3_000
  # What one source has too little of goes to the other, whichever of its caps it reaches.
  for cap in ('max_bytes=1e3', 'max_documents=10'):
    card = build(tmp_path / cap, f'{a} | {cap}', b, max_bytes=total // 2).card
    assert card['sources']['b']['documents'] > 0.8 * 300 and 0 < card['sources']['a']['documents'] <= 10
  # Here b reaches its cap only with what a leaves; c gets what both leave.
  (tmp_path / 'c.jsonl').write_bytes((tmp_path / 'b.jsonl').read_bytes().replace(b'"b', b'"c'))
  sources = (f'{a} | max_documents=10', f'{b} | max_documents=120', f'jsonl:{tmp_path}/c.jsonl')
  card = build(tmp_path / 'three', *sources, max_bytes=total // 2).card
  assert [card['sources'][name]['documents'] for name in 'ab'] == [10, 120]
  assert 0.95 * total / 2 < card['bytes'] <= total / 2
  # A share that is left over by the number of documents changes nothing else of the source.
  alone = build(tmp_path / 'alone', f'{a} | max_documents=10', max_bytes=total // 6)
  shared = build(tmp_path / 'shared', *sources, max_bytes=total // 2)
  assert {d['id'] for d in alone.documents} == {d['id'] for d in shared.documents if d['source'] == 'a'}


def test_caps_and_weights_hold_for_sources_that_are_read_from_beginning_to_end(tmp_path: Path):
  import seqio
  import tensorflow as tf

  def values(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices({'text': [f'seqio {i} ' + 'word ' * 18 for i in range(300)]})

  name = 'test_caps_task'
  source = seqio.FunctionDataSource(values, splits=['train'])
  seqio.TaskRegistry.add(name, source=source, output_features={'text': seqio.Feature(seqio.ByteVocabulary())})
  size = build(tmp_path / 'all', f'seqio:{name}').card['bytes']
  assert build(tmp_path / 'bytes', f'seqio:{name} | max_bytes=3e3').card['bytes'] <= 3_000
  assert 0 < build(tmp_path / 'documents', f'seqio:{name} | max_documents=40').card['documents'] <= 40
  card = build(tmp_path / 'budget', f'seqio:{name}', max_bytes=size // 4).card
  assert 0.15 * size < card['bytes'] <= size // 4 and card['lost']['above_caps']['documents'] == 300 - card['documents']
  other = [{'id': f'b/{i}', 'source': 'b', 'text': f'other {i} ' + 'word ' * 18} for i in range(300)]
  (tmp_path / 'b.jsonl').write_bytes(lines(other))
  card = build(tmp_path / 'weights', f'seqio:{name} | weight=3', f'jsonl:{tmp_path}/b.jsonl', max_bytes=size // 2).card
  # 300 draws at a share of 3/8 and 1/8: five standard deviations.
  for source_name, share in ((name, 3 / 8), ('b', 1 / 8)):
    selected = card['sources'][source_name]
    assert selected['bytes'] <= share * size
    assert abs(selected['documents'] - share * 300) <= 5 * (300 * share * (1 - share)) ** 0.5
  functions = 'tests.helpers.data:invented'
  assert build(tmp_path / 'few', f'{functions} | max_documents=5', max_bytes=9_000).card['documents'] <= 5
  card = build(tmp_path / 'mixed', functions, f'seqio:{name}', max_bytes=20_000).card
  assert 15_000 < card['bytes'] <= 20_000


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('jsonl:a | wieght=2', "option 'wieght=2' is none of those of jsonl: text=, id=, source=, name=, prompt="),
    ('jsonl:a | weight=much', 'weight=much is not a number'),
    ('jsonl:a | weight=0', 'weight must be above 0'),
    ('jsonl:a | weight=inf', 'weight must be above 0 and at most 1,000,000'),
    ('jsonl:a | max_bytes=1e999', 'max_bytes=1e999 is not a whole number'),
    ('jsonl:a | max_bytes=0.5', 'max_bytes=0.5 is not a whole number'),
    ('jsonl:a | max_documents=1e15', 'max_documents must be at least 0 and at most 1,000,000,000,000'),
    ('jsonl:a | text=', 'text= is empty'),
    ('text:a | id=name', "option 'id=name' is none of those of text: name="),
    ('jsonl:a | split=test', "option 'split=test' is none of those of jsonl"),
    ('tokens:a | max_documents=5', "'max_documents=5' is none of those of tokens: text=, name=$"),
    ('csv/x', 'whose kind is not'),
    ('jsonl:', 'jsonl: needs a pattern'),
    ('jsonl:a | name=', 'name= is empty'),
  ],
)
def test_bad_lines(line: str, expected: str):
  with pytest.raises(UserError, match=expected) as caught:
    sources.parse(line)
  assert repr(line) in str(caught.value)


def test_a_tfds_dataset_that_tfds_prepares(tmp_path: Path):
  """TFDS's way of preparing a dataset works with what requirements.txt installs; TFRecord, its usual format."""
  from tests.data.prepared import Lines

  builder = Lines(data_dir=str(tmp_path / 'tfds'), file_format='tfrecord')
  builder.download_and_prepare()
  pool = build(tmp_path / 'pool', f'tfds:{builder.data_dir} | name=lines')
  assert {d['bytes'] for d in pool.documents} == {29, 30} and len(pool.documents) == 20
  with pytest.raises(UserError, match=r"piqa is not prepared in .*builder\('piqa'\)\.download_and_prepare"):
    build(tmp_path / 'none', 'tfds:piqa | text=goal')


@pytest.mark.parametrize(
  ('kind', 'ending', 'write'),
  [('jsonl', 'jsonl.gz', gzip.compress), ('jsonl', 'jsonl.zst', zstandard.compress), ('parquet', 'parquet', None)],
)
def test_files_behind_an_address(kind: str, ending: str, write: Callable[[bytes], bytes] | None, tmp_path: Path):
  """With fsspec's in-memory file system, which is opened as gs://, hf:// and all others are."""
  import fsspec

  local = tmp_path / f'a.{ending}'
  if write is None:
    write_parquet(local, lines(RECORDS))
  else:
    local.write_bytes(write(lines(RECORDS)))
  memory = fsspec.filesystem('memory')
  memory.pipe(f'/{tmp_path.name}/a.{ending}', local.read_bytes())
  memory.pipe(f'/{tmp_path.name}/b.other', b'not this one')
  there = build(tmp_path / 'there', f'{kind}:memory://{tmp_path.name}/*.{ending}')
  here = build(tmp_path / 'here', f'{kind}:{local}')
  np.testing.assert_array_equal(there.tokens(range(there.num_rows)), here.tokens(range(here.num_rows)))
  assert list(there.documents) == list(here.documents)
  memory.pipe(f'/{tmp_path.name}/c.{ending}', local.read_bytes()[:-40])
  with pytest.raises(UserError, match=rf'^memory://.*c\.{ending}'):
    build(tmp_path / 'bad', f'{kind}:memory://{tmp_path.name}/c.{ending}')


def test_an_address_that_cannot_be_reached_is_one_line(tmp_path: Path):
  for address, expected in (
    ('ftp://127.0.0.1:9/x-*.jsonl', r'cannot be (reached|listed) \(ConnectionRefusedError'),
    ('nosuch://x-*.jsonl', r'cannot be reached \(ValueError Protocol not known'),
    ('az://bucket/x-*.jsonl', r'az:// need adlfs; pip install it'),
  ):
    with pytest.raises(UserError, match=expected) as caught:
      build(tmp_path / 'a', f'jsonl:{address}')
    assert '\n' not in str(caught.value)


def test_files_of_a_seqio_task_count_by_content(tmp_path: Path):
  import seqio

  file = tmp_path / 'a.txt'
  source = seqio.TextLineDataSource({'train': str(file)})
  features = {'text': seqio.Feature(seqio.ByteVocabulary())}
  seqio.TaskRegistry.add('lines_of_a_file', source=source, output_features=features)
  settings = {'pool.sources': ['seqio:lines_of_a_file'], 'pool.plant_targets': 0}

  def identity(text: str) -> dict:
    file.write_text(text)
    return inputs.by_content(settings, settings, None)[0]

  assert identity('a') == identity('a') != identity('b')


def write_hf(path: Path, data: bytes) -> None:
  """A folder as `save_to_disk` writes it, with the records of `data` in one Arrow stream."""
  path.mkdir()
  table = pa.Table.from_pylist([json.loads(line) for line in data.splitlines()])
  name = 'data-00000-of-00001.arrow'
  (path / 'state.json').write_text(json.dumps({'_data_files': [{'filename': name}]}))
  with pa.OSFile(str(path / name), 'wb') as file, pa.ipc.new_stream(file, table.schema) as stream:
    stream.write_table(table)


KINDS = pytest.mark.parametrize(
  ('kind', 'write'), [('jsonl', write_jsonl), ('parquet', write_parquet), ('hf', write_hf)]
)


def documents(line: str, max_bytes: int = 0) -> list[sources.Document | readers.Problem]:
  return [found for unit in sources.units(sources.parse(line)) for found in readers.read(unit, max_bytes)]


@KINDS
def test_fields_by_name(kind: str, write: Callable[[Path, bytes], None], tmp_path: Path):
  """Nested ones too. What the user named must be there; 0 is a name, and an empty text is none."""
  path = tmp_path / f'a.{kind}'
  write(
    path,
    lines(
      [
        {'text': 'one', 'source': 0, 'meta': {'id': 7, 'in': {'name': 'x'}, 'empty': ''}, 'a.b': 'dotted', 'list': [1]},
        {'text': 'two', 'source': 1, 'meta': {'id': 8, 'in': {'name': 'y'}, 'empty': ''}, 'a.b': 'point', 'list': [2]},
      ]
    ),
  )

  def read(options: str) -> list:
    return [
      (d.id, d.source) if isinstance(d, sources.Document) else str(d) for d in documents(f'{kind}:{path}{options}')
    ]

  first = f'a.{kind}/data-00000-of-00001.arrow:1' if kind == 'hf' else f'a.{kind}:1'
  assert read('')[0] == (f'0/{first}', '0')
  assert read(' | id=meta.id | source=meta.in.name') == [('7', 'x'), ('8', 'y')]
  assert read(' | id=a.b | source=') == [('dotted', kind), ('point', kind)]
  assert [d.text for d in documents(f'{kind}:{path} | text=meta.in.name')] == ['x', 'y']
  for option in ('id', 'source', 'text'):
    for name in ('nowhere', 'meta.nowhere', 'text.x', 'meta.in.id'):
      found = read(f' | {option}={name}')[0]
      assert f'{name!r} among' in found and f'with | {option}=' in found, found
    assert 'not text' in read(f' | {option}=list')[0]
  for option in ('id', 'source'):
    assert "field 'meta.empty'" in (found := read(f' | {option}=meta.empty')[0]) or "'meta.empty' among" in found


def test_labels_of_files_with_one_name_do_not_depend_on_how_their_places_are_written(tmp_path, monkeypatch):
  for name in 'ab':
    (tmp_path / name).mkdir()
    (tmp_path / name / 'x.jsonl').write_text(json.dumps({'text': f'text of {name} ' * 9}) + '\n')
  monkeypatch.chdir(tmp_path / 'a')
  found = []
  for second in (f'{tmp_path}/b/x.jsonl', '../b/x.jsonl', '../a/../b/x.jsonl'):
    units = [unit for place in ('x.jsonl', second) for unit in sources.units(sources.parse(f'jsonl:{place}'))]
    found.append([label for unit in sources.distinct(units) for label in unit.labels])
  assert found == [['a/x.jsonl', 'b/x.jsonl']] * 3
  # Beside a file in a store, where the current folder says nothing.
  import fsspec

  with fsspec.open('memory://c/x.jsonl', 'w') as file:
    file.write('{"text": "text of c"}')
  places = [f'{tmp_path}/a/x.jsonl', 'memory://c/x.jsonl']
  units = [unit for place in places for unit in sources.units(sources.parse(f'jsonl:{place}'))]
  assert [unit.labels for unit in sources.distinct(units)] == [('x.jsonl',), (units[1].paths[0],)]


def test_nan_is_no_id(tmp_path):
  """pandas writes it where a cell is empty."""
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(json.dumps({'id': float('nan'), 'text': f'text {i} ' * 9}) + '\n' for i in range(3)))
  pool = build(tmp_path, f'jsonl:{path}')
  assert sorted(d['id'] for d in pool.documents) == [f'jsonl/a.jsonl:{i}' for i in (1, 2, 3)]


def test_ids_are_unique_and_those_of_the_user(tmp_path: Path):
  for folder in ('x/a', 'x/b', 'y/a'):
    (tmp_path / folder).mkdir(parents=True)
    records = [{'text': f'{folder} {i} {r["text"]}'} for i, r in enumerate(RECORDS[:10])]
    (tmp_path / folder / 'part-0.jsonl').write_bytes(lines(records))
    (tmp_path / folder / 'own.jsonl').write_bytes(lines([{'id': str(i), **r} for i, r in enumerate(records)]))

  def ids(*lines_: str) -> set[str]:
    found = [d['id'] for d in build(tmp_path / 'pool', *lines_).documents]
    assert len(found) == len(set(found))
    return set(found)

  each = {f'{i}' for i in range(10)}
  numbers = range(1, 11)
  assert ids(f'jsonl:{tmp_path}/x/*/part-0.jsonl') == {f'jsonl/{f}/part-0.jsonl:{n}' for f in 'ab' for n in numbers}
  assert ids(f'jsonl:{tmp_path}/x/a/part-0.jsonl') == {f'jsonl/part-0.jsonl:{n}' for n in numbers}
  assert ids(f'jsonl:{tmp_path}/x/a/own.jsonl') == each
  # Two sources whose files have the same name below the first wildcard.
  assert ids(f'jsonl:{tmp_path}/x/a/*.jsonl | id=', f'text:{tmp_path}/y/*/part-0.jsonl') == {
    *(f'jsonl/{name}.jsonl:{n}' for name in ('part-0', 'own') for n in numbers if name == 'own'),
    'text/a/part-0.jsonl',
  }
  assert ids(f'jsonl:{tmp_path}/x/a/part*.jsonl', f'jsonl:{tmp_path}/y/a/part*.jsonl') == {
    f'jsonl/{f}/a/part-0.jsonl:{n}' for f in 'xy' for n in numbers
  }
  with pytest.raises(
    UserError, match=r"a/own\.jsonl, line 1 and .*b/own\.jsonl, line 1 have the same id '0'.*\| id="
  ) as e:
    ids(f'jsonl:{tmp_path}/x/*/own.jsonl')
  assert '\n' not in str(e.value)
  assert len(ids(f'jsonl:{tmp_path}/x/*/own.jsonl | id=')) == 20


def test_byte_order_marks_are_removed(tmp_path: Path):
  mark = files.BOM
  (tmp_path / 'a.jsonl').write_bytes(mark + lines(RECORDS[:2]) + mark + lines(RECORDS[2:3]) + mark + b'\n')
  write_gzip(tmp_path / 'b.jsonl.gz', mark + lines([{'text': '\ufefftext \ufeff of b'}]))
  (tmp_path / 't.txt').write_bytes(mark + 'text \ufeff of t'.encode())
  write_parquet(tmp_path / 'c.parquet', lines([{'text': '\ufefftext of c'}]))
  assert [d.text for d in documents(f'jsonl:{tmp_path}/a.jsonl')] == [r['text'] for r in RECORDS[:3]]
  assert [d.text for d in documents(f'jsonl:{tmp_path}/b.jsonl.gz')] == ['text \ufeff of b']
  assert [d.text for d in documents(f'text:{tmp_path}/t.txt')] == ['text \ufeff of t']
  assert [d.text for d in documents(f'parquet:{tmp_path}/c.parquet')] == ['text of c']
  (tmp_path / 'd.jsonl').write_bytes(mark)
  (tmp_path / 'd.txt').write_bytes(mark)
  assert ['empty' in str(d) for d in documents(f'jsonl:{tmp_path}/d.jsonl')] == [True]
  assert ['without text' in str(d) for d in documents(f'text:{tmp_path}/d.txt')] == [True]


def test_the_index_of_a_folder_decides_what_is_read(tmp_path: Path):
  folder = tmp_path / 'saved'
  write_hf(folder, lines(RECORDS[:9]))
  [file] = folder.glob('*.arrow')
  whole = file.read_bytes()
  (folder / 'data-00001-of-00002.arrow').write_bytes(whole)  # left over from an earlier save
  assert len(documents(f'hf:{folder}')) == 9
  for end in (1, 8, 9, 200, len(whole) - 20):
    file.write_bytes(whole[:-end])
    assert any(isinstance(d, readers.Problem) for d in documents(f'hf:{folder}')), end
  file.write_bytes(whole)
  for state, what in (
    ({'_data_files': [{'filename': file.name}, {'filename': 'data-9.arrow'}]}, r'data-9\.arrow: is missing, though'),
    ({'_data_files': [{'filename': '../x.arrow'}]}, "lists '../x.arrow', which is no file of that folder"),
    ({'_data_files': 3}, "no list '_data_files'"),
    ([], "no list '_data_files'"),
  ):
    (folder / 'state.json').write_text(json.dumps(state))
    with pytest.raises(UserError, match=what):
      build(tmp_path / 'pool', f'hf:{folder}')
  (folder / 'state.json').write_text(json.dumps({'_data_files': [{'filename': n} for n in (file.name, 'gone.arrow')]}))
  pool = build(tmp_path / 'pool', f'hf:{folder}', on_error='skip')
  assert bad_inputs(pool) == 1 and len(pool.documents) == 9
  (folder / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  with pytest.raises(UserError, match="no split 'dev', only train, test"):
    documents(f'hf:{folder} | split=dev')


def test_compressed_arrow_is_refused(tmp_path: Path):
  """Arrow would unpack its buffers whole. Dictionaries come in messages of their own."""
  folder = tmp_path / 'saved'
  write_hf(folder, lines(RECORDS[:3]))
  [file] = folder.glob('*.arrow')
  texts_ = pa.array([r['text'] * 9 for r in RECORDS])
  for column in (texts_, texts_.dictionary_encode()):
    for compression in (None, 'zstd', 'lz4'):
      table = pa.table({'text': column, 'n': range(len(column))})
      options = pa.ipc.IpcWriteOptions(compression=compression)
      with pa.OSFile(str(file), 'wb') as f, pa.ipc.new_stream(f, table.schema, options=options) as stream:
        stream.write_table(table.slice(0, 9))
        stream.write_table(table.slice(9))
      found = documents(f'hf:{folder}')
      if compression:
        assert 'its buffers are compressed' in str(found[0]) and len(found) == 1
      else:
        assert [d.text for d in found] == texts_.to_pylist()


def test_row_numbers_of_tfrecord_files(tmp_path: Path):
  """TFDS takes records from 16 files in turn by default; `dataset_info.json` decides which files there are."""
  import seqio
  import tensorflow_datasets as tfds

  identity = tfds.core.dataset_info.DatasetIdentity(
    name='mine', version=tfds.core.Version('1.0.0'), data_dir=str(tmp_path / 'mine/1.0.0'), module_name='m'
  )
  (tmp_path / 'mine/1.0.0').mkdir(parents=True)
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict({'text': tfds.features.Text()}))
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=20, file_format='tfrecord')
  writer.initialize_splits(['train'])
  writer.add_examples({'train': [{'text': f'text of row {i}'} for i in range(70)]})
  writer.close_all()
  wanted = [(f'mine/train:{i}', f'text of row {i}') for i in range(70)]
  line = f'tfds:{tmp_path}/mine/1.0.0'
  assert [(d.id, d.text) for d in documents(line)] == wanted
  part = dataclasses.replace(sources.units(sources.parse(line))[0], first=15, stop=45)
  assert [(d.id, d.text) for d in readers.read(part)] == wanted[15:45]
  seqio.TaskRegistry.add(
    'test_row_numbers',
    source=seqio.TfdsDataSource('mine:1.0.0', tfds_data_dir=str(tmp_path)),
    output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
  )
  entry = sources.parse('seqio:test_row_numbers | name=mine')
  assert [(d.id, d.text) for _, d in readers.read_generated(entry, None, 0)] == wanted
  shards = sorted((tmp_path / 'mine/1.0.0').glob('*tfrecord*'))
  (tmp_path / 'mine/1.0.0' / shards[0].name.replace('00000', '00009')).write_bytes(shards[0].read_bytes())
  assert len(documents(line)) == 70
  whole = shards[2].read_bytes()
  for damaged in (whole[: len(whole) // 20 * 10], whole[:-3], b'', whole + whole[: len(whole) // 20 * 10]):
    shards[2].write_bytes(damaged)
    assert isinstance(documents(line)[-1], readers.Problem), len(damaged)
  shards[2].unlink()
  with pytest.raises(UserError, match=r'mine-train\.tfrecord-00002\S*: is missing, though the index of'):
    build(tmp_path / 'pool', line)


WORDS = st.sampled_from(['word', ' ', '\n', 'é', '😀', '\ufeff', '\u2028', '\0'])
TEXTS = st.lists(WORDS, max_size=30).map(''.join)


@given(
  records=st.lists(TEXTS | st.sampled_from(['same', b'broken', b'{"text": 3}', b'', None]), min_size=1, max_size=25),
  limit=st.sampled_from([0, 1, 5, 20]),
  budget=st.sampled_from([0, 3, 40, 200]),
  duplicates=st.booleans(),
)
def test_all_text_is_in_the_pool_or_counted_as_lost(records, limit, budget, duplicates, tmp_path_factory):
  from dsdm_jax.data.pool import build as stage
  from dsdm_jax.data.pool import layout, passes, vocabulary

  folder = tmp_path_factory.mktemp('sum')
  (folder / 'documents').mkdir()
  raw = [r if isinstance(r, bytes) else json.dumps({'text': r}, ensure_ascii=False).encode() for r in records]
  half = len(raw) // 2
  (folder / 'a.jsonl').write_bytes(b'\n'.join(raw[:half]) + b'\n')
  (folder / 'b.jsonl.gz').write_bytes(gzip.compress(b'\n'.join(raw[half:])))
  vocabulary.save('bytes', folder)
  entries = [sources.parse(f'jsonl:{folder}/*.jsonl*')]
  jobs = [
    passes.Job(unit, index, folder, limit, True, out=folder)
    for index, unit in enumerate(sources.distinct(sources.units(entries[0])))
  ]
  scanned = [passes.scan(job) for job in jobs]
  begin = layout.bounds(scanned)
  jobs = [dataclasses.replace(job, begin=begin[i], end=begin[i + 1]) for i, job in enumerate(jobs)]
  selected = layout.decide(entries, jobs, scanned, duplicates, budget, 0)
  np.save(folder / 'lost.npy', selected.lost_M)
  passes._lost.cache_clear()
  jobs = [dataclasses.replace(job, first=selected.first[i]) for i, job in enumerate(jobs)]
  for job in jobs:
    passes.encode(job)
  jobs, selected = layout.without_tokens(jobs, selected)
  read = {'documents': sum(s.documents + s.problems for s in scanned), 'bytes': sum(s.bytes for s in scanned)}
  stage.check_sum(read, selected)
  # Independently: text without its mark, or the line where there is no text.
  bad = [line for line in raw if line.strip() and not isinstance(json_text(line), str)]
  good = [text.removeprefix('\ufeff').encode() for line in raw if isinstance(text := json_text(line), str)]
  ends = sum(line in bad for line in raw[:half]) + sum(line in bad for line in raw[half:-1])  # newlines of bad lines
  empty = sum(not any(map(bytes.strip, part)) for part in (raw[:half], raw[half:]))  # an empty file is a bad input
  assert read == {'documents': len(good) + len(bad) + empty, 'bytes': sum(map(len, good + bad)) + ends}
  table = pq.read_table(folder / 'documents')
  for name, lost in selected.lost.items():
    of = [r['bytes'] for r in table.to_pylist() if r['status'] == name]
    assert name == 'cut' or lost == {'documents': len(of), 'bytes': sum(of)}, name
  kept = table.filter(pc.is_in(table['status'], pa.array(['kept', 'cut'])))
  assert selected.bytes == sum(kept['bytes'].to_pylist()) and selected.count == kept.num_rows
  assert not budget or selected.bytes <= budget
  assert not limit or max([0, *kept['bytes'].to_pylist()]) <= limit


def json_text(line: bytes) -> str | None:
  try:
    return json.loads(line)['text']
  except ValueError:
    return None


def test_long_documents_are_cut_at_the_limit_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
  """A title before one long paragraph: nothing is cut by default, and the title is not all that remains."""
  values = [{'id': str(i), 'text': f'Title\n{"é" * 500}{i}'} for i in range(20)]
  (tmp_path / 'a.jsonl').write_bytes(lines(values))
  for i, value in enumerate(values):
    (tmp_path / f'{i}.txt').write_text(value['text'])
  for line in (f'jsonl:{tmp_path}/a.jsonl', f'text:{tmp_path}/*.txt'):
    card = build(tmp_path / 'whole', line).card
    total = sum(len(value['text'].encode()) for value in values)
    assert card['read'] == {'documents': 20, 'bytes': total} and card['bytes'] == total
    assert card['lost']['cut'] == {'documents': 0, 'bytes': 0}
    card = build(tmp_path / 'cut', line, max_document_bytes=101, drop_duplicates=False).card
    # 6 bytes of the title, and 47 letters of two bytes: 101 would split one.
    assert card['bytes'] == 20 * 100 and card['lost']['cut'] == {'documents': 20, 'bytes': total - 2_000}
    assert card['read'] == {'documents': 20, 'bytes': total}


@pytest.mark.parametrize('place', [0, 150, 299])
def test_a_budget_takes_a_sample_that_a_long_document_does_not_fill(place: int, tmp_path: Path):
  values = [{'id': str(i), 'text': f'{i} ' + 'word ' * 18} for i in range(300)]
  values[place]['text'] = 'long ' * 1_000
  (tmp_path / 'a.jsonl').write_bytes(lines(values[:200]))
  (tmp_path / 'b.jsonl').write_bytes(lines(values[200:]))
  pool = build(tmp_path / 'pool', f'jsonl:{tmp_path}/*.jsonl', max_bytes=9_000)
  ids = sorted(int(d['id']) for d in pool.documents)
  assert place not in ids
  assert 8_900 < pool.card['bytes'] <= 9_000
  # Both files and both halves of them give their share: five standard deviations of 95 draws.
  for low, high in ((0, 100), (100, 200), (200, 300)):
    assert 95 / 3 - 24 < sum(low <= i < high for i in ids) < 95 / 3 + 24
  other = small_config(sources=(f'jsonl:{tmp_path}/*.jsonl',), max_bytes=9_000, vocabulary='bytes')
  other.seed = 1
  assert sorted(int(d['id']) for d in Pool(run_pool(other, tmp_path / 'other')).documents) != ids
  # Where long documents are all there is, they are taken.
  assert build(tmp_path / 'all', f'jsonl:{tmp_path}/*.jsonl', max_bytes=33_500).card['bytes'] > 28_000

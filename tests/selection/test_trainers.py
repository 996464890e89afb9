"""Files of trainers: against the formats' descriptions here, and opened by the trainers' own readers in peer tests."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.order.batches import training_batches
from dsdm_jax.data.order.schedule import Part, Schedule
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.chat import Chat
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.selection import trainers
from dsdm_jax.selection.export import Export
from dsdm_jax.selection.trainers import Example
from tests.data.pool.test_completions import TALK, TEMPLATE, write_jsonl, write_tokenizer
from tests.data.pool.test_sources import build
from tests.helpers import scores as saved_scores
from tests.pipeline import runs

ROOT = Path(__file__).parents[2]
PACKAGES = {'mds': 'streaming'}  # that are not named as their format
RNG = np.random.default_rng(0)
EXAMPLES = [
  Example(f'é\u2028{i}', row, weight, RNG.integers(0, 60_000, size=size).astype(np.int32))
  for i, (row, weight, size) in enumerate([(7, 1.0, 5), (2**40, 0.5, 300), (-1, 3.0, 1)])
]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  out = tmp_path_factory.mktemp('trainers')
  (out / 'mds').mkdir()
  trainers.arrayrecord(EXAMPLES, 3, out, 'a')
  trainers.megatron(EXAMPLES, 3, out, 'small', 64_000)
  trainers.megatron(EXAMPLES, 3, out, 'large', 128_000)
  trainers.mds(EXAMPLES, out / 'mds')
  return out


@pytest.mark.parametrize(('name', 'dtype'), [('small', '<u2'), ('large', '<i4')])
def test_megatron_by_its_description(written, name, dtype):
  index, data = (written / f'{name}.idx').read_bytes(), (written / f'{name}.bin').read_bytes()
  assert index[:9] == b'MMIDIDX\0\0'
  version, code, sequences, bounds = struct.unpack('<QBQQ', index[9:34])
  assert (version, {8: '<u2', 4: '<i4'}[code], sequences, bounds) == (1, dtype, 3, 4)
  size_S, begin_S = np.frombuffer(index[34:46], '<i4'), np.frombuffer(index[46:70], '<i8')
  assert np.frombuffer(index[70:], '<i8').tolist() == [0, 1, 2, 3]
  for size, begin, example in zip(size_S, begin_S, EXAMPLES, strict=True):
    assert np.frombuffer(data, dtype, size, begin).tolist() == example.tokens_L.tolist()


def test_array_record_is_of_examples_in_order(written):
  from array_record.python import array_record_data_source
  from tensorflow_datasets.proto import tf_example_pb2

  source = array_record_data_source.ArrayRecordDataSource(str(written / 'a-00000-of-00001.array_record'))
  for record, example in zip(source.__getitems__([0, 1, 2]), EXAMPLES, strict=True):
    feature = tf_example_pb2.Example.FromString(record).features.feature
    assert list(feature['tokens'].int64_list.value) == example.tokens_L.tolist()
    assert list(feature['row'].int64_list.value) == [example.row]
    assert list(feature['weight'].float_list.value) == [example.weight]
    assert feature['id'].bytes_list.value[0].decode() == example.id


def test_shards_of_mds_are_of_a_limited_size(tmp_path, monkeypatch):
  monkeypatch.setattr(trainers, '_SHARD_BYTES', 1_000)
  trainers.mds(EXAMPLES, tmp_path)
  index = json.loads((tmp_path / 'index.json').read_text())
  assert [shard['samples'] for shard in index['shards']] == [1, 1, 1]  # the second alone is longer
  for shard in index['shards']:
    assert (tmp_path / shard['raw_data']['basename']).stat().st_size == shard['raw_data']['bytes']


def open_with(form: str, folder: Path) -> list[Any]:
  """What the reader of the package of a format gives; skips the test where it is not installed."""
  python = Path(os.environ.get('DSDM_JAX_PEERS', ROOT / '.venv-peers' / 'bin' / 'python'))
  known = f'import importlib.util, sys; sys.exit(importlib.util.find_spec({PACKAGES.get(form, form)!r}) is None)'
  if not python.is_file() or subprocess.run([python, '-c', known], check=False).returncode:
    pytest.skip(f'no environment with the package for {form}; launch/test.sh makes .venv-peers')
  done = subprocess.run(
    [python, str(ROOT / 'tests/selection/peer_read.py'), form, str(folder)],
    capture_output=True,
    text=True,
    check=False,
    env=runs.environment(1, HF_HUB_OFFLINE='1', PYTHONPATH=''),
  )
  assert done.returncode == 0, done.stderr[-3_000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.peers
def test_grain_opens_array_record(written):
  from tensorflow_datasets.proto import tf_example_pb2

  records = [bytes.fromhex(record) for record in open_with('grain', written)]
  features = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
  assert [list(f['tokens'].int64_list.value) for f in features] == [e.tokens_L.tolist() for e in EXAMPLES]


@pytest.mark.peers
@pytest.mark.parametrize('name', ['small', 'large'])
def test_megatron_opens_its_files(written, tmp_path, name):
  for ending in ('bin', 'idx'):
    shutil.copy(written / f'{name}.{ending}', tmp_path)
  assert open_with('megatron', tmp_path) == [e.tokens_L.tolist() for e in EXAMPLES]


@pytest.mark.peers
def test_streaming_opens_mds(written):
  wanted = [{'id': e.id, 'row': e.row, 'tokens': e.tokens_L.tolist(), 'weight': e.weight} for e in EXAMPLES]
  assert open_with('mds', written / 'mds') == wanted


def export_of(base: Path, pool: Pool, rows: np.ndarray, documents: Any = None, score_D: Any = None) -> Export:
  """An arm that selected rows, or documents, of a pool in the folder `base`."""
  weights = np.ones(len(rows), np.float32)
  Selection('dsdm--a--0', rows, weights, {'target': 'a'}, None, documents, score_D).save(base / 'selection')
  for task in ('a', 'mix'):
    saved_scores.save(base / 'datamodel', **{f'score_{task}_N': np.zeros(pool.num_rows, np.float32)})
  semantics = {
    'tasks': ['a'],
    'half_width': {'a': 1.0},
    **dict.fromkeys(('sign', 'scale', 'output_fn', 'mix', 'confidence', 'damping'), ''),
  }
  inputs = {
    'pool': Artifact(base / 'pool', {}),
    'datamodel': Artifact(base / 'datamodel', {'semantics': semantics}),
    'selection': Artifact(base / 'selection', {'files': {'dsdm--a--0.npz': ''}}),
  }
  return Export(inputs, 'dsdm')


@pytest.fixture(scope='module', params=['rows', 'packed rows', 'packed documents'])
def answered(request, tmp_path_factory) -> tuple[Export, list[list[int]]]:
  """An arm of a pool of prompts and answers, and what the loss counts of each of its records."""
  base = tmp_path_factory.mktemp('answered')
  pairs = [{'prompt': f'{i} asks ', 'completion': f'answer {i}' * (1 + i % 3)} for i in range(40)]
  line = f'jsonl:{write_jsonl(base / "pairs.jsonl", *pairs)} | prompt=prompt | completion=completion'
  pool = build(base, line, length=24, packed=request.param != 'rows')
  rows, documents, score_D = np.arange(0, pool.num_rows, 3), None, None
  if request.param == 'packed documents':
    documents = np.flatnonzero(pool.spans.whole_D)[::3]
    score_D = np.zeros(len(documents), np.float32)
    texts = [pool.encoder.decode(tokens) for tokens in pool.document_tokens(documents)]
    masks = [np.arange(len(text) + 1) >= text.index('answer') for text in texts]
  else:
    [batch] = training_batches(pool, Schedule((Part('all', rows, 1.0),), len(rows), 0), len(rows))
    counted = dict(zip(batch['row_B'].tolist(), batch['weight_BL'] > 0, strict=True))
    masks = [counted[row][:size] for row, size in zip(rows.tolist(), pool.sizes(rows), strict=True)]
  return export_of(base, pool, rows, documents, score_D), [mask_L.astype(int).tolist() for mask_L in masks]


def read_masks(form: str, folder: Path) -> list[list[int]]:
  """As the package that an export is for reads them."""
  if form == 'jsonl':
    [file] = folder.glob('*.jsonl')
    return [json.loads(line)['loss_mask'] for line in file.read_text('utf-8').split('\n') if line]
  if form == 'parquet':
    from pyarrow import parquet

    return parquet.read_table(folder / 'dsdm--a--0-00000-of-00001.parquet')['loss_mask'].to_pylist()
  if form == 'tfds':
    import tensorflow_datasets as tfds

    dataset = tfds.builder_from_directory(str(folder / 'selection/1.0.0')).as_dataset(split='train')
    return [record['loss_mask'].tolist() for record in tfds.as_numpy(dataset)]
  if form == 'arrayrecord':
    from tensorflow_datasets.proto import tf_example_pb2

    records = [bytes.fromhex(record) for record in open_with('grain', folder)]
    features = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
    return [list(f['loss_mask'].int64_list.value) for f in features]
  return [record['loss_mask'] for record in open_with(form, folder)]


@pytest.mark.parametrize(
  'form',
  ['jsonl', 'parquet', 'tfds', *(pytest.param(f, marks=pytest.mark.peers) for f in ('arrayrecord', 'mds', 'datasets'))],
)
def test_masks_are_what_the_loss_counts(answered, form, tmp_path):
  export, masks = answered
  assert all(0 in mask and 1 in mask for mask in masks) and export.lost(form) == ''
  (tmp_path / form).mkdir()
  getattr(export, form)(tmp_path / form)
  assert read_masks(form, tmp_path / form) == masks


@pytest.mark.parametrize('whole', [False, True])
def test_text_of_a_conversation_is_what_its_template_writes(tmp_path, whole):
  """Also where that has the end mark inside."""
  line = f'jsonl:{write_jsonl(tmp_path / "talks.jsonl", {"messages": TALK})} | messages=messages'
  pool = build(tmp_path, line, vocabulary=write_tokenizer(tmp_path / 'model'), length=160, packed=False)
  options = (np.array([0]), np.zeros(1, np.float32)) if whole else ()
  [columns] = export_of(tmp_path, pool, np.array([0]), *options).records()
  assert columns['text'] == [Chat(TEMPLATE, ()).render(TALK)]


def test_weight_is_that_of_the_arm(answered, monkeypatch):
  """As in a mixture; documents have none."""
  export, _ = answered
  weights = np.arange(export.selection.size, dtype=np.float32)
  monkeypatch.setattr(export, 'selection', dataclasses.replace(export.selection, weights=weights))
  wanted = [1.0] * export.size if export.whole else weights.tolist()
  assert [example.weight for example in export.examples()] == wanted
  assert [weight for columns in export.records() for weight in columns['weight']] == wanted


def test_what_megatron_has_no_place_for_is_said(answered, monkeypatch):
  export, _ = answered
  assert export.lost('megatron').startswith('; without loss_mask, for which it has no place')
  chosen = export.selection
  monkeypatch.setattr(export, 'selection', dataclasses.replace(chosen, weights=chosen.weights * 2))  # as in a mixture
  assert ('loss_mask and weight' in export.lost('megatron')) == (not export.whole)

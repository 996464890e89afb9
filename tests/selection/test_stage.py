"""The stage with every method on a real run: its files on any number of devices and processes, and its exports."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax import pipeline
from dsdm_jax.config.methods import METHODS
from dsdm_jax.core import artifacts
from dsdm_jax.data.order import batches
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.selection import export
from dsdm_jax.selection.proxy_signals import _TOKENS
from tests.conftest import FAULTS
from tests.helpers import scores as saved_scores
from tests.helpers.workdirs import files_of
from tests.pipeline import runs
from tests.selection import every
from tests.selection.test_trainers import open_with

ONCE = {'random_one_epoch': 64, 'semdedup_one_epoch': 64}  # rows of those that do not take 32


def select(source: Path, folder: Path, **changes) -> Path:
  """A copy of a finished run with another selection; in a folder that has one, it is made again."""
  for stage in ('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features', 'datamodel'):
    shutil.copytree(source / stage, folder / stage, dirs_exist_ok=True)
  config = every.get_config()
  for key, value in changes.items():
    section, _, name = key.partition('__')
    config[section][name] = value
  pipeline.run(config, folder, 'selection', rerun=(folder / 'selection').is_dir())
  return folder


@pytest.fixture(scope='module')
def chosen(finished, tmp_path_factory) -> Path:
  """Selected on eight devices; LESS with fewer columns outside --all."""
  with pytest.MonkeyPatch.context() as patch:
    if not FAULTS:
      patch.setattr('dsdm_jax.selection.less.DIMENSION', 64)
    return select(finished, tmp_path_factory.mktemp('chosen') / 'run')


def test_every_arm_is_whole(chosen):
  index = json.loads((files_of(chosen, 'selection') / 'index.json').read_text())
  assert {e['method'] for e in index} == {*METHODS, 'shortest', 'mixture'} - {'imported'}
  pool = Pool(artifacts.open_stage(chosen, 'pool'))
  for entry in index:
    found = Selection.load(files_of(chosen, 'selection'), entry['selection'])
    found.check(pool.num_rows, cap=16)
    assert found.size * entry['epochs'] == pytest.approx(64)
    if entry['method'] not in ('dsdm_boltzmann', 'mixture'):
      assert len(np.unique(found.rows)) == found.size == ONCE.get(entry['method'], 32)
    assert (entry['target'] == 'docs') == (found.provenance['target'] == 'docs')
  # Arms that draw have rows of their own for each seed, others share them.
  by_seed = {(e['method'], e['seed']): e['selection'] for e in index}
  assert by_seed['dsir', 0] != by_seed['dsir', 1]
  assert by_seed['dsdm', 0] == by_seed['dsdm', 1] == 'dsdm--docs--0'
  for name in {e['selection'] for e in index if e['method'] == 'bm25'}:
    assert np.bincount(pool.document_N[Selection.load(files_of(chosen, 'selection'), name).rows]).max() <= 8


@pytest.mark.slow
def test_what_selections_share_counts_once_whenever_they_are_added(finished, tmp_path):
  """The decomposition of the pool's n-grams for LSA."""

  def flop(folder: Path, *targets: str) -> float:
    select(finished, folder, selection__methods=('lsa',), selection__targets=targets, mixture__parts=())
    return artifacts.open_stage(folder, 'selection').manifest['cost']['flop']

  one, both = flop(tmp_path / 'added', 'docs'), flop(tmp_path / 'together', 'docs', 'api_qa')
  assert 0 < one < both < 2 * one
  assert flop(tmp_path / 'added', 'docs', 'api_qa') == both


def test_summaries_describe_the_selections(chosen):
  cards = {c['name']: c for c in json.loads((files_of(chosen, 'selection') / 'cards.json').read_text())}
  pool = Pool(artifacts.open_stage(chosen, 'pool'))
  dsdm, bottom = (Selection.load(files_of(chosen, 'selection'), f'{m}--docs--0').rows for m in ('dsdm', 'bottom'))
  card = cards['dsdm--docs--0']
  assert card['tokens'] == 32 * 32
  assert card['documents'] == len({int(pool.document_N[row]) for row in dsdm})
  assert card['overlap']['bottom--docs--0'] == round(len(set(dsdm) & set(bottom)) / 32, 4)
  assert sum(card['sources'].values()) == pytest.approx(1, abs=1e-3)
  assert set(card['overlap']) == set(cards) - {'dsdm--docs--0'}
  assert cards['shortest--any--0' if 'shortest--any--0' in cards else 'shortest--docs--0']['why'] == 'short'
  # What a person sees.
  from dsdm_jax.selection.summaries import text_tables

  text = text_tables(list(cards.values()))
  assert '…' not in text
  assert max(map(len, text.splitlines())) <= 160


@pytest.mark.slow
@pytest.mark.parametrize(
  'methods',
  [
    (
      'dsdm',
      'random',
      'random_one_epoch',
      'dsdm_boltzmann',
      'dsdm_greedy',
      'bm25',
      'minhash',
      'tests.selection.every:shortest',
    ),
    pytest.param((*(m for m in METHODS if m != 'imported'),), marks=pytest.mark.full, id='all'),
  ],
)
def test_every_method_selects_documents(finished, tmp_path, methods):
  folder = select(
    finished,
    tmp_path / 'run',
    selection__unit='document',
    selection__document_cap=0,
    selection__methods=methods,
    mixture__parts=('dsdm@docs rate=2', 'random epochs=1'),
  )
  index = json.loads((files_of(folder, 'selection') / 'index.json').read_text())
  pool = Pool(artifacts.open_stage(folder, 'pool'))
  spans = pool.spans
  assert {e['method'] for e in index} == {*(m.rpartition(':')[2] for m in methods), 'mixture'}
  smallest = int(spans.tokens_D[spans.whole_D].min())
  for entry in index:
    found = Selection.load(files_of(folder, 'selection'), entry['selection'])
    found.check(pool.num_rows, cap=16)
    assert found.size * entry['epochs'] == pytest.approx(64)
    if entry['method'] == 'mixture':
      continue
    rows = ONCE.get(entry['method'], 64 if entry['method'] == 'dsdm_boltzmann' else 32)
    tokens = int(spans.tokens_D[found.documents].sum())
    assert found.provenance['tokens'] == tokens <= rows * pool.length
    assert len(set(found.documents.tolist())) == found.provenance['documents'] == len(found.documents)
    assert spans.whole_D[found.documents].all() and smallest <= tokens
    assert found.weights.sum() * pool.length == pytest.approx(tokens, rel=1e-5)
    assert set(found.rows.tolist()) == set(spans.rows_of(found.documents)[1].tolist())
  # What is exported are documents, whole.
  export.write(folder, 'dsdm--docs', 'jsonl', tmp_path / 'e')
  records = [json.loads(line) for line in (tmp_path / 'e/dsdm--docs--0.jsonl').read_text('utf-8').split('\n') if line]
  by_id = {d['id']: d for d in pool.documents}
  mean_D = spans.means(saved_scores.load(files_of(folder, 'datamodel'))['score_docs_N'])
  for record, document in zip(
    records, Selection.load(files_of(folder, 'selection'), 'dsdm--docs--0').documents, strict=True
  ):
    assert record['row'] is None and record['document'] == pool.documents[document]['id']
    assert len(record['text'].encode()) == by_id[record['document']]['bytes']
    assert pool.encoder.encode(record['text']) == record['tokens'][:-1]
    assert record['score'] == pytest.approx(mean_D[document], rel=1e-5) == pytest.approx(record['datamodel'], rel=1e-5)
  assert [r['score'] for r in records] == sorted((r['score'] for r in records), reverse=True)
  for form in ('parquet', 'megatron', 'tfds'):
    assert f'{len(records)} documents as {form}' in export.write(folder, 'dsdm--docs', form, tmp_path / form)


@pytest.mark.slow
def test_each_selection_is_charged_for_what_it_uses(chosen):
  found = artifacts.open_stage(chosen, 'selection')
  flop = {name: spent['flop'] for name, spent in found.semantics['cost'].items()}
  assert {f'{name}.npz' for name in flop} <= found.manifest['files'].keys()
  free = ('random', 'dsir', 'bm25', 'classifier', 'dsdm')
  assert all(flop[name] == 0 for name in flop if name.partition('--')[0] in free)
  # Embeddings of rows are computed once, and charged to each method that uses them; `embedding` has targets too.
  embedded = {flop[f'{method}--any--{seed}'] for method in ('semdedup', 'semdedup_one_epoch') for seed in (0, 1)}
  assert len(embedded) == 1 and 0 < embedded.pop() < flop['embedding--docs--0']
  assert flop['perplexity_low--any--0'] == flop['perplexity_high--any--0'] > 0
  # CoLoR-Filter passes over the pool with two models, like perplexity. It tries one and two steps of 16 rows at three
  # rates, each with a pass over a batch of other examples, and takes the best number of steps again.
  pool = Pool(artifacts.open_stage(chosen, 'pool'))
  batch = _TOKENS // pool.length
  rows = -(-pool.num_rows // batch) * batch
  forward = flop['perplexity_low--any--0'] / (2 * rows)
  steps = flop['color_filter--docs--0'] - flop['perplexity_low--any--0']
  assert 10 * 16 * 2.5 + 6 * batch < steps / forward < 11 * 16 * 3.5 + 6 * batch
  # The oracle costs about five trainings of three forward passes each: one, two recomputed on the way back, and the
  # way back itself.
  trained = every.get_config().proxies.epochs * pool.num_rows
  assert 4 * 3 * forward < flop['oracle--docs--0'] / trained < 6 * 3 * forward
  assert all(spent['seconds'] > 0 for spent in found.semantics['cost'].values())


@pytest.mark.full
def test_two_processes_select_the_rows_of_one(chosen, finished, tmp_path):
  """Two connected processes of one device each, beside one of eight, from the stage's own command."""
  folder = tmp_path / 'run'
  methods = tuple(m for m in METHODS if m != 'imported' and (FAULTS or m != 'less'))
  for stage in ('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features', 'datamodel'):
    shutil.copytree(finished / stage, folder / stage)
  flags = (f'--workdir={folder}', '--stage=selection', f'--config.selection.methods={methods}')
  first, second = runs.run_two('--config=tests/selection/every.py', *flags)
  for done in (first, second):
    assert done.returncode == 0, done.stderr[-3_000:]
  assert '] selection' in first.stdout and 'selection' not in second.stdout
  made = sorted(path.name for path in files_of(folder, 'selection').glob('*.npz'))
  assert {re.sub(r'^mixture\d+', 'mixture', name.partition('--')[0]) for name in made} == {*methods, 'mixture'}
  differ = []
  for name in made:
    with np.load(files_of(chosen, 'selection') / name) as one, np.load(files_of(folder, 'selection') / name) as other:
      differ += [name] if one['rows'].tolist() != other['rows'].tolist() else []
  assert differ == []


def test_the_mixture_trains_in_the_order_that_seqio_shows(chosen):
  import seqio

  entry = next(
    e for e in json.loads((files_of(chosen, 'selection') / 'index.json').read_text()) if e['method'] == 'mixture'
  )
  assert [p['name'] for p in entry['parts']] == ['dsdm--docs--0', 'dsdm--api_qa--0', 'random--any--0']
  assert [p['examples'] for p in entry['parts']] == [16, 3, 16]  # shares 32, 16, 16 of 64 in 2, ·, 1 passes
  schedule = selection_lib.schedule(files_of(chosen, 'selection'), entry, 64, 5)
  part_B, row_B, _ = schedule.at(np.arange(64))
  assert np.bincount(part_B)[1] == 6, 'three rows twice, then the other parts take its place'
  assert np.bincount(part_B)[0] > np.bincount(part_B)[2]
  every = Selection.load(files_of(chosen, 'selection'), 'mixture--any--0').rows
  assert set(row_B.tolist()) <= set(every.tolist())
  for start in (0, 23):
    name = batches.register(schedule, Pool(artifacts.open_stage(chosen, 'pool')), start)
    stream = seqio.get_mixture_or_task(name).get_dataset(
      sequence_length=None,
      split='train',
      shuffle=False,
      num_epochs=1,
      passthrough_features=('row',),
      trim_output_features=False,
    )
    assert [int(x['row']) for x in stream.as_numpy_iterator()] == row_B[start:].tolist()
  refused = {**entry, 'when_empty': 'refuse'}
  with pytest.raises(UserError, match="'dsdm--api_qa--0' has 3 rows and is asked for 15 examples"):
    selection_lib.schedule(files_of(chosen, 'selection'), refused, 64, 5)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'selection__methods': ('tests.selection.every:repeats',)}, 'occurs 32 times, more than 8'),
    ({'selection__methods': ('json:loads',)}, None),
    ({'selection__methods': ('random',), 'mixture__parts': ('dsdm epochs=20',)}, 'epochs=20 and at most 16'),
    ({'selection__methods': ('dsdm',), 'selection__document_cap': 1, 'selection__source_cap': 0.01}, 'leave 0 of 32'),
  ],
)
def test_refusals(finished, tmp_path, changes, words):
  with pytest.raises(UserError if words else TypeError, match=words):
    select(finished, tmp_path / 'run', **changes)


def test_jsonl_and_parquet_hold_the_same(chosen, tmp_path):
  from pyarrow import parquet

  assert (
    export.main(['--workdir', str(chosen), '--arm', 'dsdm--docs', '--format', 'jsonl', '--out', str(tmp_path / 'j')])
    == 0
  )
  export.write(chosen, 'dsdm--docs--0', 'parquet', tmp_path / 'p')
  records = [json.loads(line) for line in (tmp_path / 'j/dsdm--docs--0.jsonl').read_text('utf-8').split('\n') if line]
  found = parquet.read_table(tmp_path / 'p/dsdm--docs--0-00000-of-00001.parquet').to_pylist()
  assert len(found) == len(records) == 32
  chosen_rows = Selection.load(files_of(chosen, 'selection'), 'dsdm--docs--0')
  pool = Pool(artifacts.open_stage(chosen, 'pool'))
  score_N = saved_scores.load(files_of(chosen, 'datamodel'))['score_docs_N']
  for place, (a, b) in enumerate(zip(records, found, strict=True)):
    row = int(chosen_rows.rows[place])
    assert a.keys() == b.keys()
    assert (a['place'], a['row'], a['text']) == (b['place'], b['row'], b['text']) == (place, row, pool.text(row))
    assert a['score'] == a['datamodel'] == pytest.approx(float(score_N[row]), rel=1e-6)
    assert a['low'] < a['datamodel'] < a['high'] and (a['low'], a['high']) == (b['low'], b['high'])
    assert a['document'] == pool.documents[pool.document_N[row]]['id']
    assert a['source'] == pool.sources[pool.source_N[row]]
    assert a['tokens'] == b['tokens'] == pool.tokens([row])[0].tolist()


def test_other_programs_open_the_dataset(chosen, tmp_path):
  """Plain tfds and plain seqio, in a process that cannot import this package."""
  export.write(chosen, 'dsdm--docs--0', 'tfds', tmp_path / 'd')
  code = (
    'import sys, json\n'
    'import seqio, tensorflow as tf, tensorflow_datasets as tfds\n'
    'folder = sys.argv[1]\n'
    "builder = tfds.builder_from_directory(folder + '/selection/1.0.0')\n"
    "read = [int(x['row']) for x in tfds.as_numpy(builder.as_dataset(split='train'))]\n"
    "vocabulary = seqio.SentencePieceVocabulary(folder + '/vocabulary.model')\n"
    "features = {'tokens': seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32)}\n"
    "source = seqio.TfdsDataSource('selection:1.0.0', tfds_data_dir=folder)\n"
    "task = seqio.TaskRegistry.add('mine', source=source, output_features=features)\n"
    "data = task.get_dataset(split='train', shuffle=False, sequence_length=None)\n"
    "tokens = [x['tokens'].tolist() for x in data.as_numpy_iterator()]\n"
    "assert not any(name.startswith('dsdm_jax') for name in sys.modules)\n"
    "print(json.dumps({'rows': read, 'tokens': tokens}))\n"
  )
  done = subprocess.run(
    [sys.executable, '-P', '-c', code, str(tmp_path / 'd')],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
    env=runs.environment(1, PYTHONPATH=''),
  )
  assert done.returncode == 0, done.stderr[-3_000:]
  found = json.loads(done.stdout.splitlines()[-1])
  rows = Selection.load(files_of(chosen, 'selection'), 'dsdm--docs--0').rows
  assert found['rows'] == rows.tolist()
  assert found['tokens'] == Pool(artifacts.open_stage(chosen, 'pool')).tokens(rows).tolist()


@pytest.mark.peers
def test_hugging_face_opens_the_folder(chosen, tmp_path):
  export.write(chosen, 'random--any--1', 'datasets', tmp_path / 'h')
  found = open_with('datasets', tmp_path / 'h')
  rows = Selection.load(files_of(chosen, 'selection'), 'random--any--1').rows
  tokens_BL = Pool(artifacts.open_stage(chosen, 'pool')).tokens(rows)
  assert found == [
    {'row': row, 'tokens': tokens.tolist()} for row, tokens in zip(rows.tolist(), tokens_BL, strict=True)
  ]


@pytest.mark.parametrize('form', ['arrayrecord', 'megatron', 'mds'])
def test_files_of_trainers_have_the_rows_and_the_vocabulary(chosen, tmp_path, form):
  export.write(chosen, 'dsdm--docs--0', form, tmp_path / form)
  tokens_BL = Pool(artifacts.open_stage(chosen, 'pool')).tokens(
    Selection.load(files_of(chosen, 'selection'), 'dsdm--docs--0').rows
  )
  if form == 'megatron':
    assert np.fromfile(tmp_path / form / 'dsdm--docs--0.bin', '<u2').tolist() == tokens_BL.ravel().tolist()
  assert (tmp_path / form / 'vocabulary.model').is_file()
  about = json.loads((tmp_path / form / 'metadata.json').read_text())
  assert about['sign'].startswith('higher') and about['selection']['method'] == 'dsdm'


def test_export_refuses(chosen, tmp_path, capsys):
  kept = [tmp_path / name / 'mine' for name in ('there', 'new.part', '.old.export.dsdm')]
  for file in kept:
    file.parent.mkdir()
    file.write_text('mine')
  own = ('--workdir', str(chosen), '--arm', 'dsdm--docs', '--out')
  before = sorted(chosen.rglob('*'))
  for flags, words in [
    ((*own, str(tmp_path / 'there')), 'exists and is not an empty folder'),
    ((*own, str(kept[0])), 'exists and is not an empty folder'),
    ((*own, str(tmp_path / 'old')), 'another export writes it, or was killed; then delete it'),
    ((*own, str(chosen / 'ladder')), 'ladder, which belongs to a run'),  # a stage that has not begun
    ((*own, str(chosen / 'selection/new')), 'selection, which belongs to a run'),
    ((*own, str(files_of(chosen, 'pool') / 'deep/new')), 'pool, which belongs to a run'),
    (('--workdir', str(chosen), '--arm', 'dsdm--squad', '--out', str(tmp_path / 'new')), 'dsdm--docs--0'),
    (('--workdir', str(tmp_path), '--arm', 'dsdm--docs', '--out', str(tmp_path / 'new')), 'has no finished pool'),
  ]:
    assert export.main([*flags, '--format', 'jsonl']) == 2
    message = capsys.readouterr().err
    assert words in message and message.count('\n') == 1
  assert not (tmp_path / 'new').exists() and sorted(chosen.rglob('*')) == before
  (tmp_path / 'new').mkdir()
  for out in (tmp_path / 'new', chosen / 'exports/a'):
    assert export.main([*own, str(out), '--format', 'jsonl']) == 0
    assert sorted(path.name for path in out.iterdir()) == ['dsdm--docs--0.jsonl', 'metadata.json']
  assert all(file.read_text() == 'mine' for file in kept)


def test_the_mix_is_exported_with_its_interval(finished, tmp_path):
  export.write(finished, 'dsdm', 'jsonl', tmp_path / 'm')  # its only arm of that method
  records = [json.loads(line) for line in (tmp_path / 'm/dsdm--mix--0.jsonl').read_text('utf-8').split('\n') if line]
  assert all(r['low'] < r['score'] == r['datamodel'] < r['high'] for r in records)

"""Scores of documents: every record of the sources comes back once, and sums agree with those over rows."""

import bz2
import gzip
import itertools
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import dsdm_jax
from dsdm_jax.attribution.calibration import FILE, Bank
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.pool.spans import Spans
from dsdm_jax.data.targets import tasks
from dsdm_jax.errors import UserError
from dsdm_jax.selection import documents, export, sample, whole
from dsdm_jax.selection.documents import DocumentScores
from tests.helpers import scores as saved_scores
from tests.helpers.data import RECORDS, lines, run_pool, small_config
from tests.helpers.selection import ArrayCandidates, selected
from tests.selection.test_trainers import open_with


class Stream:
  """Rows of a stream of documents, shuffled."""

  def __init__(self, size_D, length, planted, seed):
    begin_D = np.concatenate([[0], np.cumsum(size_D)])
    rows = int(begin_D[-1]) // length
    token_S = np.arange(rows) * length
    document_S = np.searchsorted(begin_D, token_S, side='right') - 1
    row_S = np.random.default_rng(seed).permutation(rows)
    self.num_rows, self.length = rows + planted, length
    self.document_N = np.append(np.empty(rows, np.int64), len(size_D) + np.arange(planted))
    self.offset_N = np.zeros(rows + planted, np.int64)
    self.document_N[row_S], self.offset_N[row_S] = document_S, token_S - begin_D[document_S]
    self.owner_SL = np.repeat(np.arange(len(size_D)), size_D)[: rows * length].reshape(rows, length)
    self.row_S = row_S


@given(
  size_D=st.lists(st.integers(1, 30), min_size=1, max_size=12),
  length=st.integers(2, 9),
  planted=st.integers(0, 2),
  seed=st.integers(0, 3),
)
def test_sums_over_documents_against_a_count_of_tokens(size_D, length, planted, seed):
  rows = Stream(size_D, length, planted, seed)
  spans = Spans(np.array([*size_D, *[length] * planted], np.int64), rows, planted)
  value_N = np.random.default_rng(seed).normal(size=rows.num_rows)
  wanted_D = np.zeros(len(size_D) + planted)
  for row, owner_L in zip(rows.row_S, rows.owner_SL, strict=True):
    np.add.at(wanted_D, owner_L, value_N[row] / length)
  wanted_D[len(size_D) :] += value_N[rows.num_rows - planted :]
  np.testing.assert_allclose(spans.sums(value_N), wanted_D, rtol=1e-9, atol=1e-9)
  assert np.isclose(spans.sums(value_N).sum(), value_N.sum())
  counts = np.bincount(rows.owner_SL.ravel(), minlength=len(wanted_D))
  counts[len(size_D) :] = length
  assert spans.tokens_D.tolist() == counts.tolist()
  wanted = [(d, row) for d in range(len(size_D)) for row in rows.row_S[(rows.owner_SL == d).any(axis=1)]]
  assert list(zip(*spans.rows_of(range(len(size_D))), strict=True)) == wanted
  chosen = np.arange(len(size_D) + planted)[seed::2]
  in_chosen = np.isin(rows.owner_SL, chosen).mean(axis=1)
  share_N = spans.shares(chosen)
  np.testing.assert_allclose(share_N[rows.row_S], in_chosen)
  assert share_N[len(rows.row_S) :].tolist() == [float(len(size_D) + i in chosen) for i in range(planted)]
  assert spans.whole_D.tolist() == [*(counts[: len(size_D)] == size_D), *[True] * planted]


@pytest.fixture(scope='module')
def lossy(tmp_path_factory):
  """A pool whose sources lose documents in every way, and made-up scores of its rows."""
  base = tmp_path_factory.mktemp('lossy')
  folder = base / 'web' / 'documents'
  folder.mkdir(parents=True)
  config = small_config(
    sources=(f'jsonl:{folder}/*.jsonl.gz', f'parquet:{base}/*.parquet', f'text:{base}/*.txt'),
    max_bytes=16_000,
    max_document_bytes=700,
    on_error='skip',
  )
  leak = max((text.text for text in tasks.raw_texts(config.targets)), key=len)
  control = {'id': '=1+1\u0007\u2028é', 'text': 'a text under an id with control characters ' * 3}
  bad = [{'id': 'empty', 'text': ' '}, {'id': 'number', 'text': 3}, {'id': 'none'}]
  for part in range(2):
    records = [*RECORDS[part::3], *bad[part::2], {'id': f'again {part}', 'text': RECORDS[part]['text']}]
    records += [control, {'id': 'leak', 'text': f'Words before. {leak} Words after.'}] if part else []
    (folder / f'part-{part}.jsonl.gz').write_bytes(gzip.compress(lines(records)))
  import pyarrow as pa

  parquet.write_table(pa.Table.from_pylist([{**r, 'id': f'p {r["id"]}'} for r in RECORDS[2::3]]), base / 'a.parquet')
  (base / 'note.txt').write_text('one file\n' * 20)
  pool = run_pool(config, base / 'run')
  count = Pool(pool.path).num_rows
  rng = np.random.default_rng(0)
  arrays = {
    f'{kind}_{task}_N': rng.normal(size=count).astype(np.float32) for task in 'ab' for kind in ('score', 'error')
  }
  arrays = {name: abs(array) if name.startswith('error') else array for name, array in arrays.items()}
  arrays['score_mix_N'] = (arrays['score_a_N'] + arrays['score_b_N']) / 2
  (base / 'datamodel').mkdir()
  saved_scores.save(base / 'datamodel', **arrays)
  semantics = {'tasks': ['a', 'b'], 'mix': 'mean', 'half_width': {'a': 2.0, 'b': 3.0}, 'sign': 'higher helps'}
  semantics |= {'scale': 'one unit', **dict.fromkeys(('output_fn', 'confidence', 'damping'), '')}
  selection = base / 'selection'
  selection.mkdir()
  (selection / 'index.json').write_text(json.dumps([{'selection': 'dsdm--a--0'}]))
  Selection('dsdm--a--0', np.arange(count // 2), np.ones(count // 2, np.float32), {'target': 'a+b'}).save(selection)
  inputs = {'pool': pool, 'datamodel': Artifact(base / 'datamodel', {'semantics': semantics})}
  return base, inputs | {'selection': Artifact(selection, {'files': {'dsdm--a--0.npz': ''}})}, arrays


def _made_up(pool, folder):
  """Inputs with scores of 0 for the rows of a pool."""
  (folder / 'datamodel').mkdir()
  zero_N = np.zeros(Pool(pool.path).num_rows, np.float32)
  saved_scores.save(folder / 'datamodel', score_a_N=zero_N, error_a_N=zero_N, score_mix_N=zero_N)
  semantics = {'tasks': ['a'], 'mix': 'mean', 'half_width': {'a': 2.0}, 'sign': 'higher helps', 'scale': 'one unit'}
  semantics |= dict.fromkeys(('output_fn', 'confidence', 'damping'), '')
  return {'pool': pool, 'datamodel': Artifact(folder / 'datamodel', {'semantics': semantics})}


def _records(inputs, **options):
  return list(itertools.chain.from_iterable(t.to_pylist() for t in DocumentScores(inputs, **options).tables()))


def test_every_record_comes_back_once_with_its_place(lossy):
  base, inputs, _ = lossy
  found = _records(inputs)
  by_status = {}
  for record in found:
    by_status.setdefault(record['status'], set()).add(record['id'])
  wanted = []
  for path in sorted((base / 'web/documents').iterdir()):
    data = gzip.decompress(path.read_bytes())
    read = [r for r in found if r['file'] == path.name]
    assert [r['number'] for r in read] == list(range(1, len(read) + 1))
    for record in read:  # the bytes of the user's own line
      assert json.loads(data[record['begin'] : record['end']])['id'] == record['id']
    wanted += [json.loads(line)['id'] for line in data.decode().split('\n') if line]
  wanted += [f'p {r["id"]}' for r in RECORDS[2::3]] + ['text/note.txt']
  assert sorted(r['id'] for r in found) == sorted(wanted)
  assert by_status['bad_input'] == {'empty', 'number', 'none'}
  assert by_status['duplicates'] == {'again 0', 'again 1'}
  assert by_status['above_caps'] and by_status['cut'] and by_status['kept']
  assert [r['begin'] for r in found if r['file'] == 'a.parquet'] == [None] * len(RECORDS[2::3])
  [note] = (r for r in found if r['file'] == 'note.txt')
  assert (note['begin'], note['end']) == (0, 180)


def test_sums_over_documents_are_sums_over_rows(lossy):
  _, inputs, arrays = lossy
  pool, found = Pool(inputs['pool'].path), _records(inputs)
  scored = [r for r in found if r['sum_a'] is not None]
  assert {r['status'] for r in scored} == {'kept', 'cut'}
  for target in ('a', 'b', 'mix'):
    assert sum(r[f'sum_{target}'] for r in scored) == pytest.approx(
      arrays[f'score_{target}_N'].sum(dtype=np.float64), rel=1e-6
    )
  assert sum(r['row_tokens'] for r in found) == pool.num_rows * pool.length
  missing = pool.card['unfilled_row']
  assert (
    sum(r['tokens'] + 1 for r in found if r['status'] in ('kept', 'cut', 'unfilled_row'))
    == missing + pool.num_rows * pool.length
  )
  for record in scored:
    mean = record['sum_a'] * pool.length / record['row_tokens']
    assert record['score_a'] == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert record['low_a'] < record['score_a'] < record['high_a']
  selected = sum(r['selected_dsdm--a--0'] * r['row_tokens'] for r in scored)
  assert selected == pytest.approx(pool.num_rows // 2 * pool.length, rel=1e-5)
  # A document in one row has the row's score.
  span = pool.spans
  document = int(np.flatnonzero(span.begin_D // pool.length == (span.end_D - 1) // pool.length)[0])
  [record] = (r for r in scored if r['id'] == pool.documents[document]['id'])
  assert record['score_a'] == pytest.approx(float(arrays['score_a_N'][span.rows_of([document])[1][0]]), rel=1e-4)


def test_a_document_with_text_of_a_target_says_so_beside_its_score(lossy, tmp_path):
  """With the leakage stage's list, if it masks rows."""
  _, inputs, _ = lossy
  before = _records(inputs)
  leaking = next(r for r in before if r['status'] == 'kept')['id']
  (tmp_path / 'leaks.jsonl').write_text(json.dumps({'id': leaking, 'task': 'a'}) + '\n')
  for masked in (True, False):
    (tmp_path / 'card.json').write_text(json.dumps({'masked': masked}))
    found = _records(inputs | {'leakage': Artifact(tmp_path, {})})
    changed = [(a, b) for a, b in zip(before, found, strict=True) if a != b]
    assert changed == ([(a, a | {'status': 'leaks'}) for a in before if a['id'] == leaking] if masked else [])


def test_targets_and_arms_are_named(lossy):
  _, inputs, _ = lossy
  assert {n for n in _records(inputs, targets=['a+b'], arms=[])[0] if n.startswith(('score', 'sel'))} == {'score_a+b'}
  assert 'selected_dsdm--a--0' in _records(inputs, arms=['dsdm'])[0]
  for options, words in [
    ({'targets': ['c']}, "no scores for 'c'; targets are a, b, mix"),
    ({'arms': ['x']}, '--arm=x: the run has dsdm--a--0; name one'),
    ({'targets': ['mix'], 'by': 'tokens'}, "score for 'mix' is no sum over tokens"),
  ]:
    with pytest.raises(UserError, match=words):
      DocumentScores(inputs, **options)


def test_dolma_has_a_line_for_each_line(lossy, tmp_path):
  base, inputs, _ = lossy
  DocumentScores(inputs).dolma(tmp_path)
  assert json.loads((tmp_path / 'metadata.json').read_text())['sign'] == 'higher helps'
  scores = {r['id']: r for r in _records(inputs)}
  for path in sorted((base / 'web/documents').iterdir()):
    own = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split('\n') if line]
    found = [
      json.loads(line) for line in gzip.decompress((tmp_path / path.name).read_bytes()).decode().split('\n') if line
    ]
    assert [f['id'] for f in found] == [o['id'] for o in own]
    for mine, theirs in zip(found, own, strict=True):
      record, spans = scores[mine['id']], mine['attributes']
      if record['score_a'] is None:
        assert spans['dsdm__score_a'] == [] and spans[f'dsdm__{record["status"]}'][0][2] == 1
      else:
        [[start, end, score]] = spans['dsdm__score_a']
        assert np.float32(score) == np.float32(record['score_a'])  # to the last bit, however small
        assert theirs['text'][start:end] == theirs['text'] if record['status'] == 'kept' else end < len(theirs['text'])


@pytest.mark.parametrize('between', [False, True])
@pytest.mark.parametrize('form', ['dolma', 'datakit'])
def test_a_file_that_two_sources_read_is_not_written_twice(form, between, tmp_path):
  """Neither over the first, nor after it."""
  (tmp_path / 'web').mkdir()
  for name in 'ab' if between else 'a':
    records = [{'title': f'{name} title {i} ' * 9, 'body': f'{name} body {i} ' * 9} for i in range(9)]
    (tmp_path / 'web' / f'{name}.jsonl').write_bytes(lines(records))
  both = tuple(f'jsonl:{tmp_path}/web/*.jsonl | text={field} | id= | name={field}' for field in ('title', 'body'))
  pool = run_pool(small_config(sources=both, vocabulary='bytes'), tmp_path / 'run')
  (tmp_path / 'out').mkdir()
  with pytest.raises(UserError, match=r'one that two sources read, would be written as a\.jsonl.*--format=parquet'):
    getattr(DocumentScores(_made_up(pool, tmp_path)), form)(tmp_path / 'out')


def test_dolma_says_which_files_it_leaves_out_and_reads_each_compression(tmp_path):
  packed = {'b.jsonl.xz': lzma.compress, 'c.ndjson': bytes, 'd.json.bz2': bz2.compress, 'e.lines': bytes}
  (tmp_path / 'b.bad.jsonl.gz').write_bytes(b'no gzip')
  for index, (name, pack) in enumerate(packed.items()):
    own = [{'id': f'{name} {i}', 'text': f'{name} has text {i} ' * 9} for i in range(index, index + 5)]
    (tmp_path / name).write_bytes(pack(lines(own)))
  pool = run_pool(
    small_config(sources=(f'jsonl:{tmp_path}/[b-e].*',), vocabulary='bytes', on_error='skip'), tmp_path / 'run'
  )
  (tmp_path / 'out').mkdir()
  said = DocumentScores(_made_up(pool, tmp_path)).dolma(tmp_path / 'out')
  assert said == '15 documents of 4 files; 1 file left out, which are not named as JSONL'
  assert gzip.decompress((tmp_path / 'out' / 'b.bad.jsonl.gz').read_bytes()) == b'', 'it could not be read'
  for name, unpack in (('b.jsonl.xz', lzma.decompress), ('c.ndjson', bytes), ('d.json.bz2', bz2.decompress)):
    assert unpack((tmp_path / 'out' / name).read_bytes()).count(b'"attributes"') == 5


@pytest.mark.peers
def test_the_mixer_of_dolma_reads_the_attributes(lossy, tmp_path):
  """It compares ids line by line, so every line of a file must have one."""
  base, inputs, _ = lossy
  (tmp_path / 'documents').mkdir()
  for path in (base / 'web/documents').iterdir():
    shutil.copy(path, tmp_path / 'documents')
  (tmp_path / 'attributes/dsdm').mkdir(parents=True)
  DocumentScores(inputs).dolma(tmp_path / 'attributes/dsdm')
  wanted = [r['id'] for r in _records(inputs) if r['file'].endswith('.gz') and (r['score_a'] or 0) > 0]
  assert wanted and open_with('dolma', tmp_path) == wanted


def stated(folder: Path) -> list[dict]:
  """What an export says about its scores, in each place that its files have for it."""
  places = [parquet.read_schema(path).metadata[export.METADATA] for path in folder.rglob('*.parquet')]
  places += [path.read_bytes() for path in folder.glob('metadata.json')]
  places += [path.read_text().split('```json')[1].split('```')[0] for path in folder.glob('README.md')]
  places += [json.loads(path.read_bytes())['description'] for path in folder.rglob('dataset_info.json')]
  return [json.loads(place) for place in places]


def test_every_export_states_sign_and_scale(lossy, tmp_path):
  """All formats there are, with scores of one datamodel, calibrated on one bank."""
  _, inputs, arrays = lossy
  random, rows = np.random.default_rng(0), len(arrays['score_a_N'])
  subsets = random.random((20, rows)) < 0.5
  bank = Bank(np.arange(rows), np.repeat('halves', 20), subsets, random.normal(size=(20, 2)), ('a', 'b'))
  bank.save(tmp_path)
  calibrated = {**inputs, 'validation': Artifact(tmp_path, {'files': {FILE: {}}})}
  exports = {form: export.Export(calibrated, 'dsdm') for form in export.FORMATS}
  exports |= {form + ' of documents': DocumentScores(calibrated, ['a+b']) for form in documents.FORMATS}
  for name, of_run in exports.items():
    (tmp_path / name).mkdir()
    getattr(of_run, name.partition(' ')[0])(tmp_path / name)
    found = stated(tmp_path / name)
    assert found, name
    for about in found:
      assert (about['sign'], about['scale']) == ('higher helps', 'one unit'), name
      worth = about['calibration']['targets']
      assert set(worth) == {'a', 'b', 'mix', 'a+b'} and worth['a+b']['error'] > 0, name
      assert 'nats per token on the target for each 1% of the training budget' in about['calibration']['unit'], name
  sample.write(next((tmp_path / 'parquet').iterdir()), tmp_path / 'drawn.parquet', 'datamodel', method='top', count=3)
  about = json.loads(parquet.read_schema(tmp_path / 'drawn.parquet').metadata[export.METADATA])
  assert (about['sign'], about['scale']) == ('higher helps', 'one unit')


def test_datakit_has_a_file_for_each_file(lossy, tmp_path):
  _base, inputs, _ = lossy
  DocumentScores(inputs).datakit(tmp_path)
  table = parquet.read_table(tmp_path / 'a.parquet')
  assert table['id'].to_pylist() == [f'p {r["id"]}' for r in RECORDS[2::3]]
  assert table.schema.names[:3] == ['id', 'partition_id', 'status']
  assert json.loads(table.schema.metadata[export.METADATA])['sign'] == 'higher helps'
  parts = [parquet.read_table(path) for path in sorted(tmp_path.rglob('*.parquet'))]
  names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*.parquet'))
  assert names == ['a.parquet', 'note.txt.parquet', 'part-0.jsonl.gz.parquet', 'part-1.jsonl.gz.parquet']
  assert sorted({t['partition_id'][0].as_py() for t in parts}) == list(range(len(parts))) == [0, 1, 2, 3]


def test_a_finished_run(finished, tmp_path, capsys):
  run = dsdm_jax.load(finished)
  frame = run.scores.documents()
  assert frame.attrs['sign'].startswith('higher')
  for target in run.scores:
    assert frame[f'sum_{target}'].sum() == pytest.approx(run.scores[target].sum(dtype=np.float64), rel=1e-5, abs=1e-5)
  flags = ['--workdir', str(finished), '--format', 'parquet', '--out', str(tmp_path / 'd'), '--target', 'docs']
  assert documents.main(flags) == 0
  assert f'{len(frame):,} documents as parquet' in capsys.readouterr().out
  table = parquet.read_table(tmp_path / 'd')
  assert table['id'].to_pylist() == frame['id'].tolist()
  np.testing.assert_array_equal(table['score_docs'].to_pandas(), frame['score_docs'].astype(np.float32))
  assert documents.main([*flags[:2], '--format', 'dolma', '--out', str(tmp_path / 'e')]) == 2
  assert 'no source of the pool is a JSONL file' in capsys.readouterr().err


def test_by_tokens_in_a_finished_run(finished):
  """Contributions of tokens of one document, and of all: their sums are the rows'."""
  run = dsdm_jax.load(finished)
  rows, tokens = (run.scores.documents(['docs'], [], by) for by in ('rows', 'tokens'))
  assert rows['id'].tolist() == tokens['id'].tolist()
  wanted = run.scores['docs'].sum(dtype=np.float64)
  assert tokens['sum_docs'].sum() == pytest.approx(
    wanted, abs=0.02 * float(run.scores['docs'].std()) * len(rows) ** 0.5
  )
  first = rows['id'].tolist().index(run.pool.documents[0]['id'])
  length, size = run.pool.length, int(rows['row_tokens'][first])
  score_BL = run.scores.tokens('docs', run.pool.spans.rows_of([0])[1])
  assert tokens['sum_docs'][first] == pytest.approx(score_BL.ravel()[:size].sum(), rel=1e-4, abs=1e-7)
  assert tokens['score_docs'][first] == pytest.approx(tokens['sum_docs'][first] * length / size, rel=1e-5)


def _pool(inputs, score_N, **options):
  return ArrayCandidates(score_N, Pool(inputs['pool'].path), unit='document', **options)


def test_the_best_documents_fill_the_budget_in_tokens(lossy):
  """Against a search over all documents one by one."""
  _, inputs, arrays = lossy
  score_N = arrays['score_a_N']
  pool = _pool(inputs, score_N)
  found = selected('dsdm', pool, examples=20)
  spans, left, wanted = pool.pool.spans, 20 * pool.pool.length, []
  mean_D = spans.means(score_N)
  for document in sorted(range(len(mean_D)), key=lambda d: -np.float32(mean_D[d])):
    if spans.whole_D[document] and spans.tokens_D[document] <= left:
      wanted.append(document)
      left -= int(spans.tokens_D[document])
  assert found.documents.tolist() == wanted and len(wanted) > 3
  assert found.document_scores.tolist() == mean_D[wanted].astype(np.float32).tolist()
  assert found.weights.sum() * pool.pool.length == pytest.approx(found.provenance['tokens'])
  # Rows of better documents come first.
  first = [min(wanted.index(d) for d in wanted if row in spans.rows_of([d])[1]) for row in found.rows]
  assert first == sorted(first)
  capped = selected('dsdm', _pool(inputs, score_N, source_cap=0.25), examples=20)
  sources = pool.pool.documents.column('source')[capped.documents]
  assert all(spans.tokens_D[capped.documents[sources == s]].sum() <= 5 * pool.pool.length for s in set(sources))
  with pytest.raises(UserError, match='no whole document fits into selection.examples = 1 rows'):
    selected('dsdm', _pool(inputs, score_N, source_cap=0.001), examples=1)


def test_random_documents_are_not_chosen_by_length(lossy):
  """Of documents that fit, long and short ones are first with the same probability."""
  _, inputs, arrays = lossy
  pool = _pool(inputs, arrays['score_a_N'])
  spans = pool.pool.spans
  first = [int(selected('random', pool, examples=200, seed=seed).documents[0]) for seed in range(60)]
  long_D = spans.tokens_D > np.median(spans.tokens_D[spans.whole_D])
  share = long_D[spans.whole_D].mean()
  assert abs(long_D[first].mean() - share) < 4 * (share * (1 - share) / 60) ** 0.5


def test_semdedup_keeps_as_many_documents_as_an_arm_needs(lossy):
  """A fifth of the rows has few documents of which most tokens are in them."""
  _, inputs, arrays = lossy
  pool = _pool(inputs, arrays['score_a_N'])
  spans, length = pool.pool.spans, pool.pool.length
  near_N = np.random.default_rng(3).random(pool.num_rows).astype(np.float32)
  pool.once('semdedup', lambda: near_N)
  for masked in (0, 4):
    pool.masked_N[:masked] = True
    open_D = spans.whole_D & (spans.means(pool.masked_N.astype(float)) == 0)
    most = int(spans.tokens_D[open_D].sum()) // length
    for examples in (most // 10, most // 2):
      found = selected('semdedup', pool, examples=examples)
      random = selected('random', pool, examples=examples)
      short = length * examples - found.provenance['tokens']
      assert 0 <= short < max(spans.tokens_D), 'it fills the budget up to a document'
      assert abs(found.provenance['tokens'] - random.provenance['tokens']) < max(spans.tokens_D)
    left = pool.num_rows - found.provenance['dropped']
    assert pool.num_rows / 5 < left < pool.num_rows, 'and drops what it can'


def test_rows_of_any_method_become_documents(lossy):
  _, inputs, arrays = lossy
  pool = _pool(inputs, arrays['score_a_N'])
  spans, document = pool.pool.spans, 4
  rows = spans.rows_of([document])[1]
  found = whole.of_rows(Selection.of(np.repeat(rows, 2), why='x'), pool)
  assert found.documents[0] in (document, *np.flatnonzero(spans.means(np.isin(np.arange(pool.num_rows), rows)) == 1))
  assert found.provenance['why'] == 'x' and found.document_scores[0] == 1
  assert (np.diff(found.document_scores) <= 1e-6).all() and (found.document_scores > 0).all()

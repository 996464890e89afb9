"""Draws from files of scores: the distribution that is named, caps, ids, and refusals."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dsdm_jax.errors import UserError
from dsdm_jax.selection import export, sample
from dsdm_jax.selection.sample import METHODS


def draws(path, out, *flags):
  assert sample.main(['--scores', str(path), '--out', str(out), *flags]) == 0
  return parquet.read_table(out)


@pytest.fixture
def file(tmp_path):
  """Two hundred entries, a tenth without a score."""
  rng = np.random.default_rng(0)
  score_N = [None if i % 10 == 0 else float(x) for i, x in enumerate(rng.normal(size=200))]
  ids = [f'=cmd|{i}\u0007é' for i in range(200)]
  table = pa.table(
    {'id': ids, 'score_docs': pa.array(score_N, pa.float32()), 'source': [f's{i % 4}' for i in range(200)]}
  )
  parquet.write_table(table, tmp_path / 'scores.parquet')
  return tmp_path / 'scores.parquet'


@pytest.mark.parametrize('method', METHODS)
def test_entries_and_their_ids(file, tmp_path, method, capsys):
  flags = ('--column', 'score_docs', '--method', method, '--count', '60', '--cap', '3')
  table, given = draws(file, tmp_path / 'a.parquet', *flags), parquet.read_table(file)
  assert f'{60} draws' in capsys.readouterr().out
  for record in table.to_pylist():
    assert record['id'] == given['id'][record['row']].as_py()
    assert record['score'] == given['score_docs'][record['row']].as_py()
  assert sum(table['count'].to_pylist()) == 60 and len(set(table['row'].to_pylist())) == len(table)
  assert max(table['count'].to_pylist()) <= (3 if method == 'boltzmann' else 1)
  about = json.loads(table.schema.metadata[export.METADATA])
  assert about['method'] == method and about['scores'] == 'scores.parquet'
  assert about['sign'] == 'a higher score is better' and about['scale'] == 'that of the file of scores'
  own = given.replace_schema_metadata({export.METADATA: json.dumps({'sign': '+', 'scale': 'nats', 'method': 'x'})})
  parquet.write_table(own, tmp_path / 'own.parquet')
  about = json.loads(draws(tmp_path / 'own.parquet', tmp_path / 'b.parquet', *flags).schema.metadata[export.METADATA])
  assert (about['sign'], about['scale'], about['method']) == ('+', 'nats', method)
  again, other = (draws(file, tmp_path / f'{seed}.parquet', *flags, '--seed', str(seed)) for seed in (0, 1))
  assert again.equals(table)
  assert other.equals(table) == (method == 'top')
  if method == 'top':
    scores = np.array([s for s in given['score_docs'].to_pylist() if s is not None])
    assert table['score'].to_pylist() == sorted(scores, reverse=True)[:60]


def test_gumbel_draws_by_the_weights(tmp_path):
  """The first of many draws of one: exp(z/T), within four standard errors."""
  score_N = np.array([0.0, 1.0, 2.0, 4.0], np.float32)
  first = [int(sample.sample(score_N, 'gumbel', 1, temperature=0.5, seed=seed)[0][0]) for seed in range(600)]
  weight_N = np.exp((score_N - score_N.mean()) / score_N.std() / 0.5)
  share_N = weight_N / weight_N.sum()
  found_N = np.bincount(first, minlength=4) / 600
  assert np.all(np.abs(found_N - share_N) < 4 * np.sqrt(share_N * (1 - share_N) / 600) + 1e-9)


def test_groups_have_a_cap_and_vectors_are_read(file, tmp_path):
  flags = ('--column', 'score_docs', '--method', 'gumbel', '--count', '8', '--group', 'source', '--group-cap', '2')
  table, given = draws(file, tmp_path / 'a.parquet', *flags), parquet.read_table(file)
  sources = [given['source'][row].as_py() for row in table['row'].to_pylist()]
  assert sorted(sources) == sorted(['s0', 's1', 's2', 's3'] * 2)
  np.save(tmp_path / 'v.npy', np.arange(10, dtype=np.float32))
  assert draws(tmp_path / 'v.npy', tmp_path / 'b.parquet', '--method', 'top', '--count', '3')['row'].to_pylist() == [
    9,
    8,
    7,
  ]


@pytest.mark.parametrize('encode', [False, True])
def test_entries_without_a_group_are_a_group(tmp_path, encode):
  sources = pa.array(['a', None, 'a', None, 'b', None])
  table = pa.table({'score': np.arange(6.0), 'source': sources.dictionary_encode() if encode else sources})
  parquet.write_table(table, tmp_path / 's.parquet')
  flags = ('--method', 'top', '--count', '3', '--group', 'source', '--group-cap', '1')
  assert draws(tmp_path / 's.parquet', tmp_path / 'o.parquet', *flags)['row'].to_pylist() == [5, 4, 2]


def test_refusals(file, tmp_path, capsys):
  np.save(tmp_path / 'none.npy', np.ones(0, np.float32))
  (tmp_path / 'torn.parquet').write_bytes(file.read_bytes()[:500])
  (tmp_path / 'there.parquet').write_bytes(b'')
  new, method = ('--out', str(tmp_path / 'new.parquet')), ('--column', 'score_docs', '--method')
  for scores, flags, words in [
    (file, (*new, *method, 'top', '--count', '181'), '180 of 180 scores can be drawn, fewer than 181'),
    (file, (*new, *method, 'boltzmann', '--count', '400', '--cap', '2'), 'of at most 2 draws do not give 400'),
    (file, (*new, '--method', 'top', '--count', '1'), "no column 'score'; it has id, score_docs, source"),
    (file, (*new, '--column', 'id', '--method', 'top', '--count', '1'), "column 'id' holds string"),
    (tmp_path / 'none.npy', (*new, *method, 'top', '--count', '1'), 'none.npy has no scores'),
    (file, (*new, *method, 'top', '--count', '1', '--group', 'source'), '--group and --group-cap belong together'),
    (file, ('--out', str(tmp_path / 'there.parquet'), *method, 'top', '--count', '1'), 'exists; name a new file'),
    (file, ('--out', str(tmp_path / 'a.csv'), *method, 'top', '--count', '1'), 'must end in .parquet'),
    (tmp_path / 'torn.parquet', (*new, *method, 'top', '--count', '1'), 'cannot be read'),
    (tmp_path / 'none.parquet', (*new, *method, 'top', '--count', '1'), 'cannot be read'),
  ]:
    assert sample.main(['--scores', str(scores), *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count('\n') == 1
  assert not (tmp_path / 'new.parquet').exists()
  with pytest.raises(UserError, match='fewer than 5'):
    sample.sample(np.zeros(4), 'gumbel', 5)

"""What is packed into the page, unpacked again as the browser does; and which rows are taken where not all can be."""

import base64
import dataclasses
import gzip
import json
import random

import numpy as np
import pytest

from dsdm_jax.report import explorer, figures, tables


def unpack(packed: explorer.Packed) -> tuple[dict, dict[str, np.ndarray], list[str]]:
  raw = gzip.decompress(base64.b64decode(packed.columns))
  at = 4 + int.from_bytes(raw[:4], 'little')
  header = json.loads(raw[4:at])
  columns = {}
  for name, kind in header['columns']:
    columns[name] = np.frombuffer(raw, f'<{kind}', header['rows'], at)
    assert at % columns[name].itemsize == 0  # a typed array of JavaScript may begin nowhere else
    at += columns[name].nbytes
  assert at == len(raw)
  return header, columns, gzip.decompress(base64.b64decode(packed.text)).decode().split('\0')


def test_all_that_is_packed_comes_out(shown, packed, hostile):
  header, columns, text = unpack(packed)
  row_N = columns['row']
  assert sorted(row_N) == list(range(3000))
  assert packed.characters is None
  assert text == [shown.text(n) for n in row_N]
  assert text[list(row_N).index(7)] == hostile
  assert [header['documents'][d] for d in columns['document']] == [
    shown.documents[d]['id'] for d in shown.document_N[row_N]
  ]
  assert (columns['source'] == shown.source_N[row_N]).all()
  for target in header['targets']:
    z_N = figures.standardised(shown.scores[target['id']])
    found_N = columns[f'score {target["id"]}'] * target['step']
    np.testing.assert_allclose(found_N, z_N[row_N], atol=target['step'] / 2 * (1 + 1e-9))
    if target['id'] in shown.reach:  # the mix of this run has no intervals
      wanted_N = shown.reach[target['id']][row_N] / shown.scores[target['id']].std()
      code_N = columns[f'reach {target["id"]}'].astype(float)
      found_N = np.where(code_N > 0, target['reach'] * 1000 ** ((code_N - 255) / 254), 0)
      np.testing.assert_allclose(found_N, wanted_N, rtol=np.log(1000) / 254 / 2 * 1.02)
      assert (wanted_N == 0).sum() == 1
    else:
      assert target['id'] == 'mix' and 'reach mix' not in columns
    assert target['quantiles'][256] == pytest.approx(np.median(z_N), abs=1e-3)
  random_rows = tables.draws(shown, ('random', 'any'))
  at = [arm['name'] for arm in header['arms']].index('random, same epochs')
  assert header['arms'][at]['selections'] == 3
  assert columns[f'arm {at}'].tolist() == [sum(n in rows for rows in map(set, random_rows)) for n in row_N]


@pytest.mark.parametrize('most', [255, 256, 65_536, 2**31 + 1, 2**32])
def test_no_source_row_or_number_of_draws_wraps(shown, most):
  """Values around the ends of one, two and four bytes, and above."""
  values_N = np.array([0, most - 1, most])
  assert explorer._narrowed(values_N).tolist() == values_N.tolist()
  if most >= 2**31:
    return
  sources = [f'source {n}' for n in range(most + 1)]
  many = dataclasses.replace(shown, sources=sources, source_N=np.resize(np.arange(most, -1, -97), len(shown.source_N)))
  header, columns, _ = unpack(explorer.pack(many, 200, 10_000))
  assert [header['sources'][s]['name'] for s in columns['source']] == [
    sources[many.source_N[int(row)]] for row in columns['row']
  ]


def test_target_examples_point_at_rows_that_are_there(shown):
  packed = explorer.pack(shown, 120, 10_000_000)
  header, columns, _ = unpack(packed)
  assert len(columns['row']) == 120
  assert header['pool'] == 3000
  assert len(header['examples']) == 6
  for example in header['examples']:
    assert set(example['rows']) <= set(columns['row'].tolist())
    assert example['scores'][0] > example['scores'][4] > 0 > example['scores'][5] or example['target']


def test_rows_are_taken_in_the_order_of_their_worth(shown):
  row_N = explorer.choose(shown, 1_000)
  assert len(row_N) == len(set(row_N.tolist())) == 1_000
  assert (np.diff(row_N) > 0).all()
  for score_N in shown.scores.values():
    order_N = np.argsort(-score_N, kind='stable')
    assert set(order_N[:60]) | set(order_N[-60:]) <= set(row_N.tolist())
  shares = [np.isin(s.rows, row_N).mean() for s in shown.selected if s.method == 'random']
  assert min(shares) > 1.2 * 1_000 / 3_000  # what was selected is more often there than the rest
  assert len(explorer.choose(dataclasses.replace(shown, selected=[], examples={}), 500)) == 500


@pytest.mark.parametrize('limit', [3_000, 20_000])
def test_text_is_cut_to_fit(limit):
  rng = random.Random(0)
  texts = [''.join(rng.choices('abcdefgh ', k=rng.randrange(200, 900))) for _ in range(100)]
  packed, characters = explorer._fitting(texts, limit)
  assert len(packed) <= limit
  assert len(packed) > 0.8 * limit
  assert gzip.decompress(base64.b64decode(packed)).decode().split('\0') == [t[:characters] for t in texts]
  whole, none = explorer._fitting(texts, 10_000_000)
  assert none is None
  assert len(gzip.decompress(base64.b64decode(whole))) == sum(map(len, texts)) + 99


def test_a_little_of_each_text_stays():
  packed, characters = explorer._fitting(['x' * 50 + str(i) for i in range(1000)], 10)
  assert characters == explorer._LEAST_CHARACTERS
  assert len(packed) > 10


def test_only_documents_of_the_chosen_rows_are_looked_up(shown):
  asked = []

  class Documents(list):
    def __getitem__(self, index):
      asked.append(int(index))
      return list.__getitem__(self, index)

    def __iter__(self):
      raise AssertionError('all documents were read')

  watched = dataclasses.replace(shown, documents=Documents(shown.documents), text=str)
  packed = explorer.pack(watched, 20, 10_000_000)
  assert sorted(asked) == sorted(set(shown.document_N[packed.row_N].tolist()))
  header, columns, _ = unpack(packed)
  names = [header['documents'][d] for d in columns['document']]
  assert names == [shown.documents[shown.document_N[n]]['id'] for n in columns['row']]
  assert names == sorted(names)


def test_text_with_the_mark_between_texts(shown):
  packed = explorer.pack(dataclasses.replace(shown, text=lambda n: f'a\0b{n}'), 3_000, 10_000_000)
  _, columns, text = unpack(packed)
  assert text == [f'a\u2400b{n}' for n in columns['row']]

"""From item values to `results.json` and its table."""

import json

import numpy as np
import pytest

from dsdm_jax.core.errors import UserError
from dsdm_jax.evaluation import results

RUNS = [
  {'method': method, 'target_mix': target, 'seed': seed}
  for method, target in (
    ('dsdm', 'mix'),
    ('dsdm', 'docs'),
    ('random', 'any'),
    ('random_one_epoch', 'any'),
    ('bottom', 'mix'),
  )
  for seed in range(3)
]
EFFECT = {'dsdm': 0.3, 'random': 0.0, 'random_one_epoch': 0.0, 'bottom': -0.5}


def _items(runs=RUNS, count=40):
  g = np.random.default_rng(1)
  items = {}
  for task in ('docs', 'api_qa'):
    for split in ('target', 'holdout'):
      item_I = g.normal(-4, 1, count)
      values = [item_I + EFFECT[run['method']] + g.normal(0, 0.02) + g.normal(0, 0.05, count) for run in runs]
      items[f'logprob__{task}__{split}'] = np.stack(values).astype(np.float32)
      items[f'accuracy__{task}__{split}'] = (g.random((len(runs), count)) < 0.2).astype(np.float32)
  return items


def _results(items=None, runs=RUNS, **options):
  return results.results(
    _items(runs) if items is None else items, runs, confidence=0.95, cost={'pool': {'seconds': 1.0, 'flop': 2.0}},
    versions={'jax': '0'}, config={'seed': 0}, **options,
  )  # fmt: skip


def test_schema_and_values():
  items = _items()
  found = _results(items)
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert len(found['arms']) == len(RUNS) * 4
  first = found['arms'][0]
  assert set(first) == {'method', 'target_mix', 'seed', 'task', 'split', 'logprob', 'accuracy', 'n_items'}
  assert first['logprob'] == pytest.approx(
    float(items['logprob__docs__target'][0].astype(np.float64).mean()), rel=1e-12
  )
  assert first['n_items'] == 40
  summary = next(
    r
    for r in found['summary']
    if (r['method'], r['target_mix'], r['task'], r['split']) == ('dsdm', 'mix', 'docs', 'holdout')
  )
  assert summary['logprob'] == pytest.approx(items['logprob__docs__holdout'][:3].mean(), rel=1e-6)
  assert summary['low'] < summary['logprob'] < summary['high']


def test_comparisons():
  found = _results()
  pairs = [(c['method'], c['target_mix'], c['baseline']) for c in found['comparisons'] if c['task'] == 'docs']
  assert pairs == [
    ('dsdm', 'mix', 'random'),
    ('dsdm', 'docs', 'random'),
    ('random_one_epoch', 'any', 'random'),
    ('bottom', 'mix', 'random'),
    ('dsdm', 'mix', 'random_one_epoch'),
    ('dsdm', 'docs', 'random_one_epoch'),
    ('bottom', 'mix', 'random_one_epoch'),
    ('dsdm', 'mix', 'bottom'),
    ('dsdm', 'docs', 'bottom'),
  ]
  verdicts = {(c['method'], c['baseline']): c['verdict'] for c in found['comparisons']}
  assert verdicts['dsdm', 'random'] == 'better'
  assert verdicts['bottom', 'random'] == 'worse'
  assert verdicts['random_one_epoch', 'random'] == 'no evidence'
  for c in found['comparisons']:
    assert c['split'] == 'holdout'
    assert c['p_value'] <= c['p_holm'] <= 1
    assert (c['verdict'] == 'better') == (c['low'] > 0)


def test_paired_seeds_match_by_number():
  """Rows in another order, and a seed that only one arm has, change nothing that is shared."""
  g = np.random.default_rng(4)
  order = [2, 0, 1, *range(3, len(RUNS))]
  items = _items()
  start_S = g.normal(0, 0.5, 3)  # what the models of one seed have in common
  for key in items:
    items[key] += np.tile(start_S, 5)[:, None].astype(np.float32)
  plain = _results(items, paired_seeds=True)['comparisons']
  shuffled_runs = [RUNS[i] for i in order]
  shuffled = results.results(
    {key: values_RI[order] for key, values_RI in items.items()}, shuffled_runs, confidence=0.95, cost={}, versions={},
    config={}, paired_seeds=True,
  )['comparisons']  # fmt: skip
  widths = [[c['high'] - c['low'] for c in found] for found in (plain, shuffled)]
  np.testing.assert_allclose(widths[0], widths[1], rtol=1e-6)
  independent = _results(items)['comparisons']
  assert plain[0]['high'] - plain[0]['low'] < 0.3 * (independent[0]['high'] - independent[0]['low'])
  assert plain[0]['paired_seeds']


def test_document_clusters_widen_intervals():
  """Ten documents in which all items move alike leave less to judge by than forty items."""
  g = np.random.default_rng(3)
  items = _items()
  shift_I = np.repeat(g.normal(0, 0.5, 10), 4)
  items['logprob__docs__holdout'][:3] += shift_I
  documents = {('docs', 'holdout'): [f'd{i // 4}' for i in range(40)]}
  wide, narrow = _results(items, documents=documents), _results(items)
  width = [next(c['high'] - c['low'] for c in r['comparisons'] if c['task'] == 'docs') for r in (wide, narrow)]
  assert width[0] > 1.3 * width[1]


def test_one_document_for_all_says_nothing():
  assert _results(documents={('docs', 'holdout'): ['file'] * 40})['comparisons'] == _results()['comparisons']


def test_table_shows_every_comparison_unbroken():
  found = _results()
  lines = results.table(found).splitlines()
  assert sum('[' in line and ']' in line for line in lines) == len(found['comparisons'])
  assert any('dsdm (docs) − random ' in line and 'better' in line for line in lines)
  assert max(map(len, lines)) <= 110
  assert '…' not in ''.join(lines)


@pytest.mark.parametrize(
  ('spoil', 'said'),
  [
    (lambda items: items['logprob__docs__holdout'].__setitem__((0, 0), np.nan), 'finite'),
    (lambda items: items.update(logprob__docs__holdout=np.zeros((2, 40), np.float32)), '15 runs'),
    (
      lambda items: items.update({f'{k}__docs__target': np.zeros((15, 1)) for k in ('logprob', 'accuracy')}),
      'two of them',
    ),
  ],
)
def test_refuses_in_one_line(spoil, said):
  items = _items()
  spoil(items)
  with pytest.raises(UserError, match=said) as caught:
    _results(items)
  assert 'docs' in str(caught.value)
  assert '\n' not in str(caught.value)

"""From item values to `results.json` and its table."""

import json

import numpy as np
import pytest

from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import results, statistics
from dsdm_jax.evaluation.comparisons import Options

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


def _results(items=None, runs=RUNS, documents=(), categories=(), **options):
  values = _items(runs) if items is None else items
  return results.results(results.Items(values, dict(documents), dict(categories)), runs, Options(**options))


def test_schema_and_values():
  items = _items()
  found = _results(items)
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert len(found['arms']) == len(RUNS) * 4
  first = found['arms'][0]
  assert set(first) == {
    'method',
    'target_mix',
    'seed',
    'task',
    'split',
    'logprob',
    'accuracy',
    'acc',
    'acc_norm',
    'n_items',
  }
  assert first['acc'] is None
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


def test_accuracies_stay_within_their_bounds():
  items = {}
  for name, rate in (('low', 0.02), ('high', 0.98)):
    g = np.random.default_rng(0)
    items[f'logprob__{name}__holdout'] = g.normal(-4, 1, (len(RUNS), 12))
    right_RI = g.random((len(RUNS), 12)) < rate
    right_RI[::3] = name == 'low'  # one seed of three differs, so that intervals are wide
    items[f'accuracy__{name}__holdout'] = right_RI.astype(np.float32)
  found = _results(items)
  ends = [row[f'accuracy_{end}'] for row in found['summary'] for end in ('low', 'high')]
  assert min(ends) == 0 and max(ends) == 1
  ends = [c[end] for c in found['accuracy_comparisons'] for end in ('low', 'high')]
  assert min(ends) >= -1 and max(ends) <= 1


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
    assert (c['verdict'] == 'better') == (c['p_holm'] < 0.05 and c['difference'] > 0)
    assert c['conditional'], 'no selections are named, so nothing says that there are several'


def test_paired_seeds_match_by_number():
  """Rows in another order, and a seed that only one arm has, change nothing that is shared."""
  g = np.random.default_rng(4)
  order = [2, 0, 1, *range(3, len(RUNS))]
  items = _items()
  start_S = g.normal(0, 0.5, 3)  # what the models of one seed have in common
  for key in items:
    items[key] += np.tile(start_S, 5)[:, None].astype(np.float32)
  plain = _results(items, paired_seeds=True)['comparisons']
  shuffled_items = {key: values_RI[order] for key, values_RI in items.items()}
  shuffled = _results(shuffled_items, [RUNS[i] for i in order], paired_seeds=True)['comparisons']
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
  lines = results.text_tables(found).splitlines()
  assert sum('[' in line and ']' in line for line in lines) == len(found['comparisons'])
  for note in found['notes']:
    assert note[:40] in ' '.join(lines)
  assert any('dsdm (docs) − random ' in line and 'better' in line for line in lines)
  assert max(map(len, lines)) <= 110
  assert '…' not in ''.join(lines)


def test_the_main_comparison_fits_a_terminal():
  found = _results()
  head, columns, *rows = results.main_table(found).splitlines()
  assert head == 'dsdm − random (above zero: dsdm is better)'
  assert columns.split('  ')[1] == 'task' and 'right (random, guessing)' in columns
  mine = [c for c in found['comparisons'] if (c['method'], c['baseline']) == ('dsdm', 'random')]
  first = found['comparisons'][0]
  mine = [c for c in mine if c['target_mix'] == first['target_mix']]
  assert [row.split()[:2] for row in rows] == [[c['task'], f'{c["difference"]:+.3f}'] for c in mine]
  for c in found['comparisons']:
    c['task'] = c['task'] * 30
  assert max(map(len, results.main_table(found).splitlines())) <= 80


def test_accuracies_on_benchmarks_have_intervals_where_they_fit():
  def lines(tasks: int) -> list[str]:
    items = {}
    for metric in ('logprob', 'accuracy'):
      for task in range(tasks):
        items[f'{metric}__task{task}__benchmark'] = _items()[f'{metric}__docs__holdout']
    found = _results(items)
    printed = results.text_tables(found).splitlines()
    assert max(map(len, printed)) <= 110 and '…' not in ''.join(printed)
    (row,) = (r for r in found['summary'] if (r['method'], r['task']) == ('random', 'task0'))
    value, end = f'{row["accuracy"]:.3f}', f' [{row["accuracy_low"]:.2f}, {row["accuracy_high"]:.2f}]'
    (line,) = (line for line in printed if line.strip().startswith('random ') and value in line and '−' not in line)
    return [line.count(value + end), line.count(value)]

  assert lines(3) == [3, 3]
  assert lines(6) == [0, 6]


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda items: items['logprob__docs__holdout'].__setitem__((0, 0), np.nan), 'finite'),
    (lambda items: items.update(logprob__docs__holdout=np.zeros((2, 40), np.float32)), '15 runs'),
    (
      lambda items: items.update({f'{k}__docs__target': np.zeros((15, 1)) for k in ('logprob', 'accuracy')}),
      'two of them',
    ),
  ],
)
def test_refuses_in_one_line(spoil, message):
  items = _items()
  spoil(items)
  with pytest.raises(UserError, match=message) as caught:
    _results(items)
  assert 'docs' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_holm_is_over_the_arms_of_one_task():
  found = _results()
  for task in ('docs', 'api_qa'):
    rows = [c for c in found['comparisons'] if c['task'] == task]
    assert [c['p_holm'] for c in rows] == statistics.holm([c['p_value'] for c in rows]).tolist()


def test_verdict_needs_three_seeds_on_both_sides():
  """A plain difference at two seeds or one remains without a verdict, as the notes say."""
  g = np.random.default_rng(5)
  item_I = g.normal(-4, 1, 60)

  def verdict(seeds: int) -> tuple[str, str, bool]:
    runs = [r for r in RUNS if r['method'] in ('bottom', 'random') and r['seed'] < seeds]
    values = [item_I + (-3 if r['method'] == 'bottom' else 0) + g.normal(0, 0.001, 60) for r in runs]
    items = {'logprob__docs__holdout': np.stack(values), 'accuracy__docs__holdout': np.zeros((len(runs), 60))}
    found = _results(items, runs)
    first = found['comparisons'][0]
    return first['verdict'], first['basis'], any('no verdict is given' in note for note in found['notes'])

  assert verdict(3) == ('worse', 'seeds and items', False)
  assert verdict(2) == ('no evidence', 'seeds and items', False)
  assert verdict(1) == ('no evidence', 'items only (bootstrap)', True)


def test_arms_without_a_baseline_are_tabulated_and_the_note_says_what_is_missing():
  runs = [r for r in RUNS if (r['method'], r['target_mix']) == ('dsdm', 'mix')]
  found = _results(_items(runs), runs)
  assert not found['comparisons']
  printed = results.text_tables(found)
  assert 'No two arms are compared' in printed and printed.count('dsdm') == 1


def test_conditional_on_one_selection():
  """Random arms draw rows for each seed; DsDm has one choice, unless proxies were retrained for each."""
  for drawn, conditional in ((False, True), (True, False)):
    runs = [
      {**r, 'selection': f'{r["method"]}--{r["seed"] if drawn or r["method"] == "random" else 0}'}
      for r in RUNS
      if r['method'] in ('random', 'random_one_epoch', 'dsdm')
    ]
    found = _results(_items(runs), runs)
    by_pair = {(c['method'], c['baseline']): c['conditional'] for c in found['comparisons']}
    assert by_pair['dsdm', 'random'] == conditional
    assert any('one selection' in note for note in found['notes']) == conditional


def test_arms_that_share_a_model_are_not_compared():
  """As `dsdm/again` of a study, whose first model is one of `dsdm`: with a model on both sides noise would cancel."""

  def pairs(joined: list[str]) -> set[tuple[str, str]]:
    selections = {'dsdm': ['a', 'b', 'c'], 'random': ['d', 'e', 'f'], 'random_one_epoch': joined}
    runs = [
      {'method': method, 'target_mix': 'mix', 'seed': seed, 'selection': name}
      for method, names in selections.items()
      for seed, name in enumerate(names)
    ]
    return {(c['method'], c['baseline']) for c in _results(_items(runs), runs)['comparisons']}

  alone = {('dsdm', 'random'), ('random_one_epoch', 'random'), ('dsdm', 'random_one_epoch')}
  assert pairs(['g', 'h', 'i']) == pairs(['g', 'a', 'd']) == alone, 'the same rows by another seed are another model'
  assert pairs(['g', 'b', 'i']) == alone - {('dsdm', 'random_one_epoch')}
  assert pairs(['g', 'b', 'f']) == {('dsdm', 'random')}


def test_macro_average_over_categories():
  items = _items()
  category = ['few'] * 4 + ['many'] * 36
  found = _results(items, categories={('docs', 'holdout'): category})
  values_I = items['logprob__docs__holdout'][0].astype(np.float64)
  row = next(r for r in found['arms'] if (r['task'], r['split']) == ('docs', 'holdout'))
  assert row['logprob'] == pytest.approx((values_I[:4].mean() + values_I[4:].mean()) / 2, rel=1e-9)
  plain = next(r for r in _results(items)['arms'] if (r['task'], r['split']) == ('docs', 'holdout'))
  assert abs(plain['logprob'] - row['logprob']) > 1e-3


def test_mean_over_tasks_weighs_tasks_alike():
  """Of 40 and 10 items: the mean of the two tasks' means, and an interval that knows that seeds are shared."""
  g = np.random.default_rng(6)
  runs = [r for r in RUNS if r['method'] in ('dsdm', 'random')]
  items = {}
  shift_R = g.normal(0, 0.3, (len(runs), 1))
  for task, count in (('docs', 40), ('api_qa', 10)):
    item_I = g.normal(-4, 1, count)
    items[f'logprob__{task}__holdout'] = item_I + shift_R + g.normal(0, 0.01, (len(runs), count))
    items[f'accuracy__{task}__holdout'] = np.zeros((len(runs), count))
  found = _results(items, runs)
  single = {(r['method'], r['target_mix'], r['task']): r['logprob'] for r in found['summary']}
  for row in found['means']['summary']:
    arm = (row['method'], row['target_mix'])
    assert row['logprob'] == pytest.approx((single[(*arm, 'docs')] + single[(*arm, 'api_qa')]) / 2, rel=1e-9)
  widths = [c['high'] - c['low'] for c in found['comparisons'] if c['target_mix'] == 'mix']
  together = next(c for c in found['means']['comparisons'] if c['metric'] == 'logprob')
  assert together['high'] - together['low'] > 0.9 * min(widths), 'independent tasks would make it 0.7 of one'


def test_a_document_with_items_of_two_tasks_counts_once_in_their_mean():
  """Twenty documents that move both tasks alike: the mean is as uncertain as one task, and less with other names."""
  g = np.random.default_rng(7)
  runs = [r for r in RUNS if r['method'] in ('dsdm', 'random')]
  names = [f'd{i // 5}' for i in range(100)]
  effect_I = np.repeat(g.normal(0, 1, 20), 5) * (np.array([[r['method'] == 'dsdm'] for r in runs]))
  values = {'logprob': effect_I + g.normal(0, 0.01, effect_I.shape), 'accuracy': np.zeros(effect_I.shape)}
  items = {f'{metric}__{task}__holdout': v for task in ('docs', 'api_qa') for metric, v in values.items()}
  other = [f'another {name}' for name in names]

  def width(second: list[str]) -> float:
    documents = {('docs', 'holdout'): names, ('api_qa', 'holdout'): second}
    compared = _results(items, runs, documents)['means']['comparisons']
    row = next(c for c in compared if c['metric'] == 'logprob')
    return row['high'] - row['low']

  assert width(names) > 1.3 * width(other)


def test_a_mix_of_some_tasks_has_a_mean_of_its_own():
  """Over its held-out tasks alone; a mix of all tasks, or of a task that was not held out, has none."""
  mixes = ('docs+api_qa', 'docs+api_qa+puzzles', 'docs+elsewhere')
  runs = [{'method': 'dsdm', 'target_mix': mix, 'seed': seed} for mix in mixes for seed in range(3)]
  g = np.random.default_rng(8)
  items = {}
  for task, split in (('docs', 'holdout'), ('api_qa', 'holdout'), ('puzzles', 'holdout'), ('docs', 'target')):
    items[f'logprob__{task}__{split}'] = g.normal(-4, 1, (len(runs), 20))
    items[f'accuracy__{task}__{split}'] = np.zeros((len(runs), 20))
  found = _results(items, runs)
  rows = found['means']['summary']
  assert {row['task'] for row in rows} == {'mean', 'docs+api_qa'}
  single = {(r['target_mix'], r['task']): r['logprob'] for r in found['summary'] if r['split'] == 'holdout'}
  for row in rows:
    tasks = ('docs', 'api_qa', 'puzzles') if row['task'] == 'mean' else ('docs', 'api_qa')
    assert row['logprob'] == pytest.approx(np.mean([single[row['target_mix'], task] for task in tasks]), rel=1e-9)


def test_random_arms_rarely_get_a_verdict():
  """Forty comparisons of arms that are alike, as `results.json` judges them, five to a task: at most five verdicts."""
  runs = [
    {'method': method, 'target_mix': target, 'seed': seed}
    for method, target in [('random', 'any'), *(('dsdm', f't{i}') for i in range(5))]
    for seed in range(3)
  ]
  g = np.random.default_rng(7)
  items = {}
  for task in range(8):
    item_I = g.normal(-4, 1, 100)
    taste_RI = np.repeat(g.normal(0, 0.1, (6, 100)), 3, axis=0)
    noise_RI = g.normal(0, 0.05, (18, 1)) + g.normal(0, 0.2, (18, 100))
    items[f'logprob__{task}__holdout'] = item_I + taste_RI + noise_RI
    items[f'accuracy__{task}__holdout'] = np.zeros((18, 100))
  found = _results(items, runs)['comparisons']
  assert len(found) == 40
  assert sum(c['verdict'] != 'no evidence' for c in found) <= 5
  assert sum(c['p_value'] < 0.05 for c in found) <= 5


def test_arms_below_their_lines_are_marked_and_leave_the_means():
  """The line of every run is its own values plus 0.1 (`low` for `docs`), or minus 0.1; `bottom` is always below."""
  items = _items()
  base = {key.split('__', 1)[1]: values for key, values in items.items() if key.startswith('logprob')}
  base |= {'third__holdout': base['docs__holdout'] - 1}
  items |= {f'{metric}__third__holdout': base['third__holdout'] for metric in ('logprob', 'accuracy')}
  bottom_R = np.array([run['method'] == 'bottom' for run in RUNS])[:, None]
  height = {'docs': -0.1, 'api_qa': 0.1, 'third': -0.3}
  lines = {}
  for task, above in height.items():
    for line, more in (('bigram', -1.0), ('5-gram', 0.0)):
      values_RI = base[f'{task}__holdout'] + above + more
      lines[f'{line}__logprob__{task}__holdout'] = np.where(bottom_R & (more == 0), values_RI + 1, values_RI)
  found = results.results(results.Items(items, lines=lines), RUNS, Options())
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert len(found['lines']) == 5 * 3 * 2
  for row in found['summary']:
    if row['split'] == 'holdout':
      below = row['task'] == 'api_qa' or row['method'] == 'bottom'
      assert row['below_ngrams'] == below and row['best_line'] == '5-gram'
      over = -height[row['task']] - (row['method'] == 'bottom')
      assert row['over_line'] == pytest.approx(over, abs=1e-6)
      assert row['over_line_low'] <= row['over_line'] <= row['over_line_high']
    else:
      assert row['below_ngrams'] is None and row['best_line'] is None
  for c in found['comparisons']:
    assert c['below_ngrams'] == (c['task'] == 'api_qa' or 'bottom' in (c['method'], c['baseline']))
  means = [row for row in found['means']['summary'] if row['method'] == 'dsdm' and row['target_mix'] == 'mix']
  expected = (base['docs__holdout'][:3].mean() + base['third__holdout'][:3].mean()) / 2  # without `api_qa`
  assert [row['logprob'] for row in means] == [pytest.approx(expected, rel=1e-6)]
  assert not any(c['below_ngrams'] for c in found['means']['comparisons'])
  assert any('api_qa (holdout)' in note for note in found['notes'])
  text = results.text_tables(found)
  assert text.count('below n-grams') == 5 + 2 + 0
  # With one task above, the mean is over all of them and is marked.
  lines |= {key: values + 0.2 for key, values in lines.items() if '__docs__' in key}
  found = results.results(results.Items(items, lines=lines), RUNS, Options())
  assert all(row['below_ngrams'] for row in found['means']['summary'] + found['means']['comparisons'])
  assert found['means']['summary'][0]['logprob'] < expected + 1


def test_right_choices_decide_the_mark_of_tasks_with_choices():
  items = _items()
  right = {'accuracy': 0.0, 'logprob': -9.0}
  lines = {f'5-gram__{m}__docs__holdout': np.full_like(items[f'{m}__docs__holdout'], right[m]) for m in right}
  lines['5-gram__accuracy__docs__holdout'] += 1
  lines['5-gram__logprob__api_qa__holdout'] = np.zeros_like(items['logprob__api_qa__holdout'])
  found = results.results(results.Items(items, lines=lines), RUNS, Options())
  marks = {
    (kind, c['task']): c['below_ngrams'] for kind in ('comparisons', 'accuracy_comparisons') for c in found[kind]
  }
  assert marks == {
    ('comparisons', 'docs'): True,  # though far above in log-probability
    ('comparisons', 'api_qa'): True,
    ('accuracy_comparisons', 'docs'): True,
    ('accuracy_comparisons', 'api_qa'): True,  # it has no choices: the log-probability decides
  }
  lines['5-gram__logprob__docs__holdout'] += 9
  lines['5-gram__accuracy__docs__holdout'] -= 1.1
  found = results.results(results.Items(items, lines=lines), RUNS, Options())
  marks = {c['task']: c['below_ngrams'] for c in found['comparisons']}
  assert marks == {'docs': False, 'api_qa': True}, 'counts are better in log-probability and choose worse'
  assert any('docs (holdout), api_qa (holdout)' in note for note in found['notes']), 'means are of log-probabilities'

"""Sentences and numbers."""

import pytest

from dsdm_jax.report import formatting


def _comparison(task, difference, half, verdict, baseline='random', target='mix', split='holdout', seeds=3):
  return {
    'method': 'dsdm',
    'target_mix': target,
    'baseline': baseline,
    'task': task,
    'split': split,
    'difference': difference,
    'low': difference - half,
    'high': difference + half,
    'verdict': verdict,
    'seeds': [3, seeds],
  }


def _results(*comparisons, summary=(), accuracies=(), tasks=()):
  return {'comparisons': comparisons, 'summary': summary, 'accuracy_comparisons': accuracies, 'tasks': tasks}


def _headlines(*comparisons, **parts):
  return [s.replace('\u00a0', ' ') for s in formatting.headlines(_results(*comparisons, **parts))]


_NONE_RIGHT = 'No model answers an item right as a whole, so the measure is how likely the right answer is.'
_START = 'Compared with as many passes over random data at the same training budget,'


def test_headline_for_each_outcome():
  better = _comparison('docs', 0.17, 0.05, 'better')
  worse = _comparison('api_qa', -0.3, 0.1, 'worse')
  neither = _comparison('cs_algorithms', 0.01, 0.04, 'no evidence')
  assert _headlines(better) == [
    f'{_START} they make the right token 1.19 times as likely on docs (+0.17 nats [0.12, 0.22]).',
    _NONE_RIGHT,
  ]
  assert _headlines(better, worse, neither)[0] == (
    f'{_START} they make the right token 1.19 times as likely on docs (+0.17 nats [0.12, 0.22]) and 0.74 times as '
    'likely on api_qa (−0.30 nats [−0.40, −0.20]); chance may explain the difference on cs_algorithms '
    '(+0.01 nats [−0.03, 0.05]).'
  )
  assert _headlines(neither)[0] == (
    f'{_START} there is no evidence of a difference on cs_algorithms (+0.01 nats [−0.03, 0.05]).'
  )
  assert _headlines() == []
  many = [_comparison(f't{i}', 0.1 * i, 0.05, 'better') for i in range(1, 7)]
  assert _headlines(*many)[0] == f'{_START} they make the right token between 1.11 times and 1.82 times as likely.'


@pytest.mark.parametrize(('seeds', 'models'), [(2, '2 models of each kind are'), (1, 'one model of each kind is')])
def test_few_seeds_give_no_verdict_in_any_word(seeds, models):
  few = _comparison('docs', 0.17, 0.05, 'no evidence', seeds=seeds)
  title = formatting.title(_results(few))
  assert title == f'A first look at data chosen by DsDm: {models} too few for a verdict'
  said = ' '.join([title, *_headlines(few)])
  assert f'{_START} log-probability changes by +0.17 nats [0.12, 0.22] on docs.' in said
  assert not {'better', 'worse', 'evidence', 'likely on'} & {
    w for w in ('better', 'worse', 'evidence', 'likely on') if w in said
  }


def test_right_answers_are_beside_those_of_guessing():
  c = _comparison('cloze', 0.17, 0.05, 'better')
  summary = [
    {'method': m, 'target_mix': t, 'task': 'cloze', 'split': 'holdout', 'accuracy': a}
    for m, t, a in (('dsdm', 'mix', 0.375), ('random', 'any', 0.3))
  ]
  tasks = [{'task': 'cloze', 'split': 'holdout', 'chance': 0.25}]
  found = _headlines(c, summary=summary, tasks=tasks)
  assert found[1] == 'The share of items answered right is 37.5 % instead of 30.0 % (guessing: 25.0 %) on cloze.'
  assert formatting.right_answers(_results(c, summary=summary, tasks=tasks), c)['chance'] == 0.25


def test_right_choices_come_first_beside_guessing_and_counting():
  nats = [_comparison(task, 0.4, 0.1, 'better') for task in ('brackets', 'next_code')]
  arms = ('dsdm', 'mix'), ('random', 'any')
  share = {('dsdm', 'brackets'): 0.87, ('random', 'brackets'): 0.74, ('dsdm', 'next_code'): 0.47}
  summary = [
    {'method': m, 'target_mix': t, 'task': task, 'split': 'holdout', 'accuracy': share.get((m, task), 0.45)}
    for task in ('brackets', 'next_code')
    for m, t in arms
  ]
  accuracies = [
    _comparison('brackets', 0.13, 0.05, 'better') | {'metric': 'accuracy'},
    _comparison('next_code', 0.02, 0.06, 'no evidence') | {'metric': 'accuracy'},
  ]
  facts = {'split': 'holdout', 'rule': 'shared_continuation'}
  tasks = [{'task': 'brackets', 'chance': 0.5, **facts}, {'task': 'next_code', 'chance': 0.25, **facts}]
  line = {'method': 'dsdm', 'target_mix': 'mix', 'task': 'brackets', 'split': 'holdout'}
  lines = [{**line, 'accuracy': share} for share in (0.5, 0.53, None)]
  results = _results(*nats, summary=summary, accuracies=accuracies, tasks=tasks) | {'lines': lines}
  first, second = (sentence.replace('\u00a0', ' ') for sentence in formatting.headlines(results))
  assert first == (
    f'{_START} these models choose right in 87 % instead of 74 % on brackets (+13 points [8, 18]; guessing: 50 %; '
    'n-grams: 53 %); chance may explain the rest: 47 % instead of 45 % on next_code '
    '(+2 points [−4, 8]; guessing: 25 %).'
  )
  assert second.startswith('In log-probability, they make the right token 1.49 times as likely on brackets (+0.40 nats')
  open_ = results | {'accuracy_comparisons': [c | {'verdict': 'no evidence'} for c in accuracies]}
  first, second = (sentence.replace('\u00a0', ' ') for sentence in formatting.headlines(open_))
  assert first.startswith(f'{_START} they make the right token 1.49 times as likely on brackets')
  assert second.startswith('In right choices, chance may explain the difference: 87 % instead of 74 %')
  few = [c | {'seeds': [2, 2]} for c in nats]
  assert formatting.headlines(results | {'comparisons': few})[1].startswith('Log-probability changes by +0.40')


def test_headline_prefers_the_arm_for_all_targets():
  mix = _comparison('docs', 0.1, 0.05, 'better')
  single = _comparison('docs', 0.9, 0.05, 'better', target='docs')
  assert '0.10' in _headlines(mix, single)[0]
  assert '0.90' not in _headlines(mix, single)[0]


def test_headline_of_single_targets_speaks_of_their_own_task():
  own = _comparison('docs', 0.5, 0.05, 'better', target='docs')
  other = _comparison('docs', 0.2, 0.05, 'better', target='api_qa')
  assert '0.50' in _headlines(own, other)[0]
  assert '0.20' not in _headlines(own, other)[0]


def test_headline_of_several_arms_speaks_of_each_task_by_the_first_arm_for_it():
  arms = ('docs+api_qa', 'mine', 'docs')
  rows = [_comparison(task, 0.1, 0.05, 'better', target=arm) for arm in arms for task in ('docs', 'api_qa', 'mine')]
  found = formatting.main_comparisons(_results(*rows))
  assert [(c['target_mix'], c['task']) for c in found] == [
    ('docs+api_qa', 'docs'),
    ('docs+api_qa', 'api_qa'),
    ('mine', 'mine'),
  ]


def test_a_run_without_dsdm_has_a_headline_of_its_first_method():
  c = {**_comparison('docs', 0.17, 0.05, 'better'), 'method': 'dsir'}
  control = {**_comparison('docs', -0.3, 0.05, 'worse'), 'method': 'bottom'}
  assert formatting.title(_results(control, c)) == 'Data chosen by DSIR train a better model than random data'
  assert formatting.title(_results(control)) == 'Data selection with datamodels'


@pytest.mark.parametrize(
  ('verdicts', 'title'),
  [
    (['better', 'better'], 'Data chosen by DsDm train a better model than random data on both targets'),
    (['better'], 'Data chosen by DsDm train a better model than random data'),
    (
      ['better', 'no evidence', 'no evidence'],
      'Data chosen by DsDm train a better model than random data on 1 of 3 targets',
    ),
    (['no evidence'], 'Data chosen by DsDm and random data train models that do not measurably differ'),
    (
      ['better', 'worse'],
      'Data chosen by DsDm train a better model than random data on 1 of 2 targets and a worse one on 1',
    ),
    (['worse'], 'Data chosen by DsDm train a worse model than random data'),
    ([], 'Data selection with datamodels'),
  ],
)
def test_title_follows_the_verdicts(verdicts, title):
  rows = [_comparison(f't{i}', 0.0, 1.0, verdict) for i, verdict in enumerate(verdicts)]
  assert formatting.title(_results(*rows)) == title


def test_a_task_counts_as_better_only_against_every_baseline():
  equal = _comparison('docs', 0.17, 0.05, 'better')
  for verdict, words in (
    ('better', 'better model'),
    ('no evidence', 'do not measurably differ'),
    ('worse', 'worse model'),
  ):
    single = _comparison('docs', 0.2, 0.05, verdict, baseline='random_one_epoch')
    assert words in formatting.title(_results(equal, single))
  assert 'a single pass over random data' in _headlines(single)[0]


def test_tasks_below_n_grams_are_named_and_explained():
  above = _comparison('docs', 0.17, 0.05, 'better')
  below = _comparison('api_qa', 0.3, 0.05, 'better') | {'below_ngrams': True}
  last = _headlines(above, below)[-1]
  assert last.startswith('On api_qa, n-grams predict the right answers better than the models') and 'docs' not in last
  assert formatting.title(_results(above, below)) == (
    'Data chosen by DsDm train a better model than random data on both targets, but these models are still weaker '
    'than simple counting on 1 of 2 targets'
  )
  alike = _comparison('docs', 0.01, 0.05, 'no evidence') | {'below_ngrams': True}
  assert formatting.title(_results(alike)).endswith(
    'not measurably differ, and these models are still weaker than simple counting'
  )
  assert formatting.title(_results(below)) == (
    'Data chosen by DsDm train a better model than random data, but these models are still weaker than simple counting'
  )


def test_benchmarks_are_called_so():
  rows = [_comparison('docs', 0.17, 0.05, 'better'), _comparison('piqa', 0.2, 0.05, 'better', split='benchmark')]
  assert formatting.title(_results(*rows)).endswith('than random data on both tasks')
  assert 'on piqa (benchmark) (+0.20 nats [0.15, 0.25])' in _headlines(*rows)[0]
  assert formatting.row_task_name({'task': 'mean', 'split': 'benchmark'}) == 'mean of all benchmarks'


def test_tasks_have_the_names_that_the_user_wrote():
  assert [formatting.task_heading(name) for name in ('docs', 'my_task', 'mix')] == [
    'docs',
    'my_task',
    'All targets together',
  ]


@pytest.mark.parametrize(
  ('found', 'wanted'),
  [
    (formatting.signed(0.1), '+0.10'),
    (formatting.signed(-0.1), '−0.10'),
    (formatting.signed(-0.001), '0.00'),
    (formatting.scientific(0), '–'),
    (formatting.scientific(9.97e11), '1.0\u202f×\u202f10¹²'),
    (formatting.scientific(0.002), '2.0\u202f×\u202f10⁻³'),
    (formatting.duration(3.14), '3.1 s'),
    (formatting.duration(59.97), '1 min 0 s'),
    (formatting.duration(119.7), '2 min 0 s'),
    (formatting.duration(7260), '2 h 1 min'),
    (formatting.count(1234567), '1,234,567'),
    (formatting.percent(0.125), '12.5\u00a0%'),
    (formatting.percent(None), '–'),
    (formatting.interval(None, None), ''),
    (formatting.interval(-0.1, 0.2), '[−0.10,\u00a00.20]'),
    (formatting.joined(['a', 'b', 'c']), 'a, b and c'),
    (formatting.joined([]), ''),
    (formatting.p_value(0.0), '< 0.001'),
  ],
)
def test_numbers(found, wanted):
  assert found == wanted

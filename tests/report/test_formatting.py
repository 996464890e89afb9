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


def _headlines(*comparisons):
  return [s.replace('\u00a0', ' ') for s in formatting.headlines({'comparisons': comparisons})]


def test_headline_for_each_outcome():
  better = _comparison('docs', 0.17, 0.05, 'better')
  worse = _comparison('api_qa', -0.3, 0.1, 'worse')
  neither = _comparison('cs_algorithms', 0.01, 0.04, 'no evidence')
  start = 'In log-probability, the same model trained on data chosen by DsDm at the same token budget'
  end = 'with as many passes over randomly chosen data'
  assert _headlines(better) == [f'{start} is better by 0.17 nats [0.12, 0.22] on documentation prose than {end}.']
  assert _headlines(better, worse, neither) == [
    f'{start} is better by 0.17 nats [0.12, 0.22] on documentation prose but worse by 0.30 nats [0.20, 0.40] on '
    f'API questions than {end}; there is no evidence of a difference on CS algorithms [−0.03, 0.05].'
  ]
  assert _headlines(neither) == [
    f'{start} does not measurably differ from one trained {end}: CS algorithms [−0.03, 0.05].'
  ]
  assert _headlines() == []
  few = _comparison('docs', 0.17, 0.05, 'no evidence', seeds=2)
  assert _headlines(few) == [
    f'{start} and one trained {end} get no verdict, which takes three seeds: documentation prose [0.12, 0.22].'
  ]
  assert formatting.verdict_word({'comparisons': [few]}) == 'DsDm and random data: too few seeds for a verdict'


def test_second_headline_refers_to_the_first():
  equal = _comparison('docs', 0.17, 0.05, 'better')
  single = _comparison('docs', 0.2, 0.05, 'better', baseline='random_one_epoch')
  assert _headlines(equal, single)[1].startswith(
    'It is better by 0.20 nats [0.15, 0.25] on documentation prose than with a single'
  )
  assert _headlines(single)[0].startswith('In log-probability, the same model trained on data chosen by DsDm')


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


@pytest.mark.parametrize(
  ('verdicts', 'title'),
  [
    (['better', 'better'], 'DsDm beats random data in log-probability on all 2 targets'),
    (['better'], 'DsDm beats random data in log-probability'),
    (['better', 'no evidence', 'no evidence'], 'DsDm beats random data in log-probability on 1 of 3 targets'),
    (['no evidence'], 'DsDm and random data: this run shows no difference in log-probability'),
    (['better', 'worse'], 'In log-probability, DsDm beats random data on 1 and loses on 1 of 2 targets'),
    (['worse'], 'DsDm loses to random data in log-probability'),
    ([], 'Dataset selection with datamodels'),
  ],
)
def test_title_follows_the_verdicts(verdicts, title):
  rows = [_comparison(f't{i}', 0.0, 1.0, verdict) for i, verdict in enumerate(verdicts)]
  assert formatting.verdict_word({'comparisons': rows}) == title


def test_tasks_below_n_grams_are_named_and_no_result():
  above = _comparison('docs', 0.17, 0.05, 'better')
  below = _comparison('api_qa', 0.3, 0.05, 'better') | {'below_ngrams': True}
  first, last = _headlines(above, below)
  assert '0.17' in first and 'API' not in first and '0.30' not in first + last
  assert last.startswith('On API questions a model does not beat n-gram counts') and 'leaves it out' in last
  (only,) = _headlines(below)
  assert 'no result to put in a headline' in only and '0.30' not in only
  title = formatting.verdict_word({'comparisons': [below]})
  assert title == 'DsDm and random data: no target on which models beat n-gram counts'


def test_benchmarks_are_called_so():
  rows = [_comparison('docs', 0.17, 0.05, 'better'), _comparison('piqa', 0.2, 0.05, 'better', split='benchmark')]
  assert formatting.verdict_word({'comparisons': rows}) == 'DsDm beats random data in log-probability on all 2 tasks'
  assert '[0.15, 0.25] on piqa (benchmark) than' in _headlines(*rows)[0]
  assert formatting.row_task_name({'task': 'mean', 'split': 'benchmark'}) == 'mean of all benchmarks'


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
    (formatting.count(1234567), '1\u202f234\u202f567'),
    (formatting.joined(['a', 'b', 'c']), 'a, b and c'),
    (formatting.joined([]), ''),
    (formatting.p_value(0.0), '< 0.001'),
  ],
)
def test_numbers(found, wanted):
  assert found == wanted

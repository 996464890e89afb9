"""The linear datamodeling score by hand and with SciPy, its interval, and the ceiling from seeds."""

import numpy as np
import pytest
import scipy.stats

from dsdm_jax.core import storage
from dsdm_jax.validation import agreement, subsets, table
from dsdm_jax.validation.agreement import Resamples


def resamples(size: int, documents, count: int = 200) -> Resamples:
  return Resamples(0, size, documents, count, 0.95)


def test_lds_is_spearmans_correlation_averaged_over_targets():
  rng = np.random.default_rng(0)
  truth_ST = rng.standard_normal((30, 4))
  predicted_ST = truth_ST + rng.standard_normal((30, 4))
  predicted_ST[:5] = predicted_ST[5]  # ties
  found = agreement.lds(predicted_ST, truth_ST, resamples(30, list('abcd')))
  wanted = [scipy.stats.spearmanr(predicted_ST[:, t], truth_ST[:, t]).statistic for t in range(4)]
  assert found.lds == pytest.approx(np.mean(wanted), abs=1e-12)
  assert found.low < found.lds < found.high


@pytest.mark.parametrize(('predicted', 'wanted'), [(lambda x: 3 * x, 1.0), (lambda x: -(x**3), -1.0)])
def test_any_monotone_prediction_is_perfect(predicted, wanted):
  truth_ST = np.random.default_rng(1).standard_normal((20, 3))
  assert agreement.lds(predicted(truth_ST), truth_ST, resamples(20, list('abc'))).lds == pytest.approx(wanted)


def test_constant_prediction_has_no_correlation():
  truth_ST = np.random.default_rng(1).standard_normal((20, 3))
  assert agreement.lds(np.ones((20, 3)), truth_ST, resamples(20, list('abc'))) == agreement.Agreement(0.0, 0.0, 0.0)


def test_intervals_cover_the_truth():
  """Bivariate normal of known rank correlation; one target, so that subsets alone vary."""
  rho, inside, trials = 0.6, 0, 200
  rank_rho = 6 / np.pi * np.arcsin(rho / 2)
  rng = np.random.default_rng(2)
  for _ in range(trials):
    x = rng.standard_normal((60, 1))
    y = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal((60, 1))
    found = agreement.lds(x, y, resamples(60, ['a']))
    inside += found.low <= rank_rho <= found.high
  assert 0.90 <= inside / trials <= 0.99  # 0.95 nominal; the percentile bootstrap of 60 points is a little short


def test_gain_is_paired():
  rng = np.random.default_rng(3)
  truth_ST = rng.standard_normal((40, 2))
  worse_ST = truth_ST + 2 * rng.standard_normal((40, 2))
  better_ST = worse_ST + 0.5 * truth_ST
  drawn = resamples(40, ['a', 'b'])
  found = agreement.gain(better_ST, worse_ST, truth_ST, drawn)
  apart = agreement.lds(better_ST, truth_ST, drawn)
  assert found.low > 0, 'the difference is clear'
  assert found.high - found.low < apart.high - apart.low, 'and narrower than either score alone'


@pytest.mark.parametrize('seeds', [2, 4])
def test_ceiling_is_the_correlation_with_the_noise_free_truth(seeds):
  rng = np.random.default_rng(4)
  signal_ST = rng.standard_normal((400, 8))
  truth_RST = signal_ST + rng.standard_normal((seeds, 400, 8))
  fit = agreement.lds(signal_ST, truth_RST.mean(0), resamples(400, list('abcdefgh'), 20)).lds
  assert agreement.ceiling(truth_RST) == pytest.approx(fit, abs=0.03)
  assert agreement.ceiling(truth_RST[:1]) is None


@pytest.mark.parametrize('seeds', [2, 3, 4])
@pytest.mark.parametrize('order', ['reversed', 'apart'])
def test_ceiling_of_seeds_that_disagree_is_zero(seeds, order):
  """Correlations of −1 and of −0.8, on both sides of the poles of Spearman's and Brown's formula."""
  first_ST = np.arange(4.0)[:, None]
  second_ST = first_ST[::-1] if order == 'reversed' else np.array([3.0, 2.0, 0.0, 1.0])[:, None]
  half = seeds // 2
  truth_RST = np.stack([*[first_ST] * half, *[second_ST] * (seeds - half)])
  assert agreement.ceiling(truth_RST) == 0


def test_families_of_subsets():
  rng = np.random.default_rng(5)
  score_N, source_N = rng.standard_normal(200), rng.integers(0, 3, 200)
  found = subsets.make(1, source_N, {'docs': score_N}, halves=5, stratified=4, drops=(0.1,))
  again = subsets.make(1, source_N, {'docs': score_N}, halves=5, stratified=4, drops=(0.1,))
  np.testing.assert_array_equal(found.weight_SN, again.weight_SN)
  sizes = found.weight_SN.sum(axis=1)
  assert set(sizes[found.of('halves')]) == {100} == set(sizes[found.of('stratified')])
  deciles = found.weight_SN[found.of('deciles')]
  assert (deciles.sum(axis=0) == 1).all(), 'every row in one decile'
  means = [score_N[d].mean() for d in deciles]
  assert means == sorted(means, reverse=True)
  highest = found.weight_SN[found.name.index('docs: highest 0.1 dropped')]
  assert score_N[~highest].min() > score_N[highest].max()
  assert sorted(sizes[found.of('drops')]) == [180, 180, 180, 200]
  shares = [[found.weight_SN[s][source_N == k].mean() for k in range(3)] for s in found.of('stratified')]
  assert np.ptp(shares, axis=1).min() > 0.1, 'shares of sources differ'


def test_table_puts_the_truth_first():
  rng = np.random.default_rng(6)
  score_NT = rng.standard_normal((120, 5))
  found = subsets.make(2, np.zeros(120, int), {'docs': score_NT[:, 0]}, halves=12, stratified=0, drops=(0.1,))
  truth_RST = np.stack([found.weight_SN.astype(float) @ score_NT] * 2)
  names = [f for f in subsets.FAMILIES if len(found.of(f))]
  drawn = {f: resamples(len(found.of(f)), list('abcde'), 30) for f in names}
  scores = {'noise': rng.standard_normal((120, 5)), 'right': score_NT}
  records = table.records('plain', scores, truth_RST, found, drawn, 'noise', {'own': np.stack([score_NT] * 2)})
  assert all(r['lds'] == pytest.approx(1, abs=1e-3) for r in records if r['predictor'] in ('right', 'own'))
  assert all(r['gain']['low'] > 0 for r in records if r['predictor'] == 'right' and r['family'] == 'halves')
  lines = table.markdown(records).splitlines()
  assert [line.split('|')[1].strip() for line in lines[2:]][-2:] == ['noise', '*highest that seeds allow*']


def test_tables_need_only_the_json_files(tmp_path, capsys):
  record = {'setting': 'plain', 'predictor': 'BM25', 'family': 'halves', 'lds': 0.125, 'low': -0.1, 'high': 0.3}
  records = [record | {'ceiling': 0.5}, record | {'predictor': 'reference', 'lds': 0.2, 'ceiling': 0.5}]
  by_task = [record | {'ceiling': None}]
  storage.write_json(tmp_path / 'lds.json', {'by_example': records, 'by_task': by_task})
  assert table.main([str(tmp_path)]) == 2
  assert 'has no results of a validation' in capsys.readouterr().err
  runs = {name: [{'loss': [1.0, 2.0, 3.5], 'ordered': True}] for name in ('docs', 'api_qa')}
  text = table.page(records, by_task, runs)
  storage.write_json(tmp_path / 'monotone.json', runs)
  assert table.main([str(tmp_path)]) == 0
  found = capsys.readouterr().out
  assert found == text, 'independent of the order of the tasks'
  lines = found.splitlines()
  assert [line for line in lines if line.startswith('###')] == [
    '### plain, each target example',
    '### plain, mean of each task',
    '### Loss after training on one decile of scores',
  ]
  assert lines[4:7] == [
    '| reference | 0.20 [-0.10, 0.30] |',
    '| BM25 | 0.12 [-0.10, 0.30] |',
    '| *highest that seeds allow* | 0.50 |',
  ]
  assert lines[-1] == '| docs | 0 | 1.000 | 2.000 | 3.500 | yes |'

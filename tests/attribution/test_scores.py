"""The stage `datamodel` on random features, against NumPy in float64."""

import json

import numpy as np
import pytest
import scipy.stats

from configs import base
from dsdm_jax.attribution import accumulators, score_arrays, scores
from dsdm_jax.attribution.score_arrays import ScoreArrays
from dsdm_jax.attribution.sources import RowSource
from dsdm_jax.attribution.store import Features, FeatureStore, open_store
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.errors import UserError

N, J, C = 64, 24, 3
TASKS = {'docs': 9, 'api_qa': 6}
LAYERS = [
  {'path': 'up', 'stack': [2], 'inputs': 9, 'outputs': 9, 'a': 2, 'b': 4, 'start': 0},
  {'path': 'down', 'stack': [], 'inputs': 9, 'outputs': 9, 'a': 4, 'b': 2, 'start': 16},
]


@pytest.fixture
def run(tmp_path):
  """Runs the stage with some settings and returns (arrays, report, semantics, features)."""
  rng = np.random.default_rng(0)
  common_NJ, common_TJ = rng.normal(size=(N, J)), {t: rng.normal(size=(n, J)) for t, n in TASKS.items()}
  phi_CNJ = (common_NJ + rng.normal(size=(C, N, J))).astype(np.float32)
  target = {t: (x + rng.normal(size=(C, *x.shape))).astype(np.float32) for t, x in common_TJ.items()}
  subsets = [np.sort(rng.choice(N, 24, replace=False)) for _ in range(C)]
  # As many again, for those who want two checkpoints of each proxy.
  phi_CNJ = np.concatenate([phi_CNJ, (common_NJ + rng.normal(size=(C, N, J))).astype(np.float32)])
  target = {
    t: np.concatenate([x, (common_TJ[t] + rng.normal(size=x.shape)).astype(np.float32)]) for t, x in target.items()
  }
  documents = {t: [f'{t}/{i // 2}' for i in range(n)] for t, n in TASKS.items()}

  def make(name, semantics=None, settings=None):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    manifest = {'identity': {'settings': settings or {}}, 'semantics': semantics or {}, 'files': {}, 'models': []}
    return Artifact(folder, manifest), folder

  targets, folder = make('targets')
  storage.write_json(folder / 'tasks.json', list(TASKS))
  for task, names in documents.items():
    length = np.zeros((len(names), 4))
    storage.save_npz(folder / f'{task}.target.npz', tokens_TL=length.astype(np.int32), weights_TL=length)
    lines = [json.dumps({'id': f'{i}', 'context': '', 'answer': 'x', 'document': d}) for i, d in enumerate(names)]
    (folder / f'{task}.target.jsonl').write_text('\n'.join(lines))

  def run(count=C, change=None, each=1, steps=1, kept=None, mode='store', **settings):
    config = base.get_config()
    config.proxies.count, config.proxies.checkpoints = count // each, each
    config.datamodel.update({'gram': 'full'} | settings)
    phi = phi_CNJ[:count, slice(None) if kept is None else kept].copy()
    if change:
      change(phi)
    proxies, folder = make('proxies', {'steps': steps})
    for p in range(count // each):
      storage.save_npy(folder / f'subset_{p}.npy', subsets[p])
    semantics = {
      'projection': 'two_sided', 'layers': LAYERS, 'dimension': J, 'mode': mode, 'rows': phi.shape[1],
      'checkpoints': count, 'shard_rows': 10, 'store_dtype': 'float32',
    }  # fmt: skip
    name = f'features_{len(list(tmp_path.iterdir()))}'
    features, folder = make(name, semantics, {'features.output_fn': 'margin'})
    target_features, of_targets = make(f'target_{name}')
    for c in range(count):
      store = FeatureStore(folder / f'features_{c}.zarr', phi.shape[1], J, 10, 'float32')
      for shard in store.missing():
        store.write(shard, phi[c, slice(*store.bounds(shard))])
      for task in TASKS:
        storage.save_npy(of_targets / f'{task}_{c}.npy', target[task][c])
    out = tmp_path / f'out_{name}'
    out.mkdir()
    inputs = {'targets': targets, 'proxies': proxies, 'features': features, 'target_features': target_features}
    if kept is not None:
      inputs['prefilter'], folder = make(f'prefilter_{name}', {'of': N})
      storage.save_npy(folder / 'rows.npy', kept)
    cost = Cost(out)
    made = scores.run(Context(config, out, inputs, Log(tmp_path, 'datamodel', enabled=False), cost))
    arrays, run.flop = dict(ScoreArrays(out)), cost.flop
    run.artifact = Artifact(out, {'semantics': made})
    return arrays, json.loads((out / 'report.json').read_text()), made

  run.phi_CNJ, run.target, run.documents = phi_CNJ[:C], {t: x[:C] for t, x in target.items()}, documents
  run.twice_phi_CNJ, run.twice_target = phi_CNJ, target
  run.seen_CN = np.array([np.isin(np.arange(N), s) for s in subsets])
  return run


def _one(phi_NJ, target_TJ, damping=0.1):
  """Scores for every target example, [N, T], in float64."""
  phi = phi_NJ.astype(np.float64)
  gram = phi.T @ phi / len(phi)
  gram += damping * np.trace(gram) / len(gram) * np.eye(len(gram))
  return phi @ np.linalg.solve(gram, target_TJ.astype(np.float64).T)


def _close(got, expected, rtol=1e-4):
  np.testing.assert_allclose(got, expected, rtol=rtol, atol=0.1 * rtol * np.abs(expected).max())


def test_partial_results_stay_until_the_scores_are_written(run, monkeypatch, tmp_path):
  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(accumulators.Accumulator, '_is_due', lambda _: True)
  with monkeypatch.context() as patched:
    patched.setattr(scores, 'agreement', killed)
    with pytest.raises(KeyboardInterrupt):
      run()
  [out] = tmp_path.glob('out*')
  assert list(out.glob('partial_*.npz'))
  run()
  [out] = {path.parent for path in tmp_path.glob('out*/report.json')}
  assert not list(out.glob('partial_*'))


def test_blocks_on_disk_and_chunks_in_memory_change_nothing(run, monkeypatch):
  """Four blocks of 16 rows, and chunks of two shards of ten."""
  whole, report, _ = run(average='unseen')
  monkeypatch.setattr(score_arrays, 'BLOCK', 16)
  monkeypatch.setattr(accumulators, 'CHUNK_ROWS', 20)
  parts, report_of_parts, _ = run(average='unseen')
  assert len(list((run.artifact.path / 'scores' / 'docs').glob('score_CN.*.npy'))) == 4
  assert whole.keys() == parts.keys() and report == report_of_parts
  for name, array in whole.items():
    if name.startswith('example_score'):  # the mean and the deviation of all rows are added up from those of blocks
      np.testing.assert_allclose(parts[name], array, rtol=1e-5)
    else:
      np.testing.assert_array_equal(parts[name], array)
  sample = np.array([3, 15, 16, 40, 63])
  arrays = score_arrays.ScoreArrays(run.artifact.path)
  np.testing.assert_array_equal(arrays.rows('score_docs_CN', sample), whole['score_docs_CN'][:, sample])


def test_rows_that_a_prefilter_left_out_have_no_score(run):
  kept = np.array([3, 4, 10, 11, 12, 25, 30, 31, 50, 51, 52, 60])
  run(kept=kept, average='all', bootstrap=4, examples=2)
  read, left_out = scores.Scores(run.artifact), np.setdiff1d(np.arange(N), kept)
  by_task = {}
  for task, target in run.target.items():
    phi_CMJ = run.phi_CNJ[:, kept]
    by_task[task] = np.mean([_one(p, t).mean(axis=1) for p, t in zip(phi_CMJ, target, strict=True)], axis=0)
    _close(read.score_N(task)[kept], by_task[task])
  _close(read.score_N('mix')[kept], scores.mix(np.stack(list(by_task.values())), 'zscore'))
  _close(read.score_N('docs+api_qa')[kept], read.score_N('mix')[kept])
  for values in (read.score_N('mix'), read.score_N('docs'), read.reach_N('docs'), read.groups_NG('docs')[:, 0]):
    assert len(values) == N and np.isnan(values[left_out]).all() and np.isfinite(values[kept]).all()
  assert set(read.arrays['example_rows_docs_EM'].ravel()) <= set(kept)


class _Directional(RowSource):
  """Stored rows as `DirectionalSource` has them: the first 20 make the Gram matrix."""

  def __init__(self, store, rows=N):
    self._store, self.rows, self.dimension, self.shard_rows = store, rows, J, store.shard_rows

  def from_row(self, row):
    return (shard for shard in self._store.from_row(row) if shard[1] <= self.rows)

  def gram_rows(self):
    return _Directional(self._store, 20)


def test_operations_are_those_of_the_rows_that_make_the_gram_matrix(run, monkeypatch):
  columns = sum(1 + groups for groups in (5, 3))  # the mean, and a group for each document
  run(bootstrap=0, examples=0, groups=8)
  assert run.flop == pytest.approx(C * (2 * N * J**2 + J**3 / 3 + 2 * N * J * columns))

  def directional(features, checkpoint):
    return _Directional(open_store(features._path, checkpoint, features.semantics))

  monkeypatch.setattr(Features, 'pool', directional)
  run(bootstrap=0, examples=0, groups=8, mode='jvp')
  assert run.flop == pytest.approx(C * (2 * 20 * J**2 + J**3 / 3))


def test_every_array_against_numpy(run):
  arrays, report, made = run(average='all', groups=3, bootstrap=50, examples=2)
  mixed = []
  for task, target in run.target.items():
    score_CNT = np.stack([_one(p, t) for p, t in zip(run.phi_CNJ, target, strict=True)])
    by_checkpoint = score_CNT.mean(axis=2)
    _close(arrays[f'score_{task}_CN'], by_checkpoint)
    _close(arrays[f'score_{task}_N'], by_checkpoint.mean(axis=0))
    _close(arrays[f'spread_{task}_N'], by_checkpoint.std(axis=0, ddof=1))
    group_T = arrays[f'group_{task}_T']
    for g in range(3):
      _close(arrays[f'groups_{task}_NG'][:, g], score_CNT[:, :, group_T == g].mean(axis=(0, 2)))
    own_NE = scipy.stats.zscore(score_CNT.mean(axis=0)[:, :2])
    count = min(20, N // 2)
    rows_EM, score_EM = arrays[f'example_rows_{task}_EM'], arrays[f'example_score_{task}_EM']
    assert rows_EM.shape == (2, 2 * count)
    for own_N, rows_M, score_M in zip(own_NE.T, rows_EM, score_EM, strict=True):
      _close(score_M, own_N[rows_M], 1e-3)
      _close(score_M, np.concatenate([np.sort(own_N)[::-1][:count], np.sort(own_N)[:count]]), 1e-3)
    # The bootstrap's error against the sandwich for a ratio of sums over documents; 50 resamples know it to 10 %.
    mean_NT = score_CNT.mean(axis=0)
    centred = mean_NT - mean_NT.mean(axis=1, keepdims=True)
    names = np.array(run.documents[task])
    sums = np.stack([centred[:, names == d].sum(axis=1) for d in np.unique(names)])
    error_N = np.sqrt(np.square(sums).sum(axis=0)) / len(names)
    assert arrays[f'error_{task}_N'].mean() == pytest.approx(error_N.mean(), rel=0.2)
    mixed.append(scipy.stats.zscore(by_checkpoint.mean(axis=0)))
    assert made['half_width'][task] == pytest.approx(scipy.stats.t.ppf(0.975, len(np.unique(names)) - 1))
  _close(arrays['score_mix_N'], np.mean(mixed, axis=0))
  error = [arrays[f'error_{t}_N'] / arrays[f'score_{t}_N'].std() for t in TASKS]
  _close(arrays['error_mix_N'], np.hypot(*error) / 2)
  assert set(report['top_overlap_over_targets']) == {*TASKS, 'mix'}
  assert all(0 < x <= 1 for x in report['top_overlap_over_targets']['mix'].values())
  reader = scores.Scores(run.artifact)
  low_N, high_N = reader.interval_2N('docs')
  _close((low_N + high_N) / 2, reader.score_N('docs'))
  assert reader.groups_NG('docs').shape == (N, 3)


def test_peaks_of_equal_scores_are_the_lower_rows():
  examples_NE = np.array([[0.0, 1.0], [0, 1], [1, 1], [0, 1], [1, 1], [2, 1]])
  rows_EM, score_EM = scores.merge([scores.ends(examples_NE)], len(examples_NE))
  assert rows_EM.tolist() == [[5, 2, 4, 0, 1, 3], [0, 1, 2, 0, 1, 2]]
  np.testing.assert_array_equal(score_EM[1], np.zeros(6))


def test_unseen_average(run):
  arrays, report, _ = run(average='unseen')
  unseen_CN = ~run.seen_CN
  for task, target in run.target.items():
    score_CN = np.stack([_one(p, t).mean(axis=1) for p, t in zip(run.phi_CNJ, target, strict=True)])
    expected = np.where(unseen_CN, score_CN, 0).sum(axis=0) / np.maximum(unseen_CN.sum(axis=0), 1)
    everywhere = ~unseen_CN.any(axis=0)
    difference = np.mean([s[~u].mean() - s[u].mean() for s, u in zip(score_CN, unseen_CN, strict=True)])
    expected[everywhere] = score_CN.mean(axis=0)[everywhere] - difference
    assert everywhere.any()
    _close(arrays[f'score_{task}_N'], expected)
  assert report['average'] == dict.fromkeys(TASKS, 'unseen')


def test_checkpoints_of_a_proxy_are_averaged_over_and_share_its_subset(run):
  """Six members, two for each of three proxies."""
  arrays, report, made = run(count=6, each=2, average='unseen')
  assert made['scale'].endswith('mean over 2 checkpoints of each proxy')
  unseen_CN = ~np.repeat(run.seen_CN, 2, axis=0)
  for task, target in run.twice_target.items():
    score_CN = np.stack([_one(p, t).mean(axis=1) for p, t in zip(run.twice_phi_CNJ, target, strict=True)])
    _close(arrays[f'score_{task}_CN'], score_CN)
    expected = np.where(unseen_CN, score_CN, 0).sum(axis=0) / np.maximum(unseen_CN.sum(axis=0), 1)
    everywhere = ~unseen_CN.any(axis=0)
    difference = np.mean([s[~u].mean() - s[u].mean() for s, u in zip(score_CN, unseen_CN, strict=True)])
    expected[everywhere] = score_CN.mean(axis=0)[everywhere] - difference
    _close(arrays[f'score_{task}_N'], expected)
    by_proxy_PN = (score_CN[::2] + score_CN[1::2]) / 2
    _close(arrays[f'spread_{task}_N'], by_proxy_PN.std(axis=0, ddof=1))
    agreement = [scipy.stats.spearmanr(by_proxy_PN[a], by_proxy_PN[b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
    assert report['checkpoint_agreement'][task] == pytest.approx(np.mean(agreement), abs=1e-3)
  # Two checkpoints of a proxy are no further draw of rows: the error is that of three proxies' rows.
  rows = np.array([run.seen_CN.sum(), (~run.seen_CN).sum()])
  assert report['subset_effect']['docs']['shift_error_sd'] == pytest.approx(np.sqrt((1 / rows).sum()))


def test_joint_gram_is_of_all_checkpoints(run):
  arrays, report, _ = run(count=4, each=2, gram='joint')
  assert report['average'] == dict.fromkeys(TASKS, 'all')
  assert arrays['score_docs_CN'].shape == (1, N)
  assert 'spread_docs_N' not in arrays


def test_auto_average_follows_the_shift_of_each_task(run):
  def memorise(phi_CNJ):
    for c, seen_N in enumerate(run.seen_CN):
      phi_CNJ[c, seen_N] -= 6 * run.target['docs'][c].mean(axis=0)

  assert run()[1]['average'] == dict.fromkeys(TASKS, 'all')
  arrays, report, made = run(change=memorise)
  assert report['average']['docs'] == made['average']['docs'] == 'unseen'
  assert report['subset_effect']['docs']['shift_sd'] < -0.5
  forced, _, _ = run(change=memorise, average='unseen')
  np.testing.assert_array_equal(arrays['score_docs_N'], forced['score_docs_N'])
  np.testing.assert_array_equal(arrays['error_docs_N'], forced['error_docs_N'])
  # A model of others that was not trained has seen no row, whatever the difference is.
  untrained, report, _ = run(change=memorise, steps=0)
  assert report['average'] == dict.fromkeys(TASKS, 'all')
  np.testing.assert_array_equal(untrained['score_docs_N'], run(change=memorise, average='all')[0]['score_docs_N'])


def test_blocks_of_layers_unit_norm_and_targets_in_the_gram(run):
  arrays, report, _ = run(gram='layers', unit_norm=True, target_share=0.4, average='all')
  blocks = [(0, 8), (8, 16), (16, 24)]
  assert [tuple(s['columns']) for s in report['spectrum'][0]] == blocks
  expected = {t: np.zeros((N, n)) for t, n in TASKS.items()}
  for c in range(C):
    phi, *targets = (
      x / np.linalg.norm(x, axis=1, keepdims=True)
      for x in (run.phi_CNJ[c].astype(np.float64), *(run.target[t][c].astype(np.float64) for t in TASKS))
    )
    for a, b in blocks:
      pool = phi[:, a:b].T @ phi[:, a:b] / N
      moment = np.mean([t[:, a:b].T @ t[:, a:b] / len(t) for t in targets], axis=0)
      gram = 0.6 * pool + 0.4 * moment * np.trace(pool) / np.trace(moment)
      gram += 0.1 * np.trace(pool) / (b - a) * np.eye(b - a)
      for task, t in zip(TASKS, targets, strict=True):
        expected[task] += phi[:, a:b] @ np.linalg.solve(gram, t[:, a:b].T) / C
  for task in TASKS:
    _close(arrays[f'score_{task}_N'], expected[task].mean(axis=1))


def test_joint_datamodel(run):
  def grow(phi_CNJ):
    phi_CNJ[1] *= 100  # what one proxy's features are scaled by must not matter, nor that its targets' are not

  for change in (None, grow):
    arrays, report, made = run(gram='joint', change=change)
    factor = [1, 100 if change else 1, 1]
    phi = [p.astype(np.float64) * f for p, f in zip(run.phi_CNJ, factor, strict=True)]
    rms = [np.sqrt(np.mean(p**2)) for p in phi]
    joint_NJ = np.concatenate([p / r for p, r in zip(phi, rms, strict=True)], axis=1)
    for task, target in run.target.items():
      joint_TJ = np.concatenate([t / r for t, r in zip(target, rms, strict=True)], axis=1)
      _close(arrays[f'score_{task}_N'], _one(joint_NJ, joint_TJ).mean(axis=1))
    assert f'spread_{task}_N' not in arrays
    assert made['scale'].endswith('one datamodel of all proxies')
    assert report['subset_effect'] == dict.fromkeys(TASKS)
    assert set(report['average'].values()) == {'all'}


def test_q_multiplies_once(run, monkeypatch):
  before, _, _ = run()
  probability_N = np.linspace(0, 1, N, dtype=np.float32)
  monkeypatch.setattr(scores, '_mean_probability', lambda context, bar: probability_N)
  after, _, made = run(q=True)
  for key in before:
    if key.endswith('_N') and 'mix' not in key:
      np.testing.assert_allclose(after[key], before[key] * (1 - probability_N), rtol=1e-6)
  np.testing.assert_allclose(
    after['groups_docs_NG'], before['groups_docs_NG'] * (1 - probability_N)[:, None], rtol=1e-6
  )
  assert made['q'].startswith('times 1 − mean')


def test_one_proxy_one_group_no_resamples(run):
  arrays, report, made = run(count=1, bootstrap=0, groups=1)
  _close(arrays['score_docs_N'], _one(run.phi_CNJ[0], run.target['docs'][0]).mean(axis=1))
  np.testing.assert_array_equal(arrays['groups_docs_NG'][:, 0], arrays['score_docs_N'])
  assert not any(key.startswith(('error', 'spread')) for key in arrays)
  assert report['checkpoint_agreement']['docs'] == 1
  assert report['top_overlap_over_targets']['mix'] == {}
  with pytest.raises(UserError, match='no intervals; set datamodel.bootstrap'):
    scores.Scores(Artifact(run.artifact.path, {'semantics': made})).interval_2N('docs')


def test_features_that_are_all_equal_are_refused(run):
  def same(phi_CNJ):
    phi_CNJ[:] = phi_CNJ[:, :1]

  with pytest.raises(UserError, match='all rows have the same score for target docs'):
    run(change=same)


@pytest.mark.parametrize('rule', ['mean', 'zscore', 'rank'])
def test_mixes(rule):
  score_TN = np.array([[0.0, 1.0, 2.0], [30.0, 10.0, 20.0]], np.float32)
  expected = {
    'mean': [15.0, 5.5, 11.0],
    'zscore': [0.0, -np.sqrt(1.5) / 2, np.sqrt(1.5) / 2],
    'rank': [0.5, 0.25, 0.75],
  }[rule]
  np.testing.assert_allclose(scores.mix(score_TN, rule), expected, atol=1e-6)


def test_error_of_mixes():
  score_TN, error_TN = np.array([[0.0, 2.0], [0.0, 20.0]]), np.array([[3.0, 0.0], [4.0, 1.0]])
  np.testing.assert_allclose(scores.mix_error(error_TN, score_TN, 'mean'), [2.5, 0.5])
  np.testing.assert_allclose(scores.mix_error(error_TN, score_TN, 'zscore'), [np.hypot(3, 0.4) / 2, 0.05])
  assert scores.mix_error(error_TN, score_TN, 'rank') is None

"""`dsdm_jax.load` on a real run: what it gives is what the stages' own readers give."""

import argparse
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import dsdm_jax
from dsdm_jax.attribution.scores import Scores
from dsdm_jax.config.validate import flatten
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import open_stage
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.report import notebook
from dsdm_jax.selection import distilled, export
from dsdm_jax.study import arm_file
from dsdm_jax.training import trained
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import trainer
from tests.helpers import flips
from tests.helpers.workdirs import files_of
from tests.pipeline import tiny

pandas = pytest.importorskip('pandas', reason='pandas is not installed')


@pytest.fixture(scope='module')
def run(finished):
  return dsdm_jax.load(finished)


def test_opening_brings_no_tensorflow_and_no_pandas(finished):
  code = (
    f'import sys, dsdm_jax; run = dsdm_jax.load({str(finished)!r}); run.scores, run.selections, run.results; '
    "print('\\n'.join(sys.modules))"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert not {'tensorflow', 'tensorflow_datasets', 'seqio', 'pandas'} & set(done.stdout.split())


def test_pool(run, finished):
  pool = Pool(files_of(finished, 'pool'))
  assert list(run.pool.table.columns) == ['source', 'document', 'offset', 'planted']
  assert len(run.pool.table) == pool.num_rows
  shown = run.pool.show([3, 1])
  assert shown.index.tolist() == [3, 1]
  assert shown.loc[1, 'text'] == pool.text(1)
  assert shown.loc[1, 'document'] == pool.documents[pool.document_N[1]]['id']


def test_scores(run, finished):
  scores = Scores(open_stage(finished, 'datamodel'))
  assert list(run.scores) == [*scores.tasks, 'mix']
  for target in run.scores:
    assert np.array_equal(run.scores[target], scores.score_N(target))
    assert np.array_equal(run.scores.table[target], scores.score_N(target))
  low_N, high_N = scores.interval_2N('docs')
  assert np.array_equal(run.scores.interval('docs')['low'], low_N)
  assert np.array_equal(run.scores.interval('docs')['high'], high_N)
  mixed = run.scores.interval('mix')
  errors = [run.scores.arrays[f'error_{t}_N'] / run.scores[t].std() for t in scores.tasks]
  widest = max(run.scores.semantics['half_width'].values())  # zscore: each task's errors in its standard deviations
  np.testing.assert_allclose(
    mixed['high'] - mixed['score'], widest * np.sqrt(np.sum(np.square(errors), axis=0)) / 3, rtol=1e-3, atol=1e-5
  )
  top, bottom = run.scores.top('docs', 3), run.scores.bottom('docs', 3)
  assert top.index[0] == run.scores['docs'].argmax()
  assert bottom.index[0] == run.scores['docs'].argmin()
  assert top['score'].is_monotonic_decreasing
  assert top.iloc[0]['text'] == run.pool.text(int(top.index[0]))
  with pytest.raises(KeyError, match='no scores for .*docs'):
    run.scores['poems']


def test_selections(run, finished):
  wanted = Selection.load(files_of(finished, 'selection'), 'dsdm--mix--0')
  assert np.array_equal(run.selections['dsdm--mix--0'].rows, wanted.rows)
  assert len(run.selections.table) == len(json.loads((files_of(finished, 'selection') / 'index.json').read_text()))
  np.testing.assert_allclose(run.selections.sources().sum(axis=1), 1)
  overlap = run.selections.overlap()
  assert overlap.loc['DsDm', 'bottom-ranked'] == 0 or overlap.loc['DsDm', 'bottom-ranked'] < 1
  with pytest.raises(KeyError, match='no selection'):
    run.selections['../pool/rows']


def test_results(run, finished):
  raw = json.loads((finished / 'results.json').read_text())
  assert run.results.comparisons['difference'].tolist() == [c['difference'] for c in raw['comparisons']]
  assert len(run.results.arms) == len(raw['arms'])
  assert len(run.results.summary) == len(raw['summary'])
  assert 'n-gram' in run.results.headline  # so small models are below their counts
  assert run.cost.loc['proxies', 'seconds'] == raw['cost']['proxies']['seconds']
  assert run.cost['bytes'].min() > 0
  losses = run.results.losses
  first = losses.query("method == 'dsdm' and seed == 0").iloc[0]
  logged = (files_of(finished, 'pretraining') / 'dsdm--mix--0.jsonl').read_text().split('\n')[0]
  assert json.loads(logged)['loss'] == first['loss']
  assert run.config['datamodel.damping'] == 0.1
  with pytest.raises(UserError, match='no ladder'):
    _ = run.results.multiplier


def test_models_compute_what_the_run_computed(run, finished):
  """Against the weights as evaluation restores them, on a mesh."""
  config = tiny.get_config()
  pool, tokens_BL = run.pool, run.pool.tokens(range(8))
  for model, section, train, folder in (
    (run.model('dsdm', seed=1), config.model, config.pretraining.train, 'pretraining/dsdm--mix--1'),
    (run.model(proxy=1), config.proxies.model, config.proxies.train, 'proxies/proxy_1'),
  ):
    stage, _, name = folder.partition('/')
    made = trainer(section, train, pool.vocab_size, pool.length, make_mesh(config.mesh))
    state = load_state(files_of(finished, stage) / name, made)
    found_BLV = model.logits(tokens_BL)
    assert found_BLV.shape == (*tokens_BL.shape, pool.vocab_size) and found_BLV.dtype == np.float32
    np.testing.assert_allclose(found_BLV, jax.jit(made.logits)(state.params, state.rest, tokens_BL), atol=2e-5)
    np.testing.assert_allclose(model.logits(tokens_BL[0, :5]), found_BLV[:1, :5], atol=2e-5)  # causal
    assert f'{name}: ' in repr(model) and 'parameters' in repr(model)
  assert run.model('dsdm--mix', seed=1).name == 'dsdm--mix--1'
  for words, call in {
    r'has the arms dsdm--mix, .* with the seeds 0, 1': lambda: run.model('nothing'),
    'name one model': run.model,
    'proxy_9 does not exist': lambda: run.model(proxy=9),
    'are more than the': lambda: run.model('dsdm').logits(np.zeros((1, pool.length + 1), int)),
    'ids of tokens must be from 0': lambda: run.model('dsdm').logits([[pool.vocab_size]]),
    'must be whole numbers': lambda: run.model('dsdm').logits([[0.5]]),
  }.items():
    with pytest.raises(UserError, match=words):
      call()


def test_a_view_lists_what_opens_and_nothing_else(finished, tmp_path):
  """After each stage of a run, in order."""
  for stage in dsdm_jax.load(finished).stages:
    shutil.copytree(finished / stage, tmp_path / stage)
    run = dsdm_jax.load(tmp_path)
    _, listed = list(run.facts())[-1]
    for name in listed.split(', '):
      assert eval(name, {'run': run}) is not None
    assert ('run.leakage' in listed) == ('leakage' in run.stages)


def test_a_custom_model_is_opened_only_by_name(copied, monkeypatch):
  monkeypatch.setattr(trained, 'OUR_FACTORY', 'another')
  with pytest.raises(UserError, match=r"custom model; if you trust .*functions=\('dsdm_jax.lm.decoder:build',\)"):
    dsdm_jax.load(copied).model('dsdm')
  own = dsdm_jax.load(copied, functions=('dsdm_jax.lm.decoder:build',)).model('dsdm')
  assert own.logits([[1, 2]]).shape == (1, 2, own.pool.vocab_size)


def test_everything_prints_itself(run, finished):
  """As lines and as HTML, without text of the run as markup."""
  views = [
    (run, "run.model('dsdm')"),
    (run.pool, 'rows'),
    (run.scores, 'best +'),
    (run.selections, 'dsdm--mix--0'),
    (run.results, 'too few for a verdict'),
    (run.leakage, 'documents'),
    (run.report, 'index.html'),
  ]
  for view, words in views:
    assert words in repr(view) and max(map(len, repr(view).split('\n'))) < 110
    assert view._repr_html_().startswith('<table>') and '<script' not in view._repr_html_()
  assert len(run.leakage.table) == sum(1 + len(leak['more']) for found in run.leakage.raw.values() for leak in found)
  assert run.report.path.read_bytes() == (finished / 'report/index.html').read_bytes()
  assert 'overlap' in run.report.data and run.report.data['rows'].is_file()


def test_tables_without_pandas(run, finished, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pandas', None)
  plain = dsdm_jax.load(finished, verify=False)
  for of in (
    lambda r: r.pool.table,
    lambda r: r.pool.show([3, 1]),
    lambda r: r.scores.table,
    lambda r: r.scores.interval('docs'),
    lambda r: r.scores.top('docs', 3),
    lambda r: r.selections.table,
    lambda r: r.selections.sources(),
    lambda r: r.selections.overlap(),
    lambda r: r.results.arms,
    lambda r: r.results.comparisons,
    lambda r: r.results.losses,
    lambda r: r.cost,
  ):
    table = of(plain)
    assert isinstance(table, notebook.Table)
    with monkeypatch.context() as context:
      context.setitem(sys.modules, 'pandas', pandas)
      wanted = of(dsdm_jax.load(finished, verify=False))
    assert list(table) == list(wanted.columns) and table.index.tolist() == wanted.index.tolist()
    for column in table:
      values, theirs = table[column].tolist(), wanted[column].tolist()
      assert all(
        a == b or (a != a and b != b) or (a is None and b != b) for a, b in zip(values, theirs, strict=True)
      ), column
    assert f'[{len(wanted):,} lines × {len(wanted.columns)} columns]' in repr(table)


def test_plots(run, tmp_path):
  plots = [run.scores.plot('docs'), run.selections.plot_overlap(), run.results.plot('docs'), run.results.plot_losses()]
  for plot in [*plots, run.selections.plot_sources()]:
    assert plot._repr_png_().startswith(b'\x89PNG')
  plots[0].save(tmp_path / 'a.svg')
  plots[0].save(tmp_path / 'a.png')
  assert (tmp_path / 'a.svg').read_text().startswith('<?xml')
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_unfinished_run(copied):
  shutil.rmtree(copied / 'evaluation')
  run = dsdm_jax.load(copied)
  assert 'evaluation' not in run.stages
  assert len(run.scores.top('mix', 2)) == 2
  with pytest.raises(UserError, match='no finished evaluation'):
    _ = run.results


def test_a_flipped_bit_never_reaches_a_reader(copied, tmp_path, count):
  """Load, export, report, tables, files of arms, scores, features, verify: an error line or the same result."""
  flips.prepare(copied)
  ends = list(flips.flips(copied, tmp_path / 'scratch', 3 * len(flips.READERS)))
  assert {reader for reader, _ in ends} == {reader.__name__ for reader in flips.READERS}
  assert sum(end == 'an error line' for _, end in ends) > len(ends) * 0.8, ends
  count('bits flipped', len(ends))


def test_readers_refuse_a_pool_that_scores_and_selections_are_not_of(copied, tmp_path):
  """As after `--stage=pool --rerun`, or a rerun that was interrupted."""
  other = artifacts.Identity('pool', 2, {'pool.length': 16}, {})
  out = artifacts.begin(copied, other)
  before = artifacts.open_stage(copied, 'pool')
  shutil.copytree(before.path, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns('begun.json'))
  artifacts.commit(copied, other, before.semantics, artifacts.Cost(out))
  words = 'was computed from another pool than the one that is there now'
  for act in (
    lambda: dsdm_jax.load(copied).scores,
    lambda: dsdm_jax.load(copied).selections,
    lambda: dsdm_jax.load(copied).results,
    lambda: export.write(copied, 'dsdm--mix', 'jsonl', tmp_path / 'out'),
    lambda: distilled._run(argparse.Namespace(workdir=copied)),
    lambda: arm_file.write(copied, 'a', flatten(tiny.get_config()), tmp_path / 'a.json'),
  ):
    with pytest.raises(UserError, match=words):
      act()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['run']


def test_readers_take_only_what_the_manifests_list(copied, tmp_path):
  """A copy over an older copy leaves files that look newer; they change nothing, or are named."""
  flips.prepare(copied)
  wanted = {reader: reader(copied, tmp_path) for reader in (flips._load, flips._report, flips._pool)}
  pool, evaluation = files_of(copied, 'pool'), files_of(copied, 'evaluation')
  shutil.copy(next(pool.glob('documents/*.parquet')), pool / 'documents/999999.parquet')
  storage.write_json(evaluation / 'multiplier.json', {'older': True})
  proxies = artifacts.open_stage(copied, 'proxies')
  step = proxies.last_step('proxy_0')
  shutil.copytree(proxies.path / f'proxy_0/{step}', proxies.path / f'proxy_0/{step + 99}')
  assert proxies.last_step('proxy_0') == step
  for reader, read in wanted.items():
    assert reader(copied, tmp_path) == read
  (pool / 'tokenizer.json').write_text('{}')
  with pytest.raises(UserError, match=r'tokenizer\.json is a vocabulary that the manifest of the pool does not list'):
    _ = dsdm_jax.load(copied).pool


def test_no_run(tmp_path):
  with pytest.raises(UserError, match='has no finished stage'):
    dsdm_jax.load(tmp_path)

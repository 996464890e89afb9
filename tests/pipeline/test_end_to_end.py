"""The whole pipeline through the command line."""

import json
import math
import re
import subprocess

import jax
import numpy as np
import pytest

from dsdm_jax import pipeline
from dsdm_jax.config.validate import flatten
from dsdm_jax.core import prng
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.data.order import selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.training.step import TrainState, trainer
from tests.conftest import ROOT
from tests.helpers.workdirs import files_of
from tests.pipeline import runs
from tests.pipeline.tiny import get_config

TASKS = {'docs', 'api_qa', 'cs_algorithms'}
METHODS = {'dsdm', 'random', 'random_one_epoch', 'bottom'}


@pytest.fixture(scope='module')
def results(finished) -> dict:
  return json.loads((finished / 'results.json').read_text())


def test_all_stages_run_in_order_and_nothing_is_left_over(finished):
  assert runs.stages_run(finished) == list(pipeline.NAMES)
  assert {p.name for p in finished.iterdir()} == {
    *pipeline.NAMES,
    'events.jsonl',
    'tensorboard',
    'results.json',
    'results.md',
  }


def test_results_hold_every_arm_seed_task_and_split(results):
  assert {'arms', 'comparisons', 'cost', 'versions', 'config'} <= results.keys()
  rows = results['arms']
  for row in rows:
    assert row.keys() == {
      'method', 'target_mix', 'seed', 'task', 'split', 'logprob', 'accuracy', 'acc', 'acc_norm', 'n_items'
    }  # fmt: skip
    assert math.isfinite(row['logprob']) and row['logprob'] < 0
    assert 0 <= row['accuracy'] <= 1
    assert row['n_items'] == 12
  keys = [(row['method'], row['seed'], row['task'], row['split']) for row in rows]
  assert len(keys) == len(set(keys))
  assert set(keys) == {
    (method, seed, task, split)
    for method in METHODS
    for seed in range(2)
    for task in TASKS
    for split in ('target', 'holdout')
  }
  # Seeds differ, and so do arms: nothing is copied from one to the other.
  assert len({(row['task'], row['split'], row['logprob']) for row in rows}) == len(rows)


def test_comparisons_hold_differences_of_the_arms(results):
  wanted = {(m, b) for b in ('random', 'random_one_epoch') for m in ('dsdm', 'bottom')}
  wanted |= {('random_one_epoch', 'random'), ('dsdm', 'bottom')}
  found = results['comparisons']
  assert {(c['method'], c['baseline'], c['task']) for c in found} == {
    (*pair, task) for pair in wanted for task in TASKS
  }
  for c in found:
    assert {'method', 'baseline', 'task', 'difference', 'low', 'high'} <= c.keys()
    assert c['low'] < c['difference'] < c['high']
    mean = {}
    for method in (c['method'], c['baseline']):
      values = [
        row['logprob']
        for row in results['arms']
        if (row['method'], row['task'], row['split']) == (method, c['task'], 'holdout')
      ]
      mean[method] = sum(values) / len(values)
    assert c['difference'] == pytest.approx(mean[c['method']] - mean[c['baseline']], abs=1e-6)


def test_cost_versions_and_config_are_those_of_the_run(results):
  assert results['cost'].keys() == set(pipeline.NAMES)
  assert all(cost['seconds'] > 0 for cost in results['cost'].values())
  for stage in ('proxies', 'features', 'target_features', 'datamodel', 'pretraining', 'evaluation'):
    assert results['cost'][stage]['flop'] > 0
  import jax

  assert results['versions']['jax'] == jax.__version__
  # 'evaluated' names the benchmarks that are evaluated, and there are none.
  assert results['config'] == flatten(get_config()) | {'leakage.benchmarks': []}


def test_terminal_shows_the_table_and_where_things_are(finished):
  output = finished.with_suffix('.out').read_text()
  for word in ['dsdm − random', *TASKS, str(finished / 'results.md'), str(finished / 'report/index.html')]:
    assert word in output
  assert [line for line in output.splitlines() if len(line) > 80 and str(finished) not in line] == []
  whole = (finished / 'results.md').read_text()
  for word in [*METHODS, *TASKS]:
    assert word in whole


def test_report_is_one_file_that_fetches_nothing(finished):
  page = (finished / 'report/index.html').read_text()
  assert len(page) > 20_000
  for word in METHODS | TASKS:
    assert word in page
  assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []


def test_curves_and_events(finished):
  assert len(list((finished / 'tensorboard').rglob('events.out.tfevents.*'))) == 2 + 4 * 2
  found = runs.events(finished)
  assert all({'time', 'stage', 'event'} <= event.keys() for event in found)
  assert [e['time'] for e in found] == sorted(e['time'] for e in found)


def test_every_arm_has_the_same_budget_in_tokens(finished):
  last = [json.loads(file.read_text().splitlines()[-1]) for file in files_of(finished, 'pretraining').glob('*.jsonl')]
  assert len(last) == 4 * 2
  assert {(line['step'], line['tokens']) for line in last} == {(4, 32 * 2 * 32)}


def test_models_begin_with_the_weights_of_their_seed_and_the_first_rows_of_their_arm(finished):
  """The first loss is that of the seed's initialization, the same for all arms, on the arm's first batch."""
  config, pool = get_config(), Pool(files_of(finished, 'pool'))
  compiled = trainer(config.model, config.pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))

  @jax.jit
  def loss_of(state: TrainState, tokens_BL: jax.Array, weight_B: jax.Array) -> jax.Array:
    return compiled._loss(state.params, state.rest, tokens_BL, weight_B, 16)[0]

  selections, losses = files_of(finished, 'selection'), {}
  for entry in json.loads((selections / 'index.json').read_text()):
    state = compiled.init(prng.stream(config.seed, 'init', 'final', entry['seed']))
    order = prng.derive(config.seed, 'order', entry['seed'])
    _, row_B, weight_B = selection.schedule(selections, entry, 64, order, 0.0).at(np.arange(16))
    losses[entry['name']] = float(loss_of(state, pool.tokens(row_B), weight_B))
  found = {
    file.stem: json.loads(file.read_text().splitlines()[0])['loss']
    for file in files_of(finished, 'pretraining').glob('*.jsonl')
  }
  assert found == pytest.approx(losses, rel=1e-5)
  assert len({round(loss, 5) for loss in losses.values()}) == len(losses), 'so no two models can be mistaken'


def test_pool_rows_are_whole_and_each_has_its_document(finished):
  pool = Pool(files_of(finished, 'pool'))
  tokens_NL = pool.tokens(range(pool.num_rows))
  assert tokens_NL.shape == (pool.num_rows, 32)
  assert tokens_NL.max() < pool.vocab_size
  assert set(pool.document_N) <= set(range(len(pool.documents)))
  assert all(pool.text(row) for row in (0, pool.num_rows - 1))


def test_second_run_reuses_all_and_starts_neither_tensorflow_nor_a_device(copied):
  before = runs.fingerprint(copied)
  done = subprocess.run(
    runs.command(runs.TINY, f'--workdir={copied}'),
    cwd=ROOT, env=runs.environment(PYTHONPROFILEIMPORTTIME='1'), capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.startswith(f'nothing to do: each stage is finished in {copied}\n')
  imported = set(re.findall(r'\|\s+([\w.]+)$', done.stderr, re.M))
  assert 'dsdm_jax.pipeline' in imported
  assert not imported & {'tensorflow', 'seqio', 'tensorflow_datasets', 'flax', 'orbax.checkpoint', 'jax'}
  after = runs.fingerprint(copied)
  assert after.keys() == before.keys()
  assert [n for n in before if after[n] != before[n] and n not in ('results.json', 'results.md')] == []
  assert after['results.json'][0] == before['results.json'][0]


def test_a_finished_stage_alone_is_reused(copied, capsys):
  before = (copied / 'results.json').read_bytes()
  for stage in pipeline.NAMES:
    pipeline.run(get_config(), copied, stage)
    assert (copied / 'results.json').read_bytes() == before
    assert f'nothing to do: {stage} is finished in {copied}\n' in capsys.readouterr().out


def test_a_stage_alone_wants_what_it_reads(tmp_path):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', '--stage=datamodel')
  assert '--stage=datamodel reads pool, which is not finished' in message
  assert not (tmp_path / 'run').exists()

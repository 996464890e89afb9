"""An arm that is a mixture and a ladder of random models, through the command line to the results and the report."""

import csv
import json
import shutil

import numpy as np
import pytest

import dsdm_jax
from dsdm_jax.config.methods import STAGES
from dsdm_jax.core import artifacts, prng
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.order.selection import Selection
from tests.helpers.workdirs import files_of
from tests.pipeline import runs

PARTS = ('dsdm@docs rate=2', 'dsdm@api_qa rows=3 cap=2', 'random epochs=1')
RUNGS = ('0.5', '1')


@pytest.fixture(scope='module')
def trained(finished, tmp_path_factory):
  """The shared run with two arms, the mixture and the ladder; proxies and scores are taken over."""

  folder = tmp_path_factory.mktemp('mixed') / 'run'
  for stage in ('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features', 'datamodel'):
    shutil.copytree(finished / stage, folder / stage)
  output = runs.succeed(
    runs.TINY,
    f'--workdir={folder}',
    "--config.selection.methods=('dsdm','random')",
    f'--config.mixture.parts={PARTS}',
    f'--config.ladder.rungs={RUNGS}',
    '--config.ladder.step=1',
    '--config.ladder.seeds=2',
  )
  return folder, output


def table(folder, name):
  return list(csv.DictReader((folder / 'report' / 'data' / f'{name}.csv').read_text().splitlines()))


def test_stages_that_stood_were_not_made_again(trained):
  assert runs.stages_run(trained[0]) == ['selection', 'pretraining', 'ladder', 'evaluation', 'report']


def test_the_mixture_trained_to_its_end_on_its_schedule(trained):
  folder, _ = trained
  for seed in range(2):
    lines = (files_of(folder, 'pretraining') / f'mixture--any--{seed}.jsonl').read_text().splitlines()
    assert [json.loads(line)['tokens'] for line in lines][-1] == 64 * 32, 'the budget of every arm'
  index = json.loads((files_of(folder, 'selection') / 'index.json').read_text())
  entry = next(e for e in index if e['name'] == 'mixture--any--0')
  schedule = selection_lib.schedule(files_of(folder, 'selection'), entry, 64, prng.derive(0, 'order', 0))
  part_B, row_B, _ = schedule.at(np.arange(64))
  # Rates 2 : 1 : 1, but the second part has three rows, twice at most; the others share its place as 2 : 1.
  counts = np.bincount(part_B, minlength=3)
  assert counts[1] == 6 and counts.sum() == 64 and counts[0] > counts[2] > 16
  every = Selection.load(files_of(folder, 'selection'), 'mixture--any--0').rows
  assert set(row_B.tolist()) <= set(every.tolist())
  assert 'mixture' in (folder / 'results.md').read_text()


def test_the_mixture_is_compared_and_reported(trained):
  folder, _ = trained
  found = json.loads((folder / 'results.json').read_text())
  assert {r['method'] for r in found['arms']} == {'dsdm', 'random', 'mixture'}
  assert ('mixture', 'random') in {(c['method'], c['baseline']) for c in found['comparisons']}
  assert 'mixture' in (folder / 'report' / 'index.html').read_text().lower()
  shares = table(folder, 'sources')
  assert sum(float(s['share']) for s in shares if s['selection'].lower().startswith('mixture')) == pytest.approx(1)


def test_gross_and_net_multiplier_of_every_arm(trained):
  folder, _ = trained
  found = json.loads((folder / 'results.json').read_text())
  read = found['multiplier']
  assert read == json.loads((files_of(folder, 'evaluation') / 'multiplier.json').read_text())
  assert [(r['factor'], r['chosen']) for r in read['rungs']] == [(0.5, True), (1.0, True)] and read['rungs'][0][
    'flop'
  ] < read['rungs'][1]['flop']
  tasks = {'docs', 'api_qa', 'cs_algorithms', 'mean'}
  assert {(a['method'], a['task']) for a in read['arms']} == {
    (m, t) for m in ('dsdm', 'random', 'mixture') for t in tasks
  }
  spent = {stage: found['cost'][stage]['flop'] for stage in STAGES if stage in found['cost']}
  final = found['cost']['pretraining']['flop'] / 6
  for arm in read['arms']:
    assert arm['flop_final'] == pytest.approx(final)
    assert arm['flop_selection'] == (0 if arm['method'] == 'random' else pytest.approx(sum(spent.values())))
    same = (arm['gross'] == arm['net']) if arm['method'] == 'random' else (arm['gross'] != arm['net'])
    assert same, arm
    for end in ('estimate', 'low', 'high'):
      if arm['gross'][end] is not None:
        for unit, ending in (('flop', ''), ('seconds', '_seconds')):
          ratio = arm[f'{unit}_final'] / (arm[f'{unit}_final'] + arm[f'{unit}_selection'])
          assert arm[f'net{ending}'][end] == pytest.approx(arm[f'gross{ending}'][end] * ratio)


def test_the_report_shows_multipliers_and_what_the_ladder_cost(trained):
  folder, _ = trained
  page = (folder / 'report' / 'index.html').read_text()
  read = json.loads((files_of(folder, 'evaluation') / 'multiplier.json').read_text())
  section = page[page.index('id="multiplier"') :]
  for arm in read['arms']:
    for kind in ('gross', 'gross_seconds', 'net', 'net_seconds'):
      text = arm[kind]['text'].replace('>', '&gt;').replace('<', '&lt;')
      label = kind.replace('_seconds', ', in seconds')
      assert f'<td class="n" data-label="{label}">{text}</td>' in section
  costs = {line['stage']: line for line in table(folder, 'cost')}
  ladder = artifacts.open_stage(folder, 'ladder').manifest['cost']
  assert float(costs['ladder']['flop']) == ladder['flop'] > 0 and float(costs['ladder']['seconds']) == ladder['seconds']
  assert '<td>ladder</td>' in page
  assert (folder / 'report/figures/multiplier-mean.png').read_bytes().startswith(b'\x89PNG')
  gross = [line['gross text'] for line in table(folder, 'multiplier')]
  assert gross == [arm['gross']['text'] for arm in read['arms']]
  points = [float(line['value']) for line in table(folder, 'ladder')]
  assert points == [p['value'] for curve in read['curves'] for p in curve['points']] and len(points) == 2 * 4


def test_the_notebook_has_multipliers_and_their_plot(trained):
  pytest.importorskip('pandas')
  found = dsdm_jax.load(trained[0]).results
  assert found.multiplier['gross text'].tolist() == [a['gross']['text'] for a in found.raw['multiplier']['arms']]
  assert found.ladder['flop'].nunique() == 2
  assert found.plot_multiplier('docs')._repr_png_().startswith(b'\x89PNG')
  with pytest.raises(KeyError, match='no ladder on'):
    found.plot_multiplier('poems')

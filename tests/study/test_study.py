"""A small study from the command line: shared stages, resume, comparison of arms, arms with new proxies, arm files."""

import base64
import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest

from configs import study, study_above_ngrams, study_mixed_text
from dsdm_jax.config import validate as checks
from dsdm_jax.core import artifacts
from dsdm_jax.errors import UserError
from dsdm_jax.study import arm_file
from dsdm_jax.study.__main__ import main
from dsdm_jax.study.arm_file import ArmFile
from dsdm_jax.study.results import drawings, tables
from dsdm_jax.study.study import _named, compare, headline_task, primary, primary_pairs
from tests.conftest import ROOT
from tests.helpers.workdirs import files_of
from tests.pipeline import runs, tiny

CONFIG = """
from tests.pipeline import tiny

ARMS = {'base': {}, 'damped': {}, 'again_1': {}}
PRIMARY = (('dsdm', 'random'), ('dsdm', 'dsdm/damped'))

def get_config(arm='base'):
  config = tiny.get_config()
  config.pool.sources = (*config.pool.sources, 'jsonl:MORE')
  config.selection.methods = {'base': ('dsdm', 'random'), 'damped': ('dsdm', 'dsdm_greedy')}.get(arm, ('dsdm',))
  config.datamodel.damping = 1.0 if arm == 'damped' else 0.1
  config.proxies.seed = 1 if arm == 'again_1' else 0
  config.ladder.rungs = ('0.5', '1') if arm == 'base' else ()
  config.ladder.step, config.ladder.seeds = 1.0, 2
  config.evaluation.selection_uses = 2
  return config
"""


def _study(tmp_path, *flags: str, config=None) -> subprocess.CompletedProcess[str]:
  config, more = (
    config or tmp_path / 'arms.py',
    tmp_path / 'more.jsonl',
  )  # files of a source have a state, which is part of the pool's identity
  if not more.exists():
    more.write_text(json.dumps({'text': 'One more document, of a file. ' * 40}) + '\n')
  (tmp_path / 'arms.py').write_text(CONFIG.replace('MORE', str(more)))
  command = [sys.executable, '-m', 'dsdm_jax.study', 'run', f'--config={config or tmp_path / "arms.py"}']
  command += [f'--workdir={tmp_path / "study"}', *flags]
  options = {'cwd': ROOT, 'env': runs.environment(), 'capture_output': True, 'text': True}
  return subprocess.run(command, **options, timeout=400, check=False)


@pytest.mark.parametrize('module', [study, study_mixed_text, study_above_ngrams])
def test_every_arm_of_a_study_is_a_config(module):
  for arm in module.ARMS:
    checks.validate(module.get_config(arm))


def test_the_study_varies_every_choice_of_the_method():
  def flat(arm: str) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in checks.flatten(study.get_config(arm)).items()}

  base = flat('base')
  varied: dict[str, set] = {}
  for arm in study.ARMS:
    for key, value in flat(arm).items():
      if value != base[key]:
        varied.setdefault(key, {base[key]}).add(value)
  proxies = {'proxies.count', 'proxies.model.width', 'proxies.epochs', 'proxies.seed'}
  method = {'features.dimension', 'features.projection', 'datamodel.damping', 'datamodel.gram', 'datamodel.mix'}
  assert proxies | method | {f'selection.{key}' for key in ('examples', 'epochs', 'methods')} <= set(varied)
  assert {'auto', 'full', 'joint'} == varied['datamodel.gram'] and {'mean', 'rank'} <= varied['datamodel.mix']
  assert ('dsdm_greedy',) in varied['selection.methods'] and ('dsdm_clusters',) in varied['selection.methods']
  budgets = {c.selection.examples * c.selection.epochs for c in map(study.get_config, study.ARMS)}
  assert len(budgets) == 1, 'every arm trains as long as every other'


def _compared(
  task: str, method: str, baseline: str, difference: float, p_value: float, target_mix: str = 'mix'
) -> dict:
  names = {'task': task, 'split': 'holdout', 'metric': 'logprob', 'method': method, 'baseline': baseline}
  own = {'difference': difference, 'low': difference - 0.1, 'high': difference + 0.2, 'p_value': p_value}
  return {**names, **own, 'seeds': [5, 3], 'target_mix': target_mix}


def _arms(tasks, *arms: tuple[str, str]) -> list[dict]:
  return [{'task': t, 'split': 'holdout', 'method': method, 'target_mix': mix} for method, mix in arms for t in tasks]


def test_primary_comparisons_of_one_task_ignore_the_mean_over_benchmarks():
  compared, of_benchmarks = (_compared(task, 'dsdm', 'random', 0.3, 0.02) for task in ('a', 'mean'))
  means = {'summary': [], 'comparisons': [of_benchmarks | {'split': 'benchmark', 'difference': -1.0}]}
  arms = _arms(['a'], ('dsdm', 'mix'), ('random', 'any'))
  comparison = {'arms': arms, 'means': means, 'comparisons': [compared], 'confidence': 0.95}
  assert [c['difference'] for c in primary(comparison, [('dsdm', 'random')])] == [0.3]


@pytest.mark.parametrize('tasks', [('a',), ('a', 'b', 'mean')])
def test_primary_comparisons_are_adjusted_over_themselves_alone(tasks):
  rows = [
    row
    for task in tasks
    for row in (
      _compared(task, 'dsdm', 'random', 0.3, 0.02),
      _compared(task, 'lsa/lsa', 'dsdm', -0.2, 0.03),
      _compared(task, 'lsa/lsa', 'random', 0.1, 0.001),
    )
  ]
  averaged = [row for row in rows if row['task'] == 'mean']
  singles = [row for row in rows if row['task'] != 'mean'] + [_compared('breadth', 'dsdm', 'random', -9.0, 0.5)]
  arms = _arms(tasks[:2], ('dsdm', 'mix'), ('random', 'any'), ('lsa/lsa', 'mix'))
  means = {'summary': [{'task': 'mean', 'split': 'holdout'}] * bool(averaged), 'comparisons': averaged}
  comparison = {'arms': arms, 'means': means, 'comparisons': singles, 'confidence': 0.95}
  found = primary(comparison, [('dsdm', 'random'), ('dsdm', 'lsa/lsa')])
  assert [(c['task'], c['method'], c['baseline']) for c in found] == [
    (tasks[-1], 'dsdm', 'random'),
    (tasks[-1], 'dsdm', 'lsa/lsa'),
  ]
  assert [c['p_holm'] for c in found] == pytest.approx([0.04, 0.04]), 'twice 0.02, and not below that'
  assert [(c['verdict'], c['seeds']) for c in found] == [('better', [5, 3]), ('better', [3, 5])]
  assert (found[1]['difference'], found[1]['low'], found[1]['high']) == pytest.approx((0.2, 0.0, 0.3))
  assert primary(comparison, [('dsdm', 'random'), ('dsdm', 'bm25/text')]) == [], 'that arm is not finished'


def _of_targets(headline: str, *arms: tuple[str, str], below: str = 'random') -> dict:
  """Arms of targets against `below`, each with a difference of its own, on tasks a, b and c."""
  known = [(below, 'any'), *arms] if below == 'random' else list(arms)
  compared = [
    _compared(headline, method, below, 0.1 * number, 0.01, mix)
    for number, (method, mix) in enumerate(arms, 1)
    if method != below
  ]
  means = {'summary': [{'task': headline, 'split': 'holdout'}], 'comparisons': compared}
  return {'arms': _arms(['a', 'b', 'c'], *known), 'means': means, 'comparisons': [], 'confidence': 0.95}


@pytest.mark.parametrize(
  ('headline', 'targets', 'wanted'),
  [
    ('mean', ('a', 'mix'), 0.2),
    ('mean', ('mix', 'a'), 0.1),
    ('mean', ('a', 'c+b+a'), 0.2),  # all tasks by their names
    ('a+b', ('mix', 'a+b', 'c'), 0.2),
    ('a+b', ('a', 'a+b+breadth'), 0.2),
    ('a+b', ('c',), 0.1),  # the only one there is
  ],
)
def test_primary_comparisons_are_for_the_target_of_the_headline(headline, targets, wanted):
  comparison = _of_targets(headline, *(('dsdm', target) for target in targets))
  (found,) = primary(comparison, [('dsdm', 'random')])
  assert found['difference'] == pytest.approx(wanted)
  (turned,) = primary(comparison, [('random', 'dsdm')])
  assert (turned['difference'], turned['target_mix']) == (pytest.approx(-wanted), 'any')


@pytest.mark.parametrize('targets', [('a', 'b'), ('mix', 'a+b+c')])
def test_primary_comparisons_of_several_targets_without_a_headline_are_refused(targets):
  comparison = _of_targets('mean', *(('dsdm/x', target) for target in targets))
  for pair in (('dsdm/x', 'random'), ('random', 'dsdm/x')):
    with pytest.raises(UserError, match=r'not exactly one is the headline \(mean\); name fewer in .* of x'):
      primary(comparison, [('dsdm', 'lsa/lsa'), pair])


def test_primary_comparisons_see_the_target_of_the_baseline_too():
  """An arm without a target is compared with the first of `dsdm`."""
  arms = ('minhash/text', 'any'), ('dsdm', 'mix'), ('dsdm', 'a')
  (found,) = primary(_of_targets('mean', *arms, below='dsdm'), [('dsdm', 'minhash/text')])
  assert (found['difference'], found['target_mix']) == (pytest.approx(-0.1), 'mix')
  with pytest.raises(UserError, match='dsdm has the targets a, mix, .* of base'):
    primary(_of_targets('mean', arms[0], *arms[:0:-1], below='dsdm'), [('dsdm', 'minhash/text')])


def test_the_figure_has_arms_for_all_tasks_by_their_names():
  comparison = _of_targets('mean', ('dsdm', 'a+b+c'), ('lsa', 'a')) | {'multiplier': None}
  for c in comparison['means']['comparisons']:
    c |= {'verdict': 'better', 'conditional': False, 'basis': 'seeds and items', 'p_holm': 0.01}
  (drawing,) = drawings(comparison).values()
  svg = drawing.svg('effect')
  assert 'DsDm' in svg and 'LSA' not in svg


def test_what_names_no_comparison_is_refused():
  module = types.SimpleNamespace(PRIMARY=('dsdm', 'random'))
  with pytest.raises(UserError, match="has 'dsdm'; give pairs of names"):
    primary_pairs(module)
  assert primary_pairs(study) == []


@pytest.mark.parametrize(
  ('pair', 'message'),
  [(('dsdm', 'lsa'), "names 'lsa', which no arm has"), (('bm25/text', 'bm25/text'), 'one of the two must be random')],
)
def test_primary_comparisons_that_no_arm_can_give_are_refused_before_anything_is_trained(
  pair, message, tmp_path, capsys
):
  text = CONFIG.replace("'again_1': {}}", "'text': {}}").replace("('dsdm', 'dsdm_greedy')", "('dsdm',)")
  text = text.replace("}.get(arm, ('dsdm',))", "}.get(arm, ('bm25',))").replace("('dsdm', 'dsdm/damped')", repr(pair))
  (tmp_path / 'arms.py').write_text(text)
  assert main(['run', '--config', str(tmp_path / 'arms.py'), '--workdir', str(tmp_path / 'w')]) == 2
  assert message in capsys.readouterr().err and not (tmp_path / 'w').exists()


def test_primary_comparisons_name_arms_as_the_tables_do():
  config = tiny.get_config()
  config.selection.methods = ('dsdm', 'my.own:shortest')
  config.mixture.parts, config.evaluation.checkpoints = ('dsdm:1',), ('public=some/folder',)
  assert _named('base', config) == ['dsdm', 'shortest', 'mixture', 'public']
  assert _named('x', config) == ['dsdm/x', 'shortest/x', 'mixture/x', 'public/x']


@pytest.mark.parametrize('text', ['undefined', "ARMS = {'base': {}}\ndef get_config(arm): return 1 / 0"])
def test_a_config_that_fails_is_one_line(tmp_path, capsys, text):
  (tmp_path / 'mine.py').write_text(text)
  assert main(['run', '--config', str(tmp_path / 'mine.py'), '--workdir', str(tmp_path / 'w')]) == 2
  said = capsys.readouterr().err
  assert re.fullmatch(r'dsdm_jax: --config=.*mine.py\S*: (NameError|ZeroDivisionError): .*; correct it.*\n', said), said
  assert not (tmp_path / 'w').exists()


def _of_one_task(name: str, *mixes: str) -> ArmFile:
  """The published arm `base` on one task alone, with models of DsDm for each of the `mixes`."""
  arm = arm_file.read(ROOT / 'docs/results/above_ngrams/base.json')
  rows = [(place, mix) for place, run in enumerate(arm.runs) if run['method'] == 'dsdm' for mix in mixes]
  rows += [(place, run['target_mix']) for place, run in enumerate(arm.runs) if run['method'] == 'random']
  runs = [{**arm.runs[place], 'target_mix': mix} for place, mix in rows]
  items, lines = (
    {key: value[[place for place, _ in rows]] for key, value in of.items() if 'squad' in key}
    for of in (arm.items, arm.lines)
  )
  return dataclasses.replace(arm, name=name, runs=runs, items=items, lines=lines)


def test_new_draws_are_of_one_target_and_of_several_arms():
  def found(*arms: ArmFile) -> set[str]:
    return {row['target_mix'] for row in compare(arms)['arms'] if row['method'] == 'dsdm/again'}

  base = _of_one_task('base', 'squad_cloze', 'mix')
  assert found(base) == set()
  assert found(base, _of_one_task('again_1', 'mix')) == {'mix'}


def test_the_only_task_is_the_headline():
  arm = _of_one_task('base', 'squad_cloze')
  comparison = compare([arm])
  assert headline_task(comparison) == 'squad_cloze'
  comparison['primary'] = primary(comparison, [('dsdm', 'random')])
  assert [c['task'] for c in comparison['primary']] == ['squad_cloze']
  assert drawings(comparison).keys() == {'effect'}
  assert '| dsdm for squad_cloze | 3 | **+0.42' in tables(comparison, [arm], '')


@pytest.fixture(scope='module')
def studied(tmp_path_factory):
  """The folder of a study that took two commands."""
  tmp_path = tmp_path_factory.mktemp('studied')
  done = _study(tmp_path, '--arms=base,nothing')
  assert done.returncode == 2 and '--arms=nothing is not an arm' in done.stderr
  done = _study(tmp_path, '--arms=base,damped')
  assert done.returncode == 0, done.stderr[-3000:]
  arms = tmp_path / 'study' / 'arms'
  before = runs.fingerprint(arms)
  done = _study(tmp_path)  # finished stages are not computed again
  assert done.returncode == 0, done.stderr[-3000:]
  after = runs.fingerprint(arms)
  arrays = {file for file in before if file.endswith('.npz')}
  assert arrays and {file: after[file] for file in arrays} == {file: before[file] for file in arrays}, 'resumed'
  return tmp_path / 'study'


def test_equal_stages_are_computed_once(studied):
  arms = studied / 'arms'
  for arm, own in (('damped', 'datamodel'), ('again_1', 'proxies')):
    for stage in ('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features', 'datamodel'):
      mine, of_base = (artifacts.open_stage(arms / name, stage) for name in (arm, 'base'))
      file = min(mine.manifest['files'])
      same = file in of_base.manifest['files'] and (mine.path / file).samefile(of_base.path / file)
      shared = {'pool', 'leakage', 'targets'} | (
        {'proxies', 'features', 'target_features'} if own == 'datamodel' else set()
      )
      assert same == (stage in shared), stage


def test_every_arm_is_compared(studied):
  assert all((studied / 'arms' / arm / 'report/index.html').is_file() for arm in ('base', 'damped', 'again_1'))
  found = json.loads((studied / 'study.json').read_text())
  pairs = {(c['method'], c['baseline']) for c in found['comparisons']}
  compared = {'dsdm/damped', 'dsdm/again_1', 'dsdm_greedy/damped'}  # dsdm/again has a model of dsdm
  against_random = {(method, 'random') for method in {*compared, 'dsdm', 'dsdm/again'}}
  assert pairs == against_random | {(method, 'dsdm') for method in compared}
  conditional = {c['method']: c['conditional'] for c in found['comparisons'] if c['baseline'] == 'random'}
  assert conditional['dsdm'] and conditional['dsdm/again_1'] and not conditional['dsdm/again']
  assert [(c['method'], c['baseline']) for c in found['primary']] == [('dsdm', 'random'), ('dsdm', 'dsdm/damped')]
  means = {(r['method'], r['seed'], r['task'], r['split']): r['logprob'] for r in found['arms']}
  place = ('docs', 'holdout')
  assert means['dsdm/again', 0, *place] == means['dsdm', 0, *place]
  assert means['dsdm/again', 1, *place] == means['dsdm/again_1', 1, *place] != means['dsdm', 1, *place]
  with (studied / 'study.csv').open() as file:
    assert len(list(csv.DictReader(file))) == 2 * (len(found['comparisons']) + len(pairs))


def test_every_arm_is_read_off_the_ladder_of_base_and_charged_with_its_own_stages(studied):
  found = json.loads((studied / 'study.json').read_text())['multiplier']
  rows = {row['method']: row for row in found['arms'] if (row['task'], row['split']) == ('docs', 'holdout')}
  assert (
    set(rows) == {'dsdm', 'random', 'dsdm/damped', 'dsdm_greedy/damped', 'dsdm/again_1', 'dsdm/again'}
    and found['uses'] == 2
  )
  for name, arm in (('dsdm', 'base'), ('dsdm/damped', 'damped'), ('dsdm/again_1', 'again_1')):
    spent = [
      json.loads((studied / 'arms' / arm / stage / 'manifest.json').read_text())['cost']['flop']
      for stage in ('proxies', 'features', 'target_features', 'datamodel', 'selection')
    ]
    assert rows[name]['flop_selection'] == pytest.approx(sum(spent)) and spent[0] > 0
  assert rows['random']['flop_selection'] == 0
  # The run's own table agrees for its arms, up to the rounding of values.
  own = json.loads((artifacts.open_stage(studied / 'arms/base', 'evaluation').path / 'multiplier.json').read_text())
  (alone,) = (r for r in own['arms'] if (r['method'], r['task'], r['split']) == ('dsdm', 'docs', 'holdout'))
  assert alone['value'] == pytest.approx(rows['dsdm']['value'], abs=1e-3)
  assert alone['flop_final'] == rows['dsdm']['flop_final'] and alone['flop_selection'] == rows['dsdm']['flop_selection']


def test_a_file_holds_the_values_to_a_thousandth(studied):
  found = arm_file.read(studied / 'finished/damped.json')
  evaluation = files_of(studied / 'arms/damped', 'evaluation')
  with np.load(evaluation / 'items.npz') as arrays:
    compared = {key for key in arrays.files if key.rpartition('__')[2] in ('holdout', 'benchmark')}
    assert set(found.items) == compared and compared
    for key, values_RI in found.items.items():
      np.testing.assert_allclose(values_RI, arrays[key], atol=0.50001e-3)
  documents = json.loads((evaluation / 'documents.json').read_text())
  for (task, split), numbers in found.documents.items():
    names = documents[f'{task}__{split}']
    assert len(numbers) == len(names)
    assert len(set(zip(numbers, names, strict=True))) == len(set(numbers)) == len(set(names)), 'one number a document'


def test_a_document_has_one_number_over_all_tasks(tmp_path):
  names = {'a__holdout': ['x', 'a/1'], 'b__benchmark': ['b/1', 'x', 'b/1'], 'b__target': ['left out']}
  (tmp_path / 'documents.json').write_text(json.dumps(names))
  found = arm_file._names(arm_file._packed_names(tmp_path / 'documents.json'))
  assert found.keys() == {('a', 'holdout'), ('b', 'benchmark')}
  (x, first), (second, same, again) = found['a', 'holdout'], found['b', 'benchmark']
  assert x == same and second == again and len({x, first, second}) == 3


def test_arms_from_elsewhere_join_the_table(studied, tmp_path):
  shutil.copytree(studied / 'finished', tmp_path / 'finished')
  flags = ['--config', str(studied.parent / 'arms.py'), '--out', str(tmp_path / 'out')]
  assert main(['results', '--files', f'{tmp_path}/finished/*.json', *flags]) == 0
  ours, theirs = ((folder / 'study.csv').read_text().splitlines() for folder in (tmp_path / 'out', studied))
  assert sorted(ours) == sorted(theirs), 'independent of the order of the files'
  text = (tmp_path / 'out/tables.md').read_text()
  assert '| dsdm/damped for mix |' in text and '`datamodel.damping=1.0`' in text and 'pays from' in text
  assert '## Primary comparisons' in text and '| dsdm − dsdm/damped |' in text
  for name in ('effect', 'multiplier'):
    assert (tmp_path / f'out/{name}.svg').read_text().count('<svg') == 1
  # Elsewhere, with only the arm files of the first study: the base arm's models are not trained again.
  (tmp_path / 'finished/damped.json').unlink()
  for stage in ('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features', 'datamodel'):
    shutil.copytree(studied / 'arms/damped' / stage, tmp_path / 'study/arms/damped' / stage)
  done = _study(tmp_path, '--arms=damped', f'--also={tmp_path}/finished/*.json', config=studied.parent / 'arms.py')
  assert done.returncode == 0, done.stderr[-3000:]
  assert [path.name for path in (tmp_path / 'study/arms').iterdir()] == ['damped']
  joined = json.loads((tmp_path / 'study/study.json').read_text())
  assert {row['method'] for row in joined['arms']} >= {'dsdm', 'dsdm/damped', 'dsdm/again_1'}


def test_arms_whose_targets_count_differently_fit(studied, tmp_path):
  base, damped = (artifacts.unseal((studied / f'finished/{arm}.json').read_bytes()) for arm in ('base', 'damped'))
  counts = [name.replace('.holdout.npz', '.json') for name in damped['asked'] if name.endswith('.holdout.npz')]
  assert counts and damped['asked'].keys() >= {*counts}
  asked = damped['asked'] | dict.fromkeys(counts, '0' * 64)
  for arm in (base, {**damped, 'asked': asked}):
    (tmp_path / f'{arm["arm"]}.json').write_bytes(artifacts.seal(arm))
  assert main(['results', '--files', f'{tmp_path}/*.json', '--out', str(tmp_path / 'out')]) == 0


def test_files_that_do_not_fit_are_refused(studied, tmp_path, capsys):
  whole = artifacts.unseal((studied / 'finished/damped.json').read_bytes())
  (tmp_path / 'base.json').write_text((studied / 'finished/base.json').read_text())

  def refused(**changes) -> str:
    (tmp_path / 'damped.json').write_bytes(artifacts.seal({**whole, **changes}))
    assert main(['results', '--files', f'{tmp_path}/*.json', '--out', str(tmp_path / 'out')]) == 2
    message = capsys.readouterr().err
    assert message.count('\n') == 1
    return message

  assert 'arm damped was evaluated on other items than base: evaluation.max_items differ' in refused(
    asked={**whole['asked'], 'evaluation.max_items': 13}
  )
  (file, *_) = (name for name in whole['asked'] if name.endswith('.holdout.npz'))
  assert f'was evaluated on other items than base: {file} differ' in refused(asked={**whole['asked'], file: '0' * 64})
  assert 'has format 2 and this version reads 1' in refused(format=2)
  assert 'must have distinct names and include base' in refused(arm='base')
  bomb = base64.b64encode(zlib.compress(b'\0' * 2**24, 9)).decode()
  key = next(iter(whole['items']))
  for packed in ({'shape': [2, 3], 'data': bomb}, {'shape': [10**12], 'data': bomb}, {'shape': [2, 3], 'data': '!'}, 7):
    assert 'is not the file of a finished arm, or is damaged' in refused(items={key: packed})
  (tmp_path / 'damped.json').write_text((studied / 'finished/damped.json').read_text()[:-40])
  with pytest.raises(UserError, match='is not the file of a finished arm, or is damaged'):
    arm_file.read(tmp_path / 'damped.json')
  assert main(['results', '--files', f'{tmp_path}/none-*.json', '--out', str(tmp_path / 'out')]) == 2
  assert 'matches no file' in capsys.readouterr().err

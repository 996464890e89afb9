"""A small study through its command: shared stages, resume, arms compared, proxies made anew."""

import csv
import json
import subprocess
import sys

from configs import study
from dsdm_jax.core import config as checks
from tests.conftest import ROOT
from tests.pipeline import runs

CONFIG = """
from tests.pipeline import tiny

ARMS = {'base': {}, 'damped': {}, 'again_1': {}}

def get_config(arm='base'):
  config = tiny.get_config()
  config.pool.sources = (*config.pool.sources, 'jsonl:MORE')
  config.selection.methods = {'base': ('dsdm', 'random'), 'damped': ('dsdm', 'dsdm_greedy')}.get(arm, ('dsdm',))
  config.datamodel.damping = 1.0 if arm == 'damped' else 0.1
  config.proxies.seed = 1 if arm == 'again_1' else 0
  return config
"""


def _study(tmp_path, *flags: str) -> subprocess.CompletedProcess[str]:
  more = tmp_path / 'more.jsonl'  # a source whose files have a state, which is part of what makes pools alike
  if not more.exists():
    more.write_text(json.dumps({'text': 'One more document, of a file. ' * 40}) + '\n')
  (tmp_path / 'arms.py').write_text(CONFIG.replace('MORE', str(more)))
  return subprocess.run(
    [
      sys.executable, '-m', 'dsdm_jax.bench', 'study', f'--config={tmp_path / "arms.py"}',
      f'--workdir={tmp_path / "study"}', *flags,
    ],
    cwd=ROOT, env=runs.environment(), capture_output=True, text=True, timeout=400, check=False,
  )  # fmt: skip


def test_every_arm_of_the_study_is_a_config():
  for arm in study.ARMS:
    checks.validate(study.get_config(arm))


def test_the_study_varies_every_choice_of_the_method():
  def flat(arm: str) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in checks.flatten(study.get_config(arm)).items()}

  base = flat('base')
  varied: dict[str, set] = {}
  for arm in study.ARMS:
    for key, value in flat(arm).items():
      if value != base[key]:
        varied.setdefault(key, {base[key]}).add(value)
  assert {
    'proxies.count', 'proxies.model.width', 'proxies.epochs', 'proxies.seed', 'features.dimension',
    'features.projection', 'datamodel.damping', 'datamodel.gram', 'datamodel.mix', 'selection.examples',
    'selection.epochs', 'selection.methods',
  } <= set(varied)  # fmt: skip
  assert {'auto', 'full', 'joint'} == varied['datamodel.gram'] and {'mean', 'rank'} <= varied['datamodel.mix']
  assert ('dsdm_greedy',) in varied['selection.methods'] and ('dsdm_clusters',) in varied['selection.methods']
  budgets = {c.selection.examples * c.selection.epochs for c in map(study.get_config, study.ARMS)}
  assert len(budgets) == 1, 'every arm trains as long as every other'


def test_study(tmp_path):
  done = _study(tmp_path, '--arms=base,nothing')
  assert done.returncode == 2 and '--arms=nothing is no arm' in done.stderr
  done = _study(tmp_path, '--arms=base,damped')
  assert done.returncode == 0, done.stderr[-3000:]
  arms = tmp_path / 'study' / 'arms'
  before = runs.fingerprint(arms)
  done = _study(tmp_path)  # some of its stages are finished, and are not made again
  assert done.returncode == 0, done.stderr[-3000:]
  after = runs.fingerprint(arms)
  kept = {file for file in before if file.endswith('.npz')}
  assert kept and {file: after[file] for file in kept} == {file: before[file] for file in kept}, 'resumed'

  for arm, own in (('damped', 'datamodel'), ('again_1', 'proxies')):
    for stage in ('pool', 'targets', 'proxies', 'features', 'datamodel'):
      same = (arms / arm / stage / 'manifest.json').samefile(arms / 'base' / stage / 'manifest.json')
      assert same == (stage in ('pool', 'targets') or (own == 'datamodel' and stage in ('proxies', 'features'))), stage

  found = json.loads((tmp_path / 'study' / 'study.json').read_text())
  pairs = {(c['method'], c['baseline']) for c in found['comparisons']}
  assert pairs == {
    ('dsdm', 'random'), ('dsdm/damped', 'random'), ('dsdm/again_1', 'random'), ('dsdm/again', 'random'),
    ('dsdm/damped', 'dsdm'), ('dsdm/again_1', 'dsdm'), ('dsdm/again', 'dsdm'),
    ('dsdm_greedy/damped', 'random'), ('dsdm_greedy/damped', 'dsdm'),
  }  # fmt: skip
  conditional = {c['method']: c['conditional'] for c in found['comparisons'] if c['baseline'] == 'random'}
  assert conditional['dsdm'] and conditional['dsdm/again_1'] and not conditional['dsdm/again']
  means = {(r['method'], r['seed'], r['task'], r['split']): r['logprob'] for r in found['arms']}
  place = ('docs', 'holdout')
  assert means['dsdm/again', 0, *place] == means['dsdm', 0, *place]
  assert means['dsdm/again', 1, *place] == means['dsdm/again_1', 1, *place] != means['dsdm', 1, *place]
  with (tmp_path / 'study' / 'study.csv').open() as file:
    assert len(list(csv.DictReader(file))) == 2 * (len(found['comparisons']) + len(pairs))

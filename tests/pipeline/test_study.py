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
  config.selection.methods = ('dsdm', 'random') if arm == 'base' else ('dsdm',)
  config.datamodel.damping = 1.0 if arm == 'damped' else 0.1
  config.proxies.seed = 1 if arm == 'again_1' else 0
  return config
"""


def _study(tmp_path, *flags: str) -> subprocess.CompletedProcess[str]:
  (tmp_path / 'arms.py').write_text(CONFIG)
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


def test_study(tmp_path):
  done = _study(tmp_path, '--arms=base,nothing')
  assert done.returncode == 2 and '--arms=nothing is no arm' in done.stderr
  done = _study(tmp_path, '--arms=base,damped')
  assert done.returncode == 0, done.stderr[-3000:]
  arms = tmp_path / 'study' / 'arms'
  before = runs.fingerprint(arms)
  done = _study(tmp_path)
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
  }  # fmt: skip
  conditional = {c['method']: c['conditional'] for c in found['comparisons'] if c['baseline'] == 'random'}
  assert conditional['dsdm'] and conditional['dsdm/again_1'] and not conditional['dsdm/again']
  means = {(r['method'], r['seed'], r['task'], r['split']): r['logprob'] for r in found['arms']}
  place = ('docs', 'holdout')
  assert means['dsdm/again', 0, *place] == means['dsdm', 0, *place]
  assert means['dsdm/again', 1, *place] == means['dsdm/again_1', 1, *place] != means['dsdm', 1, *place]
  with (tmp_path / 'study' / 'study.csv').open() as file:
    assert len(list(csv.DictReader(file))) == 2 * (len(found['comparisons']) + 7)

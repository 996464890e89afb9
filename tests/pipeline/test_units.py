"""What is added to a finished run is all that a rerun computes: targets, seeds, arms and benchmarks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax import pipeline
from dsdm_jax.core import artifacts
from tests.helpers import scores as saved_scores
from tests.helpers.workdirs import files_of
from tests.pipeline import runs

OURS = ('docs', 'api_qa', 'cs_algorithms')
KINDS = ('gold', 'tin', 'iron', 'lead', 'zinc', 'clay', 'salt', 'chalk')
ALWAYS = {'report'}


def _questions(file: Path, place: str) -> str:
  lines = [
    {
      'context': f'Where in the {place} of house {n} is {kind} kept by the {n}th owner?\nAnswer:',
      'answer': f' room {n}',
    }
    for n, kind in enumerate(KINDS * 3)
  ]
  file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return str(file)


def _rerun(workdir: Path, *flags: str) -> dict[str, set[str]]:
  """Stage that ran → its units that were computed."""
  count = len(runs.events(workdir))
  runs.succeed(runs.TINY, f'--workdir={workdir}', '--rerun', *flags)
  ended = [event for event in runs.events(workdir)[count:] if event['event'] == 'end']
  for name in (event['stage'] for event in ended):
    artifacts.read(workdir, name)
  return {event['stage']: set(event['made']) for event in ended}


def _tasks(*more: str) -> str:
  return f'--config.targets.tasks={(*OURS, *more)}'


def test_additions_compute_only_themselves(copied, tmp_path):
  """All kinds at once; a mix of all targets asks for the new one, so its arms are trained again."""
  mine, asked = (_questions(tmp_path / f'{name}.jsonl', name) for name in ('mine', 'asked'))
  before = {name: artifacts.open_stage(copied, name).manifest for name in pipeline.NAMES}
  old_scores = saved_scores.load(files_of(copied, 'datamodel'))
  made = _rerun(
    copied,
    _tasks(mine),
    '--config.pretraining.seeds=3',
    f'--config.evaluation.tasks=("targets","{asked}")',
    '--config.selection.methods=("dsdm","random","random_one_epoch","bottom","random_again")',
  )
  assert made.keys() == set(pipeline.NAMES) - {'pool', 'proxies', 'features'}
  assert made['targets'] == made['target_features'] == {'mine'} and made['datamodel'] == {'scores of mine'}
  of_mix = {f'{method}--mix--{seed}' for method in ('dsdm', 'bottom') for seed in range(3)}
  new = {'random--any--2', 'random_one_epoch--any--2', *(f'random_again--any--{seed}' for seed in range(3))}
  assert made['selection'] == {'dsdm--mix--0', 'bottom--mix--0'} | new
  assert made['pretraining'] == of_mix | new
  old = {f'{method}--any--{seed}' for method in ('random', 'random_one_epoch') for seed in range(2)}
  every, added = {*OURS, 'mine', 'asked'}, {'mine', 'asked'}
  assert made['evaluation'] == {f'{m} on {t}' for m in of_mix | new for t in every} | {
    f'{m} on {t}' for m in old for t in added
  }
  scores = saved_scores.load(files_of(copied, 'datamodel'))
  for task in OURS:
    np.testing.assert_array_equal(scores[f'score_{task}_N'], old_scores[f'score_{task}_N'])
  # What was taken over has its cost: that of the stage is that of all its units.
  for name in ('target_features', 'pretraining', 'evaluation'):
    now = artifacts.open_stage(copied, name).manifest
    assert now['cost']['flop'] > before[name]['cost']['flop']
    assert now['cost']['seconds'] >= sum(unit['parts'].get(n, 0) for n, unit in now['units'].items())
  assert {finding.kind for finding in artifacts.inspect(copied)} == {'whole'}


@pytest.mark.full
def test_each_kind_alone_and_the_same_as_a_run_of_its_own(finished, tmp_path):
  mine, asked = (_questions(tmp_path / f'{name}.jsonl', name) for name in ('mine', 'asked'))
  old_mix = '--config.selection.targets=("docs+api_qa+cs_algorithms",)'
  named = Path(shutil.copytree(finished, tmp_path / 'named'))
  _rerun(named, old_mix)
  own = '--config.selection.targets=("docs+api_qa+cs_algorithms","mine")'
  both = {f'{method}--mine--{seed}' for method in ('dsdm', 'bottom') for seed in range(2)}
  models = {
    f'{m}--{t}--{seed}'
    for m, t in (('dsdm', '+'.join(OURS)), ('bottom', '+'.join(OURS)), ('random', 'any'), ('random_one_epoch', 'any'))
    for seed in range(2)
  }
  seeds = {f'{name[:-1]}2' for name in models}
  again = {f'random_again--any--{seed}' for seed in range(2)}
  arms = '--config.selection.methods=("dsdm","random","random_one_epoch","bottom","random_again")'
  kinds = {
    'target': ((old_mix, _tasks(mine)), set(), {f'{m} on mine' for m in models}),
    'target with arms': (
      (own, _tasks(mine)),
      both,
      {f'{m} on {t}' for m in both for t in (*OURS, 'mine')} | {f'{m} on mine' for m in models},
    ),
    'seed': ((old_mix, '--config.pretraining.seeds=3'), seeds, {f'{m} on {t}' for m in seeds for t in OURS}),
    'arm': ((old_mix, arms), again, {f'{m} on {t}' for m in again for t in OURS}),
    'benchmark': (
      (old_mix, f'--config.evaluation.tasks=("targets","{asked}")'),
      set(),
      {f'{m} on asked' for m in models},
    ),
  }
  for kind, (flags, trained, evaluated) in kinds.items():
    workdir = Path(shutil.copytree(named, tmp_path / kind.replace(' ', '_')))
    made = _rerun(workdir, *flags)
    assert not made.keys() & {'pool', 'proxies', 'features'}, kind
    assert made.get('pretraining', set()) == trained and made['evaluation'] == evaluated, kind
    fresh = tmp_path / f'fresh_{kind.replace(" ", "_")}'
    runs.succeed(runs.TINY, f'--workdir={fresh}', *flags)
    runs.assert_same_outcome(workdir, fresh)
  back = _rerun(tmp_path / 'target', old_mix)
  assert not any(back.values()), 'removing a target computes nothing'
  runs.assert_same_outcome(tmp_path / 'target', named)

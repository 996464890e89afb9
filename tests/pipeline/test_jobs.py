"""Features shared among jobs: on one disk at once, on disks of their own, and on other numbers of devices."""

import json
import shutil

import numpy as np
import pytest

from dsdm_jax import pipeline
from dsdm_jax.attribution.store import Features
from dsdm_jax.core import artifacts
from dsdm_jax.core.runner import Runner
from dsdm_jax.errors import UserError
from tests.helpers.workdirs import attempt_of
from tests.helpers.workdirs import finished as finished_in
from tests.pipeline import runs
from tests.pipeline.tiny import get_config

JOBS = 3


def flags(job, workdir):
  return (
    runs.TINY,
    f'--workdir={workdir}',
    '--stage=features',
    f'--config.features.jobs={JOBS}',
    f'--config.features.job={job}',
  )


def config_of(job):
  config = get_config()
  config.features.jobs, config.features.job = JOBS, job
  return config


@pytest.fixture
def begun(finished, tmp_path):
  """A run that stands as far as the proxies."""
  folder = tmp_path / 'run'
  for stage in ('pool', 'targets', 'proxies'):
    shutil.copytree(finished / stage, folder / stage)
  return folder


@pytest.mark.slow
def test_jobs_and_another_number_of_devices_make_what_one_run_makes(begun, finished, tmp_path, capsys):
  """Jobs 0 (one device) and 1 (two) at once on one disk, job 2 (eight) on its own; a run without jobs finishes it."""
  elsewhere = shutil.copytree(begun, tmp_path / 'elsewhere')
  started = [runs.start(*flags(job, begun), devices=1 + job) for job in (0, 1)]
  pipeline.run(config_of(2), elsewhere, 'features')
  for process in started:
    done = process.wait(300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'this job has finished its share' in done.stdout
  assert not finished_in(begun, 'features') and not finished_in(elsewhere, 'features')
  part = attempt_of(begun, 'features')
  shutil.copytree(attempt_of(elsewhere, 'features'), part, dirs_exist_ok=True)
  saved = sum(json.loads(file.read_text())['seconds'] for file in part.glob('cost*.json'))
  pipeline.run(get_config(), begun, 'features')

  made, wanted = (artifacts.open_stage(folder, 'features') for folder in (begun, finished))
  assert made.manifest['identity'] == wanted.manifest['identity']
  assert made.manifest['cost']['flop'] == wanted.manifest['cost']['flop']
  assert made.manifest['cost']['seconds'] > saved
  assert not [name for name in made.manifest['files'] if name.startswith(('cost', 'begun'))]
  mine, theirs = Features(made), Features(wanted)
  for checkpoint in range(mine.checkpoints):
    (first, *_, last), others = list(mine.pool(checkpoint)), list(theirs.pool(checkpoint))
    np.testing.assert_array_equal(first[2], others[0][2])  # one device, as in the undisturbed run
    a_BJ, b_BJ = last[2].astype(np.float32), others[-1][2].astype(np.float32)
    # 1e-5 of the row apart before both are rounded to bfloat16, which may put the two a step of 2^-7 apart.
    assert np.all(np.abs(a_BJ - b_BJ) <= 2**-7 * np.abs(b_BJ) + 1e-5 * np.linalg.norm(b_BJ, axis=1, keepdims=True))


@pytest.mark.full
def test_jobs_share_one_basis_of_eigenvectors(begun):
  first = []
  for job in (2, 0, 1):
    config = config_of(job)
    config.features.basis, config.features.basis_rows = 'eigenvectors', 40
    pipeline.run(config, begun, 'features')
    assert finished_in(begun, 'features') == (job == 1), 'the last job finishes the stage'
    bases = [file.read_bytes() for file in sorted(begun.glob('features/*/basis_*.npz'))]
    first = first or bases
    assert len(bases) == 2 and bases == first
  made = artifacts.open_stage(begun, 'features')
  made.verify()
  semantics = made.semantics
  assert semantics['basis'] == 'eigenvectors'
  for kept in semantics['basis_kept']:
    assert kept.keys() == {layer['path'] for layer in semantics['layers'] if layer['path'].endswith('/kernel')}
    assert all(0.2 < share <= 1 for sides in kept.values() for share in sides)


def test_of_two_jobs_that_commit_at_once_the_second_returns_the_artifact_of_the_first(workdir):
  identity = artifacts.Identity('pool', 1, {}, {})
  out = artifacts.begin(workdir, identity)
  costs = [artifacts.Cost(out, job) for job in (0, 1)]
  first, second = (artifacts.commit(workdir, identity, {'rows': 3}, cost) for cost in costs)
  assert first.manifest == second.manifest


def test_a_damaged_stage_that_mends_itself_is_opened_anew_but_not_by_one_of_several_jobs(workdir, capsys):
  identity = artifacts.Identity('features', 1, {}, {})
  for name in ('one', 'two'):
    out = artifacts.begin(workdir, identity)
    (out / name).write_text(name)
  made = artifacts.commit(workdir, identity, {}, artifacts.Cost(out))
  runner, runner_of_a_job = (Runner(pipeline.STAGES, config, workdir) for config in (get_config(), config_of(0)))
  stage = runner.stages['features']
  assert runner._intact(stage, made)
  (out / 'two').write_text('owt')
  with pytest.raises(UserError, match='/two has changed since it was written; delete'):
    runner_of_a_job._intact(stage, made)
  assert not runner._intact(stage, made)
  assert '/two has changed since it was written; only this file is computed again' in capsys.readouterr().out
  assert (out / 'one').is_file() and not (out / 'two').exists() and not finished_in(workdir, 'features')


@pytest.mark.parametrize(('only', 'rerun'), [(None, False), ('datamodel', False), ('features', True)])
def test_jobs_are_for_the_features_stage_alone(workdir, only, rerun):
  with pytest.raises(UserError, match=r'features\.jobs = 3 shares one stage .* --stage=features'):
    pipeline.run(config_of(0), workdir, only, rerun)
  config = config_of(0)
  config.features.job = 3
  with pytest.raises(UserError, match=r'features\.job = 3 must be below features\.jobs = 3'):
    pipeline.run(config, workdir, 'features')

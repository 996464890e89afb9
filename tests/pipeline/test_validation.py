"""The bank from the command line: it stands on the pool alone, goes on where it was stopped, and runs when asked."""

import json
import shutil

import numpy as np

import dsdm_jax
from dsdm_jax import pipeline
from dsdm_jax.attribution.calibration import Bank
from dsdm_jax.bench import __main__ as bench
from dsdm_jax.core import artifacts, storage
from dsdm_jax.data.targets.masked import masked_rows
from dsdm_jax.selection import export
from dsdm_jax.validation import table
from tests.conftest import FAULTS
from tests.helpers.workdirs import files_of, unfinish
from tests.pipeline import runs

SMALL = (
  '--stage=validation', '--config.validation.rows=120', '--config.validation.target_examples=4',
  '--config.validation.epochs=1.2', '--config.validation.halves=8', '--config.validation.stratified=3',
  '--config.validation.drops=(0.1,)', '--config.validation.proxies=2', '--config.validation.models_at_once=8',
  '--config.validation.variants=^BM25|^no curvature$', '--config.validation.resamples=20',
)  # fmt: skip


def test_bank_runs_resumes_and_says_what_it_found(finished, tmp_path, capsys):
  workdir = tmp_path / 'run'
  for stage in ('pool', 'leakage', 'targets'):
    shutil.copytree(finished / stage, workdir / stage)
  # Derivatives through training compile as long as all the rest.
  flags = (runs.TINY, f'--workdir={workdir}', *SMALL, f'--config.validation.oracle={FAULTS}')
  assert '\nvalidation  120 rows' in runs.succeed(*flags)
  found = json.loads((files_of(workdir, 'validation') / 'lds.json').read_text())
  names = {r['predictor'] for r in found['by_example']}
  assert names == {'reference', 'no curvature', 'BM25'}
  assert {r['predictor'] for r in found['by_task']} == names | ({'oracle (metagradient)'} if FAULTS else set())
  assert {r['family'] for r in found['by_example']} == {'halves', 'stratified', 'deciles', 'drops'}
  assert all(-1 <= r['low'] <= r['high'] <= 1 for level in found.values() for r in level)
  masked_N = masked_rows(artifacts.open_stage(workdir, 'leakage'))
  bank = Bank.load(artifacts.open_stage(workdir, 'validation'))
  assert bank.row_N.tolist() == np.flatnonzero(~masked_N)[:120].tolist()
  monotone = json.loads((files_of(workdir, 'validation') / 'monotone.json').read_text())
  assert {len(runs_) for runs_ in monotone.values()} == {2}

  # A run with scores of the same pool says what they are worth.
  for stage in ('proxies', 'features', 'datamodel', 'selection'):
    shutil.copytree(finished / stage, workdir / stage)
  worth = dsdm_jax.load(workdir).scores.scale['calibration']['targets']
  assert worth.keys() == {'docs', 'api_qa', 'cs_algorithms', 'mix'}
  assert all(np.isfinite(w['nats_per_token']) and w['error'] > 0 for w in worth.values())
  export.write(workdir, 'dsdm--mix', 'jsonl', tmp_path / 'e')
  assert json.loads((tmp_path / 'e/metadata.json').read_text())['calibration']['targets'] == worth
  for stage in ('proxies', 'features', 'datamodel', 'selection'):
    shutil.rmtree(workdir / stage)

  # The tables can be made from the numbers alone.
  assert table.main([str(files_of(workdir, 'validation'))]) == 0
  assert capsys.readouterr().out == (files_of(workdir, 'validation') / 'lds.md').read_text()
  assert table.main([str(tmp_path)]) == 2
  assert 'has no results of a validation' in capsys.readouterr().err

  # A killed attempt resumes, and computes the rest, to the same table.
  whole = (files_of(workdir, 'validation') / 'lds.md').read_text()
  part = unfinish(workdir, 'validation')
  oracle = ('metasmooth/oracle-1.npy',) if FAULTS else ()
  for name in ('lds.md', 'lds.json', 'monotone.json', 'plain/0-0.npz', *oracle):
    (part / name).unlink()
  score = next(part.glob('plain/score-*.npy'))
  score_bytes = score.read_bytes()
  score.write_bytes(b'')  # torn
  kept = part / 'plain/0-8.npz'
  with np.load(kept) as arrays:
    assert arrays['output'].shape == (8, 12)
  before = kept.stat().st_mtime_ns
  runs.succeed(*flags)
  assert [e['resumed'] for e in runs.events(workdir) if e['event'] == 'begin'][-1]
  assert (files_of(workdir, 'validation') / 'lds.md').read_text() == whole
  assert (files_of(workdir, 'validation') / 'plain/0-8.npz').stat().st_mtime_ns == before
  assert score.read_bytes() == score_bytes


def test_bench_holds_the_derivative_to_finite_differences(finished, tmp_path, capsys):
  flags = ['--rows', '192', '--epochs', '1', '--directions', '2', '--steps', '0.001', '--settings', 'metasmooth']
  assert bench.main(['derivative', '--workdir', str(finished), *flags]) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert {x['setting'] for x in lines} == {'metasmooth'}
  assert [(x['step'], x['of']) for x in lines] == [(h, of) for h in (0.001, 'dropped') for of in ('rows', 'groups')]
  for line in lines:
    assert line['values'] == 2 * 3  # directions × tasks
    if line['step'] == 0.001:
      assert line['correlation'] > 0.999
      assert line['relative_error'] < 0.01
  assert bench.main(['derivative', '--workdir', str(tmp_path)]) == 2
  assert 'has no finished stage pool' in capsys.readouterr().err


def test_it_is_no_part_of_a_whole_run(finished):
  assert not (finished / 'validation').exists()
  assert pipeline.ON_REQUEST == ('validation',)


def test_it_names_the_stages_that_it_lacks_in_order(finished, tmp_path):
  """It is no part of a whole run: leaving `--stage` out would not run it."""
  advice = (
    ('pool', '--stage=leakage and --stage=targets first, in this order'),
    ('leakage', '--stage=targets first'),
  )
  for stage, run_first in advice:
    shutil.copytree(finished / stage, tmp_path / 'run' / stage)
    message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', '--stage=validation')
    assert message.endswith(f'; run {run_first}'), message


def test_a_pool_that_is_too_small_is_reported(finished, tmp_path):
  for stage in ('pool', 'leakage', 'targets'):
    shutil.copytree(finished / stage, tmp_path / 'run' / stage)
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', '--stage=validation')
  assert 'validation.rows = 2048' in message


def test_report_includes_a_validation_of_the_same_pool(copied):
  """It ignores one of another pool. A new validation reruns the report and nothing else."""
  record = {
    'setting': 'plain', 'predictor': 'default', 'family': 'halves', 'subsets': 9, 'lds': 0.33, 'low': 0.1, 'high': 0.5
  }  # fmt: skip
  inputs = {name: artifacts.open_stage(copied, name).digest for name in ('pool', 'leakage', 'targets')}
  for read, shown in ((inputs | {'pool': 'another'}, False), (inputs, True)):
    identity = artifacts.Identity('validation', 1, {}, read)
    out = artifacts.begin(copied, identity)
    storage.write_json(out / 'lds.json', {'by_example': [record], 'by_task': []})
    artifacts.commit(copied, identity, {}, artifacts.Cost(out))
    count = len(runs.events(copied))
    runs.succeed(runs.TINY, f'--workdir={copied}')
    assert runs.stages_run(copied, count) == (['report'] if shown else [])
    assert ('Do the scores predict' in (copied / 'report/index.html').read_text()) == shown

"""A changed key reruns exactly the stages that depend on it, and only on request."""

import contextlib
import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dsdm_jax import pipeline
from dsdm_jax.config.validate import flatten
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core import runner as runner_lib
from dsdm_jax.core.runner import Runner
from dsdm_jax.core.stage import Stage
from dsdm_jax.errors import UserError
from dsdm_jax.plan import preflight
from tests.helpers.workdirs import change_manifest, files_of
from tests.pipeline import runs
from tests.pipeline.tiny import get_config

ALL = set(pipeline.NAMES)
AFTER_LEAKAGE = {'leakage', 'selection', 'pretraining', 'ladder', 'evaluation', 'report'}
AFTER_PROXIES = {
  'proxies',
  *('features', 'target_features', 'datamodel'),
  'selection',
  'pretraining',
  'evaluation',
  'report',
}

# key, another value, the stages that it reruns: written by hand, from the meaning of the keys.
CHANGES = [
  ('seed', 7, ALL),
  ('pool.max_bytes', 70_000, ALL),
  ('leakage.benchmarks', (), set()),  # evaluation asks targets alone
  ('leakage.ngram', 13, AFTER_LEAKAGE),
  ('targets.max_examples', 11, ALL - {'pool', 'leakage', 'proxies', 'features', 'ladder'}),
  ('targets.tasks', ('docs',), ALL - {'pool', 'proxies', 'features'}),
  ('proxies.train.learning_rate', 0.01, AFTER_PROXIES),
  ('features.dimension', 32, AFTER_PROXIES - {'proxies'}),
  ('features.batch_size', 48, set()),
  ('datamodel.damping', 0.2, {'datamodel', 'selection', 'pretraining', 'evaluation', 'report'}),
  ('selection.examples', 31, {'selection', 'pretraining', 'ladder', 'evaluation', 'report'}),
  ('pretraining.seeds', 3, {'selection', 'pretraining', 'evaluation', 'report'}),
  ('pretraining.train.weight_decay', 0.1, {'pretraining', 'ladder', 'evaluation', 'report'}),
  ('ladder.seeds', 2, {'ladder', 'evaluation', 'report'}),
  ('evaluation.confidence', 0.9, {'evaluation', 'report'}),
  ('report.examples', 3, {'report'}),
  ('mesh.data', 1, set()),
]


def changed(key: str, value: object) -> ConfigDict:
  config = get_config()
  *sections, last = key.split('.')
  section = config
  for name in sections:
    section = section[name]
  section[last] = value
  return config


@dataclasses.dataclass
class Ran:
  """Stands in for the stages' code: leaves a file that tells the settings and inputs it was made from."""

  stages: list[str]

  def __call__(self, runner, stage):
    self.stages.append(stage.name)
    identity = runner.identity(stage)
    out = artifacts.begin(runner.workdir, identity)
    storage.write_json(out / 'made.json', identity.as_json())
    if stage.name == 'evaluation':
      storage.write_json(out / 'results.json', {'summary': [], 'comparisons': [], 'tasks': [], 'confidence': 0.95})
    runner.done[stage.name] = artifacts.commit(runner.workdir, identity, {}, artifacts.Cost(out))


def begin(workdir: Path, config: ConfigDict, name: str) -> Path:
  """Begins a stage whose inputs are finished in `workdir`."""
  runner = Runner(pipeline.STAGES, config, workdir)
  stage = runner.stages[name]
  for read in stage.reads:
    runner.done[read] = artifacts.open_stage(workdir, read)
  return artifacts.begin(workdir, runner.identity(stage))


@pytest.fixture
def ran(monkeypatch) -> Ran:
  ran = Ran([])
  # It reads the pool, which is empty here.
  monkeypatch.setattr(preflight, 'run', lambda *_: {'lines': [], 'warnings': [], 'seconds': {}})
  monkeypatch.setattr(Runner, 'run_stage', lambda *arguments: ran(*arguments))
  return ran


@pytest.fixture
def made(ran: Ran, workdir: Path) -> Path:
  """A finished run of the tiny config, of empty stages."""
  pipeline.run(get_config(), workdir)
  assert ran.stages == list(pipeline.NAMES)
  ran.stages.clear()
  return workdir


@pytest.mark.parametrize(('key', 'value', 'stages'), CHANGES, ids=[c[0] for c in CHANGES])
def test_changed_key(made, ran, key, value, stages):
  before = runs.fingerprint(made)
  config = changed(key, value)
  if stages:
    with pytest.raises(UserError) as caught:
      pipeline.run(config, made)
    old, new = (json.dumps(flatten(c)[key]) for c in (get_config(), config))
    assert f'{key} was {old}, now {new}' in str(caught.value)
    assert '--rerun' in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(UserError) as checked:
      pipeline.run(config, made, pipeline.CHECK)
    assert str(checked.value) == str(caught.value)
    assert runs.fingerprint(made) == before, 'an error writes nothing'
    assert ran.stages == []
  pipeline.run(config, made, rerun=True)
  assert ran.stages == [name for name in pipeline.NAMES if name in stages]
  after = runs.fingerprint(made)
  for name in ALL - stages:
    files = {file for file in before if file.startswith(f'{name}/')}
    assert {file: after[file] for file in files} == {file: before[file] for file in files}
  ran.stages.clear()
  pipeline.run(config, made)
  assert ran.stages == [], 'and then it stands'


def test_what_benchmark_files_hold_counts_and_not_which_place_holds_them(tmp_path: Path):
  """Where there are several places, what is found in the first that has it."""
  stage = next(stage for stage in pipeline.STAGES if stage.name == 'targets')
  first, second = tmp_path / 'a' / 'jeopardy_all.jsonl', tmp_path / 'b' / 'jeopardy_all.jsonl'
  second.parent.mkdir()
  second.write_text('{"context": "a", "continuation": "b"}')

  def identity(folder: str) -> dict:
    config = changed('targets.tasks', ('jeopardy',))
    config.targets.folder = folder
    return Runner(pipeline.STAGES, config, tmp_path / 'run').identity(stage, {}).as_json()

  alone = identity(str(second.parent))
  both = f'{first.parent} | {second.parent}'
  assert identity(both) == alone
  first.parent.mkdir()
  first.write_bytes(second.read_bytes())
  assert identity(both) == alone
  first.write_text('{"context": "a", "continuation": "c"}')
  assert identity(both) != alone
  of_tfds = identity('tfds:data')  # which has no Jeopardy
  assert not any(key.endswith('jeopardy') for key in of_tfds['settings'])


def test_every_stage_has_a_key_that_makes_it_the_first_to_run():
  first = {next(name for name in pipeline.NAMES if name in stages) for _, _, stages in CHANGES if stages}
  assert first == ALL - {'target_features'}, 'which depends on what features do, and on targets'


def test_model_and_proxies_are_apart(made, ran):
  config = get_config()
  for key in config.proxies.model:
    config.proxies.model[key] = config.proxies.model[key]  # no longer a reference
  config.model.layers = 2
  pipeline.run(config, made, rerun=True)
  assert ran.stages == ['pretraining', 'ladder', 'evaluation', 'report']


def test_changed_words_of_a_target_file_count(tmp_path, ran):
  file = tmp_path / 'mine.jsonl'
  file.write_text('{"context": "a", "answer": "b"}\n')
  config = changed('targets.tasks', (str(file),))
  pipeline.run(config, tmp_path / 'run')
  ran.stages.clear()
  file.write_text('{"context": "a", "answer": "c"}\n')
  with pytest.raises(UserError, match=r'targets\.tasks was \["mine.jsonl: content '):
    pipeline.run(config, tmp_path / 'run')
  pipeline.run(config, tmp_path / 'run', rerun=True)
  assert set(ran.stages) == ALL - {'pool', 'proxies', 'features'}


def test_a_deleted_stage_reruns_and_later_stages_are_reused_if_it_comes_out_the_same(made, ran):
  for name in pipeline.NAMES:
    shutil.rmtree(made / name)
    pipeline.run(get_config(), made)
    assert ran.stages == [name]
    ran.stages.clear()


def test_a_deleted_stage_that_comes_out_otherwise_makes_anew_what_follows(made, ran, monkeypatch):
  monkeypatch.setattr(Runner, 'run_stage', lambda *arguments: _otherwise(ran, *arguments))
  shutil.rmtree(made / 'datamodel')
  pipeline.run(get_config(), made)
  assert ran.stages == ['datamodel', 'selection', 'pretraining', 'evaluation', 'report']


def _otherwise(ran, runner, stage):
  if stage.name == 'datamodel':
    storage.write_json(artifacts.begin(runner.workdir, runner.identity(stage)) / 'other.json', 0)
  ran(runner, stage)


def test_an_unfinished_stage_of_other_settings_is_not_thrown_away_unasked(made, ran):
  config = changed('datamodel.damping', 0.2)
  shutil.rmtree(made / 'datamodel')
  out = begin(made, config, 'datamodel')
  storage.write_json(out / 'half.json', 1)
  with pytest.raises(UserError, match=r'datamodel.damping was 0.2, now 0.1'):
    pipeline.run(get_config(), made)
  assert (out / 'half.json').is_file()


def other_packages(part: Path, **versions: str) -> None:
  """Has an unfinished stage say that it was begun with `versions`."""
  note = json.loads((part / 'begun.json').read_text())
  del note['sha256']
  note['versions'] |= versions
  storage.write_bytes(part / 'begun.json', artifacts.seal(note))


@pytest.mark.parametrize('only', [None, 'datamodel'])
def test_an_unfinished_stage_of_other_packages_is_refused_with_the_difference(made, ran, only):
  """By name, before anything is written; what is finished stands whatever it was made with."""
  now = artifacts.versions()
  for name in pipeline.NAMES:
    change_manifest(made, name, lambda manifest: manifest.update(versions={'jax': '0.1.0', 'numpy': '1.0'}))
  pipeline.run(get_config(), made)
  assert ran.stages == []
  shutil.rmtree(made / 'datamodel')
  out = begin(made, get_config(), 'datamodel')
  other_packages(out, jax='0.1.0', numpy='1.0', orbax_checkpoint='0.1', python=f'{now["python"]}1')
  pipeline.run(get_config(), made, only)  # only notes: nothing is lost with them
  assert ran.stages == ['datamodel']
  shutil.rmtree(made / 'datamodel')
  out = begin(made, get_config(), 'datamodel')
  storage.write_json(out / 'half.json', 1)
  other_packages(out, jax='0.1.0', numpy='1.0')
  before = runs.fingerprint(made)
  with pytest.raises(UserError) as caught:
    pipeline.run(get_config(), made, only)
  message = str(caught.value)
  assert (
    f'{out} was begun with other packages: jax was 0.1.0, now {now["jax"]}, numpy was 1.0, now {now["numpy"]}; '
    in message
  )
  assert 'pip install jax==0.1.0 numpy==1.0' in message
  assert '--rerun to run datamodel again' in message and '\n' not in message
  assert runs.fingerprint(made) == before
  pipeline.run(get_config(), made, only, rerun=True)
  assert not (files_of(made, 'datamodel') / 'half.json').exists()


def test_work_of_other_packages_is_also_refused_if_its_inputs_were_rerun(made, ran):
  shutil.rmtree(made / 'pretraining')
  out = begin(made, get_config(), 'pretraining')
  shutil.rmtree(made / 'selection')
  storage.write_json(out / 'half.json', 1)
  other_packages(out, flax='0.1.0')
  with pytest.raises(UserError, match=r'pretraining/\w+-0 was begun with other packages: flax was 0.1.0, now '):
    pipeline.run(get_config(), made)
  assert ran.stages == ['selection'] and (out / 'half.json').is_file()


@pytest.mark.parametrize('only', [None, pipeline.CHECK])
def test_work_whose_input_alone_was_rerun_is_refused(made, ran, only):
  config = changed('selection.methods', ('dsdm', 'random'))
  pipeline.run(config, made, 'selection', rerun=True)
  with pytest.raises(UserError, match='holds pretraining with other settings: its input selection has changed'):
    pipeline.run(config, made, only)


def test_a_real_rerun(finished, copied):
  """The same through the command line: what runs is what the key touches, byte for byte."""
  before, count = runs.fingerprint(copied), len(runs.events(copied))
  flags = (runs.TINY, f'--workdir={copied}', '--config.evaluation.confidence=0.5')
  message = runs.refused(*flags)
  assert 'evaluation.confidence was 0.95, now 0.5' in message
  assert runs.fingerprint(copied) == before
  runs.succeed(*flags, '--rerun')
  assert runs.stages_run(copied, count) == ['evaluation', 'report']
  after = runs.fingerprint(copied)
  kept = [f for f in before if f.split('/')[0] in ALL - {'evaluation', 'report'}]
  assert {f: after[f] for f in kept} == {f: before[f] for f in kept}
  wide, narrow = (json.loads((folder / 'results.json').read_text()) for folder in (finished, copied))
  assert narrow['config']['evaluation.confidence'] == narrow['confidence'] == 0.5
  assert narrow['arms'] == wide['arms']
  for a, b in zip(narrow['comparisons'], wide['comparisons'], strict=True):
    assert b['low'] < a['low'] < a['difference'] == b['difference'] < a['high'] < b['high']


@pytest.mark.parametrize(('number', 'times', 'ends'), [('ESTALE', 2, True), ('ESTALE', 9, False), ('EIO', 2, False)])
def test_a_stage_that_meets_a_stale_file_resumes(workdir, monkeypatch, number, times, ends):
  seen = []

  def code(context) -> dict:
    seen.append(sorted(path.name for path in context.out.glob('part*')))
    (context.out / f'part{len(seen)}').write_text('x')
    if len(seen) <= times:
      raise OSError(getattr(errno, number), 'of a shared disk')
    return {}

  load = runner_lib.load
  monkeypatch.setattr(runner_lib, 'load', lambda name: code if name == 'any:code' else load(name))
  monkeypatch.setattr(storage, '_STALE_SECONDS', (0.0,) * 3)
  runner = Runner([Stage('pool', (), ('seed',), 'any:code')], get_config(), workdir)
  with contextlib.nullcontext() if ends else pytest.raises(OSError, match='of a shared disk'):
    runner.run()
  assert len(seen) == (times + 1 if ends else 4 if number == 'ESTALE' else 1)
  assert seen[0] == [] and all(len(parts) == at for at, parts in enumerate(seen)), 'each attempt goes on'

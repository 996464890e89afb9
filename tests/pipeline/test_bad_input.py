"""What a user may get wrong: one line on stderr, exit code 2, nothing written."""

import argparse
import os
import re
import shutil
from pathlib import Path

import jax
import pytest
import tensorflow_datasets as tfds

from dsdm_jax import pipeline
from dsdm_jax.core import lock
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.errors import UserError
from dsdm_jax.plan import plan
from dsdm_jax.selection import export
from dsdm_jax.study import results, study
from tests.conftest import FAULTS
from tests.helpers.workdirs import files_of, unfinish
from tests.pipeline import runs
from tests.pipeline.tiny import get_config
from tests.training.test_step import make_trainer


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.pool.lenght=64'], ['--config.pool.lenght=64', 'mean "length"']),
    (['--config.zzz=64'], ['zzz', 'docs/keys.md']),
    (['--config.pool.length=long'], ['pool.length', 'long']),
    (['--config.datamodel.damping=much'], ['datamodel.damping', 'much']),
    (['--config.datamodel.damping=0'], ['config key datamodel.damping = 0.0', 'greater than 0']),
    (['--config.proxies.count=4611686018427387904'], ['proxies.count = 4611686018427387904', 'at most 100,000 models']),
    (['--config.seed=4294967296'], ['seed = 4294967296 must be at most 4,294,967,295', '--config.seed=0']),
    (['--config.pool.kinds=("poems",)'], ['pool.kinds', 'poems', 'licences']),
    (['--config.selection.targets=("squad",)'], ['selection.targets', 'squad']),
    (['--config.model.factory=no_such_module:build'], ['model.factory', 'no_such_module']),
    (['--config.features.output_fn=dsdm_jax.lm.outputs:margni'], ['features.output_fn', 'margni', 'margin']),
    (['--stage=pol'], ['--stage', 'pol', *pipeline.NAMES]),
    (['--workdri=x'], ['workdri', 'workdir']),
    (['stray'], ["'stray'"]),
    (['--config.targets.tasks=("no_such.jsonl",)'], ['no_such.jsonl', 'No such file']),
  ],
  ids=lambda value: value[0] if value[0].startswith('--') else '',
)
def test_bad_flag(tmp_path, flags, words):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', *flags)
  for word in words:
    assert word in message
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--workdir={}/run'], ['--config is missing', 'configs/quickstart.py']),
    ([runs.TINY], ['--workdir is missing', 'runs/quickstart']),
    (['--config=configs/no_such.py', '--workdir={}/run'], ['configs/no_such.py']),
    (['--config={}/slip.py', '--workdir={}/run'], ['slip.py', 'invalid syntax']),
    (['--config={}/empty.py', '--workdir={}/run'], ['empty.py', 'get_config']),
  ],
  ids=['no config', 'no workdir', 'no such config', 'broken config', 'config without get_config'],
)
def test_missing_or_broken_config(tmp_path, flags, words):
  (tmp_path / 'slip.py').write_text('def get_config(:\n')
  (tmp_path / 'empty.py').write_text('')
  message = runs.refused(*(flag.format(tmp_path) for flag in flags))
  for word in words:
    assert word in message
  assert not (tmp_path / 'run').exists()


def test_batch_that_devices_do_not_divide(tmp_path):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', devices=3)
  assert 'config key proxies.train.batch_size = 16 must be a multiple of the 3 devices' in message
  assert '--config.proxies.train.batch_size=15' in message
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.pool.sources=("tests.helpers.custom_models:no_documents",)'], ['the pool is empty', 'pool.sources']),
    (['--config.pool.max_bytes=20', '--config.pool.max_document_bytes=20'], ['pool.vocab_size is 320']),
  ],
)
def test_empty_pool(tmp_path, flags, words):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', '--config.host.workers=1', *flags)
  for word in [*words, 'raise pool.max_bytes']:
    assert word in message
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('line', 'word'),
  [
    ('{"context": "a", "answer": }', 'not JSON'),
    ('{"context": "a"}', '"continuation" is missing'),
    ('{"context": "a", "answer": " "}', '"answer" is empty'),
    ('["a", "b"]', 'must be a JSON object, not list'),
  ],
)
def test_target_file_with_a_broken_line(tmp_path, line, word):
  file = tmp_path / 'mine.jsonl'
  file.write_text('{"context": "a", "answer": "b"}\n\n' + line + '\n')
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', f'--config.targets.tasks=("{file}",)')
  assert message.startswith(f'{file}, line 3: ')
  assert word in message
  assert not (tmp_path / 'run').exists()


def test_target_file_that_is_not_utf8(tmp_path):
  file = tmp_path / 'mine.jsonl'
  file.write_bytes(b'{"context": "a", "answer": "b"}\n{"context": "\xff", "answer": "b"}\n')
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', f'--config.targets.tasks=("{file}",)')
  assert f'{file}, line 2: not UTF-8' in message


def test_guarded_benchmark_without_a_file(tmp_path):
  message = runs.refused(
    runs.TINY,
    f'--workdir={tmp_path / "run"}',
    '--config.leakage.benchmarks=("piqa",)',
    f'--config.targets.folder={tmp_path}',
  )
  assert message.startswith(f'leakage.benchmarks: benchmark piqa: {tmp_path} ')
  assert not (tmp_path / 'run').exists()


def test_workdir_that_another_run_has(copied):
  with lock.hold(copied):
    before = runs.fingerprint(copied)
    message = runs.refused(runs.TINY, f'--workdir={copied}')
    assert f'{copied} is in use by process {os.getpid()} of ' in message
    assert runs.fingerprint(copied) == before


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    (lambda file: file.unlink(), ['is missing']),
    (lambda file: file.write_bytes(file.read_bytes()[:-1]), ['bytes where']),
    (lambda file: _flip(file), ['has changed']),
  ],
  ids=['missing', 'cut', 'flipped'],
)
def test_damaged_artifact(copied, damage, words):
  file = files_of(copied, 'datamodel') / 'scores/docs/score_N.000000.npy'
  damage(file)
  before = runs.fingerprint(copied)
  message = runs.refused(runs.TINY, f'--workdir={copied}')
  for word in [str(file), f'delete {copied / "datamodel"}', *words]:
    assert word in message
  assert runs.fingerprint(copied) == before


def test_mixture_too_small_for_the_budget_where_repeats_are_forbidden(copied):
  shutil.rmtree(copied / 'pretraining')
  flags = ('--rerun', '--stage=pretraining', '--config.pretraining.max_epochs=1')
  message = runs.refused(runs.TINY, f'--workdir={copied}', *flags)
  assert re.match(r"part '\S+' has 32 rows and is asked for 64 examples, but at most 32 are allowed; ", message)
  assert not (copied / 'pretraining').exists()


def unfinished_proxies(workdir: Path) -> Path:
  """Puts the stage back to where its first proxy has its checkpoints and its last lines are not written."""
  part = unfinish(workdir, 'proxies')
  (part / 'proxy_0.jsonl').unlink()
  return part


def refused_after_a_bar(*flags: str) -> str:
  """The one line on stderr that is no progress bar."""
  done = runs.run(*flags)
  assert done.returncode == 2, done.stderr[-3000:]
  lines = [line for line in re.split(r'[\r\n]+', done.stderr) if line and not re.match(r'\s+proxies: .*step', line)]
  assert len(lines) == 1, done.stderr[-3000:]
  return lines[0].removeprefix('dsdm_jax: ')


def test_checkpoint_of_another_model(copied):
  part = unfinished_proxies(copied)
  shutil.rmtree(part / 'proxy_0')
  with Checkpoints(part / 'proxy_0') as checkpoints:
    checkpoints.save(2, make_trainer(model={'width': 32}).init(jax.random.key(0)), {'history': []})
  before = runs.fingerprint(part / 'proxy_0') | runs.fingerprint(part / 'proxy_1')
  message = refused_after_a_bar(runs.TINY, f'--workdir={copied}', '--stage=proxies')
  assert message.startswith(f'no checkpoint in {part / "proxy_0"} can be restored into this model (')
  assert 'is (16,) in the model and (32,) in the checkpoint' in message
  assert message.endswith('it is damaged or belongs to another model: delete that folder and start again')
  assert runs.fingerprint(part / 'proxy_0') | runs.fingerprint(part / 'proxy_1') == before


def _flip(file: Path) -> None:
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(bytes(data))


def test_workdir_is_a_file(tmp_path):
  (tmp_path / 'run').write_text('mine')
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}')
  assert str(tmp_path / 'run') in message
  assert (tmp_path / 'run').read_text() == 'mine'


def test_secrets_of_the_environment_are_written_nowhere(finished):
  """The run was given them in variables that clouds and hubs use; neither its files nor its output contains them."""
  assert runs.secrets_in(finished) == []
  assert '] features' in finished.with_suffix('.out').read_text()


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_a_run_that_says_a_secret_is_found(tmp_path, stream):
  """A config of the user's that prints its environment: the look above sees it, on either stream."""
  config = tmp_path / 'chatty.py'
  config.write_text(
    f'import os, sys\nfrom tests.pipeline import tiny\n\n\ndef get_config():\n'
    f'  print({{k: os.environ[k] for k in {runs.KEYS}}}, file=sys.{stream}, flush=True)\n  return tiny.get_config()\n'
  )
  done = runs.run(
    f'--config={config}', f'--workdir={tmp_path / "run"}', '--config.seed=-1', **dict.fromkeys(runs.KEYS, runs.SECRET)
  )
  assert done.returncode == 2
  runs.save_output(done, tmp_path / 'run')
  assert runs.secrets_in(tmp_path / 'run') == [str(tmp_path / f'run.{stream.removeprefix("std")}')]


@pytest.mark.parametrize(
  ('path', 'words'),
  [
    ('https://ann:s3cret@hub.example/task.jsonl', 'a password'),
    ('s3://key:s3cret@bucket/a.jsonl', 'a password'),
    ('https://hub.example/task.jsonl?access_token=s3cret', 'a secret in an address (…?access_token=…)'),
    ('https://b.example/a.jsonl?v=2&X-Amz-Signature=s3cret', 'a secret in an address (…?X-Amz-Signature=…)'),
  ],
  ids=['https', 's3', 'token', 'signature'],
)
def test_password_in_the_config_is_refused_and_not_repeated(tmp_path, path, words):
  message = runs.refused(runs.TINY, f'--workdir={tmp_path / "run"}', f'--config.targets.tasks=("{path}",)')
  assert f'config key targets.tasks holds {words}' in message
  assert 's3cret' not in message
  assert not (tmp_path / 'run').exists()


def test_a_folder_of_an_odd_name_works_or_is_refused_before_anything_is_written(finished, tmp_path):
  """All signs that are allowed in one path; the others are in tests/core/test_storage.py."""
  config, bad = get_config(), tmp_path / 'v[1]'
  for run in (
    lambda: pipeline.run(config, bad),
    lambda: study.run(argparse.Namespace(workdir=bad)),
    lambda: results.run(argparse.Namespace(files='', out=bad)),
    lambda: export.write(finished, 'dsdm--mix', 'tfds', bad),
    lambda: plan.run(config, bad),
  ):
    with pytest.raises(UserError, match=r"= '.*/v\[1\]' contains '\['; use a folder"):
      run()
  assert list(tmp_path.iterdir()) == []
  odd = tmp_path / '-a b' / 'ü漢字' / "{x}~100%20#@5:,;&$HOME|'" / ('n' * 200) / 'run'
  shutil.copytree(finished, odd)
  for stage in ('pretraining', 'evaluation', 'report')[0 if FAULTS else 2 :]:
    shutil.rmtree(odd / stage)
  runs.succeed(runs.TINY, f'--workdir={odd}')
  runs.assert_same_outcome(odd, finished)
  for form in export.FORMATS:
    export.write(odd, 'dsdm--mix', form, odd / 'out' / form)
  data = tfds.builder_from_directory(str(odd / 'out/tfds/selection/1.0.0')).as_dataset(split='train')
  assert len(data) == config.selection.examples

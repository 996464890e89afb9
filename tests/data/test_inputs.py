"""What a run reads counts by its content and never by its path."""

import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.base import get_config
from dsdm_jax import pipeline
from dsdm_jax.attribution import score_files
from dsdm_jax.config.values import guarded
from dsdm_jax.core.runner import Runner
from dsdm_jax.data import files, inputs
from dsdm_jax.data.pool import readers, sources
from dsdm_jax.data.targets import benchmarks, tasks
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.evaluate import unguarded
from dsdm_jax.lm import hugging_face
from tests.lm.test_hugging_face import write_gpt2

Make = Callable[[str, str], dict[str, Any]]


def write(path: str, text: str) -> str:
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  Path(path).write_text(text)
  return path


def record(root: str, name: str, letter: str) -> str:
  return write(f'{root}/{name}.jsonl', json.dumps({'context': 'a', 'answer': letter}) + '\n')


def two_files(kind: str, suffix: str, option: str = 'weight=2') -> Make:
  def make(root: str, letter: str) -> dict[str, Any]:
    write(f'{root}/a.{suffix}', 'one')
    write(f'{root}/b.{suffix}', letter)
    return {'pool.sources': (f'{kind}:{root}/*.{suffix} | {option}',), 'pool.max_bytes': 9_000}

  return make


def saved_dataset(root: str, letter: str) -> dict[str, Any]:
  write(f'{root}/data-00000-of-00001.arrow', letter)
  write(f'{root}/state.json', json.dumps({'_data_files': [{'filename': 'data-00000-of-00001.arrow'}]}))
  return {'pool.sources': (f'hf:{root}',)}


def prepared(root: str, letter: str) -> str:
  write(f'{root}/squad/1.0.0/features.json', '{}')
  return write(f'{root}/squad/1.0.0/squad-train.tfrecord-00000-of-00001', letter)


def tfds_folder(root: str, letter: str) -> dict[str, Any]:
  prepared(root, letter)
  return {'pool.sources': (f'tfds:{root}/squad/1.0.0',)}


def tfds_name(root: str, letter: str) -> dict[str, Any]:
  prepared(root, letter)
  os.environ['TFDS_DATA_DIR'] = root
  return {'pool.sources': ('tfds:squad:1.0.0',)}


def tfds_benchmark(root: str, letter: str) -> dict[str, Any]:
  prepared(root, letter)
  return {'targets.tasks': ('squad',), 'targets.folder': f'tfds:{root}'}


def module(root: str, letter: str) -> str:
  """A module whose function depends on another module of its package."""
  write(f'{root}/package/__init__.py', '')
  write(f'{root}/package/inner.py', f"LETTER = '{letter}'\n")
  write(f'{root}/package/mine.py', 'from . import inner\nimport numpy\n\n\ndef function(*_):\n  return inner.LETTER\n')
  sys.path.insert(0, root)
  return 'package.mine'


def of_function(key: str, form: str) -> Make:
  def make(root: str, letter: str) -> dict[str, Any]:
    text = form.format(f'{module(root, letter)}:function')
    return {key: (text,) if key in ('pool.sources', 'selection.methods', 'mixture.parts') else text}

  return make


def tokenizer(root: str, letter: str) -> dict[str, Any]:
  write(f'{root}/tokenizer_config.json', letter)
  return {'pool.vocabulary': write(f'{root}/tokenizer.json', '{}')}


def weights(root: str, letter: str) -> dict[str, Any]:
  """The letter is in the middle of the file, at no end of it."""
  write(f'{root}/config.json', '{}')
  write(f'{root}/model.safetensors', 'x' * 100_000 + letter + 'x' * 100_000)
  return {'model.weights': root, 'proxies.model.weights': root}


def custom_weights(root: str, letter: str) -> dict[str, Any]:
  write(f'{root}/deep/anything.bin', letter)
  return {'model.factory': 'tests.helpers.custom_models:build', 'model.weights': root}


def checkpoint(root: str, letter: str) -> dict[str, Any]:
  write(f'{root}/4/state/d/0', letter)
  return {'evaluation.checkpoints': (f'other={root}',)}


def benchmark_folder(root: str, letter: str) -> dict[str, Any]:
  write(f'{root}/reading/squad.jsonl', json.dumps({'context': 'a', 'continuation': letter}))
  return {'evaluation.tasks': ('targets', 'squad'), 'targets.folder': root}


def target_named_by_path(root: str, letter: str) -> dict[str, Any]:
  return {'targets.tasks': (record(root, 'mine', letter),), 'selection.targets': ('mine',)}


def remote(root: str, letter: str) -> dict[str, Any]:
  with fsspec.open(f'memory:/{root}/a.jsonl', 'w') as file:
    file.write(letter)
  return {'pool.sources': (f'jsonl:memory:/{root}/*.jsonl',)}


KINDS: dict[str, Make] = {
  'text': two_files('text', 'txt'),
  'jsonl': two_files('jsonl', 'jsonl.gz'),
  'parquet': two_files('parquet', 'parquet'),
  'tokens': two_files('tokens', 'parquet', 'text=ids'),
  'hf': saved_dataset,
  'remote': remote,
  'tfds folder': tfds_folder,
  'tfds name': tfds_name,
  'tfds benchmark': tfds_benchmark,
  'source function': of_function('pool.sources', '{}'),
  'selector': of_function('selection.methods', '{}'),
  'mixture': of_function('mixture.parts', '{}@mix rows=9'),
  'output function': of_function('features.output_fn', '{}'),
  'model factory': of_function('model.factory', '{}'),
  'optimizer': of_function('proxies.train.optimizer', '{}'),
  'vocabulary': lambda root, letter: {'pool.vocabulary': write(f'{root}/v.model', letter)},
  'beside the vocabulary': tokenizer,
  'weights': weights,
  'custom weights': custom_weights,
  'checkpoint': checkpoint,
  'targets': target_named_by_path,
  'guarded': lambda root, letter: {'leakage.benchmarks': (record(root, 'mine', letter),)},
  'evaluated': lambda root, letter: {'evaluation.tasks': ('targets', record(root, 'mine', letter))},
  'benchmark folder': benchmark_folder,
  'scores': lambda root, letter: {'selection.imported': write(f'{root}/s.npy', letter)},
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
  """Restores what modules and environment were; nothing is remembered from another test or for a later run."""
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.setenv('TFDS_DATA_DIR', '')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  files._remembered.cache_clear()
  yield
  inputs.code.cache_clear()
  files._remembered.cache_clear()
  for name in [name for name in sys.modules if name.partition('.')[0] == 'package']:
    del sys.modules[name]


def identities(settings: dict[str, Any], workdir: Path) -> str:
  """The settings in the identity of every stage, as text."""
  config = get_config()
  for key, value in settings.items():
    *sections, name = key.split('.')
    section = config
    for part in sections:
      section = section[part]
    section[name] = value
  inputs.code.cache_clear()
  sys.path_importer_cache.clear()
  runner = Runner(pipeline.STAGES, config, workdir)
  return json.dumps({stage.name: runner.identity(stage, {}).settings for stage in pipeline.STAGES}, sort_keys=True)


@pytest.mark.parametrize('kind', KINDS)
def test_content_counts_and_the_path_does_not(kind, tmp_path):
  make, here, there = KINDS[kind], f'{tmp_path}/here', f'{tmp_path}/there'
  first = identities(make(here, 'a'), tmp_path / 'run')
  assert str(tmp_path) not in first
  assert identities(make(here, 'b'), tmp_path / 'run') != first, 'the same path and size'
  shutil.rmtree(here, ignore_errors=True)
  if here in sys.path:
    sys.path.remove(here)
  assert identities(make(there, 'a'), tmp_path / 'run') == first


@pytest.mark.parametrize(
  ('key', 'value'), [('holdout_share', 0.25), ('file_shots', 1), ('file_delimiter', ''), ('long_prompts', 'refuse')]
)
def test_planted_targets_count_with_what_they_depend_on(tmp_path, key, value):
  runs = [
    {'pool.plant_targets': planted, **settings} for planted in (1, 0) for settings in ({}, {f'targets.{key}': value})
  ]
  first, second, *plain = [json.loads(identities(settings, tmp_path))['pool'] for settings in runs]
  assert first != second and plain[0] == plain[1]


def test_the_guard_knows_files_by_content(tmp_path):
  """A file that moved was guarded; another file of the same name was not."""
  old, same, other = (record(f'{tmp_path}/{i}', 'one', letter) for i, letter in enumerate('xxy'))
  for key in ('leakage.benchmarks', 'targets.tasks'):
    settings = {key: [inputs.of_task(old)]}
    assert unguarded(['one', 'docs'], settings, ['one', 'docs', 'piqa'], ['targets', 'piqa', same]) == ['piqa']
    assert unguarded(['one', 'docs'], settings, ['one', 'docs'], ['targets', other]) == ['one']


def test_the_folders_of_evaluated_files_do_not_order_them(tmp_path):
  digests = []
  for first, second in (('a', 'b'), ('d', 'c')):
    tasks_ = record(f'{tmp_path}/{first}', 'one', 'x'), record(f'{tmp_path}/{second}', 'two', 'y')
    digests.append(json.loads(identities({'leakage.benchmarks': guarded(('evaluated',), tasks_)}, tmp_path))['leakage'])
  assert digests[0] == digests[1]


def test_same_content_in_another_file_or_copied_again_is_the_same(tmp_path):
  first = files.digest(write(f'{tmp_path}/a', 'text'))
  assert files.digest(write(f'{tmp_path}/b', 'text')) == first
  os.utime(tmp_path / 'a', ns=(1, 1))
  assert files.digest(f'{tmp_path}/a') == first
  state = os.stat(tmp_path / 'a')
  write(f'{tmp_path}/a', 'TEXT')
  os.utime(tmp_path / 'a', ns=(state.st_atime_ns, state.st_mtime_ns))
  assert files.digest(f'{tmp_path}/a') != first, 'its size, time and inode are those of the old content'
  os.symlink(tmp_path, tmp_path / 'again')  # a circle
  os.symlink(tmp_path / 'b', tmp_path / 'c')
  assert files.digest(str(tmp_path)) != first


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
  """Also by later processes, as long as size, times and inode are the same and the note is whole."""
  read, real = [], files.hashlib.file_digest
  monkeypatch.setattr(files.hashlib, 'file_digest', lambda *a: read.append(1) or real(*a))
  monkeypatch.setattr(files, '_TICK_NS', 0)
  path = write(f'{tmp_path}/large', 'x' * files._REMEMBERED_BYTES)

  def digest(reads: int, new_process: bool = True) -> str:
    if new_process:
      files._digests.clear()
      files._remembered.cache_clear()
    read.clear()
    result = files.digest(path)
    assert len(read) == reads
    return result

  first = digest(1)
  assert digest(0, new_process=False) == digest(0) == first
  note = tmp_path / 'cache' / 'dsdm_jax' / 'digests.json'
  whole = note.read_bytes()
  note.write_bytes(whole.replace(first.encode(), b'0' * 64))
  assert digest(1) == first == digest(0)
  write(path, 'y' * files._REMEMBERED_BYTES)
  assert digest(1) != first
  note.parent.chmod(0o500)
  shutil.rmtree(note.parent, ignore_errors=True)
  write(str(note.parent), 'no folder')
  write(path, 'z' * files._REMEMBERED_BYTES)
  digest(1)
  digest(1)


def test_large_remote_files_count_by_what_the_server_reports(monkeypatch):
  def digest(letter: str) -> str:
    with fsspec.open('memory://big/a', 'w') as file:
      file.write(letter)
    return files.digest('memory://big/a')

  assert digest('a') == digest('a') != digest('b')
  monkeypatch.setattr(files, '_READ_REMOTE', 0)
  assert digest('a') != digest('a'), 'the time changed, and nothing is read'


def test_missing_inputs_are_one_line_that_names_the_key(tmp_path):
  for settings in (
    {'pool.vocabulary': f'{tmp_path}/v.model'},
    {'selection.imported': f'{tmp_path}/s.npy'},
    {'evaluation.checkpoints': (f'mine={tmp_path}/none',)},
    {'model.weights': f'{tmp_path}/none'},
  ):
    [key] = settings
    with pytest.raises(UserError, match=f'{key} names .*{tmp_path}.*; ') as caught:
      identities(settings, tmp_path / 'run')
    assert '\n' not in str(caught.value)
  assert 'no file matches' in identities({'pool.sources': ('seqio:nowhere | module=json',)}, tmp_path / 'run')
  missing = identities({'pool.sources': (f'jsonl:{tmp_path}/a.jsonl',)}, tmp_path / 'run')
  record(str(tmp_path), 'a', 'a')  # the pool stage reports it, or skips it
  assert identities({'pool.sources': (f'jsonl:{tmp_path}/a.jsonl',)}, tmp_path / 'run') != missing


@pytest.mark.parametrize(
  'name', ['a b', 'ü漢字', '-dash', 'n' * 200, 'v[1]', 'back\\slash', 's*', "{x}100%20#@:,$HOME'"]
)
def test_inputs_in_a_folder_of_an_odd_name_are_read(tmp_path, monkeypatch, name):
  (tmp_path / 'v1').mkdir()
  for root in (f'{tmp_path}/{name}', name):  # the second one is relative
    monkeypatch.chdir(tmp_path)
    path = write(f'{root}/a.jsonl', json.dumps({'text': 'hello', 'context': 'a', 'answer': 'b'}) + '\n')
    write_gpt2(Path(root) / 'model', vocab_size=96, width=16, mlp_width=48, positions=40)
    np.save(f'{root}/s.npy', np.zeros(3, np.float32))
    write(f'{root}/tokenizer.json', '{}')
    for target in (glob.escape(path), f'{glob.escape(root)}/*.jsonl'):
      [unit, *_] = sources.units(sources.parse(f'jsonl:{target}'))
      assert [document.text for document in readers.read(unit)] == ['hello']
    [item] = tasks.read_jsonl(path).items
    assert item.answer.strip() == 'b'
    assert benchmarks.find(benchmarks.BENCHMARKS['squad'], path) == path
    assert len(score_files.read(f'{root}/s.npy')) == 3
    keys = hugging_face.model_keys(f'{root}/model')
    hugging_face.check(f'{root}/model', ConfigDict(keys))
    found = identities(
      {
        'pool.sources': (f'jsonl:{glob.escape(root)}/*.jsonl',),
        'pool.vocabulary': f'{root}/tokenizer.json',
        'targets.tasks': (path,),
        'targets.folder': root,
        'selection.imported': f'{root}/s.npy',
        'model.weights': f'{root}/model',
      },
      tmp_path / 'run',
    )
    assert len(set(re.findall('content [0-9a-f]{64}', found))) == 5 and root not in found
    settings = {'evaluation.checkpoints': (f'mine={root}/model',)}
    if set(name) & set('*[\\'):
      with pytest.raises(UserError, match='evaluation.checkpoints = .* contains .*; use a folder'):
        identities(settings, tmp_path / 'run')
      if '[' in name:
        with pytest.raises(UserError, match=r'matches no file, as it is a pattern, but .*; write .*\[\[\]1\]/a\.jsonl'):
          identities({'pool.sources': (f'jsonl:{path}',)}, tmp_path / 'run')
        with pytest.raises(UserError, match=r'but a file or folder of that name exists; write .*\[\[\]1\]/\*\.jsonl'):
          identities({'pool.sources': (f'jsonl:{root}/*.jsonl',)}, tmp_path / 'run')
    else:
      assert 'mine: content' in identities(settings, tmp_path / 'run')

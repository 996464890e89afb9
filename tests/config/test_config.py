"""Configs: each config of the repository is valid, and each error is one line that names the key."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from typing import Any, Literal, get_origin

import pytest
from ml_collections import ConfigDict, FrozenConfigDict, config_dict
from pydantic import AfterValidator

from configs import base
from dsdm_jax.config import validate as checks
from dsdm_jax.config import values
from dsdm_jax.config.methods import METHODS, NEEDS, STAGES, charged_shares, label, method_name
from dsdm_jax.config.schema import FIELDS
from dsdm_jax.config.values import brief
from dsdm_jax.errors import UserError

FLAT = checks.flatten(base.get_config())

# Values of the right type that break the rule of a key; wrong numbers and choices come from the schema.
BAD: dict[str, list] = {
  'mesh.data': [0, -2],
  'distributed.coordinator': ['host', 'host:0', 'http://host:80', 'host:123456', 'host:65536'],
  'distributed.processes': [2],
  'distributed.process': [1],
  'pool.sources': [('c4',), ('no_such_package:documents',), ('jsonl:',), ()],
  'pool.kinds': [(), ('docs', 'docs'), ('poems',)],
  'pool.vocabulary': ['', 'gpt2'],
  'pool.end_piece': ['a\nb'],
  'leakage.benchmarks': [('docs',), ('my.json',)],
  'host.beam': ['DirectRunner'],
  'log.to': [('tensorboard', 'tensorboard'), ('mlflow',)],
  'targets.tasks': [
    (),
    ('docs', 'docs'),
    ('poems',),
    ('docs', 'file.json'),
    ('docs', 'my/docs.jsonl'),
    ('mix.jsonl',),
    ('a+b.jsonl',),
    (f'a/{"n" * 101}.jsonl',),
  ],
  'targets.folder': ['a\nb', ' data', 'data '],
  'targets.file_delimiter': ['x' * 1_001, r'\nAnswer: ', r'a\tB'],
  'proxies.epochs': [0.0],
  'features.output_fn': ['margin', 'no_such_package:margin', 'dsdm_jax.no_such_module:margin', 'a b:c', 'a:b:c', ':'],
  'features.layers': ['(', '*'],
  'features.job': [1],
  'datamodel.bootstrap': [1],
  'validation.drops': [(0.0,), (0.02, 0.5)],
  'validation.variants': ['(', 'a{9999999999}'],
  'selection.methods': [(), ('dsdm', 'dsdm'), ('doremi',), ('no_such_package:mine',), ('dsdm', 'json:dsdm')],
  'selection.targets': [('mix', 'mix'), ('squad',), ('docs+squad',), ('docs+docs',), ('docs+',), ('mix+docs',)],
  'selection.examples': [7],
  'selection.repeat_cap': [3],
  'selection.imported': ['scores.csv'],
  'selection.prefilter': ['lsa', 'lsa 0.5', 'dsdm 2', 'lsa two'],
  'selection.ngram_buckets': [1],
  'mixture.parts': [
    ('doremi',),
    ('dsdm', 'dsdm'),
    ('dsdm@squad',),
    ('dsdm rate=0',),
    ('dsdm rate=1 rate=2',),
    ('dsdm epochs=1 rows=5',),
    ('dsdm rows=1.5',),
    ('dsdm rows=1000000000001',),
    ('dsdm rate=inf',),
    ('dsdm weight=3',),
    ('',),
  ],
  'pretraining.max_epochs': [0.5],
  'ladder.rungs': [('1',), ('1', '1'), ('0', '1'), ('1', 'two'), ('1', 'inf'), ('1', '1000001')],
  'evaluation.tasks': [(), ('piqa', 'piqa'), (f'{"漢" * 34}.jsonl',)],
  'evaluation.max_items': [1],
  'evaluation.file_delimiter': ['x' * 1_001, r'\nAnswer: '],
  'evaluation.checkpoints': [('mine',), ('a b=x',), ('a=',), ('a=x', 'a=y'), (f'{"n" * 101}=x',)],
  'plan.topology': ['v5e', 'v5e:16', 'v5e-256', 'v5e:99999x2'],
  'plan.calibration': ['device.txt', 'device'],
}
for _model in ('model', 'proxies.model'):
  BAD |= {
    f'{_model}.factory': ['decoder', 'no_such_package:build'],
    f'{_model}.heads': [5],
    f'{_model}.kv_heads': [3, 8],
    f'{_model}.rotary_scaling': [(0.0,), (8.0, 1.0), (8.0, 4.0, 1.0, 32.0)],
    f'{_model}.weights': [' x'],
  }
for _train in ('proxies.train', 'pretraining.train'):
  BAD |= {
    f'{_train}.optimizer': ['', 'AdamW', 'no_such_package:make', 'a b', '1adam', 'a..b', '_adam'],
    f'{_train}.optimizer_arguments': ['0.9', 'b1=x', '(', '**{}', 'b1=0.9'],
    f'{_train}.microbatches': [3],
    f'{_train}.evaluate_every_steps': [15],
  }


def outside(key: str) -> list:
  """Values of a key of the right type that the types of the schema exclude."""
  field = FIELDS[key]
  if get_origin(field.annotation) is Literal:
    return ['no_such_choice']
  step: dict[str, Any] = {'ge': -1, 'gt': 0, 'le': 1, 'lt': 0}
  bounds = [(name, getattr(m, name)) for m in field.metadata for name in step if hasattr(m, name)]
  number = type(field.default)
  return [number(bound + step[name] * max(1, abs(bound) if number is float else 1)) for name, bound in bounds]


def changed(**values) -> ConfigDict:
  """The base config with `values`, keys written with '__' for '.', of any type."""
  config = base.get_config()
  for key, value in values.items():
    put(config, key.replace('__', '.'), value)
  return config


def put(config: ConfigDict, key: str, value: object) -> None:
  *sections, last = key.split('.')
  for section in sections:
    config = config[section]
  with config.ignore_type():
    config[last] = value


def finding(config: ConfigDict) -> str:
  with pytest.raises(UserError) as caught:
    checks.validate(config)
  message = str(caught.value)
  assert '\n' not in message
  assert '; ' in message, 'a way out follows the semicolon'
  return message


def test_every_config_loads_and_validates(repo_root):
  names = sorted(path.stem for path in (repo_root / 'configs').glob('*.py') if path.stem != '__init__')
  assert {'base', 'quickstart'} <= set(names)
  for name in names:
    checks.validate(importlib.import_module(f'configs.{name}').get_config())


def test_every_key_is_described_and_bounded():
  """A number has bounds and a default far below the upper one; a text or tuple has a rule, or takes any text."""
  for key, field in FIELDS.items():
    assert field.description and field.description.endswith('.'), key
    if type(field.default) in (int, float):
      lower = [m for m in field.metadata if hasattr(m, 'ge') or hasattr(m, 'gt')]
      upper = [getattr(m, 'le', getattr(m, 'lt', None)) for m in field.metadata if hasattr(m, 'le') or hasattr(m, 'lt')]
      assert upper and (lower or key == 'mesh.data'), key
      assert min(upper) == 1 or 100 * abs(field.default) <= min(upper), key
    elif type(field.default) is not bool and get_origin(field.annotation) is not Literal:
      assert key in BAD, key
  assert {key for key, field in FIELDS.items() if any(isinstance(m, AfterValidator) for m in field.metadata)} <= set(
    BAD
  )


def test_docs_list_the_keys(repo_root):
  """Write docs/keys.md again with `PYTHONPATH=. python docs/keys.py`."""
  page = runpy.run_path(str(repo_root / 'docs/keys.py'))['markdown']()
  assert (repo_root / 'docs/keys.md').read_text() == page
  for key in FIELDS:
    assert f'`{key.rpartition(".")[2]}`' in page


def test_places_of_targets_have_names():
  config = base.get_config()
  put(config, 'targets.folder', 'a |  | b')
  assert "several places are joined by ' | '" in finding(config)


@pytest.mark.parametrize('key', FLAT)
def test_bad_value_is_reported_in_one_line_that_names_key_and_value(key):
  for value in [*BAD.get(key, []), *outside(key)]:
    config = base.get_config()
    put(config, key, value)
    assert finding(config).startswith(f'config key {key} = {brief(value)} '), value


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [
    ('seed', 2**32, 'must be at most 4,294,967,295; for example --config.seed=0'),
    ('pool.max_bytes', 2**50 + 1, 'must be at most 1,125,899,906,842,624 bytes; for example --config.pool.max_bytes='),
    ('pool.length', 7, 'must be at least 8; for example --config.pool.length=128'),
    ('datamodel.damping', 1e31, 'must be at most 1e+30; for example --config.datamodel.damping=0.1'),
    ('targets.holdout_share', 1.0, 'must be less than 1; for'),
    ('model.mlp', 'swigul', 'must be one of gelu, gelu_exact, swiglu, geglu; is it swiglu?'),
    ('pool.kinds', ('doc',), 'must be one or more of source, docs, licences, metadata, data; is it docs?'),
  ],
)
def test_messages(key, value, words):
  config = base.get_config()
  put(config, key, value)
  assert words in finding(config)


def test_whole_numbers_are_integers():
  config = base.get_config()
  config.pool.max_bytes = 1e6
  config.proxies.model.width = 64.0
  assert type(config.pool.max_bytes) is type(config.proxies.model.width) is int
  assert config.pool.max_bytes == 1_000_000
  with pytest.raises(TypeError):
    config.pool.max_bytes = 1.5
  given = ['main', '--config.pool.max_bytes=1e6', '--config.seed=5_000_000', '--config.seed=1.5', '--config.seed=x']
  given += ['--config.datamodel.damping=1e6', '--config.model.width=1.5E+3', '--workdir=1e6', '--config.zzz=1e6']
  read = checks.whole_numbers(given)
  assert read[1:3] == ['--config.pool.max_bytes=1000000', '--config.seed=5000000']
  assert read[6] == '--config.model.width=1500'
  assert [read[0], *read[3:6], *read[7:]] == [given[0], *given[3:6], *given[7:]]


WRONG_TYPES = {
  bool: [1, 'True', None],
  int: [1.5, True, '1', None],
  float: ['0.1', None, float('nan'), float('inf')],  # ConfigDict itself makes 1.0 of True
  str: [1, None, ('a',)],
  list: ['docs', 1, None, (1,), (None,)],
}


@pytest.mark.parametrize('key', FLAT)
def test_wrong_type_is_reported_in_one_line_that_names_key_and_value(key):
  for value in WRONG_TYPES[type(FLAT[key])]:
    config = base.get_config()
    put(config, key, value)
    assert finding(config).startswith(f'config key {key} = {value!r} must be ')


@pytest.mark.parametrize('key', FLAT)
def test_missing_key_is_named(key):
  config = base.get_config()
  *sections, last = key.split('.')
  section = config
  for name in sections:
    section = section[name]
  del section[last]
  assert f'no key {key};' in finding(config)


@pytest.mark.parametrize(
  ('key', 'hint'),
  [('model.layer', 'is it model.layers?'), ('pool.lenght', 'is it pool.length?'), ('zzz', 'docs/keys.md')],
)
def test_unknown_key_is_named_with_its_likely_neighbour(key, hint):
  config = base.get_config()
  put(config, key, 3)
  message = finding(config)
  assert f'config key {key} = 3 is unknown' in message
  assert hint in message


def test_value_in_the_place_of_a_section():
  config = base.get_config()
  with config.ignore_type(), config.unlocked():
    del config['mesh']
    config['mesh'] = 8
  assert finding(config).startswith('config key mesh = 8 must be a section')


@pytest.mark.parametrize(
  'config',
  [
    changed(model__kv_heads=2, model__positions='rope'),
    changed(model__kv_heads=1),
    changed(pool__kinds=['docs', 'data']),  # a list does for a tuple
    changed(datamodel__damping=1),  # an int does for a float
    changed(mesh__data=8),
    changed(targets__tasks=('docs', 'my/own.jsonl'), selection__targets=('mix', 'own', 'docs+own')),
    changed(features__output_fn='json:loads'),
    changed(pool__sources=('json:loads', 'jsonl:a/*.gz | weight=2')),
    changed(pool__sources=('jsonl:a', 'jsonl:b | weight=1.0'), pool__max_bytes=0),
    changed(targets__tasks=('lambada', 'docs'), leakage__benchmarks=('piqa', 'my.jsonl')),
    FrozenConfigDict(base.get_config()),
  ],
)
def test_good_configs_pass(config):
  checks.validate(config)


@pytest.mark.parametrize(
  ('config', 'words'),
  [
    (
      changed(model__width=90, model__heads=4),
      ['model.heads = 4', 'must divide model.width = 90', '--config.model.width'],
    ),
    (
      changed(model__width=12, model__heads=4, model__positions='rope'),
      ["model.positions = 'rope'", 'even head size', '--config.model.positions=learned'],
    ),
    (changed(pool__max_document_bytes=9, pool__max_bytes=8), ['pool.max_document_bytes = 9', 'pool.max_bytes = 8']),
    (
      changed(pool__sources=('jsonl:a', 'jsonl:b | weight=3'), pool__max_bytes=0, pool__max_document_bytes=0),
      ["pool.sources = ('jsonl:a', 'jsonl:b | weight=3')", 'pool.max_bytes', '--config.pool.max_bytes'],
    ),
    (changed(pool__plant_targets=300), ['pool.plant_targets = 300', 'targets.max_examples = 256']),
    (changed(features__projection='dense', features__mode='jvp'), ["features.mode = 'jvp'", 'datamodel.bootstrap=0']),
    (
      changed(features__mode='stream'),
      ["features.mode = 'stream'", 'features.projection = ekfac makes none', '--config.features.projection=two_sided'],
    ),
    (
      changed(datamodel__gram='full'),
      ["datamodel.gram = 'full'", "must be 'auto' with features.projection = ekfac"],
    ),
    (
      changed(selection__methods=('dsdm', 'gradient')),
      ['selection.methods', 'need stored features (gradient)', '--config.features.projection=two_sided'],
    ),
    (
      changed(
        features__projection='dense',
        features__mode='jvp',
        datamodel__bootstrap=0,
        datamodel__groups=1,
        datamodel__examples=0,
        selection__methods=('dsdm', 'gradient', 'gradient_cosine'),
      ),
      ['selection.methods', 'need stored features (gradient cosine)'],
    ),
    (
      changed(mixture__parts=('dsdm_greedy rate=1',)),
      ['selection.methods', 'need stored features (DsDm, greedy)'],
    ),
    (changed(selection__methods=('dsdm', 'imported')), ["selection.imported = ''", '--config.selection.imported=']),
    (changed(mixture__parts=('imported rate=2',)), ["selection.imported = ''"]),
    (changed(selection__examples=7), ['selection.examples = 7', 'selection.epochs = 4', 'batch_size = 32']),
    (
      changed(targets__tasks=('docs',), selection__targets=('api_qa',)),
      ["selection.targets = ('api_qa',)", "targets.tasks = ('docs',)"],
    ),
    (
      changed(datamodel__gram='layers', features__projection='dense'),
      ["datamodel.gram = 'layers'", "it is 'dense'", '--config.datamodel.gram=auto'],
    ),
    (
      changed(features__projection='two_sided', datamodel__gram='joint', datamodel__average='unseen'),
      ["datamodel.average = 'unseen'", "datamodel.gram = 'joint'"],
    ),
    (
      changed(proxies__epochs=0.0, proxies__count=1, proxies__checkpoints=3, proxies__model__weights='gpt2'),
      ['proxies.epochs = 0.0 trains nothing', 'proxies.checkpoints = 1 (3)', '--config.proxies.checkpoints=1'],
    ),
    (
      changed(
        proxies__epochs=0.0, proxies__count=1, proxies__model__weights='gpt2', selection__methods=('less', 'random')
      ),
      ['selection.methods', 'need a proxy in training (LESS)', '--config.proxies.epochs=2'],
    ),
    (
      changed(proxies__epochs=0.0, proxies__count=1, proxies__model__weights='gpt2', mixture__parts=('oracle rate=1',)),
      ['selection.methods', 'need a proxy in training (oracle)'],
    ),
    (
      changed(features__projection='two_sided', datamodel__damping_rule='auto'),
      ["datamodel.damping_rule = 'auto'", 'proxies.count = 2'],
    ),
    (
      changed(
        features__projection='two_sided', datamodel__damping_rule='auto', datamodel__gram='joint', proxies__count=4
      ),
      ["datamodel.damping_rule = 'auto'", "datamodel.gram = 'joint'"],
    ),
    (changed(mesh__data=5), ['pretraining.train.batch_size = 32|proxies.train.batch_size = 32', 'mesh.data = 5']),
  ],
)
def test_values_together(config, words):
  message = finding(config)
  for word in words:
    assert any(part in message for part in word.split('|')), message


def test_proxies_follow_the_model_and_may_leave_it():
  config = changed(model__heads=8)
  assert config.proxies.model.heads == 8
  checks.validate(config)
  config.proxies.model.width = 20
  assert finding(config).startswith('config key proxies.model.heads = 8 must divide proxies.model.width = 20')


def test_size_gives_the_shape():
  def resolve(config: ConfigDict) -> ConfigDict:
    return checks.resolve(config, dict)

  config = resolve(changed(model__size='356M', model__kv_heads=4))
  assert (config.model.layers, config.model.width, config.model.heads) == (24, 1_024, 16)
  assert (config.model.kv_heads, config.model.mlp_width) == (4, 4_096)
  assert config.proxies.model.width == 1_024  # they follow
  checks.validate(config)
  same = changed(leakage__benchmarks=())
  assert resolve(same) is same
  config = resolve(changed(model__size='1.3B', proxies__model__size='125M'))
  assert (config.model.width, config.proxies.model.width) == (2_048, 768)
  config = resolve(changed(model__width=96, model__heads=4, proxies__model__size='125M'))
  assert (config.model.width, config.proxies.model.width, config.proxies.model.heads) == (96, 768, 12)
  with pytest.raises(UserError, match=r"model.width = 512 is 768 in model.size = '125M'; leave one out"):
    resolve(changed(model__size='125M', model__width=512))


def test_the_benchmarks_of_evaluation_may_be_guarded_by_one_word():
  config = changed(
    evaluation__tasks=('targets', 'piqa', 'b.jsonl', 'cbt', 'poems'),
    leakage__benchmarks=('evaluated', 'squad', 'cbt'),
  )
  checks.validate(config)
  found = checks.resolve(config, dict)
  assert found.leakage.benchmarks == ('b.jsonl', 'cbt', 'piqa', 'squad')
  assert config.leakage.benchmarks == ('evaluated', 'squad', 'cbt')
  assert checks.resolve(changed(leakage__benchmarks=('evaluated',)), dict).leakage.benchmarks == ()


def test_no_target_is_all_tasks_by_their_names():
  """So that a task that is added later makes another arm, and leaves this one as it is."""
  for breadth, names in ((0.0, 'docs+mine'), (0.5, 'docs+mine+breadth')):
    config = changed(targets__tasks=('docs', 'a/mine.jsonl'), targets__breadth=breadth, selection__targets=())
    checks.validate(config)
    found = checks.resolve(config, dict)
    checks.validate(found)
    assert found.selection.targets == (names,) and config.selection.targets == ()
  long = changed(targets__tasks=tuple(f'{letter * 60}.jsonl' for letter in 'ab'), selection__targets=())
  assert 'makes an arm of' in finding(long)


def test_a_custom_model_has_its_own_keys_and_words():
  config = changed(model__factory='json:loads', model__positions='alibi', model__heads=5, model__experts=3)
  checks.validate(config)  # proxies.model.factory follows
  assert 'model.experts' in checks.flatten(config)
  put(config, 'model.experts', None)
  assert finding(config).startswith('config key model.experts = None must be ')
  assert 'model.layers = 0' in finding(changed(model__factory='json:loads', model__layers=0))
  assert 'pool.lenght' in finding(changed(model__factory='json:loads', pool__lenght=1))


def test_placeholder_without_a_value():
  assert finding(changed(seed=config_dict.placeholder(int))).startswith('config key seed = None must be a whole number')


def test_devices():
  config = base.get_config()
  for count in (1, 2, 8, 32):
    checks.check_devices(config, count)
  checks.check_devices(changed(mesh__model=2), 8)
  checks.check_devices(changed(mesh__data=4, mesh__model=2), 8)


@pytest.mark.parametrize(
  ('config', 'count', 'words'),
  [
    (changed(mesh__model=3), 8, ['mesh.model = 3', 'number of devices, 8']),
    (changed(mesh__data=4), 8, ['mesh.data = 4', 'devices, 8', '--config.mesh.data=-1']),
    (changed(), 3, ['proxies.train.batch_size = 32', 'multiple of the 3 devices', 'batch_size=33']),
    (changed(pretraining__train__microbatches=8), 8, ['pretraining.train.microbatches = 8', 'multiples of the 8']),
    (changed(evaluation__batch_size=63), 2, ['evaluation.batch_size = 63', 'evaluation.batch_size=64']),
  ],
)
def test_devices_refuse(config, count, words):
  with pytest.raises(UserError) as caught:
    checks.check_devices(config, count)
  for word in words:
    assert word in str(caught.value)


def test_devices_are_held_to_the_batches_that_they_are_to_share():
  """Features follow the devices: nothing is asked of their batch, nor of those of stages that are not to run."""
  checks.check_devices(changed(features__batch_size=4, features__microbatch=3), 8)
  checks.check_devices(changed(pretraining__train__microbatches=8), 3, ())
  with pytest.raises(UserError, match='pretraining.train.batch_size = 32'):
    checks.check_devices(changed(), 3, ['pretraining.train.batch_size'])


def test_flatten_is_json_with_every_leaf():
  flat = checks.flatten(base.get_config())
  assert json.loads(json.dumps(flat)) == flat
  assert flat['selection.targets'] == ['mix']
  assert flat['proxies.model.width'] == flat['model.width'] == base.get_config().model.width  # references are resolved
  assert len(flat) == len(set(flat))


def test_select_takes_keys_and_sections_whole():
  flat = {'seed': 0, 'pool.length': 8, 'pool.kinds': ['a'], 'pools': 1, 'pretraining.train.batch_size': 2}
  assert checks.select(flat, ['pool']) == {'pool.length': 8, 'pool.kinds': ['a']}
  assert checks.select(flat, ['pretraining', 'seed']) == {'seed': 0, 'pretraining.train.batch_size': 2}
  with pytest.raises(ValueError, match='poool'):
    checks.select(flat, ['poool'])


def test_names_are_those_of_the_packages_that_use_them():
  """config imports no other package, so it lists these names a second time."""
  from dsdm_jax.data.pool import installed_packages, sources
  from dsdm_jax.data.targets import benchmarks, tasks

  assert values.KINDS == installed_packages.KINDS
  assert set(values.SOURCE_KINDS) == {*sources.KINDS, 'hf_hub'}  # which becomes one of the others
  assert set(values.BENCHMARKS) == set(benchmarks.BENCHMARKS)
  assert [values.task_name(t) for t in ('docs', 'a/b.jsonl')] == [tasks.task_name(t) for t in ('docs', 'a/b.jsonl')]


def test_methods():
  for name, method in METHODS.items():
    assert callable(checks.load_callable(method.path)), name
    assert set(method.needs) <= set(NEEDS) and set(method.shares(2)) <= set(STAGES)
  assert METHODS['random'].shares(2) == {}
  assert METHODS['dsir'].shares(2) == {'selection': 1}
  assert METHODS['embedding'].shares(4) == {'proxies': 0.25, 'selection': 1}
  every = {'proxies': 1, 'features': 1, 'target_features': 1, 'selection': 1}
  assert METHODS['gradient'].shares(4) == every
  assert METHODS['dsdm_greedy'].shares(4) == charged_shares('mixture', 4) == dict.fromkeys(STAGES, 1)
  assert (label('color_filter'), label('my_method')) == ('CoLoR-Filter', 'my method')
  assert [method_name(m) for m in ('dsdm', 'a.b:mine')] == ['dsdm', 'mine']


def test_task_name():
  assert values.task_name('docs') == 'docs'
  assert values.task_name('a/b/own.tasks.jsonl') == 'own.tasks'


def test_load_callable(tmp_path, monkeypatch):
  (tmp_path / 'custom_model.py').write_text('def build(): return 7\nwidth = 3\n')
  (tmp_path / 'custom_error.py').write_text('1 / 0\n')
  monkeypatch.syspath_prepend(tmp_path)
  assert checks.load_callable('custom_model:build')() == 7
  for name, words in [
    ('custom_model', "must be 'package.module:function'"),
    ('custom_model:', "must be 'package.module:function'"),
    ('no_such_module:build', 'No module named'),
    ('custom_model:biuld', 'is it build?'),
    ('custom_model:width', 'width is of type int'),
    ('custom_error:build', 'ZeroDivisionError'),
  ]:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
      checks.load_callable(name, 'model.factory')
    assert str(caught.value).startswith(f'model.factory = {name!r}')
    assert '\n' not in str(caught.value)


def test_validation_touches_no_device_and_starts_fast():
  code = (
    'import sys; from configs import base; from dsdm_jax.config.validate import validate; validate(base.get_config());'
    "print([m for m in ('jax', 'flax', 'tensorflow') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'


def test_nested_is_the_inverse_of_flatten():
  flat = checks.flatten(base.get_config())
  nested = checks.nested(flat)
  assert nested.proxies.model.width == base.get_config().model.width
  assert checks.flatten(nested) == flat

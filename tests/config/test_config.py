"""Configs: each of ours validates, and each slip in one is told in a line that names the key."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict, FrozenConfigDict, config_dict

from configs import base
from dsdm_jax.config import pool_rules
from dsdm_jax.config import validate as checks
from dsdm_jax.config.config_rules import RELATIONS, RULES, task_name
from dsdm_jax.errors import UserError

FLAT = checks.flatten(base.get_config())

# For every rule at least one value of the right type that breaks it.
BAD: dict[str, list] = {
  'seed': [-1],
  'mesh.data': [0, -2],
  'mesh.model': [0, -1],
  'distributed.coordinator': ['host', 'host:0', 'http://host:80', 'host:123456', 'host:65536'],
  'distributed.processes': [0, 2],
  'distributed.process': [-1, 1],
  'distributed.heartbeat_seconds': [4],
  'distributed.start_seconds': [0],
  'pool.sources': [('c4',), ('no_such_package:documents',), ('jsonl:',), ()],
  'pool.kinds': [(), ('docs', 'docs'), ('poems',)],
  'pool.max_bytes': [-1],
  'pool.max_document_bytes': [-1],
  'pool.on_error': ['warn'],
  'pool.vocabulary': ['', 'gpt2'],
  'pool.end_piece': ['a\nb'],
  'pool.leakage_benchmarks': [('docs',), ('my.json',)],
  'host.workers': [-1],
  'host.beam': ['DirectRunner'],
  'pool.length': [7, 0, -128],
  'pool.vocab_size': [299, -1],
  'pool.leakage_ngram': [1, 0],
  'pool.plant_targets': [-1],
  'targets.tasks': [
    (),
    ('docs', 'docs'),
    ('poems',),
    ('docs', 'file.json'),
    ('docs', 'my/docs.jsonl'),
    ('mix.jsonl',),
    ('a+b.jsonl',),
  ],
  'targets.folder': ['a\nb', ' data', 'data '],
  'targets.max_examples': [0],
  'targets.holdout_share': [0.0, 1.0, -0.5, 1.5],
  'targets.seed': [-1],
  'proxies.seed': [-1],
  'proxies.count': [0],
  'proxies.checkpoints': [0],
  'proxies.subset_share': [0.0, 1.01, -0.1],
  'proxies.epochs': [0.0, -1.0],
  'features.output_fn': ['margin', 'no_such_package:margin', 'dsdm_jax.no_such_module:margin', 'a b:c', 'a:b:c', ':'],
  'features.projection': ['sparse', ''],
  'features.dimension': [0],
  'features.layers': ['(', '*'],
  'features.mode': ['memory'],
  'features.gram_rows': [-1],
  'features.precondition': ['shampoo'],
  'features.microbatch': [-1],
  'features.batch_size': [0],
  'features.basis': ['pca'],
  'features.basis_rows': [0],
  'features.shard_rows': [0],
  'features.jobs': [0],
  'features.job': [-1, 1],
  'features.store_dtype': ['float16', 'int4'],
  'datamodel.damping': [0.0, -0.1],
  'datamodel.damping_rule': ['lds'],
  'datamodel.gram': ['diagonal'],
  'datamodel.target_share': [-0.1, 1.0],
  'datamodel.average': ['seen'],
  'datamodel.examples': [-1],
  'datamodel.groups': [0],
  'datamodel.bootstrap': [1, -1],
  'datamodel.confidence': [0.0, 1.0, 95.0],
  'datamodel.mix': ['sum'],
  'validation.rows': [0, 19],
  'validation.target_examples': [0],
  'validation.epochs': [0.0],
  'validation.seeds': [0],
  'validation.halves': [-1],
  'validation.stratified': [-1],
  'validation.drops': [(0.0,), (0.02, 0.5)],
  'validation.proxies': [0, 1],
  'validation.models_at_once': [0],
  'validation.variants': ['(', 'a{9999999999}'],
  'validation.least_eps_root': [-1e-8],
  'validation.smooth_eps_root': [0.0],
  'validation.smooth_batch_size': [0],
  'validation.resamples': [0],
  'selection.methods': [(), ('dsdm', 'dsdm'), ('doremi',), ('no_such_package:mine',), ('dsdm', 'json:dsdm')],
  'selection.targets': [(), ('mix', 'mix'), ('squad',), ('docs+squad',), ('docs+docs',), ('docs+',), ('mix+docs',)],
  'selection.examples': [0, 7],
  'selection.epochs': [0],
  'selection.repeat_cap': [0, 3],
  'selection.document_cap': [-1],
  'selection.source_cap': [0.0, 1.01],
  'selection.temperature': [0.0, -1.0],
  'selection.diversity': [-0.5],
  'selection.clusters': [-1],
  'selection.duplicate_similarity': [0.0, 1.5],
  'selection.ngrams': ['letters'],
  'selection.ngram_buckets': [1, 2**32],
  'selection.classifier_rows': [0],
  'selection.conditional_steps': [0],
  'selection.conditional_learning_rate': [0.0],
  'selection.distill_rows': [49],
  'selection.imported': ['scores.csv'],
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
  'mixture.when_empty': ['stop'],
  'pretraining.seeds': [0],
  'pretraining.max_epochs': [-1.0, 0.5],
  'pretraining.models_at_once': [0],
  'ladder.rungs': [('1',), ('1', '1'), ('0', '1'), ('1', 'two'), ('1', 'inf'), ('1', '1000001')],
  'ladder.seeds': [0],
  'evaluation.tasks': [(), ('piqa', 'piqa')],
  'evaluation.max_items': [-1, 1],
  'evaluation.file_shots': [-1],
  'evaluation.file_delimiter': [''],
  'evaluation.generate_tokens': [0],
  'evaluation.checkpoints': [('mine',), ('a b=x',), ('a=',), ('a=x', 'a=y')],
  'evaluation.bootstrap': [0, 99],
  'evaluation.selection_uses': [0],
  'evaluation.batch_size': [0],
  'evaluation.confidence': [0.0, 1.0, 95.0],
  'report.examples': [0],
  'report.explorer_rows': [99],
  'report.explorer_bytes': [9_999],
  'plan.topology': ['v5e', 'v5e:16', 'v5e-256', 'v5e:99999x2'],
  'plan.rows': [-1],
  'plan.price_per_chip_hour': [-1.0],
  'plan.multiplier': [0.0],
  'plan.calibration': [0.0],
}
for _model in ('model', 'proxies.model'):
  BAD |= {
    f'{_model}.factory': ['decoder', 'no_such_package:build'],
    f'{_model}.size': ['13B', '125m'],
    f'{_model}.attention': ['flash'],
    f'{_model}.layers': [0],
    f'{_model}.width': [0, -96],
    f'{_model}.heads': [0, 5, -4],
    f'{_model}.kv_heads': [0, 3, 8],
    f'{_model}.mlp_width': [0],
    f'{_model}.positions': ['alibi'],
    f'{_model}.norm': ['batchnorm'],
    f'{_model}.mlp': ['relu'],
    f'{_model}.rotary_share': [0.0, 1.5],
    f'{_model}.rotary_base': [1.0],
    f'{_model}.weights': [' x'],
    f'{_model}.init_std': [0.0, -1.0],
    f'{_model}.compute_dtype': ['float16', 'bf16'],
  }
for _train in ('proxies.train', 'pretraining.train'):
  BAD |= {
    f'{_train}.batch_size': [0, -32],
    f'{_train}.learning_rate': [0.0, -1e-3],
    f'{_train}.schedule': ['step'],
    f'{_train}.decay_share': [0.0, 1.5],
    f'{_train}.optimizer': ['', 'AdamW', 'no_such_package:make', 'a b'],
    f'{_train}.optimizer_arguments': ['0.9', 'b1=x', '(', '**{}', 'b1=0.9'],
    f'{_train}.mu_dtype': ['float16'],
    f'{_train}.nu_dtype': ['int8'],
    f'{_train}.z_loss': [-1e-4],
    f'{_train}.microbatches': [0, 3],
    f'{_train}.final_learning_rate': [-0.1, 1.1],
    f'{_train}.warmup_steps': [-1],
    f'{_train}.weight_decay': [-1e-4],
    f'{_train}.adam_b1': [-0.1, 1.0],
    f'{_train}.adam_b2': [-0.1, 1.0],
    f'{_train}.adam_eps': [0.0, -1e-8],
    f'{_train}.adam_eps_root': [-1e-8],
    f'{_train}.gradient_clip': [-1.0],
    f'{_train}.save_every_steps': [-1],
    f'{_train}.save_every_minutes': [-1.0],
    f'{_train}.keep_checkpoints': [0],
    f'{_train}.keep_every_steps': [-1],
    f'{_train}.keep_every_hours': [-0.5],
    f'{_train}.evaluate_every_steps': [-10, 15],
    f'{_train}.evaluate_rows': [0],
    f'{_train}.profile_steps': [-1],
    f'{_train}.log_every_steps': [0],
  }


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


def test_every_key_of_base_has_a_rule_and_no_other():
  assert set(RULES) == {key for key, value in FLAT.items() if not isinstance(value, bool)}
  assert set(RULES) == set(BAD)
  assert {key for relation in RELATIONS for key in relation.keys} <= set(FLAT)


def test_places_of_targets_have_names():
  config = base.get_config()
  put(config, 'targets.folder', 'a |  | b')
  assert "several places are joined by ' | '" in finding(config)


@pytest.mark.parametrize(('key', 'value'), [(key, value) for key, values in BAD.items() for value in values])
def test_bad_value_is_told_in_one_line_that_names_key_and_value(key, value):
  config = base.get_config()
  put(config, key, value)
  assert finding(config).startswith(f'config key {key} = {value!r} ')


WRONG_TYPES = {
  bool: [1, 'True', None],
  int: [1.0, True, '1', None],
  float: ['0.1', None, float('nan'), float('inf')],  # ConfigDict itself makes 1.0 of True
  str: [1, None, ('a',)],
  list: ['docs', 1, None, (1,), (None,)],
}


@pytest.mark.parametrize(
  ('key', 'value'), [(key, value) for key, default in FLAT.items() for value in WRONG_TYPES[type(default)]]
)
def test_wrong_type_is_told_in_one_line_that_names_key_and_value(key, value):
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
  [('model.layer', 'is it model.layers?'), ('pool.lenght', 'is it pool.length?'), ('zzz', 'configs/base.py')],
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
    changed(targets__tasks=('lambada', 'docs'), pool__leakage_benchmarks=('piqa', 'my.jsonl')),
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
      changed(datamodel__gram='joint', datamodel__average='unseen'),
      ["datamodel.average = 'unseen'", "datamodel.gram = 'joint'"],
    ),
    (
      changed(proxies__epochs=0.0, proxies__count=1, proxies__checkpoints=3, proxies__model__weights='gpt2'),
      ['proxies.epochs = 0.0 trains nothing', 'proxies.checkpoints = 1 (3)', '--config.proxies.checkpoints=1'],
    ),
    (changed(datamodel__damping_rule='auto'), ["datamodel.damping_rule = 'auto'", 'proxies.count = 2']),
    (
      changed(datamodel__damping_rule='auto', datamodel__gram='joint', proxies__count=4),
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
  same = base.get_config()
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
    pool__leakage_benchmarks=('evaluated', 'squad', 'cbt'),
  )
  checks.validate(config)
  found = checks.resolve(config, dict)
  assert found.pool.leakage_benchmarks == ('b.jsonl', 'cbt', 'piqa', 'squad')
  assert config.pool.leakage_benchmarks == ('evaluated', 'squad', 'cbt')
  assert checks.resolve(changed(pool__leakage_benchmarks=('evaluated',)), dict).pool.leakage_benchmarks == ()


def test_a_strangers_model_has_its_own_keys_and_words():
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


def test_names_are_those_of_the_registries():
  """core/ may not ask the registries, so the names stand there a second time."""
  from dsdm_jax.data.pool import installed_packages, sources
  from dsdm_jax.data.targets import benchmarks, tasks

  assert pool_rules.KINDS == installed_packages.KINDS
  assert pool_rules.SOURCE_KINDS == sources.KINDS
  assert set(pool_rules.BENCHMARKS) == set(benchmarks.BENCHMARKS)
  assert pool_rules.TASKS == tasks.BUILT_IN
  assert [task_name(t) for t in ('docs', 'a/b.jsonl')] == [tasks.task_name(t) for t in ('docs', 'a/b.jsonl')]


def test_task_name():
  assert task_name('docs') == 'docs'
  assert task_name('a/b/own.tasks.jsonl') == 'own.tasks'


def test_load_callable(tmp_path, monkeypatch):
  (tmp_path / 'strangers_model.py').write_text('def build(): return 7\nwidth = 3\n')
  (tmp_path / 'strangers_slip.py').write_text('1 / 0\n')
  monkeypatch.syspath_prepend(tmp_path)
  assert checks.load_callable('strangers_model:build')() == 7
  for name, words in [
    ('strangers_model', "must be 'package.module:function'"),
    ('strangers_model:', "must be 'package.module:function'"),
    ('no_such_module:build', 'No module named'),
    ('strangers_model:biuld', 'is it build?'),
    ('strangers_model:width', 'a int of that name'),
    ('strangers_slip:build', 'ZeroDivisionError'),
  ]:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
      checks.load_callable(name, 'model.factory')
    assert str(caught.value).startswith(f'model.factory = {name!r}')
    assert '\n' not in str(caught.value)


def test_validation_touches_no_device_and_starts_fast():
  code = (
    'import sys; from configs import base; from dsdm_jax.core import config; config.validate(base.get_config());'
    "print([m for m in ('jax', 'flax', 'tensorflow') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'


def test_nested_is_the_inverse_of_flatten():
  flat = checks.flatten(base.get_config())
  nested = checks.nested(flat)
  assert nested.proxies.model.width == base.get_config().model.width
  assert checks.flatten(nested) == flat

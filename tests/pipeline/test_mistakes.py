"""Mistakes that users make: each is refused at the start, in one line with the key or file and the way out.

`--stage=check` finds them, and so does the start of every run; nothing is computed or written.
"""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from dsdm_jax import pipeline
from dsdm_jax.errors import UserError
from dsdm_jax.plan import preflight
from tests.helpers import vocabularies
from tests.lm.test_hugging_face import write_gpt2
from tests.pipeline.tiny import get_config

Made = Callable[[Path], dict[str, Any]]
DOCUMENTS = [{'id': str(i), 'text': f'document {i} has some words of its own: {i * 7919}. ' * 20} for i in range(60)]
QUESTIONS = [{'context': f'What is {i} + {i}?', 'answer': str(2 * i), 'document': str(i)} for i in range(20)]


def lines(records: list[Any]) -> str:
  return ''.join(json.dumps(record) + '\n' for record in records)


def keys(**values: Any) -> Made:
  """Values of keys, whose dots are written as two underscores."""
  return lambda folder: {key.replace('__', '.'): value for key, value in values.items()}


def file(key: str, name: str, content: str | bytes, value: str = '{}', tuple_: bool = True, **more: Any) -> Made:
  """A file, and the key that names it by `value`."""

  def make(folder: Path) -> dict[str, Any]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    named = value.format(path)
    return {key: (named,) if tuple_ else named} | {k.replace('__', '.'): v for k, v in more.items()}

  return make


def parquet(value: str) -> Made:
  def make(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({'body': ['some text'] * 10}), folder / 'a.parquet')
    return {'pool.sources': (value.format(folder / 'a.parquet'),)}

  return make


def gpt2(rows: int) -> Made:
  """Weights for a vocabulary of `rows`."""

  def make(folder: Path) -> dict[str, Any]:
    write_gpt2(folder / 'model', vocab_size=rows, width=16, mlp_width=32, positions=32)
    return {
      'proxies.model.weights': str(folder / 'model'),
      'proxies.epochs': 0.0,
      'proxies.count': 1,
      'proxies.checkpoints': 1,
    }

  return make


SOURCE, TASK, JSON = 'pool.sources', 'targets.tasks', 'jsonl:{}'
MISTAKES: dict[str, tuple[Made, str]] = {
  # The pool
  'rows of four tokens': (keys(pool__length=4), 'pool.length = 4 must be at least 8; for example'),
  'a tiny vocabulary': (keys(pool__vocab_size=10), 'pool.vocab_size = 10 must be at least 300'),
  'no source': (keys(pool__sources=()), 'pool.sources = () must be one or more of'),
  'a name for a source': (keys(pool__sources=('c4',)), "pool.sources = ('c4',)"),
  'a kind that is none': (keys(pool__sources=('json:a.json',)), 'must be one or more of'),
  'a pattern without a match': (
    keys(pool__sources=('jsonl:no/such/*.jsonl',)),
    'no/such/*.jsonl matches no file; correct',
  ),
  'an option that is none': (file(SOURCE, 'a.jsonl', lines(DOCUMENTS), JSON + ' | txt=body'), "'txt=body' is none of"),
  'another name for the text': (
    file(SOURCE, 'a.jsonl', lines([{'body': 'x'}]), JSON),
    "no field 'text' among body; name it with | text=FIELD",
  ),
  'a field that no record has': (file(SOURCE, 'a.jsonl', lines(DOCUMENTS), JSON + ' | text=body'), 'body'),
  'a broken line': (file(SOURCE, 'a.jsonl', '{"text": "a"\n', JSON), 'a.jsonl, line 1'),
  'a file that is empty': (file(SOURCE, 'a.jsonl', '', JSON), 'a.jsonl'),
  'text that is not UTF-8': (file(SOURCE, 'a.txt', b'caf\xe9 ' * 9, 'text:{}'), 'a.txt'),
  'a column that is missing': (parquet('parquet:{}'), 'a.parquet'),
  'a column of another name': (parquet('parquet:{} | text=txt'), 'text=COLUMN'),
  'no Parquet': (file(SOURCE, 'a.parquet', 'text', 'parquet:{}'), 'a.parquet'),
  'no gzip': (file(SOURCE, 'a.jsonl.gz', lines(DOCUMENTS), JSON), 'a.jsonl.gz'),
  'half a gzip': (file(SOURCE, 'a.jsonl.gz', gzip.compress(lines(DOCUMENTS).encode())[:40], JSON), 'a.jsonl.gz'),
  'a weight without a size': (
    keys(pool__sources=('installed_packages | weight=2', 'text:*.md'), pool__max_bytes=0, pool__max_document_bytes=0),
    'set --config.pool.max_bytes',
  ),
  'a secret in an address': (keys(pool__sources=('jsonl:https://me:pw@host/a.jsonl',)), 'holds a password'),
  'a vocabulary by its name': (keys(pool__vocabulary='gpt2'), "pool.vocabulary = 'gpt2' must be 'train', 'bytes'"),
  'a vocabulary that is nowhere': (keys(pool__vocabulary='no/tokenizer.json'), 'no/tokenizer.json'),
  'a vocabulary that is none': (file('pool.vocabulary', 'tokenizer.json', '{}', tuple_=False), 'tokenizer.json'),
  'documents larger than the pool': (keys(pool__max_bytes=1_000), 'pool.max_document_bytes'),
  # Targets
  'no target': (keys(targets__tasks=()), 'targets.tasks = () must name at least one'),
  'a target misspelt': (keys(targets__tasks=('sqaud',)), "targets.tasks = ('sqaud',)"),
  'a target that is nowhere': (keys(targets__tasks=('no_such.jsonl',)), 'no_such.jsonl'),
  'a target of another kind': (keys(targets__tasks=('questions.json',)), 'paths that end in .jsonl'),
  'a target with a broken line': (file(TASK, 'q.jsonl', lines(QUESTIONS) + '{"context"\n'), 'q.jsonl, line 21'),
  'a question without an answer': (file(TASK, 'q.jsonl', lines([*QUESTIONS, {'context': 'a'}])), 'q.jsonl, line 21'),
  'a target that is empty': (file(TASK, 'q.jsonl', ''), 'q.jsonl'),
  'two targets of one name': (keys(targets__tasks=('a/q.jsonl', 'b/q.jsonl')), 'must have different names'),
  'a target called mix': (keys(targets__tasks=('mix.jsonl',)), "none may be 'mix'"),
  'a benchmark without its file': (keys(targets__tasks=('lambada',), targets__folder='no/folder'), 'no/folder'),
  'all questions held out': (keys(targets__holdout_share=1.0), 'targets.holdout_share = 1.0 must be less than 1'),
  'a benchmark misspelt': (keys(evaluation__tasks=('targets', 'hellaswagg')), 'is it hellaswag?'),
  'a target that is a benchmark too': (
    lambda folder: {
      **file(TASK, 'q.jsonl', lines(QUESTIONS))(folder),
      'evaluation.tasks': ('targets', str(folder / 'q.jsonl')),
    },
    'remove one of the two',
  ),
  # Selection
  'a method misspelt': (keys(selection__methods=('dsmd', 'random')), 'selection.methods'),
  'a method twice': (keys(selection__methods=('dsdm', 'dsdm')), 'selection.methods'),
  'a target that is not asked': (keys(selection__targets=('squad',)), 'selection.targets'),
  'a budget above the pool': (keys(selection__examples=9_000_000), 'to choose, and the pool will have about'),
  'a budget above the pool in one epoch': (
    keys(selection__examples=9_000, selection__epochs=100, selection__repeat_cap=100),
    'selection.examples = 9000',
  ),
  'a budget below a batch': (keys(selection__examples=4), 'must be at least pretraining.train.batch_size = 16'),
  'passes above the cap': (keys(selection__epochs=99), 'set --config.selection.repeat_cap=99'),
  'scores without a file': (keys(selection__methods=('imported', 'random')), 'set --config.selection.imported'),
  'scores that are nowhere': (
    keys(selection__methods=('imported', 'random'), selection__imported='no/scores.npy'),
    'no/scores.npy',
  ),
  'scores that are text': (
    file('selection.imported', 'scores.npy', '1 2 3', tuple_=False, selection__methods=('imported', 'random')),
    'scores.npy',
  ),
  'a mixture in another form': (keys(mixture__parts=('dsdm: 0.5',)), 'mixture.parts'),
  # Models and training
  'no proxy': (keys(proxies__count=0), 'proxies.count = 0 must be at least 1'),
  'an epoch of less than a batch': (keys(proxies__epochs=1e-4), 'raise proxies.epochs or the pool'),
  'more checkpoints than steps': (keys(proxies__checkpoints=5_000), 'proxies.checkpoints'),
  'a share in percent': (keys(proxies__subset_share=50.0), 'proxies.subset_share = 50.0 must be'),
  'no learning rate': (keys(pretraining__train__learning_rate=0.0), 'learning_rate = 0.0 must be greater than 0'),
  'parts of a batch': (keys(proxies__train__microbatches=3), 'must divide proxies.train.batch_size = 16'),
  'heads that do not divide': (keys(model__heads=3, model__kv_heads=3), 'must divide model.width = 16'),
  'a size of no model': (keys(model__size='7B'), "model.size = '7B' must be one of"),
  'weights that are nowhere': (keys(model__weights='no/folder'), 'no/folder'),
  'weights of another kind': (file('model.weights', 'config.json', '{}', tuple_=False), 'config.json'),
  'weights of another vocabulary': (gpt2(300), 'has a vocabulary of 300 and the pool one of 259 (a padded table'),
  'weights with too few rows': (gpt2(258), 'vocabulary, with its config.json beside tokenizer.json'),
  'a factory misspelt': (keys(model__factory='dsdm_jax.lm.decoder:biuld'), 'is it build?'),
  'an optimizer misspelt': (keys(proxies__train__optimizer='adamww'), "optimizer = 'adamww' is not in optax"),
  'a precision that is none': (keys(model__compute_dtype='fp16'), 'must be one of float32, bfloat16'),
  # Features, machine, workdir
  'no dimension': (keys(features__dimension=0), 'features.dimension = 0 must be'),
  'layers of no model': (keys(features__layers='no_such_layer'), 'features.layers'),
  'an output misspelt': (keys(features__output_fn='dsdm_jax.lm.outputs:margni'), 'is it margin'),
  'a mode that does not fit': (keys(features__mode='jvp'), 'set --config.features.projection=dense or ekfac'),
  'no damping': (keys(datamodel__damping=0.0), 'datamodel.damping = 0.0 must be greater than 0'),
  'a logger that is not installed': (keys(log__to=('wandb',)), 'pip install wandb'),
  'Beam that is not installed': (keys(host__beam='--runner=DirectRunner'), 'pip install apache-beam'),
  'a mesh of other machines': (keys(mesh__model=3), 'must divide the number of devices, 8'),
  'processes without an address': (keys(distributed__processes=2), 'set --config.distributed.coordinator'),
  'one of several jobs': (keys(features__jobs=4), 'start each with --stage=features'),
  'a rung below a batch': (keys(ladder__rungs=('0.001', '1')), 'ladder.rungs holds 0.001'),
}


def config_of(folder: Path, values: dict[str, Any]) -> ConfigDict:
  """The tiny run on a small file of documents and one of questions, with `values`."""
  (folder / 'documents.jsonl').write_text(lines(DOCUMENTS))
  (folder / 'questions.jsonl').write_text(lines(QUESTIONS))
  config = get_config()
  own = {SOURCE: (f'jsonl:{folder}/documents.jsonl',), TASK: (f'{folder}/questions.jsonl',), 'pretraining.seeds': 3}
  for key, value in {**own, 'pool.vocabulary': 'bytes', 'leakage.guard': False, **values}.items():
    *sections, name = key.split('.')
    section = config
    for part in sections:
      section = section[part]
    with section.ignore_type():
      section[name] = value
  return config


def test_there_are_at_least_60():
  assert len(MISTAKES) >= 60


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_refused_at_the_start(tmp_path: Path, name: str):
  make, words = MISTAKES[name]
  config = config_of(tmp_path, make(tmp_path))
  with pytest.raises(UserError) as caught:
    pipeline.run(config, tmp_path / 'run', pipeline.CHECK)
  message = str(caught.value)
  assert words in message and '\n' not in message
  assert not (tmp_path / 'run').exists()


def test_a_check_says_what_the_run_takes_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
  long = [{**q, 'context': 'Read this first. ' * 9 + q['context']} for q in QUESTIONS]
  (tmp_path / 'long.jsonl').write_text(lines(long))
  values = {TASK: (f'{tmp_path}/questions.jsonl', f'{tmp_path}/long.jsonl'), 'pretraining.seeds': 2}
  before = sorted(tmp_path.iterdir())
  pipeline.run(config_of(tmp_path, values), tmp_path / 'run', pipeline.CHECK)
  output = capsys.readouterr().out
  assert max(map(len, output.splitlines())) <= 80
  printed = output.splitlines()
  assert printed[0].startswith('check: about 1,7'), printed[0]  # 60 documents of about 1,000 bytes, rows of 32
  first = 1 + next(place for place, line in enumerate(printed) if line.split()[:2] == ['stage', 'time'])
  stages = [name for name in pipeline.NAMES if name != 'ladder']  # which has nothing to do
  assert [line.split()[0] for line in printed[first : first + len(stages)]] == stages
  seeds, cut = output[output.index('warning: ') + 9 :].replace('\n  ', ' ').split('warning: ')
  assert 'set --config.pretraining.seeds=4' in seeds
  assert '100% of the prompts of long' in cut and 'set --config.pool.length=256' in cut
  assert sorted(set(tmp_path.iterdir()) - set(before)) == [tmp_path / 'documents.jsonl', tmp_path / 'questions.jsonl']


def _pool(folder: Path, **values: Any) -> preflight._Pool:
  config = get_config()
  config.pool.update(values)
  return preflight._Pool(config, None)


def test_a_pool_that_is_not_read_has_an_estimate_only_where_its_vocabulary_is_trained(tmp_path):
  assert _pool(tmp_path).rows == pytest.approx(60_000 / preflight._trained_bytes_per_token(320) / 32, abs=1)
  (tmp_path / 'spiece.model').write_bytes(vocabularies.sentencepiece_model(vocab_size=80))
  assert _pool(tmp_path, vocabulary=str(tmp_path / 'spiece.model')).rows is None


def test_a_listed_file_that_is_missing_is_for_the_pool_to_report(tmp_path):
  (tmp_path / 'state.json').write_text(json.dumps({'_data_files': [{'filename': 'gone.arrow'}]}))
  assert _pool(tmp_path, sources=(f'hf:{tmp_path}',), on_error='skip', max_bytes=0).rows is None
  with pytest.raises(UserError, match='gone.arrow'):
    _pool(tmp_path, sources=(f'hf:{tmp_path}',), max_bytes=0)


def test_estimates_and_advice_are_of_the_stages_that_run(tmp_path, monkeypatch):
  config = get_config()
  config.plan.rows, config.features.projection, config.features.dimension = 1_000, 'two_sided', 64
  monkeypatch.setattr(preflight, '_measure', lambda *_: (1.0, 1e9))
  asked = preflight._Questions([], 10, 1_000)
  _, memory, disk, _ = preflight._costs(config, _pool(tmp_path), asked, ['pool', 'features', 'datamodel'])
  assert disk.keys() == {'pool', 'features', 'datamodel'} and memory.keys() == {'features', 'datamodel'}
  advice = {'features': 'or a smaller --config.features.dimension', 'pretraining': 'use another --workdir$'}
  for stage, words in advice.items():
    [warning] = preflight._too_large(config, tmp_path, {}, {stage: 1e20})
    assert re.search(words, warning)
  config.features.projection = 'ekfac'
  assert re.search('use another --workdir$', next(preflight._too_large(config, tmp_path, {}, {'features': 1e20})))
  [warning] = preflight._too_large(config, tmp_path, {'datamodel': 1e20}, {})
  assert warning.endswith('set a smaller --config.features.dimension')

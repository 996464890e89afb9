"""Exports and scorers of pools with every kind of vocabulary."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsdm_jax.core import artifacts
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool import build, vocabulary
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.selection import distilled, export
from tests.helpers import data as small
from tests.helpers import scores as saved_scores
from tests.helpers.workdirs import files_of


def tokenizer(folder: Path, size: int) -> str:
  """A tokenizer.json of `size` pieces."""
  tokenizers = pytest.importorskip('tokenizers')
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=['<|endoftext|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator([d.text for d in small.invented(small.small_config().pool, 0)], trainer)
  path = folder / f'tokenizer_{size}.json'
  made.save(str(path))
  return str(path)


def run_of(folder: Path, choice: str) -> Path:
  """A workdir with a pool of that vocabulary, invented scores and one selection."""
  identity = artifacts.Identity('pool', 1, {}, {})
  attempt = artifacts.begin(folder, identity)
  context = small.context(small.small_config(vocabulary=choice), attempt.parent, attempt.name)
  artifacts.commit(folder, identity, build.run(context), artifacts.Cost(attempt))
  rows = Pool(files_of(folder, 'pool')).num_rows
  score_N = np.random.default_rng(0).normal(size=rows).astype(np.float32)
  identity = artifacts.Identity('datamodel', 1, {}, {})
  part = artifacts.begin(folder, identity)
  saved_scores.save(part, score_docs_N=score_N, score_mix_N=score_N)
  semantics = {'tasks': ['docs'], 'mix': 'mean', 'half_width': {}}
  semantics |= dict.fromkeys(('sign', 'scale', 'output_fn', 'confidence', 'damping'))
  artifacts.commit(folder, identity, semantics, artifacts.Cost(part))
  identity = artifacts.Identity('selection', 1, {}, {})
  part = artifacts.begin(folder, identity)
  chosen = np.argsort(-score_N)[:7].astype(np.int64)
  Selection('dsdm--docs--0', chosen, np.ones(7, np.float32), {'target': 'docs'}).save(part)
  artifacts.commit(folder, identity, {}, artifacts.Cost(part))
  return folder


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory) -> dict[str, Path]:
  base = tmp_path_factory.mktemp('vocabularies')
  choices = {'bytes': 'bytes', 'sentencepiece': 'train', 'tokenizer': tokenizer(base, 400)}
  for kind in choices:
    (base / kind).mkdir()
  return {kind: run_of(base / kind, choice) for kind, choice in choices.items()}


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece', 'tokenizer'])
def test_an_exported_dataset_has_its_vocabulary(workdirs, tmp_path, kind):
  import tensorflow_datasets as tfds

  export.write(workdirs[kind], 'dsdm--docs', 'tfds', tmp_path / 'd')
  read = tfds.builder_from_directory(str(tmp_path / 'd/selection/1.0.0')).as_dataset(split='train')
  made, encoder = Pool(files_of(workdirs[kind], 'pool')), vocabulary.open_encoder(tmp_path / 'd')
  rows = Selection.load(files_of(workdirs[kind], 'selection'), 'dsdm--docs--0').rows
  found = [encoder.decode(record['tokens']) for record in tfds.as_numpy(read)]
  assert found == made.encoder.decode_batch(made.tokens(rows))
  assert len(found) == 7 and all(found)
  export.write(workdirs[kind], 'dsdm--docs', 'jsonl', tmp_path / 'j')
  first = json.loads((tmp_path / 'j/dsdm--docs--0.jsonl').read_text('utf-8').split('\n')[0])
  assert first['text'] == made.text(int(rows[0]))


@pytest.mark.parametrize('kind', ['bytes', 'tokenizer'])
def test_a_scorer_of_ids_needs_the_same_vocabulary(workdirs, tmp_path, capsys, kind):
  out = tmp_path / 'scores.npy'
  flags = ['--workdir', str(workdirs[kind]), '--target', 'docs', '--out', str(out), '--buckets', '4096']
  assert distilled.main([*flags, '--ngrams', 'tokens', '--pool', str(workdirs[kind] / 'pool')]) == 0
  assert len(np.load(out)) == Pool(files_of(workdirs[kind], 'pool')).num_rows
  other = ['--pool', str(workdirs['sentencepiece'] / 'pool')]
  capsys.readouterr()
  assert distilled.main([*flags, '--ngrams', 'tokens', *other]) == 2
  assert 'has another vocabulary' in capsys.readouterr().err
  assert distilled.main([*flags, *other]) == 0

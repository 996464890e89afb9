"""Every kind of vocabulary brings odd text back, with and without seqio, and stores ids as narrow as they go."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.data.pool import encoders, vocabulary
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.suite import open_suite
from tests.data.conftest import context, invented, run_pool, run_targets, small_config
from tests.data.pool.test_vocabulary import ODD, SPACE_SIGN

KINDS = ('bytes', 'sentencepiece', 'tokenizer')


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
  """A folder for each kind of vocabulary, as a pool has it."""
  tokenizers = pytest.importorskip('tokenizers')
  base = tmp_path_factory.mktemp('vocabularies')
  texts = [document.text for document in invented(small_config().pool, 0)]
  (base / 'mine.model').write_bytes(vocabulary.train(texts, 330))
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=['<|endoftext|>'], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )  # fmt: skip
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(base / 'tokenizer.json'))
  choices = {'bytes': 'bytes', 'sentencepiece': str(base / 'mine.model'), 'tokenizer': str(base / 'tokenizer.json')}
  for kind, choice in choices.items():
    (base / kind).mkdir()
    encoders.save(choice, base / kind)
  return {kind: base / kind for kind in KINDS}


@pytest.mark.parametrize('kind', KINDS)
def test_odd_text_comes_back_with_and_without_seqio(folders: dict[str, Path], kind: str):
  encoder = encoders.open_encoder(folders[kind])
  theirs = encoders.seqio_vocabulary(str(folders[kind]))
  assert theirs.vocab_size == encoder.size
  assert (theirs.eos_id, theirs.pad_id) == (encoder.eos, encoder.pad)
  for text in [*ODD, '<|endoftext|>', '</s>']:
    ids = encoder.encode(text)
    assert encoder.decode([*ids, encoder.eos]) == text
    assert encoder.eos not in ids
    if text:
      assert theirs.encode(text) == ids
      assert theirs.decode(ids) == text


@pytest.mark.parametrize('kind', KINDS)
@given(text=st.text(st.characters(codec='utf-8', exclude_characters=SPACE_SIGN), max_size=200))
def test_round_trip(folders: dict[str, Path], kind: str, text: str):
  encoder = encoders.open_encoder(folders[kind])
  ids = encoder.encode(text)
  assert encoder.decode(ids) == text
  assert all(0 <= i < encoder.size for i in ids)


def test_a_vocabulary_that_took_the_place_of_another_is_read_anew(folders: dict[str, Path], tmp_path: Path):
  """seqio keeps SentencePiece models by path."""
  text = 'river stone é'
  for kind in (*KINDS, *KINDS):
    shutil.rmtree(tmp_path / 'one', ignore_errors=True)
    shutil.copytree(folders[kind], tmp_path / 'one')
    encoder = encoders.open_encoder(folders[kind])
    assert encoders.seqio_vocabulary(str(tmp_path / 'one')).encode(text) == encoder.encode(text)
  assert encoders.seqio_vocabulary(str(folders['tokenizer'])) == encoders.seqio_vocabulary(str(folders['tokenizer']))


def test_a_tokenizer_inside_tensorflow(folders: dict[str, Path]):
  theirs = encoders.seqio_vocabulary(str(folders['tokenizer']))
  ids = theirs.encode_tf('river stone é').numpy()
  assert ids.tolist() == theirs.encode('river stone é')
  assert np.ravel(theirs.decode_tf(ids).numpy())[0].decode() == 'river stone é'


def test_a_tokenizer_makes_a_pool_its_targets_and_the_questions_of_evaluation(
  folders: dict[str, Path], write_jsonl: Callable[[str], str], tmp_path: Path
):
  config = small_config(vocabulary=str(folders['tokenizer'] / 'tokenizer.json'))
  artifact = run_pool(config, tmp_path)
  pool = Pool(artifact)
  assert pool.card['special_ids'] == {'pad': 0, 'eos': 0}
  texts = {d.id: d.text for d in invented(config.pool, config.seed)}
  entry = pool.documents[pool.document_N[3]]
  assert pool.text(3).split('\n␄\n')[0].rstrip('\ufffd') in texts[entry['id']]
  found = run_targets(config, tmp_path, artifact)
  with np.load(tmp_path / 'targets' / 'cs_algorithms.target.npz') as arrays:
    assert (arrays['tokens_TL'][:, 0] == pool.encoder.eos).all()
  config.evaluation.tasks = (write_jsonl('{"context": "river", "continuation": "stone"}\n'),)
  [request] = open_suite(context(config, tmp_path, 'evaluation', pool=artifact, targets=found)).requests
  assert request.ids_P[0].tolist() == [pool.encoder.eos, *pool.encoder.encode('river'), *pool.encoder.encode(' stone')]


def test_narrowest_integer():
  sizes = {2: 'uint8', 256: 'uint8', 257: 'uint16', 65_536: 'uint16', 65_537: 'int32', 2**31: 'int32'}
  assert {size: encoders.dtype_of(size).name for size in sizes} == sizes


def test_what_is_no_vocabulary(folders: dict[str, Path], tmp_path: Path):
  (tmp_path / 'a.json').write_text('{}')
  (tmp_path / 'a.model').write_bytes(b'no model')
  for name, said in (('a.json', 'is no tokenizer.json'), ('a.model', 'is no SentencePiece model'), ('b.json', 'read')):
    with pytest.raises(UserError, match=said):
      encoders.save(str(tmp_path / name), tmp_path)
  data = json.loads((folders['tokenizer'] / 'tokenizer.json').read_text())
  with pytest.raises(UserError, match=r'has no piece <stop> to end a document with'):
    encoders.HuggingFaceEncoder(json.dumps(data).encode(), '<stop>')

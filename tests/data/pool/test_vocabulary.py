"""Every kind of vocabulary decodes odd text exactly, with and without seqio; training repeats its bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.data.pool import vocabulary
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.suite import open_suite
from tests.helpers.data import context, invented, run_pool, run_targets, small_config

SPACE_SIGN = '\u2581'  # SentencePiece's own sign for a space, which cannot come back

CODE = 'def f(a, *, b=None):\n\n    """Doc.\n\n\tTab.\r\n    """\n        return  a   \n'
ODD = [
  '',
  ' ',
  '\n',
  '\n\n  \n',
  CODE,
  'a\u2028b\u2029c\x85d\x0b\x0c',
  'é ñ 中文 עברית 😀 👩‍👩‍👧 e\u0301',
  '\ufeffbom',
  'nul\0inside',
  '\x1b[0m',
]
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
    vocab_size=400,
    special_tokens=['<|endoftext|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(base / 'tokenizer.json'))
  choices = {'bytes': 'bytes', 'sentencepiece': str(base / 'mine.model'), 'tokenizer': str(base / 'tokenizer.json')}
  for kind, choice in choices.items():
    (base / kind).mkdir()
    vocabulary.save(choice, base / kind)
  return {kind: base / kind for kind in KINDS}


@pytest.mark.parametrize('kind', KINDS)
def test_odd_text_comes_back_with_and_without_seqio(folders: dict[str, Path], kind: str):
  encoder = vocabulary.open_encoder(folders[kind])
  theirs = vocabulary.seqio_vocabulary(str(folders[kind]))
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
  encoder = vocabulary.open_encoder(folders[kind])
  ids = encoder.encode(text)
  assert encoder.decode(ids) == text
  assert all(0 <= i < encoder.size for i in ids)
  if kind == 'sentencepiece':
    assert not set(ids) & {vocabulary.PAD, vocabulary.EOS, vocabulary.UNK}


def test_a_replaced_vocabulary_is_read_again(folders: dict[str, Path], tmp_path: Path):
  """seqio caches SentencePiece models by path."""
  text = 'river stone é'
  for kind in (*KINDS, *KINDS):
    shutil.rmtree(tmp_path / 'one', ignore_errors=True)
    shutil.copytree(folders[kind], tmp_path / 'one')
    encoder = vocabulary.open_encoder(folders[kind])
    assert vocabulary.seqio_vocabulary(str(tmp_path / 'one')).encode(text) == encoder.encode(text)
  first, second = (vocabulary.seqio_vocabulary(str(folders['tokenizer'])) for _ in range(2))
  assert first == second


def test_a_tokenizer_inside_tensorflow(folders: dict[str, Path]):
  theirs = vocabulary.seqio_vocabulary(str(folders['tokenizer']))
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
  result = run_targets(config, tmp_path, artifact)
  with np.load(tmp_path / 'targets' / 'cs_algorithms.target.npz') as arrays:
    assert (arrays['tokens_TL'][:, 0] == pool.encoder.eos).all()
  config.evaluation.tasks = (write_jsonl('{"context": "river", "continuation": "stone"}\n'),)
  [request] = open_suite(context(config, tmp_path, 'evaluation', pool=artifact, targets=result)).requests
  assert request.ids_P[0].tolist() == [pool.encoder.eos, *pool.encoder.encode('river'), *pool.encoder.encode(' stone')]


def test_narrowest_integer():
  sizes = {2: 'uint8', 256: 'uint8', 257: 'uint16', 65_536: 'uint16', 65_537: 'int32', 2**31: 'int32'}
  assert {size: vocabulary.dtype_of(size).name for size in sizes} == sizes


def test_what_is_no_vocabulary(folders: dict[str, Path], tmp_path: Path):
  (tmp_path / 'a.json').write_text('{}')
  (tmp_path / 'a.model').write_bytes(b'no model')
  messages = {'a.json': 'is not a tokenizer.json', 'a.model': 'is not a SentencePiece model', 'b.json': 'read'}
  for name, expected in messages.items():
    with pytest.raises(UserError, match=expected):
      vocabulary.save(str(tmp_path / name), tmp_path)
  data = json.loads((folders['tokenizer'] / 'tokenizer.json').read_text())
  with pytest.raises(UserError, match=r'has no piece <stop> to end a document with'):
    vocabulary.HuggingFaceEncoder(json.dumps(data).encode(), '<stop>')


def test_the_vocabulary_of_a_pool(tiny_pool: Pool):
  theirs = tiny_pool.vocabulary
  assert (theirs.pad_id, theirs.eos_id, theirs.unk_id) == (0, 1, 2)
  assert theirs.vocab_size == tiny_pool.encoder.size == tiny_pool.vocab_size == 340
  for text in ODD:
    assert tiny_pool.encoder.decode(tiny_pool.encoder.encode(text)) == text
    assert not text or theirs.encode(text) == tiny_pool.encoder.encode(text)


def test_the_space_sign_comes_back_as_a_space(tiny_pool: Pool):
  assert tiny_pool.encoder.decode(tiny_pool.encoder.encode(f'a{SPACE_SIGN}b')) == 'a b'


@pytest.mark.parametrize('text', ['</s>', '<pad>', '<unk>', '<0x41>', 'a</s>b'])
def test_text_that_looks_like_a_special_piece_is_text(tiny_pool: Pool, text: str):
  ids = tiny_pool.encoder.encode(text)
  assert not set(ids) & {vocabulary.PAD, vocabulary.EOS, vocabulary.UNK}
  assert tiny_pool.encoder.decode(ids) == text


def test_newline_is_always_a_piece_of_its_own(tiny_pool: Pool):
  encode = tiny_pool.encoder.encode
  first, second = 'river stone', '    lantern'
  assert encode(f'{first}\n{second}') == encode(first) + encode('\n') + encode(second)
  assert len(encode('\n')) == 1


def test_same_texts_same_bytes(tmp_path: Path):
  texts = [f'the river number {i} runs slowly\n  under stone {i % 7}\n' for i in range(400)]
  first, second = (vocabulary.train(texts, 330) for _ in range(2))
  assert first == second
  (tmp_path / 'm').write_bytes(first)
  by_path, by_bytes = (vocabulary.SentencePieceEncoder(model).encode(texts[0]) for model in (tmp_path / 'm', first))
  assert by_path == by_bytes


def test_a_sample_is_whole_lines_of_the_first_texts():
  texts = [f'{i}\n' * 100 for i in range(50)]
  some = list(vocabulary._sentences(texts, 1_000))
  assert 1_000 <= sum(map(len, some)) < 1_500
  assert ''.join(texts).startswith(''.join(some))
  assert ''.join(vocabulary._sentences(texts, 10**6)) == ''.join(texts)
  order = vocabulary.sample_order(50, 0)
  assert sorted(order) == list(range(50)) != order.tolist()
  assert order.tolist() != vocabulary.sample_order(50, 1).tolist()


def test_too_small_or_too_large_a_vocabulary():
  with pytest.raises(UserError, match=r'pool\.vocab_size is 100;'):
    vocabulary.train(['some text\n'], 100)
  # More letters than pieces: the rare ones are written in bytes.
  alphabet = ''.join(chr(0x4E00 + i) for i in range(3_000))
  texts = [d.text + alphabet[i] for i, d in enumerate(invented(small_config().pool, 0))]
  encoder = vocabulary.SentencePieceEncoder(vocabulary.train([*texts, alphabet], vocabulary.SMALLEST))
  assert encoder.size == vocabulary.SMALLEST
  assert encoder.decode(encoder.encode(alphabet)) == alphabet
  with pytest.raises(UserError, match=r'pool\.vocab_size is 5000, but SentencePiece'):
    vocabulary.train(['some text\n'], 5_000)

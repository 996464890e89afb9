"""Every kind of vocabulary decodes odd text exactly, with and without seqio; training repeats its bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from dsdm_jax.data.pool import passes, vocabulary
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.suite import open_suite
from tests.helpers import vocabularies
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
  theirs = vocabulary.seqio_vocabulary(folders[kind])
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


# Words of the vocabularies and their parts, and characters that they do not know.
PARTS = st.lists(
  st.sampled_from(['river', ' stone', 'lan', 'tern', 'v', ' ', '  ', '\n', '\t', '.', '中', 'e', '\u0301', '😀'])
)
TEXTS = PARTS.map(''.join) | st.text(max_size=20)


@pytest.mark.parametrize('kind', vocabularies.KINDS)
@given(before=TEXTS, after=TEXTS)
def test_context_and_answer_are_tokenized_as_one_text(kind: str, before: str, after: str):
  encoder = vocabularies.encoder(kind)
  before_ids, after_ids = vocabulary.encode_pair(encoder, before, after)
  assert before_ids + after_ids == encoder.encode(before + after)
  spans, end = encoder.offsets(before + after), len(before.rstrip())
  assert len(spans) == len(before_ids + after_ids)
  assert all(stop <= end for _, stop in spans[: len(before_ids)]), 'no piece of the context has text of the answer'
  assert not after_ids or any(stop > end for _, stop in spans[len(before_ids) :][:4])


@pytest.mark.parametrize(
  ('kind', 'before', 'after', 'wanted'),
  [
    # With a space before every text an answer on its own would begin with two of them.
    ('llama', 'over the', ' river', ['▁river']),
    ('t5', 'over the', ' river', ['▁river']),
    ('metaspace', 'over the', ' river', ['▁river']),
    ('byte_level', 'over the', ' river', ['Ġriver']),
    ('t5', 'the riv', 'er', ['▁river']),
    ('byte_level', 'the riv', 'er', ['Ġriver']),
    ('llama', 'the\n', '  river', ['\n', '▁▁', 'river']),
    ('t5', '中', '国', ['<unk>']),
  ],
)
def test_answers_have_the_pieces_of_their_text(kind: str, before: str, after: str, wanted: list[str]):
  encoder = vocabularies.encoder(kind)
  _, ids = vocabulary.encode_pair(encoder, before, after)
  inner = getattr(encoder, 'tokenizer', None) or encoder._processor
  assert [inner.id_to_token(i) if hasattr(inner, 'id_to_token') else inner.id_to_piece(i) for i in ids] == wanted


def test_a_replaced_vocabulary_is_read_again(folders: dict[str, Path], tmp_path: Path):
  """seqio caches SentencePiece models by path."""
  text = 'river stone é'
  for kind in (*KINDS, *KINDS):
    shutil.rmtree(tmp_path / 'one', ignore_errors=True)
    shutil.copytree(folders[kind], tmp_path / 'one')
    encoder = vocabulary.open_encoder(folders[kind])
    assert vocabulary.seqio_vocabulary(tmp_path / 'one').encode(text) == encoder.encode(text)
  first, second = (vocabulary.seqio_vocabulary(folders['tokenizer']) for _ in range(2))
  assert first == second


def test_a_tokenizer_inside_tensorflow(folders: dict[str, Path]):
  theirs = vocabulary.seqio_vocabulary(folders['tokenizer'])
  ids = theirs.encode_tf('river stone é').numpy()
  assert ids.tolist() == theirs.encode('river stone é')
  assert np.ravel(theirs.decode_tf(ids).numpy())[0].decode() == 'river stone é'


def test_seqio_leaves_out_special_pieces_without_a_row_too(folders: dict[str, Path], tmp_path: Path):
  tokenizers = pytest.importorskip('tokenizers')
  tokenizer = tokenizers.Tokenizer.from_file(str(folders['tokenizer'] / vocabulary.TOKENIZER))
  rows = tokenizer.get_vocab_size()
  tokenizer.add_special_tokens(['<image>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'config.json').write_text(json.dumps({'vocab_size': rows}))
  (tmp_path / 'pool').mkdir()
  vocabulary.save(str(tmp_path / 'tokenizer.json'), tmp_path / 'pool')
  assert vocabulary.seqio_vocabulary(tmp_path / 'pool').vocab_size == rows


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
  with pytest.raises(UserError, match=r"has no piece '<stop>' to end a document with"):
    vocabulary.HuggingFaceEncoder(json.dumps(data).encode(), '<stop>')


BPE = {'type': 'BPE', 'vocab': {'<eos>': 0, 'a': 1, 'b': 2, 'ab': 3}, 'merges': ['a b']}
WORDS = {'type': 'WordLevel', 'vocab': {'?': 0}, 'unk_token': '?'}
WORDPIECE = {'type': 'WordPiece', 'continuing_subword_prefix': '##', 'max_input_chars_per_word': 100}
SPLIT = {'type': 'Split', 'pattern': {'Regex': '(a+)+$'}, 'behavior': 'Isolated', 'invert': False}
SPACES = {'type': 'Replace', 'pattern': {'Regex': r'(\s|\s\s)+\d'}, 'content': 'x'}


def added(id: int, content: str, special: bool = False) -> dict:
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return {'id': id, 'content': content, 'special': special, **flags}


def tokenizer_json(model: dict, **parts) -> str:
  return json.dumps({'version': '1.0', 'added_tokens': [added(0, '<eos>', special=True)], **parts, 'model': model})


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    ('[' * 100_000, 'is not a tokenizer.json'),
    ('{"model":' * 100_000, 'recursion limit'),
    ('{"a":[' + '[],' * 5_000_001 + '1]}', 'too large for a tokenizer.json'),
    (tokenizer_json(BPE, pre_tokenizer=SPLIT), r"fails on 'aaa.*retry-limit-in-match"),
    (tokenizer_json(BPE, normalizer=SPACES), r"fails on .*retry-limit-in-match"),
    (tokenizer_json(BPE, normalizer={'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}), 'precompiled_charsmap'),
    (tokenizer_json(BPE | {'unk_token': '<none>'}), r'fails on .*<none>'),
    (tokenizer_json(WORDS | {'vocab': {'<eos>': 0, 'a': 1}}), r'fails on .*Missing'),
    (tokenizer_json({'type': 'Unigram', 'vocab': [['<eos>', 0.0], ['a', -1.0]]}), r'fails on .*unk_id'),
    (tokenizer_json(BPE | {'vocab': {'<eos>': 0, 'a': 2**31, 'b': 2, 'ab': 3}}), 'ids below 2,147,483,649'),
    (tokenizer_json(BPE | {'vocab': [1, 2]}), 'is not a tokenizer.json'),
    (tokenizer_json(BPE | {'dropout': 0.9}), r'draws its ids at random \(dropout = 0\.9\)'),
    (json.dumps({'model': WORDS}), 'names no piece that ends'),
    (tokenizer_json(BPE | {'unk_token': '<eos>'}), "the text .* gives the end mark '<eos>'"),
    (tokenizer_json(BPE), "has no piece for '€' and none for unknown text"),
  ],
)  # fmt: skip
def test_a_malformed_tokenizer_is_one_line(tmp_path: Path, capfd, content: str, words: str):
  (tmp_path / 'a.json').write_text(content)
  with pytest.raises(UserError, match=words) as caught:
    vocabulary.save(str(tmp_path / 'a.json'), tmp_path)
  message = str(caught.value)
  assert message.startswith('pool.vocabulary = ') and '\n' not in message and len(message) < 600
  assert capfd.readouterr().err == '', 'a panic of Rust is silent'


@pytest.mark.parametrize('name', ['a.json', 'a.model'])
def test_a_huge_file_is_not_read_whole(tmp_path: Path, name: str):
  with open(tmp_path / name, 'wb') as file:
    file.truncate(2**42)
  with pytest.raises(UserError, match='too large'):
    vocabulary.save(str(tmp_path / name), tmp_path)


TAGS = [added(0, '<pad>', special=True), added(1, '<eos>', special=True), added(2, '</s>'), added(3, '<table>')]
LETTERS = {
  '<pad>': 0,
  '<eos>': 1,
  '</s>': 2,
  '<table>': 3,
  '?': 4,
  **{sign: 5 + i for i, sign in enumerate('</>abelsto')},
}


@pytest.mark.parametrize(
  ('tokens', 'beside', 'wanted'),
  [
    (TAGS, {}, '<eos>'),
    (TAGS, {'tokenizer_config': {'eos_token': {'content': '</s>'}}, 'generation_config': {'eos_token_id': 2}}, '</s>'),
    (TAGS, {'generation_config': {'eos_token_id': [3]}}, '<table>'),
    (TAGS, {'tokenizer_config': {'eos_token': None}}, '<eos>'),
    (TAGS[2:], {}, '</s>'),
    (TAGS[::2], {}, ('none of its special pieces is <|endoftext|>',)),
    (TAGS, {'tokenizer_config': {'eos_token': '</s>'}, 'generation_config': {'eos_token_id': 1}}, ('</s>', '<eos>')),
    (TAGS, {'generation_config': {'eos_token_id': [1, 3]}}, ('<eos>', '<table>')),
    ([*TAGS[:2], added(2, '</s>', special=True)], {}, ('</s>', '<eos>')),
    (TAGS, {'generation_config': {'eos_token_id': 99}}, ('"eos_token_id" is 99',)),
    (TAGS, {'tokenizer_config': {'eos_token': 1.5}}, ('"eos_token" is 1.5',)),
    (TAGS, {'tokenizer_config': []}, ('tokenizer_config.json: must be a JSON object',)),
  ],
)
def test_the_end_mark_is_the_tokenizers_own(tmp_path: Path, tokens: list, beside: dict, wanted: str | tuple):
  """Or an error that names the candidates; written out in a document, every tag stays text."""
  vocab = {piece: id for piece, id in LETTERS.items() if len(tokens) > 2 or id not in (0, 1)}
  model = {'type': 'BPE', 'vocab': vocab, 'merges': [], 'unk_token': '?'}
  path = tmp_path / 'tokenizer.json'
  path.write_text(tokenizer_json(model, decoder={'type': 'Fuse'}, added_tokens=tokens))
  for name, content in beside.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(content))
  (tmp_path / 'pool').mkdir()
  if isinstance(wanted, tuple):
    with pytest.raises(UserError) as caught:
      vocabulary.save(str(path), tmp_path / 'pool')
    assert all(word in str(caught.value) for word in wanted), caught.value
    return
  vocabulary.save(str(path), tmp_path / 'pool')
  encoder = vocabulary.open_encoder(tmp_path / 'pool')
  assert encoder.eos == LETTERS[wanted] and encoder.unk == 4
  text = 'a<eos>b</s>a<table>b'
  ids = encoder.encode(text)
  assert encoder.eos not in ids and encoder.decode([*ids, encoder.eos]) == text


def test_a_round_trip_of_the_pool_is_in_its_card_and_unknown_text_is_refused(
  tmp_path: Path, tiny_pool: Pool, monkeypatch
):
  (tmp_path / 't5.model').write_bytes(
    vocabularies.sentencepiece_model(model_type='unigram', vocab_size=60, character_coverage=0.98)
  )
  config = small_config(vocabulary=str(tmp_path / 't5.model'), max_unknown_share=0.5)
  told: list[str] = []
  monkeypatch.setattr('dsdm_jax.core.progress.Log.say', lambda self, text: told.append(text))
  found = Pool(run_pool(config, tmp_path / 'a')).card['vocabulary']
  assert found['documents'] > 20 and found['unchanged'] == 0 and 0.01 < found['unknown'] < 0.2
  assert found['loses'] == ['newlines', 'indentation', 'tabs', 'NUL']
  assert any('of their pieces are unknown text; it loses newlines, indentation, tabs, NUL' in line for line in told)
  config.pool.max_unknown_share = base.get_config().pool.max_unknown_share
  monkeypatch.setattr(passes, 'encode', lambda job: pytest.fail('the pool was encoded before it was refused'))
  with pytest.raises(
    UserError, match=r't5\.model.* does not fit this pool: .* more than pool\.max_unknown_share = 0\.001;'
  ):
    run_pool(config, tmp_path / 'b')
  assert tiny_pool.card['vocabulary'] | {'documents': 0} == {'documents': 0, 'unchanged': 1, 'unknown': 0, 'loses': []}


@pytest.mark.parametrize(
  'model',
  [
    {'type': 'Unigram', 'unk_id': 0, 'vocab': [['?', -9.0], ['<eos>', 0.0], ['a', -1.0], ['<', -2.0], ['>', -2.0]]},
    {'type': 'WordLevel', 'unk_token': '?', 'vocab': {'?': 0, '<eos>': 1, 'a': 2}},
    WORDPIECE | {'unk_token': '?', 'vocab': {'?': 0, '<eos>': 1, 'a': 2}},
  ],
  ids=lambda model: model['type'],
)
def test_a_special_piece_that_the_model_has_is_unknown_text(tmp_path: Path, model: dict):
  (tmp_path / 'tokenizer.json').write_text(tokenizer_json(model, added_tokens=[added(1, '<eos>', special=True)]))
  vocabulary.save(str(tmp_path / 'tokenizer.json'), tmp_path)
  encoder = vocabulary.open_encoder(tmp_path)
  assert encoder.eos == 1 and encoder.encode('a') == [2]
  assert set(encoder.encode('<eos>')) == {0} and 1 not in encoder.encode('a<eos>a')


def test_text_that_is_in_no_piece_is_unknown():
  parts = {'normalizer': {'type': 'Replace', 'pattern': {'Regex': '[0-9]'}, 'content': ''}}
  encoder = vocabulary.HuggingFaceEncoder(tokenizer_json(BPE | {'unk_token': 'ab'}, **parts).encode())
  assert encoder.encode('b12 a') == [2, 3, 1], 'the digits vanish, and the space is unknown'
  found = vocabulary.summary(encoder, [vocabulary.round_trip(encoder, text) for text in ('b12 a', 'a')])
  assert (found['documents'], found['unchanged'], found['unknown']) == (2, 0.5, 0.5)


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

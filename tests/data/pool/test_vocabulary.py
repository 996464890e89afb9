"""The vocabulary keeps every character, repeats its bytes, and is the same with and without seqio."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.data.pool import vocabulary
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from tests.data.conftest import invented, small_config

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


@pytest.mark.parametrize('text', ODD)
def test_round_trip_of_odd_text(tiny_pool: Pool, text: str):
  assert tiny_pool.encoder.decode(tiny_pool.encoder.encode(text)) == text


@given(text=st.text(st.characters(codec='utf-8', exclude_characters=SPACE_SIGN), max_size=200))
def test_round_trip(tiny_pool: Pool, text: str):
  ids = tiny_pool.encoder.encode(text)
  assert tiny_pool.encoder.decode(ids) == text
  assert vocabulary.UNK not in ids
  assert vocabulary.EOS not in ids
  assert vocabulary.PAD not in ids


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


def test_seqio_gives_the_same_ids(tiny_pool: Pool):
  seqio_vocabulary = tiny_pool.vocabulary
  assert (seqio_vocabulary.pad_id, seqio_vocabulary.eos_id, seqio_vocabulary.unk_id) == (0, 1, 2)
  assert seqio_vocabulary.vocab_size == tiny_pool.encoder.size == tiny_pool.vocab_size == 340
  for text in [t for t in ODD if t]:
    assert seqio_vocabulary.encode(text) == tiny_pool.encoder.encode(text)
    assert seqio_vocabulary.decode(tiny_pool.encoder.encode(text)) == text


def test_same_texts_same_bytes(tmp_path: Path):
  texts = [f'the river number {i} runs slowly\n  under stone {i % 7}\n' for i in range(400)]
  first, second = (vocabulary.train(texts, 330) for _ in range(2))
  assert first == second
  (tmp_path / 'm').write_bytes(first)
  assert vocabulary.Encoder(tmp_path / 'm').encode(texts[0]) == vocabulary.Encoder(first).encode(texts[0])


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
  encoder = vocabulary.Encoder(vocabulary.train([*texts, alphabet], vocabulary.SMALLEST))
  assert encoder.size == vocabulary.SMALLEST
  assert encoder.decode(encoder.encode(alphabet)) == alphabet
  with pytest.raises(UserError, match=r'pool\.vocab_size is 5000, but SentencePiece'):
    vocabulary.train(['some text\n'], 5_000)

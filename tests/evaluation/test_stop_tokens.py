"""The tokens that end a generated answer, for each kind of vocabulary."""

import io

import numpy as np
import pytest
import sentencepiece

from dsdm_jax.data.pool import vocabulary
from dsdm_jax.data.pool.vocabulary import ByteEncoder
from dsdm_jax.evaluation.suite import stop_tokens

TEXTS = [
  f'The {a} of {b} is {i}, and {b} has {i * 7} {a}s.'
  for i, (a, b) in enumerate([('city', 'Rome'), ('river', 'Paris'), ('king', 'Spain'), ('sea', 'Oslo')] * 20)
]


@pytest.fixture(scope='module')
def sentencepiece_model() -> vocabulary.Encoder:
  """SentencePiece as most models have it: a space before the text, encoded as a lone '▁'."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_writer=model,
    vocab_size=300,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=3,
    byte_fallback=True,
    num_threads=1,
    minloglevel=2,
    hard_vocab_limit=False,
  )
  return vocabulary.SentencePieceEncoder(model.getvalue())


def test_a_lone_space_does_not_end_an_answer(sentencepiece_model):
  stop_V = stop_tokens(sentencepiece_model)
  (space,) = (i for i in range(sentencepiece_model.size) if sentencepiece_model._processor.id_to_piece(i) == '▁')
  assert sentencepiece_model.decode([space]) == '' and not stop_V[space]
  newline = sentencepiece_model._processor.piece_to_id('<0x0A>')
  assert np.flatnonzero(stop_V).tolist() == sorted([sentencepiece_model.eos, sentencepiece_model.pad, newline])
  answer = [*sentencepiece_model.encode('Oslo'), space, *sentencepiece_model.encode('7')]
  assert sentencepiece_model.decode(answer).startswith('Oslo ') and not stop_V[answer].any()


def test_pieces_with_a_newline_end_it():
  encoder = vocabulary.SentencePieceEncoder(vocabulary.train([text + '\n' for text in TEXTS], 320))
  stop_V = stop_tokens(encoder)
  assert stop_V[encoder.encode('a\nb')].tolist().count(True) == 1
  assert not stop_V[encoder.encode(' Rome is 7')].any()
  assert np.flatnonzero(stop_tokens(ByteEncoder())).tolist() == [0, 1, 3 + ord('\n')]

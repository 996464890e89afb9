"""Where a generated answer ends, by every kind of vocabulary."""

import io

import numpy as np
import pytest
import sentencepiece

from dsdm_jax.data.pool import vocabulary
from dsdm_jax.data.pool.vocabulary import ByteEncoder
from dsdm_jax.evaluation.suite import stops

TEXTS = [f'The {a} of {b} is {i}, and {b} has {i * 7} {a}s.' for i, (a, b) in enumerate(
  [('city', 'Rome'), ('river', 'Paris'), ('king', 'Spain'), ('sea', 'Oslo')] * 20
)]  # fmt: skip


@pytest.fixture(scope='module')
def usual() -> vocabulary.Encoder:
  """SentencePiece as most models have it: a space before the text, which a lone '▁' stands for."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=300, pad_id=0, eos_id=1, unk_id=2, bos_id=3,
    byte_fallback=True, num_threads=1, minloglevel=2, hard_vocab_limit=False,
  )  # fmt: skip
  return vocabulary.SentencePieceEncoder(model.getvalue())


def test_a_lone_space_does_not_end_an_answer(usual):
  stop_V = stops(usual)
  (space,) = (i for i in range(usual.size) if usual._processor.id_to_piece(i) == '▁')
  assert usual.decode([space]) == '' and not stop_V[space]
  newline = usual._processor.piece_to_id('<0x0A>')
  assert np.flatnonzero(stop_V).tolist() == sorted([usual.eos, usual.pad, newline])
  answer = [*usual.encode('Oslo'), space, *usual.encode('7')]
  assert usual.decode(answer).startswith('Oslo ') and not stop_V[answer].any()


def test_pieces_with_a_newline_end_it():
  encoder = vocabulary.SentencePieceEncoder(vocabulary.train([text + '\n' for text in TEXTS], 320))
  stop_V = stops(encoder)
  assert stop_V[encoder.encode('a\nb')].tolist().count(True) == 1
  assert not stop_V[encoder.encode(' Rome is 7')].any()
  assert np.flatnonzero(stops(ByteEncoder())).tolist() == [0, 1, 3 + ord('\n')]

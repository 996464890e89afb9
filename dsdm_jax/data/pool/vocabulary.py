"""The SentencePiece vocabulary of a pool, and the two ways to open it.

Pieces keep every character, newlines and runs of spaces included: the text of a document comes back exactly, but for
U+2581 ('▁'), SentencePiece's own sign for a space, which comes back as a space. Ids are 0 padding, 1 end of document,
2 unknown (never produced: characters without a piece become bytes), seqio's convention.

Encode with Python's `encode` only. The TensorFlow op of seqio's vocabularies gives other ids on most texts.
"""

import collections
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsdm_jax.core import prng, tensorflow_start
from dsdm_jax.errors import UserError

if TYPE_CHECKING:
  import seqio

PAD = 0
EOS = 1
UNK = 2
SMALLEST = 300  # 3 special ids, 256 bytes, and room for some pieces

# Training sees at most this much text: more makes it slower, not better, at vocabularies of a few thousand pieces.
SAMPLE_BYTES = 400_000
_SENTENCE_BYTES = 1_000


def sample_order(count: int, seed: int) -> np.ndarray:
  """The order in which `count` texts are trained on, until there is enough of them."""
  return prng.numpy_stream(seed, 'vocabulary').permutation(count)


def sample_bytes(vocab_size: int) -> int:
  """How much text a vocabulary of so many pieces is trained on."""
  return max(SAMPLE_BYTES, 200 * vocab_size)


def _sentences(texts: Iterable[str], limit: int) -> Iterator[str]:
  """Runs of whole lines of about a thousand characters, from texts in their order, up to `limit` bytes."""
  for text in texts:
    sentence = ''
    for line in text.splitlines(keepends=True):
      sentence += line
      if len(sentence) >= _SENTENCE_BYTES:
        limit -= len(sentence.encode())
        yield sentence
        sentence = ''
        if limit <= 0:
          return
    if sentence:
      limit -= len(sentence.encode())
      yield sentence
    if limit <= 0:
      return


def _with_common_characters(sample: Sequence[str], most: int) -> list[str]:
  """The sample with newlines in the place of rare characters, which are to be written in bytes.

  SentencePiece refuses a vocabulary smaller than the alphabet. Kept are `most` characters, or fewer that make up
  99.95 %.
  """
  counts = collections.Counter(itertools.chain.from_iterable(sample))
  uncovered = counts.total()
  rare = {}
  # Sorted: equals must not depend on the order of counting.
  for index, (character, count) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))):
    if index >= most or uncovered < 0.0005 * counts.total():
      rare[ord(character)] = '\n'
    uncovered -= count
  return [sentence.translate(rare) for sentence in sample] if rare else list(sample)


def train(texts: Iterable[str], vocab_size: int) -> bytes:
  """Trains a unigram model; the same texts in the same order and the same size give the same bytes.

  Args:
    texts: documents in the order of `sample_order`; those behind the first `sample_bytes` are not looked at.
    vocab_size: pieces in all, special ids and the 256 bytes included; at least `SMALLEST`.

  Returns:
    The serialized model.

  Raises:
    UserError: `vocab_size` is too small, or the texts do not have so many pieces in them.
  """
  import sentencepiece

  if vocab_size < SMALLEST:
    raise UserError(f'pool.vocab_size is {vocab_size}; the 256 bytes need at least {SMALLEST}')
  sample = list(_sentences(texts, sample_bytes(vocab_size)))
  sample = _with_common_characters(sample, most=(vocab_size - SMALLEST) // 2 + 20)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sample),
      model_writer=model,
      model_type='unigram',
      vocab_size=vocab_size,
      pad_id=PAD,
      eos_id=EOS,
      unk_id=UNK,
      bos_id=-1,
      byte_fallback=True,
      # Nothing is normalised away: code means its white space.
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=['\n'],
      character_coverage=1.0,
      # Candidates to prune from, and EM steps between prunings: the defaults are many times slower, no better.
      seed_sentencepiece_size=max(20_000, 20 * vocab_size),
      num_sub_iterations=1,
      max_sentence_length=1_000_000,
      # More threads add floating-point numbers in another order.
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise UserError(
      f'pool.vocab_size is {vocab_size}, but SentencePiece cannot train it on this pool '
      f'({" ".join(str(error).split())}); change it or raise pool.max_bytes'
    ) from error
  return model.getvalue()


class Encoder:
  """The vocabulary without seqio, which takes seconds to import: the same ids, text in and out.

  Args:
    model: a file that holds the model, or the model's bytes.
  """

  def __init__(self, model: str | os.PathLike | bytes):
    import sentencepiece

    data = model if isinstance(model, bytes) else Path(model).read_bytes()
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)

  @property
  def size(self) -> int:
    """V: number of ids."""
    return self._processor.vocab_size()

  @property
  def eos(self) -> int:
    """Id of the end mark; −1 where a foreign model has none."""
    return self._processor.eos_id()

  @property
  def pad(self) -> int:
    """Id of padding; 0 where a foreign model has none."""
    return max(self._processor.pad_id(), 0)

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without an end mark."""
    return self._processor.encode(text)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of `ids`; padding and end marks are nothing, a character cut through at the edge becomes U+FFFD."""
    return self._processor.decode([int(i) for i in ids])

  def decode_batch(self, ids_BL: np.ndarray) -> list[str]:
    """Text of each row; other threads may run meanwhile."""
    return self._processor.decode(ids_BL.tolist(), num_threads=1)


def load(path: str) -> 'seqio.SentencePieceVocabulary':
  """The vocabulary as seqio knows it. Imports seqio and TensorFlow."""
  return _load(path, hashlib.sha256(Path(path).read_bytes()).hexdigest())


@functools.lru_cache(maxsize=2)
def _load(path: str, digest: str) -> 'seqio.SentencePieceVocabulary':
  del digest  # tells apart what lay at one path at two times
  tensorflow_start.start()
  import seqio

  # seqio keeps models by path for ever, and reads one when it is first used.
  seqio.vocabularies._load_model_internal.cache_clear()
  found = seqio.SentencePieceVocabulary(path)
  found.tokenizer  # noqa: B018  reads it now
  return found

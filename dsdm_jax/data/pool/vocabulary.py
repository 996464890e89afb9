"""Vocabularies: a SentencePiece model that is trained on the pool, or a given model, a tokenizer.json, bytes.

A trained vocabulary keeps every character, including newlines and runs of spaces: decoding returns the text, except
that U+2581 ('▁'), SentencePiece's sign for a space, comes back as a space. Ids are 0 padding, 1 end of document, 2
unknown (never produced: characters without a piece become bytes), which is seqio's convention.

An `Encoder` needs neither seqio nor TensorFlow; `seqio_vocabulary` gives the same ids as a seqio Vocabulary. The file
in a pool's folder determines its kind. Encode with Python's `encode` only: the TensorFlow op of seqio's
SentencePiece vocabularies gives other ids on most texts.
"""

import collections
import functools
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dsdm_jax.core import prng, storage, tensorflow_start
from dsdm_jax.data import files
from dsdm_jax.errors import UserError

if TYPE_CHECKING:
  import seqio

MODEL, TOKENIZER, BYTES = 'vocabulary.model', 'tokenizer.json', 'bytes.json'
FILES = (MODEL, TOKENIZER, 'end_piece.json', BYTES)  # of all kinds of vocabularies
PAD = 0
EOS = 1
UNK = 2
SMALLEST = 300  # 3 special ids, 256 bytes, and room for some pieces

# Training uses at most this much text: more is slower but not better for vocabularies of a few thousand pieces.
SAMPLE_BYTES = 400_000
_SENTENCE_BYTES = 1_000
_END_PIECES = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '[SEP]', '<|eos|>')


def sample_order(count: int, seed: int) -> np.ndarray:
  """The seeded order in which `count` texts are sampled for training."""
  return prng.numpy_stream(seed, 'vocabulary').permutation(count)


def sample_bytes(vocab_size: int) -> int:
  """Bytes of text that a vocabulary of `vocab_size` pieces is trained on."""
  return max(SAMPLE_BYTES, 200 * vocab_size)


def _sentences(texts: Iterable[str], limit: int) -> Iterator[str]:
  """Runs of whole lines of about a thousand characters, in the order of the texts, up to `limit` bytes."""
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
  """The sample with rare characters replaced by newlines, so that they are encoded as bytes.

  SentencePiece refuses a vocabulary smaller than the alphabet. At most `most` characters stay, fewer if they make up
  99.95 % of the text.
  """
  counts = collections.Counter(itertools.chain.from_iterable(sample))
  uncovered = counts.total()
  rare = {}
  # Sorted, so that ties do not depend on the order of counting.
  for index, (character, count) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))):
    if index >= most or uncovered < 0.0005 * counts.total():
      rare[ord(character)] = '\n'
    uncovered -= count
  return [sentence.translate(rare) for sentence in sample] if rare else list(sample)


def train(texts: Iterable[str], vocab_size: int) -> bytes:
  """Trains a unigram model; the same texts in the same order and the same size give the same bytes.

  Args:
    texts: documents in the order of `sample_order`; only the first `sample_bytes` are used.
    vocab_size: number of pieces, including special ids and the 256 bytes; at least `SMALLEST`.

  Returns:
    The serialized model.

  Raises:
    UserError: `vocab_size` is too small, or the texts do not contain enough pieces.
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
      # No normalization: white space matters in code.
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=['\n'],
      character_coverage=1.0,
      # Candidates to prune from, and EM steps between prunings: the defaults are many times slower and no better.
      seed_sentencepiece_size=max(20_000, 20 * vocab_size),
      num_sub_iterations=1,
      max_sentence_length=1_000_000,
      # More threads would change the order of floating-point additions.
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise UserError(
      f'pool.vocab_size is {vocab_size}, but SentencePiece cannot train it on this pool '
      f'({" ".join(str(error).split())}); change it or raise pool.max_bytes'
    ) from error
  return model.getvalue()


class Encoder(Protocol):
  """Text to ids and back, without seqio or TensorFlow.

  Attributes:
    size: V, number of ids.
    eos: id that ends a document.
    pad: id that pads sequences.
    unk: id of text that has no piece; −1 if there is none.
  """

  @property
  def size(self) -> int: ...
  @property
  def eos(self) -> int: ...
  @property
  def pad(self) -> int: ...
  @property
  def unk(self) -> int: ...
  def encode(self, text: str) -> list[int]: ...
  def offsets(self, text: str) -> list[tuple[int, int]]:
    """First character and end of what each id of `encode(text)` covers; both equal for an id that covers none."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...
  def decode_batch(self, ids_BL: np.ndarray) -> list[str]: ...


class ByteEncoder:
  """UTF-8 bytes, as seqio's ByteVocabulary without extra ids: padding 0, end 1, unknown 2, byte b is b + 3."""

  size, eos, pad, unk = 259, 1, 0, -1

  def encode(self, text: str) -> list[int]:
    return (np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3).tolist()

  def offsets(self, text: str) -> list[tuple[int, int]]:
    return [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return bytes(i - 3 for i in np.asarray(ids).tolist() if i >= 3).decode(errors='replace')

  def decode_batch(self, ids_BL: np.ndarray) -> list[str]:
    return [self.decode(ids_L) for ids_L in ids_BL]


class SentencePieceEncoder:
  """A SentencePiece model. Gives the same ids as seqio's, whose import takes seconds.

  Args:
    model: file or bytes of the model.
  """

  def __init__(self, model: str | os.PathLike | bytes):
    import sentencepiece

    data = model if isinstance(model, bytes) else Path(model).read_bytes()
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)

  @property
  def size(self) -> int:
    return self._processor.vocab_size()

  @property
  def eos(self) -> int:
    """Id of the end mark; −1 if the model has none."""
    return self._processor.eos_id()

  @property
  def pad(self) -> int:
    """Id of padding; 0 if the model has none."""
    return max(self._processor.pad_id(), 0)

  @property
  def unk(self) -> int:
    return self._processor.unk_id()

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without an end mark."""
    return self._processor.encode(text)

  def offsets(self, text: str) -> list[tuple[int, int]]:
    """As `Encoder.offsets`; of the bytes of one character only the last covers it."""
    return self._processor.encode(text, return_type='offset_mapping')['offsets']

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of `ids`; padding and end marks are dropped, a character cut at the edge becomes U+FFFD."""
    return self._processor.decode([int(i) for i in ids])

  def decode_batch(self, ids_BL: np.ndarray) -> list[str]:
    """Text of each row; releases the GIL."""
    return self._processor.decode(ids_BL.tolist(), num_threads=1)


class HuggingFaceEncoder:
  """A tokenizer.json of Hugging Face's tokenizers. Special tokens that are written out in a text are text.

  Args:
    data: bytes of the file.
    end: the piece that ends a document; '' takes the first of the usual ones that exists.

  Raises:
    UserError: the file is not a tokenizer, or has no such piece.
  """

  def __init__(self, data: bytes, end: str = ''):
    import tokenizers

    try:
      self.tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises bare Exceptions
      raise UserError(f'pool.vocabulary is not a tokenizer.json ({" ".join(str(error).split())[:200]})') from error
    self.tokenizer.no_truncation()
    self.tokenizer.no_padding()
    self.tokenizer.encode_special_tokens = True
    known = [piece for piece in ([end] if end else _END_PIECES) if self.tokenizer.token_to_id(piece) is not None]
    if not known:
      raise UserError(
        f'the tokenizer has no piece {end or " or ".join(_END_PIECES)} to end a document with; '
        'set --config.pool.end_piece to one of its pieces'
      )
    self.size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self.eos: int = int(self.tokenizer.token_to_id(known[0]) or 0)
    pad = self.tokenizer.token_to_id('<pad>')
    self.pad: int = self.eos if pad is None else pad
    self.unk: int = -1
    self.data = data

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False).ids

  def offsets(self, text: str) -> list[tuple[int, int]]:
    return self.tokenizer.encode(text, add_special_tokens=False).offsets

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    special = {self.eos, self.pad}
    return self.tokenizer.decode([i for i in np.asarray(ids).tolist() if i not in special], skip_special_tokens=False)

  def decode_batch(self, ids_BL: np.ndarray) -> list[str]:
    return [self.decode(ids_L) for ids_L in ids_BL]


def encode_pair(encoder: Encoder, context: str, answer: str) -> tuple[list[int], list[int]]:
  """Ids of a context and of the answer that follows it; joined they are the ids of `context + answer`.

  The text is encoded once, as a document of the pool is: `encode(a + b)` is not `encode(a) + encode(b)`, because pieces
  may cross the boundary and some vocabularies put a space before every text. White space at the end of the context and
  a piece with characters of both belong to the answer, as in lm-evaluation-harness.
  """
  ids, place = encoder.encode(context + answer), len(context.rstrip())
  before = encoder.encode(context[:place])
  first = len(before)
  # Ids of the context that begin the whole end where the answer begins, unless the last stands for unknown text.
  if ids[:first] == before and first < len(ids) and encoder.unk not in before[-1:]:
    return before, ids[first:]
  spans = encoder.offsets(context + answer)
  first = next((i for i, (_, stop) in enumerate(spans) if stop > place), len(spans))
  while first and spans[first - 1][0] >= place:  # of one character's bytes only the last may cover it
    first -= 1
  return ids[:first], ids[first:]


def save(choice: str, folder: Path, end: str = '') -> None:
  """Writes the vocabulary `choice` to `folder`: 'bytes', or the path of a SentencePiece model or a tokenizer.json.

  Raises:
    UserError: the file does not exist or is of an unknown kind.
  """
  if choice == 'bytes':
    storage.write_json(folder / BYTES, {'vocabulary': 'bytes'})
    return
  try:
    data = files.read_bytes(choice)
  except files.READ_ERRORS as error:
    raise UserError(f'pool.vocabulary = {choice!r}: {files.describe(error)}') from error
  if choice.endswith('.json'):
    HuggingFaceEncoder(data, end)
    storage.write_bytes(folder / TOKENIZER, data)
    storage.write_json(folder / 'end_piece.json', {'end_piece': end})
    return
  try:
    encoder = SentencePieceEncoder(data)
  except (RuntimeError, UnicodeDecodeError) as error:  # the second: SentencePiece's message quotes bytes
    raise UserError(f'pool.vocabulary = {choice!r} is not a SentencePiece model ({error})') from error
  if encoder.eos < 0:
    raise UserError(f'pool.vocabulary = {choice!r} has no end piece; train it with an eos_id')
  storage.write_bytes(folder / MODEL, data)


def open_encoder(folder: str | os.PathLike) -> Encoder:
  """The encoder of the vocabulary in `folder`."""
  folder = Path(folder)
  if (folder / MODEL).is_file():
    return SentencePieceEncoder(folder / MODEL)
  if (folder / TOKENIZER).is_file():
    return HuggingFaceEncoder((folder / TOKENIZER).read_bytes(), _end_piece(folder))
  if (folder / BYTES).is_file():
    return ByteEncoder()
  raise UserError(f'{folder} has no vocabulary; run --stage=pool')


def _end_piece(folder: Path) -> str:
  return json.loads((folder / 'end_piece.json').read_text())['end_piece']


def seqio_vocabulary(folder: str) -> 'seqio.Vocabulary':
  """The same vocabulary for seqio. Imports seqio and TensorFlow."""
  tensorflow_start.start()
  import seqio

  path = Path(folder)
  if (path / MODEL).is_file():
    return load(str(path / MODEL))
  if (path / BYTES).is_file():
    return seqio.ByteVocabulary(extra_ids=0)
  return _hugging_face_vocabulary((path / TOKENIZER).read_bytes(), _end_piece(path))


@functools.lru_cache(maxsize=2)
def _hugging_face_vocabulary(data: bytes, end: str) -> 'seqio.Vocabulary':
  import seqio
  import tensorflow as tf

  encoder = HuggingFaceEncoder(data, end)

  class HuggingFaceVocabulary(seqio.Vocabulary):
    """A tokenizer.json for seqio; `encode_tf` calls Python."""

    bos_id = unk_id = property(lambda self: None)
    eos_id = property(lambda self: encoder.eos)
    pad_id = property(lambda self: encoder.pad)
    data = property(lambda self: encoder.data)
    _base_vocab_size = property(lambda self: encoder.size)

    def _encode(self, s: str) -> list[int]:
      return encoder.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
      return encoder.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
      text = tf.convert_to_tensor(s)
      # Eagerly the function gets an array of one object, in a graph it gets bytes.
      ids = tf.numpy_function(
        lambda t: np.asarray(encoder.encode(np.asarray(t).item().decode()), np.int32), [text], tf.int32
      )
      return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
      return tf.numpy_function(lambda ids: encoder.decode(ids).encode(), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
      return isinstance(other, HuggingFaceVocabulary) and other.data == self.data

  return HuggingFaceVocabulary()


def dtype_of(size: int) -> np.dtype:
  """The narrowest integer type for ids below `size`."""
  for dtype in (np.uint8, np.uint16):
    if size <= np.iinfo(dtype).max + 1:
      return np.dtype(dtype)
  return np.dtype(np.int32)


def load(path: str) -> 'seqio.SentencePieceVocabulary':
  """A SentencePiece model for seqio. Imports seqio and TensorFlow."""
  return _load(path, hashlib.sha256(Path(path).read_bytes()).hexdigest())


@functools.lru_cache(maxsize=2)
def _load(path: str, digest: str) -> 'seqio.SentencePieceVocabulary':
  del digest  # part of the key: another model may have replaced the one at `path`
  tensorflow_start.start()
  import seqio

  # seqio caches models by path, and reads a model when it is first used.
  seqio.vocabularies._load_model_internal.cache_clear()
  vocabulary = seqio.SentencePieceVocabulary(path)
  vocabulary.tokenizer  # noqa: B018  reads it now
  return vocabulary

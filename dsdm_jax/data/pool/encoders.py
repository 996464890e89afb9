"""Text to ids and back, for every kind of vocabulary: trained here, a SentencePiece model, a tokenizer.json, bytes.

An encoder needs neither seqio nor TensorFlow; `seqio_vocabulary` gives the same ids as a seqio Vocabulary. Which kind a
pool has is told by the file in its folder.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from etils import epath

from dsdm_jax.core import storage, tensorflow_start
from dsdm_jax.data.pool import vocabulary
from dsdm_jax.errors import UserError

if TYPE_CHECKING:
  import seqio

MODEL, TOKENIZER, BYTES = 'vocabulary.model', 'tokenizer.json', 'bytes.json'
_END_PIECES = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '[SEP]', '<|eos|>')


class Encoder(Protocol):
  """What the stages ask of a vocabulary.

  Attributes:
    size: V, number of ids.
    eos: id that ends a document.
    pad: id that fills up sequences.
  """

  @property
  def size(self) -> int: ...
  @property
  def eos(self) -> int: ...
  @property
  def pad(self) -> int: ...
  def encode(self, text: str) -> list[int]: ...
  def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...
  def decode_batch(self, ids_BL: np.ndarray) -> list[str]: ...


class ByteEncoder:
  """UTF-8 bytes, after seqio's ByteVocabulary without extra ids: padding 0, end 1, unknown 2, byte b is b + 3."""

  size, eos, pad = 259, 1, 0

  def encode(self, text: str) -> list[int]:
    return (np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3).tolist()

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return bytes(i - 3 for i in np.asarray(ids).tolist() if i >= 3).decode(errors='replace')

  def decode_batch(self, ids_BL: np.ndarray) -> list[str]:
    return [self.decode(ids_L) for ids_L in ids_BL]


class HuggingFaceEncoder:
  """A tokenizer.json of Hugging Face's tokenizers. Special tokens written out in a text are text.

  Args:
    data: the file's bytes.
    end: the piece that ends a document; '' takes the first of the usual ones that it has.

  Raises:
    UserError: the file is no tokenizer, or has no such piece.
  """

  def __init__(self, data: bytes, end: str = ''):
    try:
      import tokenizers
    except ImportError as error:
      raise UserError('pool.vocabulary is a tokenizer.json, which needs: pip install tokenizers') from error
    try:
      self.tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises bare Exceptions
      raise UserError(f'pool.vocabulary is no tokenizer.json ({" ".join(str(error).split())[:200]})') from error
    self.tokenizer.no_truncation()
    self.tokenizer.no_padding()
    self.tokenizer.encode_special_tokens = True
    known = [piece for piece in ([end] if end else _END_PIECES) if self.tokenizer.token_to_id(piece) is not None]
    if not known:
      raise UserError(
        f'the tokenizer has no piece {end or " or ".join(_END_PIECES)} to end a document with; '
        'name one that it has: --config.pool.end_piece=…'
      )
    self.size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self.eos: int = int(self.tokenizer.token_to_id(known[0]) or 0)
    pad = self.tokenizer.token_to_id('<pad>')
    self.pad: int = self.eos if pad is None else pad
    self.data = data

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    special = {self.eos, self.pad}
    return self.tokenizer.decode([i for i in np.asarray(ids).tolist() if i not in special], skip_special_tokens=False)

  def decode_batch(self, ids_BL: np.ndarray) -> list[str]:
    return [self.decode(ids_L) for ids_L in ids_BL]


def save(choice: str, folder: Path, end: str = '') -> None:
  """Puts the vocabulary `choice` into `folder`: 'bytes', or the path of a SentencePiece model or a tokenizer.json.

  Raises:
    UserError: there is no such file, or it is of no known kind.
  """
  if choice == 'bytes':
    storage.write_json(folder / BYTES, {'vocabulary': 'bytes'})
    return
  try:
    data = epath.Path(choice).read_bytes()
  except OSError as error:
    raise UserError(f'pool.vocabulary = {choice!r} cannot be read: {error.strerror or error}') from error
  if choice.endswith('.json'):
    HuggingFaceEncoder(data, end)
    storage.write_bytes(folder / TOKENIZER, data)
    storage.write_json(folder / 'end_piece.json', {'end_piece': end})
    return
  try:
    encoder = vocabulary.Encoder(data)
  except (RuntimeError, UnicodeDecodeError) as error:  # the second: SentencePiece's complaint quotes bytes of the file
    raise UserError(f'pool.vocabulary = {choice!r} is no SentencePiece model ({error})') from error
  if encoder.eos < 0:
    raise UserError(f'pool.vocabulary = {choice!r} has no end piece; train it with an eos_id')
  storage.write_bytes(folder / MODEL, data)


def open_encoder(folder: str | os.PathLike) -> Encoder:
  """The encoder of the vocabulary that lies in `folder`."""
  folder = Path(folder)
  if (folder / MODEL).is_file():
    return vocabulary.Encoder(folder / MODEL)
  if (folder / TOKENIZER).is_file():
    return HuggingFaceEncoder((folder / TOKENIZER).read_bytes(), _end_piece(folder))
  if (folder / BYTES).is_file():
    return ByteEncoder()
  raise UserError(f'{folder} holds no vocabulary; run --stage=pool')


def _end_piece(folder: Path) -> str:
  import json

  return json.loads((folder / 'end_piece.json').read_text())['end_piece']


def seqio_vocabulary(folder: str) -> 'seqio.Vocabulary':
  """The vocabulary in `folder` as seqio knows it. Imports seqio and TensorFlow."""
  tensorflow_start.start()
  import seqio

  path = Path(folder)
  if (path / MODEL).is_file():
    return vocabulary.load(str(path / MODEL))
  if (path / BYTES).is_file():
    return seqio.ByteVocabulary(extra_ids=0)
  return _hugging_face_vocabulary((path / TOKENIZER).read_bytes(), _end_piece(path))


@functools.lru_cache(maxsize=2)
def _hugging_face_vocabulary(data: bytes, end: str) -> 'seqio.Vocabulary':
  import seqio
  import tensorflow as tf

  encoder = HuggingFaceEncoder(data, end)

  class HuggingFaceVocabulary(seqio.Vocabulary):
    """A tokenizer.json for seqio; `encode_tf` calls back into Python."""

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
      # Outside of a graph the function is given an array of one object, inside bytes.
      ids = tf.numpy_function(
        lambda t: np.asarray(encoder.encode(np.asarray(t).item().decode()), np.int32), [text], tf.int32
      )
      return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
      return tf.numpy_function(lambda found: encoder.decode(found).encode(), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
      return isinstance(other, HuggingFaceVocabulary) and other.data == self.data

  return HuggingFaceVocabulary()


def dtype_of(size: int) -> np.dtype:
  """The narrowest integer that holds every id below `size`."""
  for dtype in (np.uint8, np.uint16):
    if size <= np.iinfo(dtype).max + 1:
      return np.dtype(dtype)
  return np.dtype(np.int32)

"""Vocabularies: a SentencePiece model that is trained on the pool, or a given model, a tokenizer.json, bytes.

A trained vocabulary keeps every character, including newlines and runs of spaces: decoding returns the text, except
that U+2581 ('▁'), SentencePiece's sign for a space, comes back as a space. Ids are 0 padding, 1 end of document, 2
unknown (never produced: characters without a piece become bytes), which is seqio's convention.

An `Encoder` needs neither seqio nor TensorFlow; `seqio_vocabulary` gives the same ids as a seqio Vocabulary. The file
in a pool's folder determines its kind. Encode with Python's `encode` only: the TensorFlow op of seqio's
SentencePiece vocabularies gives other ids on most texts.
"""

import collections
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from dsdm_jax.config.values import brief
from dsdm_jax.core import prng, storage, tensorflow_start
from dsdm_jax.core.storage import Location
from dsdm_jax.data import files
from dsdm_jax.data.pool import chat as chats
from dsdm_jax.errors import UserError

if TYPE_CHECKING:
  import seqio

_T = TypeVar('_T')
MODEL, TOKENIZER, BYTES = 'vocabulary.model', 'tokenizer.json', 'bytes.json'
OPTIONS = 'tokenizer_options.json'  # arguments of `HuggingFaceEncoder`
FILES = (MODEL, TOKENIZER, OPTIONS, BYTES, chats.FILE)  # of all kinds of vocabularies
PAD = 0
EOS = 1
UNK = 2
SMALLEST = 300  # 3 special ids, 256 bytes, and room for some pieces

# Training uses at most this much text: more is slower but not better for vocabularies of a few thousand pieces.
SAMPLE_BYTES = 400_000
_SENTENCE_BYTES = 1_000
LARGEST = 2**26  # bytes of a file; the largest of public models have 35 MB and 2.5 million JSON values
_VALUES = 5 * 10**6
_LARGEST_CONFIG = 2**24
_LARGEST_SIZE = 10**7  # ids; every one is a row of the model's embeddings
_END_KEY = '--config.pool.end_piece to the piece that ends a document'
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
    begin: id that begins a text: of the begin mark if the tokenizer puts one before each text, otherwise `eos`.
    pad: id that pads sequences.
    unk: id of text that has no piece; −1 if there is none.
  """

  @property
  def size(self) -> int: ...
  @property
  def eos(self) -> int: ...
  @property
  def begin(self) -> int: ...
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

  size, eos, begin, pad, unk = 259, 1, 1, 0, -1

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
  def begin(self) -> int:
    return self.eos

  @property
  def pad(self) -> int:
    """Id of padding; 0 if the model has none."""
    return max(self._processor.pad_id(), 0)

  @property
  def unk(self) -> int:
    return self._processor.unk_id()

  def piece(self, id: int) -> str:
    return self._processor.id_to_piece(id)

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


def _attempt(what: str, function: Callable[..., _T], *arguments: Any) -> _T:
  """Calls a function of a tokenizer package.

  Raises:
    UserError: it fails in any way. tokenizers raises bare Exceptions, and panics of Rust that are no Exceptions.
  """
  try:
    with _without_stderr():
      return function(*arguments)
  except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
    raise
  except BaseException as error:
    raise UserError(f'{what} ({" ".join(str(error).split())[:200]})') from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
  """Discards what native code writes to standard error: a panic prints its place before it is raised."""
  try:
    stderr = os.dup(2)
  except OSError:  # it is closed
    yield
    return
  null = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(null, 2)
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(null)
    os.close(stderr)


def _tokenizer(data: bytes) -> Any:
  """The tokenizers.Tokenizer of a tokenizer.json.

  Raises:
    UserError: it is none, or is too large.
  """
  import tokenizers

  # While the package reads the file, a JSON value takes up to 100 bytes.
  values = sum(data.count(sign) for sign in (b',', b'[', b'{'))
  if len(data) > LARGEST or values > _VALUES:
    raise UserError(f'it is too large for a tokenizer.json: at most {LARGEST:,} bytes and {_VALUES:,} values')
  return _attempt('it is not a tokenizer.json', tokenizers.Tokenizer.from_buffer, data)


def _only(candidates: Sequence[str], of: str = 'the tokenizer') -> str:
  """The only candidate for the end piece.

  Raises:
    UserError: there is none, or several.
  """
  pieces = list(dict.fromkeys(candidates))
  if len(pieces) == 1:
    return pieces[0]
  if not pieces:
    usual = ', '.join(_END_PIECES)
    raise UserError(
      f'{of} names no piece that ends a document, and none of its special pieces is {usual}; set {_END_KEY}'
    )
  raise UserError(f'{of} has several pieces that may end a document: {" and ".join(map(repr, pieces))}; set {_END_KEY}')


def _piece(tokenizer: Any, id: int) -> Any:
  """The piece of an id, if it has one; `id_to_token` gives an added one as the normalizer writes it."""
  added = tokenizer.get_added_tokens_decoder().get(id)
  return added.content if added else tokenizer.id_to_token(id)


def _begin_mark(tokenizer: Any, eos: int) -> int:
  """Id of the piece that `tokenizer` puts before each text; `eos` if it puts none.

  Raises:
    UserError: it puts several, or an id without a piece.
  """
  encoding = _attempt('it fails on the text a', tokenizer.encode, 'a')
  before = encoding.ids[: (*encoding.special_tokens_mask, 0).index(0)]
  pieces = [_piece(tokenizer, id) for id in before]
  if None in pieces:
    raise UserError(
      f'the "post_processor" of the tokenizer puts id {before[pieces.index(None)]} before each text, which has no '
      'piece; correct the file'
    )
  if len(before) > 1:
    raise UserError(
      f'the tokenizer puts {len(before)} pieces before each text ({brief(" ".join(pieces))}), and a pool has at most '
      'one; leave one of them in its "post_processor"'
    )
  return before[0] if before else eos


class HuggingFaceEncoder:
  """A tokenizer.json of Hugging Face's tokenizers. Special tokens that are written out in a text are text.

  If its `post_processor` puts a piece before each text, as Gemma's and Llama's do, that is the begin mark. What it puts
  after a text has no effect.

  Args:
    data: bytes of the file.
    end: the piece that ends a document; '' takes the only special token with a usual name, or, if no token is special,
      the only piece with one.
    rows: of the model's embedding; None if they are not known.
    begins: False where the rows have no begin marks, whatever the tokenizer does.

  Attributes:
    size: V; the number of ids, or `rows` if all further ids are special pieces that no text gives.
    end: that piece. Written out in a text it is text.
    begin_piece: the piece of `begin`, likewise.
    chat: the chat template, which `open_encoder` sets; None for none.
    rows: `size` where it is smaller than the number of ids; otherwise None.
    exact: white space before an answer is the prompt's, as a chat template writes it (`encode_pair`).

  Raises:
    UserError: the file is not a tokenizer, is too large or draws at random; or no such piece, or several.
  """

  def __init__(self, data: bytes, end: str = '', rows: int | None = None, begins: bool = True):
    import tokenizers

    self.tokenizer = _tokenizer(data)
    self.tokenizer.no_truncation()
    self.tokenizer.no_padding()
    self.tokenizer.encode_special_tokens = True
    model = self.tokenizer.model
    # The last two are not read from files by today's version.
    for option in ('dropout', 'alpha', 'nbest_size'):
      if value := getattr(model, option, None):
        raise UserError(
          f'the tokenizer draws its ids at random ({option} = {value:.3g}): a text would have other ids each time; set '
          f'"{option}" in its "model" to null'
        )
    ids = self.tokenizer.get_vocab(with_added_tokens=True)
    self.size = max(ids.values(), default=-1) + 1
    if not 0 < self.size <= _LARGEST_SIZE:
      raise UserError(
        f'the tokenizer has {len(ids):,} pieces with ids below {self.size:,}; needs 1 to {_LARGEST_SIZE:,}'
      )
    added = {token.content: token for token in self.tokenizer.get_added_tokens_decoder().values()}
    special = {piece for piece, token in added.items() if token.special}
    self.end = end or _only(
      [piece for piece in _END_PIECES if piece in special]
      or [piece for piece in _END_PIECES if piece in ids and not special]
    )
    if self.end not in ids:
      raise UserError(f'the tokenizer has no piece {self.end!r} to end a document with; set {_END_KEY}')
    self.eos: int = ids[self.end]
    self.begin: int = _begin_mark(self.tokenizer, self.eos) if begins else self.eos
    begin = self.begin_piece = _piece(self.tokenizer, self.begin)
    # Such as Gemma 3's image token, and a padding token that was added without a row.
    own = self.tokenizer.get_vocab(with_added_tokens=False)
    beyond = {piece for piece, i in ids.items() if rows and i >= rows}
    self.rows = rows if beyond and beyond <= special - own.keys() - {self.end, begin} else None
    self.size = self.rows or self.size
    self.pad: int = ids['<pad>'] if '<pad>' in special and ids['<pad>'] < self.size else self.eos
    unknown = getattr(model, 'unk_token', None)
    if isinstance(model, tokenizers.models.Unigram):
      self.unk: int = -1 if (number := json.loads(data)['model'].get('unk_id')) is None else number
    else:
      self.unk = ids.get(unknown, -1)
    # Special pieces that the model, too, has: T5's and other Unigram models would match them in a text.
    never = {ids[piece] for piece in (*special, self.end, begin) if piece in ids} - {self.unk}
    self._never = never if self.unk not in (-1, self.eos) else set()
    # Also where the file does not call it special, so that it is text when it is written out.
    kept = {piece: added.get(piece, tokenizers.AddedToken(piece)) for piece in (self.end, begin)}
    self.tokenizer.add_special_tokens(
      [
        tokenizers.AddedToken(
          piece, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word
        )
        for piece, token in kept.items()
      ]
    )
    self.data = data
    self.chat: chats.Chat | None = None
    self.exact = False

  @functools.cached_property
  def templated(self) -> 'HuggingFaceEncoder':
    """The same for text of the chat template, in which special pieces are special."""
    import tokenizers

    other = copy.copy(self)
    other.tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
    other.tokenizer.encode_special_tokens = False
    other._never, other.exact = set(), True
    return other

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without an end mark; a special piece that the model matches is unknown text.

    Raises:
      UserError: the tokenizer fails; or a text of the chat template has a piece for which the model has no row.
    """
    ids = self._encoding(text).ids
    if self.exact and self.rows and max(ids, default=0) >= self.rows:
      piece = self.tokenizer.id_to_token(max(ids))
      raise UserError(
        f'a conversation has the special piece {brief(piece)}, whose id is {max(ids)}, and the model has {self.rows} '
        'rows (config.json beside pool.vocabulary); take it out of the conversation or of the chat template'
      )
    return ids if self._never.isdisjoint(ids) else [self.unk if i in self._never else i for i in ids]

  def offsets(self, text: str) -> list[tuple[int, int]]:
    return self._encoding(text).offsets

  def _encoding(self, text: str) -> Any:
    try:
      return self.tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:
      raise self._failed(text, error) from error
    except BaseException as error:  # a panic of Rust, such as a regular expression that takes too long
      if type(error).__name__ != 'PanicException':
        raise
      raise self._failed(text, error) from error

  @staticmethod
  def _failed(text: str, error: BaseException) -> UserError:
    reason = ' '.join(str(error).split())[:200]
    return UserError(
      f'the tokenizer fails on {brief(text[:60])} ({reason}); correct it or take another pool.vocabulary'
    )

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    special = {self.eos, self.begin, self.pad}
    return self.tokenizer.decode([i for i in np.asarray(ids).tolist() if i not in special], skip_special_tokens=False)

  def decode_batch(self, ids_BL: np.ndarray) -> list[str]:
    return [self.decode(ids_L) for ids_L in ids_BL]


def unmarked(encoder: Encoder, ids: list[int]) -> list[int]:
  """`ids` of a text without the begin mark that a chat template may write first.

  An end mark there remains: a document of the pool, too, has both its own and that of the document before it.
  """
  return ids[1:] if encoder.begin != encoder.eos and ids[:1] == [encoder.begin] else ids


def encode_pair(encoder: Encoder, context: str, answer: str) -> tuple[list[int], list[int]]:
  """Ids of a context and of the answer that follows it; joined they are the `unmarked` ids of `context + answer`.

  The text is encoded once, as a document of the pool is: `encode(a + b)` is not `encode(a) + encode(b)`, because pieces
  may cross the boundary and some vocabularies put a space before every text. White space at the end of the context and
  a piece with characters of both belong to the answer, as in lm-evaluation-harness.
  """
  exact = isinstance(encoder, HuggingFaceEncoder) and encoder.exact
  whole = encoder.encode(context + answer)
  ids, place = unmarked(encoder, whole), len(context if exact else context.rstrip())
  before = unmarked(encoder, encoder.encode(context[:place]))
  first = len(before)
  # The answer begins after the context's own ids, if the whole text begins with them and the last is no unknown piece.
  if ids[:first] == before and first < len(ids) and encoder.unk not in before[-1:]:
    return before, ids[first:]
  spans = encoder.offsets(context + answer)[len(whole) - len(ids) :]
  first = next((i for i, (_, stop) in enumerate(spans) if stop > place), len(spans))
  while first and spans[first - 1][0] >= place:  # of one character's bytes only the last may cover it
    first -= 1
  return ids[:first], ids[first:]


def counted(encoder: Encoder, text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
  """Which ids of `text` cover a character of one of the ascending `spans`: bool.

  A piece with characters of both counts, as the white space before an answer does where a piece joins them.
  """
  first_I, stop_I = np.array(encoder.offsets(text), np.int64).reshape(-1, 2).T
  begin_S, end_S = np.array(spans, np.int64).reshape(-1, 2).T
  # The first span that ends after the piece begins; of one character's bytes some cover nothing.
  place_I = np.searchsorted(end_S, first_I, side='right')
  begin_I = np.append(begin_S, np.iinfo(np.int64).max)[place_I]
  return begin_I < np.maximum(stop_I, first_I + 1)


def round_trip(encoder: Encoder, text: str) -> dict[str, int]:
  """Counts of what `encoder` does to a document: whether it comes back unchanged, and pieces of unknown text.

  Characters that are in no piece count as a piece of unknown text each, unless they are white space.
  """
  ids = encoder.encode(text)
  unchanged, lost = encoder.decode(ids) == text, 0
  if not unchanged:
    inside = np.zeros(len(text), bool)
    for first, stop in encoder.offsets(text):
      inside[first:stop] = True
    lost = sum(not text[i].isspace() for i in np.flatnonzero(~inside).tolist())
  counts = {'documents': 1, 'unchanged': int(unchanged)}
  return counts | {'pieces': len(ids) + lost, 'unknown': ids.count(encoder.unk) + lost}


def summary(encoder: Encoder, trips: Iterable[Mapping[str, float]]) -> dict[str, Any]:
  """The pool's card about its vocabulary, from `round_trip` of a sample.

  Returns:
    "documents" of the sample, the shares "unchanged" of them and "unknown" of their pieces, and "loses": which of
    newlines, indentation, tabs and NUL do not come back.
  """
  total = collections.Counter[str]()
  for trip in trips:
    total.update(trip)
  back = encoder.decode(encoder.encode('x\ny\n    x\ty\0x'))
  signs = {'newlines': '\n', 'indentation': '\n    ', 'tabs': '\t', 'NUL': '\0'}
  return {
    'documents': total['documents'],
    'unchanged': round(total['unchanged'] / max(total['documents'], 1), 6),
    'unknown': round(total['unknown'] / max(total['pieces'], 1), 6),
    'loses': [name for name, sign in signs.items() if sign not in back],
  }


def save(choice: str, folder: Path, end: str = '') -> None:
  """Writes the vocabulary `choice` to `folder`: 'bytes', or the path of a SentencePiece model or a tokenizer.json.

  Args:
    choice: `pool.vocabulary`.
    folder: of the pool.
    end: piece of a tokenizer.json that ends a document; '' takes that of the configuration beside the file
      (tokenizer_config.json, generation_config.json), otherwise that of `HuggingFaceEncoder`. The number of rows comes
      from config.json, if it is beside the file.

  Raises:
    UserError: the file does not exist, is of an unknown kind, or fails on common texts; or its end piece is not unique
      or comes from text.
  """
  if choice == 'bytes':
    storage.write_json(folder / BYTES, {'vocabulary': 'bytes'})
    return
  try:
    _save_file(choice, folder, end)
  except files.READ_ERRORS as error:
    raise UserError(f'pool.vocabulary = {choice!r}: {files.describe(error)}') from error
  except UserError as error:
    raise UserError(f'pool.vocabulary = {choice!r}: {error}') from error


def _save_file(choice: str, folder: Path, end: str) -> None:
  with files.open_bytes(choice) as file:
    data = file.read(LARGEST + 1)
  if choice.endswith('.json'):
    tokenizer = HuggingFaceEncoder(data, end or _configured_end(choice, data), _model_rows(choice))
    _try(tokenizer, tokenizer.end, tokenizer.begin_piece)
    storage.write_bytes(folder / TOKENIZER, data)
    options = {'rows': tokenizer.rows} if tokenizer.rows else {}
    storage.write_json(folder / OPTIONS, {'end': tokenizer.end} | options)
    if chat := chats.read(choice):
      storage.write_json(folder / chats.FILE, chats.to_json(chat))
    return
  if end:
    raise UserError(
      f'it has an end piece of its own, and pool.end_piece = {end!r} is for a tokenizer.json; leave it out'
    )
  if len(data) > LARGEST:
    raise UserError(f'a SentencePiece model of more than {LARGEST:,} bytes is too large')
  encoder = _attempt('it is not a SentencePiece model', SentencePieceEncoder, data)
  if encoder.eos < 0:
    raise UserError('it has no end piece; train it with an eos_id')
  _try(encoder, encoder.piece(encoder.eos))
  storage.write_bytes(folder / MODEL, data)


def _configured_end(path: str, data: bytes) -> str:
  """The end piece that the files beside a tokenizer.json name; '' if they name none.

  Raises:
    UserError: they name several, or one is malformed.
  """
  folder, tokenizer, named = path[: path.rfind('/') + 1], None, {}
  for name, key in (('tokenizer_config.json', 'eos_token'), ('generation_config.json', 'eos_token_id')):
    value = _beside(folder + name, f', or set {_END_KEY}').get(key)
    for entry in value if isinstance(value, list) else [value]:
      piece = entry.get('content') if isinstance(entry, dict) else entry
      if type(piece) is int and 0 <= piece < _LARGEST_SIZE:
        tokenizer = tokenizer or _tokenizer(data)
        piece = _piece(tokenizer, piece)
      if isinstance(piece, str):
        named[piece] = name
      elif entry is not None:
        raise UserError(f'{folder}{name}: "{key}" is {brief(value)}, which is no piece; set {_END_KEY}')
  return _only(list(named), f'its configuration ({", ".join(dict.fromkeys(named.values()))})') if named else ''


def _model_rows(path: str) -> int | None:
  """Rows of the embedding of the model beside a tokenizer.json; None if there is none, or it does not say."""
  value = _beside(f'{path[: path.rfind("/") + 1]}config.json').get('vocab_size')
  return value if type(value) is int and value > 0 else None


def _beside(path: str, way_out: str = '') -> dict[str, Any]:
  """The object in a file beside a tokenizer.json; {} if there is no such file.

  Raises:
    UserError: it is malformed; the message ends with `way_out`.
  """
  if not files.is_file(path):
    return {}
  with files.open_bytes(path) as file:
    content = file.read(_LARGEST_CONFIG + 1)
  try:
    if len(content) > _LARGEST_CONFIG:
      raise files.BadLineError(f'more than {_LARGEST_CONFIG:,} bytes')
    return files.parse_line(content)
  except files.BadLineError as error:
    raise UserError(f'{path}: {error}; correct it{way_out}') from error


def _try(encoder: Encoder, end: str, begin: str = '') -> None:
  """Encodes and decodes texts that are common in pools, hard on regular expressions, unknown, or hold a mark's piece.

  Raises:
    UserError: one of them fails, vanishes or gives a mark.
  """
  lasts = ('', '!', 'Z')
  runs = [sign * 300 + last for sign in ('a', 'A', '1', ' ', '\n', '\t', '.', '_', 'ab ', '中', 'é') for last in lasts]
  texts = ['', 'def f(a):\r\n\treturn {a: "€"}\n\0', 'é ñ 中文 עברית 😀 e\u0301\x01', *runs]
  texts += [text for mark in (end, begin) for text in (mark, f' {mark} ', f'a{mark}b', f'\n{mark}\n')]
  for text in (*texts, *'€中😀Ж'):
    shown = brief(text[:60])
    ids = _attempt(f'it fails on {shown}', encoder.encode, text)
    _attempt(f'it fails on the ids of {shown}', encoder.decode, ids)
    if encoder.eos in ids:
      raise UserError(f'the text {shown} gives the end mark {end!r}, which would end a document inside; set {_END_KEY}')
    if encoder.begin in ids:
      raise UserError(
        f'the text {shown} gives the begin mark {begin!r}, which would begin a document inside; take it out of the '
        '"post_processor"'
      )
    if len(text) == 1 and not ids:
      raise UserError(
        f'it has no piece for {shown} and none for unknown text, which would vanish; give it an unk_token'
      )


def open_encoder(folder: Location | str | os.PathLike) -> Encoder:
  """The encoder of the vocabulary in `folder`."""
  folder = storage.locate(folder)
  if (model := storage.read_bytes(folder / MODEL)) is not None:
    return SentencePieceEncoder(model)
  if (tokenizer := storage.read_bytes(folder / TOKENIZER)) is not None:
    encoder = HuggingFaceEncoder(tokenizer, **_options(folder))
    if storage.is_file(folder / chats.FILE):
      encoder.chat = chats.of_json(storage.read_json(folder / chats.FILE, dict))
    return encoder
  if storage.is_file(folder / BYTES):
    return ByteEncoder()
  raise UserError(f'{folder} has no vocabulary; run --stage=pool')


def _options(folder: Location) -> dict[str, Any]:
  """The arguments of `HuggingFaceEncoder` for the tokenizer.json in `folder`.

  Raises:
    UserError: there are none.
  """
  if not storage.is_file(folder / OPTIONS):
    raise UserError(f'{folder} has a {TOKENIZER} without {OPTIONS}: another version wrote it; build the pool again')
  return storage.read_json(folder / OPTIONS, dict)


def leave_out_begin_marks(folder: Location) -> None:
  """Notes beside the tokenizer.json in `folder` that its rows have no begin marks."""
  storage.write_json(folder / OPTIONS, _options(folder) | {'begins': False})


def size_of(choice: str, end: str = '') -> int:
  """V of the vocabulary `choice`, with the arguments and errors of `save`."""
  with tempfile.TemporaryDirectory() as folder:
    save(choice, Path(folder), end)
    return open_encoder(folder).size


def seqio_vocabulary(folder: Location) -> 'seqio.Vocabulary':
  """The same vocabulary for seqio. Imports seqio and TensorFlow."""
  tensorflow_start.start()
  import seqio

  if storage.is_file(folder / MODEL):
    return load(str(storage.local(folder / MODEL)))
  if (tokenizer := storage.read_bytes(folder / TOKENIZER)) is not None:
    return _hugging_face_vocabulary(tokenizer, **_options(folder))
  return seqio.ByteVocabulary(extra_ids=0)


@functools.lru_cache(maxsize=2)
def _hugging_face_vocabulary(data: bytes, **options: Any) -> 'seqio.Vocabulary':
  import seqio
  import tensorflow as tf

  encoder = HuggingFaceEncoder(data, **options)

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
      return isinstance(other, HuggingFaceVocabulary) and (other.data, other.vocab_size) == (self.data, self.vocab_size)

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

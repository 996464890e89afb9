"""The pool's vocabulary as the files that `AutoTokenizer` of Hugging Face's transformers opens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsdm_jax.core import storage
from dsdm_jax.data.pool.vocabulary import MODEL, TOKENIZER, Encoder, HuggingFaceEncoder, open_encoder
from dsdm_jax.errors import UserError

_UNIGRAM, _BPE = 1, 2  # kinds of SentencePiece models
_USER_DEFINED = 4  # kind of a piece that is cut out of the text first


def write(pool: storage.Location, out: Path, length: int) -> dict[str, Any]:
  """Writes `tokenizer.json` and `tokenizer_config.json`, whose ids are those of the pool.

  Without a begin mark the end mark is also the piece that a text begins with, as in evaluations. A chat template is
  written too, and if it has a piece to begin with, that one. The tokenizer puts nothing but the begin mark around a
  text. Unlike the pool's encoder, transformers turns special pieces that are written out in a text into their ids.

  Args:
    pool: folder of the pool.
    out: folder to write into.
    length: tokens that the model was trained on at once.

  Returns:
    `eos_token_id`, `bos_token_id` and `pad_token_id`.

  Raises:
    UserError: a SentencePiece model of words or characters, which `tokenizers` cannot express.
  """
  encoder = open_encoder(pool)
  if isinstance(encoder, HuggingFaceEncoder):
    data, names = encoder.data, {encoder.pad: encoder.tokenizer.id_to_token(encoder.pad)}
    names |= {encoder.begin: encoder.begin_piece, encoder.eos: encoder.end}
    front = [encoder.begin] if encoder.begin != encoder.eos else []
    if encoder.tokenizer.encode('a').ids != front + encoder.encode('a'):
      processor = _begins(encoder.begin_piece, encoder.begin) if front else None
      data = json.dumps(json.loads(data) | {'post_processor': processor}, ensure_ascii=False).encode()
  else:
    model = storage.read_bytes(pool / MODEL)
    tokenizer = _bytes() if model is None else _sentencepiece(model)
    data = tokenizer.to_str(pretty=True).encode()
    names = {i: tokenizer.id_to_token(i) for i in (encoder.eos, encoder.pad)}
  storage.write_bytes(out / TOKENIZER, data)
  end = names[encoder.eos]
  begin = encoder.begin
  options = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': length}
  options |= {
    'eos_token': end,
    'bos_token': names[begin],
    'pad_token': names[encoder.pad],
    'clean_up_tokenization_spaces': False,
  }
  if isinstance(encoder, HuggingFaceEncoder) and encoder.chat:  # a template may write its own first piece
    first = dict(encoder.chat.variables).get('bos_token', names[begin])
    known = encoder.tokenizer.token_to_id(first)
    known = None if known is None or known >= encoder.size else known
    if known is not None:
      begin, options['bos_token'] = known, first
    options['chat_template'] = encoder.chat.template
  if begin == encoder.begin or encoder.begin == encoder.eos:
    options['add_bos_token'] = encoder.begin != encoder.eos  # without it `tokenizer.json` decides alone
  storage.write_json(out / 'tokenizer_config.json', options)
  return {'eos_token_id': encoder.eos, 'bos_token_id': begin, 'pad_token_id': encoder.pad}


def _begins(piece: str, id: int) -> dict[str, Any]:
  """The `post_processor` that puts a piece before each text."""
  mark, text, more = (
    {kind: {'id': name, 'type_id': 0}} for kind, name in (('SpecialToken', piece), ('Sequence', 'A'), ('Sequence', 'B'))
  )
  return {
    'type': 'TemplateProcessing',
    'single': [mark, text],
    'pair': [mark, text, mark, more],
    'special_tokens': {piece: {'id': piece, 'ids': [id], 'tokens': [piece]}},
  }


def agreement(encoder: Encoder, folder: Path, texts: Sequence[str]) -> int:
  """The number of texts to which the tokenizer in `folder` gives the ids of `encoder`."""
  import tokenizers

  written = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
  written.encode_special_tokens = True
  return sum(written.encode(text, add_special_tokens=False).ids == encoder.encode(text) for text in texts)


def _sentencepiece(data: bytes) -> Any:
  """A `tokenizers.Tokenizer` with the ids of a SentencePiece model."""
  from sentencepiece import sentencepiece_model_pb2
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(data)
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  model: Any
  if trainer.model_type == _UNIGRAM:
    model = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
  elif trainer.model_type == _BPE:
    number = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges = [
      (-score, number[piece[:cut]], number[piece[cut:]], (piece[:cut], piece[cut:]))
      for piece, score in pieces
      for cut in range(1, len(piece))
      if piece[:cut] in number and piece[cut:] in number
    ]
    unknown, fallback = pieces[trainer.unk_id][0], trainer.byte_fallback
    ordered = [merge for *_, merge in sorted(merges)]
    model = models.BPE(number, ordered, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
  else:
    raise UserError('the vocabulary is a SentencePiece model of words or characters, which no tokenizer.json expresses')
  tokenizer = Tokenizer(model)
  steps: list[Any] = (
    [normalizers.Precompiled(normalizer.precompiled_charsmap)] if normalizer.precompiled_charsmap else []
  )
  if normalizer.remove_extra_whitespaces:
    steps += [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
  defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
  first = 'never'
  if normalizer.add_dummy_prefix and defined:  # a normalizer works on each part between them; this on the first alone
    first = 'first'
  elif normalizer.add_dummy_prefix:
    steps.append(normalizers.Prepend('▁'))
  if steps:
    tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement='▁', prepend_scheme=first, split=False)
  parts = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(' ', 1, 0)] * normalizer.add_dummy_prefix)
  tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in defined])
  ends = {trainer.eos_id, max(trainer.pad_id, 0), trainer.unk_id} & set(range(len(pieces)))
  tokenizer.add_special_tokens([AddedToken(pieces[i][0], normalized=False) for i in sorted(ends)])
  return tokenizer


def _bytes() -> Any:
  """A `tokenizers.Tokenizer` with the ids of `ByteEncoder`."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

  # Each byte's sign in byte-level tokenizers: printable ones of Latin-1 stand for themselves.
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(256, 512))
  signs = [chr(byte if byte in printable else next(others)) for byte in range(256)]
  special = ('<pad>', '</s>', '<unk>')
  vocabulary = {piece: index for index, piece in enumerate((*special, *signs))}
  tokenizer = Tokenizer(models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
  return tokenizer

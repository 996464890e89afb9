"""Vocabularies of the kinds that other people's models have, trained on a little text."""

import functools
import io
import json

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dsdm_jax.data.pool import vocabulary
from dsdm_jax.data.pool.vocabulary import Encoder
from tests.helpers.data import invented, small_config

END = '<|endoftext|>'
KINDS = ('bytes', 'ours', 'byte_level', 'llama', 't5', 'llama_json', 'metaspace', 'wordpiece')


@functools.cache
def texts() -> tuple[str, ...]:
  return tuple(document.text for document in invented(small_config(max_bytes=20_000).pool, 0))


def sentencepiece_model(**options) -> bytes:
  """A SentencePiece model; ids of padding, end mark and unknown text are 0, 1 and 2."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts()),
    model_writer=model,
    num_threads=1,
    minloglevel=2,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    **options,
  )
  return model.getvalue()


def tokenizer_json(model: models.Model, trainer: trainers.Trainer | None = None, **parts) -> bytes:
  """A tokenizer.json of `model` with the parts normalizer, pre_tokenizer and decoder; `END` is a special token."""
  tokenizer = tokenizers.Tokenizer(model)
  for name, part in parts.items():
    setattr(tokenizer, name, part)
  if trainer is not None:
    tokenizer.train_from_iterator(texts(), trainer)
  tokenizer.add_special_tokens([END])
  return tokenizer.to_str().encode()


def byte_level(**options) -> bytes:
  """As GPT-2's."""
  trainer = trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  return tokenizer_json(
    models.BPE(),
    trainer,
    pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, **options),
    decoder=decoders.ByteLevel(),
  )


@functools.cache
def encoder(kind: str) -> Encoder:
  """A vocabulary of `KINDS`."""
  unknown = {'unk_token': '<unk>'}
  if kind == 'bytes':
    return vocabulary.ByteEncoder()
  if kind == 'ours':
    return vocabulary.SentencePieceEncoder(vocabulary.train(texts(), 330))
  if kind == 'llama':
    return vocabulary.SentencePieceEncoder(
      sentencepiece_model(
        model_type='bpe',
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
      )
    )
  if kind == 't5':
    return vocabulary.SentencePieceEncoder(sentencepiece_model(model_type='unigram', vocab_size=80))
  if kind == 'byte_level':
    return vocabulary.HuggingFaceEncoder(byte_level(), END)
  if kind == 'llama_json':  # as Llama 2's tokenizer.json
    spaces = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    trainer = trainers.BpeTrainer(
      vocab_size=400, special_tokens=['<unk>', *(f'<0x{b:02X}>' for b in range(256))], show_progress=False
    )
    decoder = decoders.Sequence(
      [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
    data = json.loads(tokenizer_json(models.BPE(byte_fallback=True, **unknown), trainer, normalizer=spaces))
    data['decoder'] = json.loads(decoder.__getstate__())
    # The 256 bytes are pieces of the model only: written out in a text they are text.
    data['added_tokens'] = [t for t in data['added_tokens'] if not t['content'].startswith('<0x')]
    return vocabulary.HuggingFaceEncoder(json.dumps(data).encode(), END)
  if kind == 'metaspace':  # as T5's tokenizer.json
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=['<unk>'], show_progress=False, **unknown)
    parts = {'normalizer': normalizers.NFKC(), 'pre_tokenizer': pre_tokenizers.Metaspace()}
    return vocabulary.HuggingFaceEncoder(
      tokenizer_json(models.Unigram(), trainer, **parts, decoder=decoders.Metaspace()), END
    )
  trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=['[UNK]'], show_progress=False)  # as BERT's
  parts = {'normalizer': normalizers.BertNormalizer(), 'pre_tokenizer': pre_tokenizers.BertPreTokenizer()}
  return vocabulary.HuggingFaceEncoder(
    tokenizer_json(models.WordPiece(unk_token='[UNK]'), trainer, **parts, decoder=decoders.WordPiece()), END
  )

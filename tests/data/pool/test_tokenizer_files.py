"""The files of a vocabulary for transformers give the ids of the pool's encoder."""

import json

import pytest

from dsdm_jax.core import storage
from dsdm_jax.data.pool import tokenizer_files
from dsdm_jax.data.pool.vocabulary import BYTES, MODEL, TOKENIZER
from dsdm_jax.errors import UserError
from tests.helpers import vocabularies


@pytest.mark.parametrize('kind', vocabularies.KINDS)
def test_ids_are_those_of_the_pool(kind, tmp_path):
  encoder = vocabularies.encoder(kind)
  if kind == 'bytes':
    storage.write_json(tmp_path / BYTES, {'vocabulary': 'bytes'})
  elif hasattr(encoder, 'data'):
    (tmp_path / TOKENIZER).write_bytes(encoder.data)
    storage.write_json(tmp_path / 'tokenizer_options.json', {'end': encoder.end})
  else:
    (tmp_path / MODEL).write_bytes(encoder._processor.serialized_model_proto())
  out = tmp_path / 'out'
  out.mkdir()
  ids = tokenizer_files.write(tmp_path, out, 128)
  assert ids == {'eos_token_id': encoder.eos, 'bos_token_id': encoder.eos, 'pad_token_id': encoder.pad}
  texts = [*vocabularies.texts()[:20], ' two  spaces\n\n\tx ', 'é中😀\0', 'def f(x):\n    return x\n', '']
  assert tokenizer_files.agreement(encoder, out, texts) == len(texts)
  config = json.loads((out / 'tokenizer_config.json').read_text())
  assert config['eos_token'] == config['bos_token'] and config['model_max_length'] == 128


def test_a_vocabulary_of_words_is_refused(tmp_path):
  model = vocabularies.sentencepiece_model(model_type='word', vocab_size=60)
  (tmp_path / MODEL).write_bytes(model)
  with pytest.raises(UserError, match='SentencePiece model of words or characters, which no tokenizer.json expresses'):
    tokenizer_files.write(tmp_path, tmp_path, 128)

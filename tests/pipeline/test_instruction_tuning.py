"""Conversations are scored for conversations with a model of Hugging Face, without training a proxy (as LESS does)."""

import json

import numpy as np
import pytest

import dsdm_jax
from dsdm_jax.config import schema
from dsdm_jax.lm import decoder, hugging_face, partition
from tests.data.pool.test_completions import write_jsonl, write_tokenizer
from tests.pipeline import runs

CONFIG = """
from configs import base

def get_config():
  c = base.get_config()
  c.pool.sources = ('jsonl:{0}/talks.jsonl | messages=messages',)
  c.pool.vocabulary, c.pool.packed, c.pool.max_bytes, c.pool.length = '{0}/model/tokenizer.json', False, 0, 64
  c.model.weights = c.proxies.model.weights = '{0}/model'
  c.proxies.count, c.proxies.epochs = 1, 0.0
  c.targets.tasks, c.targets.max_examples = ('{0}/goals.jsonl',), 8
  c.features.dimension, c.features.shard_rows, c.features.store_dtype = 64, 256, 'float32'
  c.selection.examples, c.pretraining.seeds, c.pretraining.train.batch_size = 16, 1, 16
  return c
"""


def _talk(number: int) -> dict:
  messages = [
    {'role': 'user', 'content': f'{number}?'},
    {'role': 'assistant', 'content': f'It is {number % 7} of 7.'},
  ]
  return {'id': f'talk-{number}', 'messages': messages}


@pytest.mark.full
def test_conversations_are_chosen_for_conversations(tmp_path):
  import jax
  from flax import nnx

  write_tokenizer(tmp_path / 'model')
  config = schema.config_dict(schema.Model)
  config.update({'layers': 1, 'width': 16, 'heads': 2, 'kv_heads': 1, 'mlp_width': 32, 'positions': 'rope'})
  config.update({'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False})
  params = nnx.state(decoder.build(config, 258, 64, nnx.Rngs(0)), nnx.Param)
  named = {partition.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
  hugging_face.write(tmp_path / 'model', config, hugging_face.their_config(config, 258, 64), named)
  write_jsonl(tmp_path / 'talks.jsonl', *map(_talk, range(90)))
  write_jsonl(tmp_path / 'goals.jsonl', *map(_talk, range(100, 120)))
  (tmp_path / 'config.py').write_text(CONFIG.format(tmp_path))

  runs.succeed(f'--config={tmp_path / "config.py"}', f'--workdir={tmp_path / "run"}')
  run = dsdm_jax.load(tmp_path / 'run')
  rows = np.arange(6)
  token_BL, weights_BL = run.scores.tokens('goals', rows), run.pool.weights(rows)
  assert not token_BL[weights_BL == 0].any() and (token_BL[weights_BL > 0] != 0).mean() > 0.9
  np.testing.assert_allclose(token_BL.sum(axis=1), run.scores['goals'][rows], rtol=1e-3, atol=1e-6)
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert {row['task'] for row in results['summary']} == {'goals'}

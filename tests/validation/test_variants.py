"""What the variants' model says of texts."""

import types

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import base
from dsdm_jax.core import prng
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.training.step import trainer
from dsdm_jax.validation.variants import Proxy, Scorer

VOCAB, LENGTH = 32, 10


@pytest.mark.parametrize('pad', [0, 5])
def test_embeddings_leave_padding_out(pad):
  config = base.get_config()
  config.proxies.model.update({'width': 16, 'mlp_width': 32, 'layers': 1, 'heads': 2, 'kv_heads': 2})
  config.features.batch_size = 4
  mesh = make_mesh(ConfigDict({'data': 1, 'model': 1}), jax.local_devices()[:1])
  compiled = trainer(config.proxies.model, config.proxies.train, VOCAB, LENGTH, mesh)
  state = compiled.init(prng.stream(0, 'init'))
  model = nnx.merge(compiled.graphdef, state.params, state.rest)
  tokens_NL = np.random.default_rng(0).integers(0, VOCAB, (6, LENGTH)).astype(np.int32)
  sequences = [[5, 7, 8], [5, 0, 9, 3, 0], list(range(1, 11))]  # the end mark first; token 0 is a text's too
  tokens_TL, weights_TL = np.full((3, LENGTH), pad, np.int32), np.zeros((3, LENGTH), np.float32)
  for i, sequence in enumerate(sequences):
    tokens_TL[i, : len(sequence)] = sequence
    weights_TL[i, len(sequence) - 1] = 1
  scorer = Scorer(config, lambda width: [], VOCAB, tokens_NL, tokens_TL, weights_TL)
  proxy = Proxy(types.SimpleNamespace(trainer=compiled), (state, state, state))
  for found, texts in zip(scorer.embeddings(proxy), (tokens_NL, sequences), strict=True):
    for x_D, tokens in zip(found, texts, strict=True):
      hidden_LD = np.asarray(model.hidden(np.int32(tokens)[None])[0], np.float32)
      np.testing.assert_allclose(x_D, hidden_LD.mean(axis=0), rtol=1e-4, atol=1e-4)
  nats_N = scorer.loss(proxy)
  assert nats_N.shape == (6,) and (nats_N > 0).all()

"""Models of the variants, and their embeddings and losses."""

import types

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.core import prng
from dsdm_jax.core.mesh import one_device
from dsdm_jax.training.step import trainer
from dsdm_jax.validation.variants import REFERENCE, Kind, Proxy, ProxyPool, Scorer, Variant

VOCAB, LENGTH = 32, 10


def test_embeddings_losses_and_probabilities_ignore_padding():
  config = base.get_config()
  config.proxies.model.update({'width': 16, 'mlp_width': 32, 'layers': 1, 'heads': 2, 'kv_heads': 2})
  config.features.batch_size = 4
  mesh = one_device()
  compiled = trainer(config.proxies.model, config.proxies.train, VOCAB, LENGTH, mesh)
  state = compiled.init(prng.stream(0, 'init'))
  model = nnx.merge(compiled.graphdef, state.params, state.rest)
  hidden = jax.jit(model.hidden)
  tokens_NL = np.random.default_rng(0).integers(0, VOCAB, (6, LENGTH)).astype(np.int32)
  sequences = [[5, 7, 8], [5, 0, 9, 3, 0], list(range(1, 11))]  # the end mark first; token 0 is a text's too
  tokens_TL, weights_TL = np.full((3, LENGTH), 5, np.int32), np.zeros((3, LENGTH), np.float32)
  for i, sequence in enumerate(sequences):
    tokens_TL[i, : len(sequence)] = sequence
    weights_TL[i, len(sequence) - 1] = 1
  # The loss counts completions; the last row ends with a prompt, after which it is padded.
  size_N, counted_NL = np.array([10, 10, 10, 4, 10, 7]), np.ones((6, LENGTH), np.float32)
  filled_NL = np.arange(LENGTH) < size_N[:, None]
  counted_NL *= filled_NL
  counted_NL[:, :2], counted_NL[5, 5:] = 0, 0
  proxies = ProxyPool(config, VOCAB, tokens_NL)
  scorer = Scorer(config, proxies, VOCAB, tokens_NL, tokens_TL, weights_TL, counted_NL, filled_NL)
  proxy = Proxy(types.SimpleNamespace(trainer=compiled), (state, state, state))
  rows = [tokens_L[:size] for tokens_L, size in zip(tokens_NL, size_N, strict=True)]
  for found, texts in zip(scorer.embeddings(proxy), (rows, sequences), strict=True):
    for x_D, tokens in zip(found, texts, strict=True):
      hidden_LD = np.asarray(hidden(np.int32(tokens)[None])[0], np.float32)
      np.testing.assert_allclose(x_D, hidden_LD.mean(axis=0), rtol=1e-4, atol=1e-4)
  nats_N = scorer.loss(proxy)
  log_p_NL = np.asarray(jax.nn.log_softmax(jax.jit(model)(tokens_NL)[:, :-1]), np.float64)
  log_p_NL = np.take_along_axis(log_p_NL, tokens_NL[:, 1:, None], axis=2)[..., 0]
  for found_N, value_NL in ((nats_N, -log_p_NL), (scorer._probability(proxy), np.exp(log_p_NL))):
    wanted_N = [value_L[counted_L[1:] > 0].mean() for value_L, counted_L in zip(value_NL, counted_NL, strict=True)]
    np.testing.assert_allclose(found_N, wanted_N, rtol=1e-4)


@pytest.fixture(scope='module')
def made():
  """(proxies, function that returns a scorer): 24 rows, two epochs of batches of four."""
  config = base.get_config()
  config.proxies.model.update({'width': 16, 'mlp_width': 32, 'layers': 1, 'heads': 2, 'kv_heads': 2})
  config.proxies.train.update({'batch_size': 4, 'warmup_steps': 1})
  config.features.update({'batch_size': 4, 'dimension': 32})
  config.validation.epochs = 2.0
  rng = np.random.default_rng(1)
  tokens_NL, tokens_TL = (rng.integers(1, VOCAB, (rows, LENGTH)).astype(np.int32) for rows in (24, 3))
  weights_TL = np.ones((3, LENGTH), np.float32)
  weights_TL[:, 0] = 0
  proxies = ProxyPool(config, VOCAB, tokens_NL)
  return proxies, lambda proxies: Scorer(config, proxies, VOCAB, tokens_NL, tokens_TL, weights_TL)


@pytest.mark.parametrize(('length', 'steps'), [(0.5, 6), (2.0, 24)])
def test_proxies_of_other_lengths_see_the_same_rows_for_other_numbers_of_steps(made, length, steps):
  proxies = made[0]
  proxy = proxies(Kind(length=length), 1)
  assert [int(state.step) for state in proxy.states] == [steps // 3, 2 * steps // 3, steps]
  usual_SB, order_SB = (proxies.training(Kind(length=x)).order('proxy 1') for x in (1.0, length))
  shorter = min(steps, 12)
  np.testing.assert_array_equal(order_SB[:shorter], usual_SB[:shorter])


def test_proxies_of_other_widths_are_wider(made):
  half, usual = (made[0](Kind(width=width), 0).states[0].params for width in (0.5, 1.0))
  assert [p.embedding.embedding.shape for p in (half, usual)] == [(VOCAB, 8), (VOCAB, 16)]


def test_variant_uses_proxies_of_its_own_kind(made):
  proxies, scorer = made
  found_NT = scorer(proxies)(Variant('half the epochs', kind=Kind(length=0.5)))
  wanted_NT = scorer(lambda kind, place: proxies(Kind(length=0.5), place))(REFERENCE)
  np.testing.assert_array_equal(found_NT, wanted_NT)
  assert np.abs(found_NT - scorer(proxies)(REFERENCE)).max() > 1e-3 * np.abs(wanted_NT).max()

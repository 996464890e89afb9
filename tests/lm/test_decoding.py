"""Greedy continuation with a cache, against running the decoder over the whole sequence for every token."""

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.lm import decoding
from dsdm_jax.lm.decoder import build

V, L, STEPS = 37, 12, 6
VARIANTS = {
  'gpt2': {},
  'modern': {'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'kv_heads': 2, 'tied_embeddings': False},
  'scanned': {'positions': 'rope', 'scan_layers': True, 'remat': True},
  'gemma': {'positions': 'rope', 'qk_norm': 'all', 'attention_cap': 0.5, 'kv_heads': 2, 'rotary_global_every': 2},
}


def _model(**keys) -> nnx.Module:
  c = base.model()
  c.width, c.heads, c.kv_heads, c.mlp_width, c.init_std = 16, 4, 4, 32, 0.3
  c.update(keys)
  return build(c, V, L + STEPS, nnx.Rngs(0))


def _prompts(seed=0, rows=5) -> tuple[np.ndarray, np.ndarray]:
  g = np.random.default_rng(seed)
  length_B = g.integers(1, L + 1, rows).astype(np.int32)
  tokens_BL = g.integers(3, V, (rows, L)).astype(np.int32) * (np.arange(L) < length_B[:, None])
  return tokens_BL, length_B


@jax.jit
def _whole(model: nnx.Module, tokens_BL: jax.Array) -> jax.Array:
  return model(tokens_BL)


_greedy = jax.jit(decoding.greedy, static_argnums=3)


def _slow(model: nnx.Module, tokens_L: np.ndarray, length: int, stop: int) -> list[int]:
  """One row alone, from scratch for each token; the tokens after it are noise."""
  sequence, out = list(tokens_L[:length]), []
  while len(out) < STEPS and (not out or out[-1] != stop):
    padded = np.full((1, L + STEPS), V - 1, np.int32)
    padded[0, : len(sequence)] = sequence
    out.append(int(np.argmax(_whole(model, padded)[0, len(sequence) - 1])))
    sequence.append(out[-1])
  return out + [0] * (STEPS - len(out))


@pytest.mark.parametrize('variant', VARIANTS)
def test_cache_agrees_with_the_whole_sequence(variant):
  model = _model(**VARIANTS[variant])
  tokens_BL, length_B = _prompts()
  free = [_slow(model, t, n, stop=-1) for t, n in zip(tokens_BL, length_B, strict=True)]
  stop = free[0][2]  # so that one row at least ends early
  wanted = [_slow(model, t, n, stop) for t, n in zip(tokens_BL, length_B, strict=True)]
  stop_V = np.zeros(V, bool)
  stop_V[stop] = True
  np.testing.assert_array_equal(_greedy(model, tokens_BL, length_B, STEPS, stop_V), wanted)
  assert 0 in wanted[0] and len({tuple(row) for row in wanted}) > 1


def test_cached_logits_are_those_of_the_decoder():
  """To rounding: 16 numbers are summed here in another order, and logits are below 10."""
  model = _model(**VARIANTS['modern'])
  tokens_BL, _ = _prompts(1)
  cache = decoding.empty_cache(model, len(tokens_BL), L + 3)
  position_BL = np.broadcast_to(np.arange(L), tokens_BL.shape)
  run = jax.jit(decoding.cached_logits)
  first, cache = run(model, tokens_BL[:, :6], position_BL[:, :6], cache)
  second, _ = run(model, tokens_BL[:, 6:], position_BL[:, 6:], cache)
  np.testing.assert_allclose(np.concatenate([first, second], axis=1), _whole(model, tokens_BL), atol=1e-5)


def test_custom_module_is_decoded_without_a_cache():
  class Custom(nnx.Module):
    def __init__(self, inner):
      self.inner = inner

    def __call__(self, tokens_BL):
      return self.inner(tokens_BL)

  model = _model()
  tokens_BL, length_B = _prompts(2)
  stop_V = np.zeros(V, bool)
  found = _greedy(Custom(model), tokens_BL, length_B, STEPS, stop_V)
  np.testing.assert_array_equal(found, _greedy(model, tokens_BL, length_B, STEPS, stop_V))

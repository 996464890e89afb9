"""Greedy decoding of a batch of prompts, with a cache of keys and values for the built-in decoder.

Prompts are padded at the end. The next token of a row replaces its first padding token, in the sequence and in the
cache, and no position sees later ones: so the output of a row does not depend on the length of the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsdm_jax.lm import attention as attention_lib
from dsdm_jax.lm.decoder import Attention, Decoder


class Cache(NamedTuple):
  """Keys and values of all layers, each [layers, B, S, kv_heads, K], with S positions."""

  keys: jax.Array
  values: jax.Array


class _CachedAttention(nnx.Module):
  """Writes keys and values of tokens at `position_BL` to the cache, then attends to it up to these positions."""

  def __init__(self, attention: Attention, keys: jax.Array, values: jax.Array, position_BL: jax.Array):
    self.attention, self.position_BL = attention, position_BL
    self.keys, self.values = keys, values

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    q_BLHK, k_BLHK, v_BLHK = self.attention.project(x_BLD, self.position_BL)
    row_BL = jnp.arange(len(x_BLD))[:, None]
    self.keys = self.keys.at[row_BL, self.position_BL].set(k_BLHK)
    self.values = self.values.at[row_BL, self.position_BL].set(v_BLHK)
    seen_BLS = jnp.arange(self.keys.shape[1])[None, None] <= self.position_BL[..., None]
    y_BLHK = attention_lib.seeing(q_BLHK, self.keys, self.values, seen_BLS, self.attention.cap)
    return self.attention.out(y_BLHK.reshape(*x_BLD.shape[:2], -1))


def empty_cache(model: Decoder, batch: int, positions: int) -> Cache:
  """A cache with `positions` positions for each of `batch` rows."""
  first = jax.tree.map(lambda x: x[0], nnx.state(model.blocks)) if model.scan else None
  block = nnx.merge(nnx.graphdef(model.blocks), first) if model.scan else model.blocks[0]
  layers = jax.tree.leaves(nnx.state(model.blocks))[0].shape[0] if model.scan else len(model.blocks)
  attention = block.attention
  shape = (layers, batch, positions, attention.kv_heads, attention.head_size)
  return Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))


def cached_logits(
  model: Decoder, tokens_BL: jax.Array, position_BL: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """Returns logits [B, L, V] of tokens at `position_BL`, which must lie within the cache, and the updated cache."""

  def run(graphdef: nnx.GraphDef, state: nnx.State, x_BLD: jax.Array, layer: Cache) -> tuple[jax.Array, Cache]:
    block = nnx.merge(graphdef, state)
    block.attention = cached = _CachedAttention(block.attention, layer.keys, layer.values, position_BL)
    return block(x_BLD), Cache(cached.keys, cached.values)

  x_BLD = model.embed(tokens_BL, position_BL)
  if model.scan:
    graphdef, states = nnx.split(model.blocks)
    x_BLD, cache = jax.lax.scan(lambda x, layer: run(graphdef, layer[0], x, layer[1]), x_BLD, (states, cache))
    return model.logits(x_BLD), cache
  layers = []
  for index, block in enumerate(model.blocks):
    graphdef, state = nnx.split(block)
    x_BLD, layer = run(graphdef, state, x_BLD, Cache(cache.keys[index], cache.values[index]))
    layers.append(layer)
  return model.logits(x_BLD), Cache(*(jnp.stack(part) for part in zip(*layers, strict=True)))


def greedy(model: nnx.Module, tokens_BL: jax.Array, length_B: jax.Array, steps: int, stop_V: jax.Array) -> jax.Array:
  """Appends the most probable token, step by step.

  Args:
    model: any module tokens_BL → logits_BLV. A model other than `Decoder` processes the whole sequence in each step.
    tokens_BL: int32, prompts of at least one token, padded at the end.
    length_B: int32, tokens of each prompt.
    steps: maximum number of new tokens; L + steps must not exceed the model's positions.
    stop_V: bool, tokens that end a row.

  Returns:
    int32 [B, steps]; 0 after a stop token.
  """
  batch = len(tokens_BL)
  first, advance = (_with_cache if isinstance(model, Decoder) else _without_cache)(model, tokens_BL, length_B, steps)
  token_B, state = first

  def unfinished(carry: tuple) -> jax.Array:
    step, _, ended_B, _, _ = carry
    return (step < steps) & ~jnp.all(ended_B)

  def body(carry: tuple) -> tuple:
    step, token_B, ended_B, out_BN, state = carry
    out_BN = out_BN.at[:, step].set(jnp.where(ended_B, 0, token_B))
    ended_B = ended_B | stop_V[token_B]
    token_B, state = advance(state, token_B, length_B + step)
    return step + 1, token_B, ended_B, out_BN, state

  start = (jnp.int32(0), token_B, jnp.zeros(batch, bool), jnp.zeros((batch, steps), jnp.int32), state)
  return jax.lax.while_loop(unfinished, body, start)[3]


# The next token, and the state that later steps need: a cache, or the sequences.
Start = tuple[jax.Array, Any]
Advance = Callable[[Any, jax.Array, jax.Array], Start]


def _best(logits_BLV: jax.Array, position_B: jax.Array) -> jax.Array:
  row_BV = jnp.take_along_axis(logits_BLV, position_B[:, None, None], axis=1)[:, 0]
  return jnp.argmax(row_BV, axis=-1).astype(jnp.int32)


def _with_cache(model: Decoder, tokens_BL: jax.Array, length_B: jax.Array, steps: int) -> tuple[Start, Advance]:
  batch, length = tokens_BL.shape
  position_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
  logits_BLV, cache = cached_logits(model, tokens_BL, position_BL, empty_cache(model, batch, length + steps))

  def advance(cache: Cache, token_B: jax.Array, position_B: jax.Array) -> Start:
    logits_BLV, cache = cached_logits(model, token_B[:, None], position_B[:, None], cache)
    return _best(logits_BLV, jnp.zeros_like(position_B)), cache

  return (_best(logits_BLV, length_B - 1), cache), advance


def _without_cache(model: nnx.Module, tokens_BL: jax.Array, length_B: jax.Array, steps: int) -> tuple[Start, Advance]:
  tokens_BL = jnp.pad(tokens_BL, ((0, 0), (0, steps)))
  row_B = jnp.arange(len(tokens_BL))

  def advance(tokens_BL: jax.Array, token_B: jax.Array, position_B: jax.Array) -> Start:
    tokens_BL = tokens_BL.at[row_B, position_B].set(token_B)
    return _best(model(tokens_BL), position_B), tokens_BL

  return (_best(model(tokens_BL), length_B - 1), tokens_BL), advance

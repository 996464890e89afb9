"""A custom model, document source and output function, independent of this project's decoder."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.data.pool.sources import Document


def no_documents(config: ConfigDict, seed: int) -> Iterator[Document]:
  del config, seed
  yield from ()


@dataclasses.dataclass
class Shape:
  dim: int
  n_q: int
  n_kv: int


class GroupedQuery(nnx.Module):
  """One key head for several query heads, a matrix each, no biases."""

  def __init__(self, s: Shape, rngs: nnx.Rngs):
    self.shape, self.head_dim = s, s.dim // s.n_q
    self.wq = nnx.Linear(s.dim, s.n_q * self.head_dim, use_bias=False, rngs=rngs)
    self.wk = nnx.Linear(s.dim, s.n_kv * self.head_dim, use_bias=False, rngs=rngs)
    self.wv = nnx.Linear(s.dim, s.n_kv * self.head_dim, use_bias=False, rngs=rngs)
    self.wo = nnx.Linear(s.n_q * self.head_dim, s.dim, use_bias=False, rngs=rngs)

  def __call__(self, h: jax.Array) -> jax.Array:
    b, t, _ = h.shape
    groups = self.shape.n_q // self.shape.n_kv
    q = self.wq(h).reshape(b, t, self.shape.n_kv, groups, self.head_dim)
    k = self.wk(h).reshape(b, t, self.shape.n_kv, self.head_dim)
    v = self.wv(h).reshape(b, t, self.shape.n_kv, self.head_dim)
    scores = jnp.einsum('bikgd,bjkd->bkgij', q, k) * self.head_dim**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool))[None, None, None], scores, -1e9)
    mixed = jnp.einsum('bkgij,bjkd->bikgd', jax.nn.softmax(scores), v)
    return self.wo(mixed.reshape(b, t, -1))


class Layer(nnx.Module):
  def __init__(self, s: Shape, hidden: int, rngs: nnx.Rngs):
    self.mix, self.pre, self.post = GroupedQuery(s, rngs), nnx.RMSNorm(s.dim, rngs=rngs), nnx.RMSNorm(s.dim, rngs=rngs)
    self.gate = nnx.Linear(s.dim, hidden, use_bias=False, rngs=rngs)
    self.value = nnx.Linear(s.dim, hidden, use_bias=False, rngs=rngs)
    self.back = nnx.Linear(hidden, s.dim, use_bias=False, rngs=rngs)

  def __call__(self, h: jax.Array) -> jax.Array:
    h = h + self.mix(self.pre(h))
    n = self.post(h)
    return h + self.back(jax.nn.silu(self.gate(n)) * self.value(n))


class CustomModel(nnx.Module):
  """Untied: the table that reads tokens and the matrix that predicts them are two."""

  def __init__(self, s: Shape, hidden: int, depth: int, vocab: int, context: int, rngs: nnx.Rngs):
    self.wte = nnx.Embed(vocab, s.dim, rngs=rngs)
    self.where = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context, s.dim)))
    self.stack = nnx.List([Layer(s, hidden, rngs) for _ in range(depth)])
    self.final = nnx.RMSNorm(s.dim, rngs=rngs)
    self.unembed = nnx.Linear(s.dim, vocab, use_bias=False, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    h = self.wte(tokens) + self.where[...][None, : tokens.shape[1]]
    for layer in self.stack:
      h = layer(h)
    return self.unembed(self.final(h))


def build(config: Any, vocab_size: int, length: int, rngs: nnx.Rngs) -> nnx.Module:
  shape = Shape(config.width, config.heads, config.kv_heads)
  return CustomModel(shape, config.mlp_width, config.layers, vocab_size, length, rngs)


def last_token_logit(logits_LV: jax.Array, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
  """A custom output function: the mean centred logit of the right tokens, which is not a probability."""
  right_L = jnp.take_along_axis(logits_LV[:-1], tokens_L[1:, None], axis=-1)[:, 0]
  centred_L = right_L - logits_LV[:-1].mean(axis=-1)
  return jnp.sum(centred_L * weights_L[1:]) / jnp.maximum(jnp.sum(weights_L), 1.0)

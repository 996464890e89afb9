"""A decoder language model in Flax NNX: GPT-2-style as in the paper; by config Llama, Qwen, OLMo-2, Gemma."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.config.values import head_size, norm_epsilon
from dsdm_jax.errors import UserError
from dsdm_jax.lm import attention, attention_tpu, partition, products


def build(config: ConfigDict, vocab_size: int, length: int, rngs: nnx.Rngs) -> 'Decoder':
  """Builds the decoder of `config` (section `model` of the config) for sequences of at most `length` tokens."""
  return Decoder(config, vocab_size, length, rngs)


def _linear(
  inputs: int, outputs: int, config: ConfigDict, rngs: nnx.Rngs, scale: float = 1.0, bias: bool = False
) -> nnx.Linear:
  init = nnx.initializers.normal(config.init_std * scale)
  dtype, dot_general = jnp.dtype(config.compute_dtype), products.dot_general
  options = {'use_bias': config.bias or bias, 'kernel_init': init, 'dtype': dtype, 'dot_general': dot_general}
  return nnx.Linear(inputs, outputs, **options, rngs=rngs)


def _norm(config: ConfigDict, rngs: nnx.Rngs, size: int = 0) -> nnx.Module:
  size, epsilon = size or config.width, norm_epsilon(config)
  if config.norm == 'rmsnorm':
    return nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)
  return nnx.LayerNorm(size, epsilon=epsilon, use_bias=config.bias, rngs=rngs)


def _capped(x: jax.Array, cap: float) -> jax.Array:
  return cap * jnp.tanh(x / cap) if cap else x


def rotate(
  x_BLHK: jax.Array,
  position_BL: jax.Array | None = None,
  share: float = 1.0,
  base: float = 10_000.0,
  scaling: Sequence[float] = (),
) -> jax.Array:
  """Rotary position embedding (arXiv 2104.09864) over the first `share` of a head (an even number), in float32.

  Args:
    x_BLHK: queries or keys.
    position_BL: int32, position of each token in its sequence; None means 0…L−1 for every row.
    share: of the head.
    base: of the frequencies.
    scaling: (factor,) divides all frequencies (arXiv 2306.15595). (factor, low, high, length) is Llama 3.1's: waves
      that fit less than `low` times into `length` tokens are stretched by the factor, those that fit more than `high`
      times stay, and between them frequencies are interpolated.
  """
  rotated = int(x_BLHK.shape[-1] * share)
  if rotated < x_BLHK.shape[-1]:
    rest_BLHK = x_BLHK[..., rotated:]
    turned_BLHK = rotate(x_BLHK[..., :rotated], position_BL, base=base, scaling=scaling)
    return jnp.concatenate([turned_BLHK, rest_BLHK], axis=-1)
  half = rotated // 2
  frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if len(scaling) == 1:
    frequency_K /= scaling[0]
  elif scaling:
    factor, low, high, length = scaling
    kept_K = jnp.clip((frequency_K * (length / (2 * math.pi)) - low) / (high - low), 0, 1)
    frequency_K *= (1 - kept_K) / factor + kept_K
  if position_BL is None:
    position_BL = jnp.arange(x_BLHK.shape[1])[None]
  angle_BLHK = position_BL.astype(jnp.float32)[..., None, None] * frequency_K[None, None, None]
  cos, sin = jnp.cos(angle_BLHK), jnp.sin(angle_BLHK)
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BLHK.dtype)


class Attention(nnx.Module):
  """Causal self-attention with grouped queries.

  Queries, keys and values come from one matmul. Its outputs are laid out group by group (the queries of a key head,
  then that key, then that value), so that splitting them over the `model` axis keeps each head whole.
  """

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs, layer: int = 0):
    self.heads, self.kv_heads = config.heads, config.kv_heads
    self.head_size = head_size(config)
    self.rope = config.positions == 'rope'
    self.fused = config.attention == 'fused'
    self.cap = config.attention_cap
    self.rotary = {'share': config.rotary_share, 'base': config.rotary_base, 'scaling': tuple(config.rotary_scaling)}
    if (layer + 1) % config.rotary_global_every:
      self.rotary |= {'base': config.rotary_local_base, 'scaling': ()}
    outputs = (config.heads + 2 * config.kv_heads) * self.head_size
    self.qkv = _linear(config.width, outputs, config, rngs, bias=config.qkv_bias)
    inputs = config.heads * self.head_size
    self.out = _linear(inputs, config.width, config, rngs, scale=(2 * config.layers) ** -0.5)
    self.qk_norm = config.qk_norm
    together = {'none': (0, 0), 'head': (1, 1), 'all': (config.heads, config.kv_heads)}[config.qk_norm]
    self.q_norm, self.k_norm = (_norm(config, rngs, n * self.head_size) if n else None for n in together)

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    q_BLHK, k_BLHK, v_BLHK = self.project(x_BLD)
    if self.fused and attention_tpu.serves(x_BLD.shape[1]):
      y_BLHK = attention_tpu.causal(q_BLHK, k_BLHK, v_BLHK)
    elif self.fused and jax.default_backend() == 'gpu':
      y_BLHK = jax.nn.dot_product_attention(q_BLHK, k_BLHK, v_BLHK, is_causal=True, implementation='cudnn')
    else:
      y_BLHK = attention.causal(q_BLHK, k_BLHK, v_BLHK, self.cap)
    return self.out(y_BLHK.reshape(*x_BLD.shape[:2], -1))

  def project(self, x_BLD: jax.Array, position_BL: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of tokens at `position_BL`, see `rotate`; keys and values have `kv_heads` heads."""
    batch, length, _ = x_BLD.shape
    group = self.heads // self.kv_heads
    qkv = self.qkv(x_BLD).reshape(batch, length, self.kv_heads, group + 2, self.head_size)
    q_BLHK = qkv[..., :group, :].reshape(batch, length, self.heads, self.head_size)
    k_BLHK, v_BLHK = qkv[..., group, :], qkv[..., group + 1, :]
    if self.qk_norm != 'none':
      q_BLHK, k_BLHK = self._normed(self.q_norm, q_BLHK), self._normed(self.k_norm, k_BLHK)
    if self.rope:
      q_BLHK, k_BLHK = (rotate(x_BLHK, position_BL, **self.rotary) for x_BLHK in (q_BLHK, k_BLHK))
    return q_BLHK, k_BLHK, v_BLHK

  def _normed(self, norm: nnx.Module, x_BLHK: jax.Array) -> jax.Array:
    """Each head by itself (Qwen3, Gemma 3), or all heads of a token together (OLMo-2)."""
    if self.qk_norm == 'head':
      return norm(x_BLHK).astype(x_BLHK.dtype)
    return norm(x_BLHK.reshape(*x_BLHK.shape[:2], -1)).reshape(x_BLHK.shape).astype(x_BLHK.dtype)


class Mlp(nnx.Module):
  """GELU, by tanh as in GPT-2 or exact; or SwiGLU or GEGLU (arXiv 2002.05202), gate and value from one matmul."""

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    self.gated, self.swish = config.mlp in ('swiglu', 'geglu'), config.mlp == 'swiglu'
    self.approximate = config.mlp != 'gelu_exact'
    self.up = _linear(config.width, config.mlp_width * (2 if self.gated else 1), config, rngs)
    self.down = _linear(config.mlp_width, config.width, config, rngs, scale=(2 * config.layers) ** -0.5)

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    h_BLF = self.up(x_BLD)
    if self.gated:
      # Gate and value alternate, so that a split over the `model` axis keeps each pair together.
      gate_BLF, value_BLF = h_BLF[..., 0::2], h_BLF[..., 1::2]
      return self.down((jax.nn.silu if self.swish else jax.nn.gelu)(gate_BLF) * value_BLF)
    return self.down(jax.nn.gelu(h_BLF, approximate=self.approximate))


class Block(nnx.Module):
  """x + f(norm(x)) for attention, then for the MLP; or x + norm(f(x)) as in OLMo-2, or both as in Gemma."""

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs, layer: int = 0):
    self.parallel, self.norms = config.parallel_residual, config.norm_place
    self.attention_norm = _norm(config, rngs)
    self.attention = Attention(config, rngs, layer)
    self.mlp_norm = _norm(config, rngs)
    self.mlp = Mlp(config, rngs)
    both = self.norms == 'both'
    self.attention_post_norm, self.mlp_post_norm = (_norm(config, rngs) if both else None for _ in range(2))

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    attended_BLD = x_BLD + self._part(self.attention, self.attention_norm, self.attention_post_norm, x_BLD)
    input_BLD = x_BLD if self.parallel else attended_BLD
    return attended_BLD + self._part(self.mlp, self.mlp_norm, self.mlp_post_norm, input_BLD)

  def _part(self, function: nnx.Module, norm: nnx.Module, post_norm: nnx.Module | None, x_BLD: jax.Array) -> jax.Array:
    y_BLD = function(x_BLD if self.norms == 'post' else norm(x_BLD))
    if self.norms == 'post':
      return norm(y_BLD)
    return y_BLD if post_norm is None else post_norm(y_BLD)


class Table(nnx.Embed):
  """An embedding that serves as the head as well."""

  def attend(self, x_BLD: jax.Array) -> jax.Array:
    """Products of `x_BLD`, in the compute dtype, with all rows, by the product of the linear layers."""
    table_DV = self.embedding[...].astype(self.dtype).T
    return products.dot_general(x_BLD, table_DV, (((2,), (0,)), ((), ())))


class Decoder(nnx.Module):
  """tokens_BL (int32) → logits_BLV (float32); position l sees tokens 0…l."""

  gathers = re.compile(r'^blocks/')  # paths of weights that the model gathers itself, see `partition.weights_here`

  def __init__(self, config: ConfigDict, vocab_size: int, length: int, rngs: nnx.Rngs):
    self.dtype = jnp.dtype(config.compute_dtype)
    self.remat = config.remat
    self.embedding_scale, self.logit_cap = config.embedding_scale, config.logit_cap
    init = nnx.initializers.normal(config.init_std)
    self.embedding = Table(vocab_size, config.width, embedding_init=init, dtype=self.dtype, rngs=rngs)
    learned = config.positions == 'learned'
    self.positions = (
      nnx.Embed(length, config.width, embedding_init=init, dtype=self.dtype, rngs=rngs) if learned else None
    )
    self.scan = config.scan_layers
    if self.scan:
      make = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda r: Block(config, r), in_axes=(0,)))
      self.blocks = make(rngs)
    else:
      self.blocks = nnx.List([Block(config, rngs, layer) for layer in range(config.layers)])
    self.norm = _norm(config, rngs)
    options = {'kernel_init': init, 'dtype': self.dtype, 'dot_general': products.dot_general, 'rngs': rngs}
    tied = config.tied_embeddings
    self.head = None if tied else nnx.Linear(config.width, vocab_size, use_bias=False, **options)

  def __call__(self, tokens_BL: jax.Array) -> jax.Array:
    return self.logits(self.residual(tokens_BL))

  def residual(self, tokens_BL: jax.Array) -> jax.Array:
    """Output of the last block, [B, L, D]: for callers that need the logits of some positions only."""
    return self._run_blocks(partition.batch_here(self.embed(tokens_BL)))

  def embed(self, tokens_BL: jax.Array, position_BL: jax.Array | None = None) -> jax.Array:
    """Input of the first block; `position_BL` as in `rotate`."""
    x_BLD = self.embedding(tokens_BL)
    if self.embedding_scale != 1:
      x_BLD *= self.embedding_scale
    if self.positions is None:
      return x_BLD
    if position_BL is None:
      length, most = tokens_BL.shape[1], self.positions.num_embeddings
      if length > most:  # a lookup would silently repeat the last position
        raise UserError(
          f'sequences of {length} tokens are longer than the {most} positions of the model; cut them, or train with '
          '--config.model.positions=rope'
        )
      position_BL = jnp.arange(length)[None]
    return x_BLD + self.positions(position_BL)

  def hidden(self, tokens_BL: jax.Array) -> jax.Array:
    """Input of the head: x_BLD after the last norm, in the compute dtype."""
    return self.norm(self._run_blocks(self.embed(tokens_BL))).astype(self.dtype)

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    """Logits [B, L, V] in float32 from the output of the last block."""
    return self.capped(self.project(self.norm(x_BLD).astype(self.dtype)))

  def project(self, hidden_BLD: jax.Array) -> jax.Array:
    """Products with the head's matrix, [B, L, V] in the compute dtype; linear in `hidden_BLD` and in the matrix."""
    return self.embedding.attend(hidden_BLD) if self.head is None else self.head(hidden_BLD)

  def capped(self, product_BLV: jax.Array) -> jax.Array:
    """Logits in float32 from `project`."""
    return _capped(product_BLV.astype(jnp.float32), self.logit_cap)

  def _run_blocks(self, x_BLD: jax.Array) -> jax.Array:
    # Blocks run as pure functions of their state: graph references do not survive remat or scan under vmap(grad).
    if self.scan:
      step, state = self._pure(self.blocks)
      x_BLD, _ = jax.lax.scan(lambda x, layer_state: (step(layer_state, x), None), x_BLD, state)
      return x_BLD
    for block in self.blocks:
      step, state = self._pure(block)
      x_BLD = step(state, x_BLD)
    return x_BLD

  def _pure(self, block: Block) -> tuple[Callable[[nnx.State, jax.Array], jax.Array], nnx.State]:
    graphdef, state = nnx.split(block)

    def step(state: nnx.State, x_BLD: jax.Array) -> jax.Array:
      return partition.batch_here(nnx.merge(graphdef, partition.weights_here(state, self.dtype))(x_BLD))

    # A scan already prevents common-subexpression elimination, which would otherwise undo the remat.
    if self.remat:
      step = jax.checkpoint(step, prevent_cse=not self.scan)
    elif self.scan:  # else XLA recomputes inside its fusions what is cheap
      step = jax.checkpoint(step, prevent_cse=False, policy=_saved)
    return step, state


def _saved(primitive: Any, *_: Any, **parameters: Any) -> bool:
  """Whether a scan without remat saves a result for the backward pass: of products, attention kernels and gathers.

  Norms and activation functions are computed again: they take less time than the HBM traffic of their intermediate
  results, of which some are in float32.
  """
  return primitive.name in ('dot_general', 'pallas_call') or parameters.get('name') == partition.SAVED

"""Model output functions: the scalar of one example that the datamodel predicts.

Each function takes logits_LV, tokens_L and weights_L of one example and returns a float32 scalar. Position l−1 predicts
token l; weights_L[l] is the weight of token l, and weights_L[0] is ignored. Scores are differences of this scalar:
higher is better for all functions here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

OutputFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _right_token(logits_LV: jax.Array, tokens_L: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (logits in float32, mask of the next token, its logit) at every position; the last predicts nothing.

  The targets are shifted, not the logits: a slice of logits is a copy of the largest array of the model, and its
  gradient another. A masked sum stands in for a gather, whose gradient would be a scatter.
  """
  logits_LV = logits_LV.astype(jnp.float32)
  next_L = jnp.roll(tokens_L, -1)
  right_LV = jnp.arange(logits_LV.shape[-1], dtype=next_L.dtype)[None] == next_L[:, None]
  return logits_LV, right_LV, jnp.sum(jnp.where(right_LV, logits_LV, 0.0), axis=-1)


@jax.custom_jvp
def _log_sum_exp(x_LV: jax.Array) -> jax.Array:
  """log Σ exp over the vocabulary.

  JAX's own saves exp(x − max), as large as the logits, for the derivative; here exp(x − result) is recomputed.
  """
  return jax.nn.logsumexp(x_LV, axis=-1)


@_log_sum_exp.defjvp
def _log_sum_exp_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
  (x_LV,), (tangent_LV,) = primals, tangents
  result_L = _log_sum_exp(x_LV)
  return result_L, jnp.sum(jnp.exp(x_LV - result_L[..., None]) * tangent_LV, axis=-1)


def token_log_probability(logits_LV: jax.Array, tokens_L: jax.Array) -> jax.Array:
  """log p of tokens 1…L−1 given those before, in nats, float32, shape [L−1]."""
  logits_LV, _, right_L = _right_token(logits_LV, tokens_L)
  return (right_L - _log_sum_exp(logits_LV))[:-1]


def token_margin(logits_LV: jax.Array, tokens_L: jax.Array) -> jax.Array:
  """log(p/(1−p)) of tokens 1…L−1, as the right token's logit minus the logsumexp of the others; float32, [L−1].

  Taking p first would lose everything once p rounds to one.
  """
  logits_LV, right_LV, right_L = _right_token(logits_LV, tokens_L)
  return (right_L - _log_sum_exp(jnp.where(right_LV, -jnp.inf, logits_LV)))[:-1]


def counted_mean(values_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
  """Mean of values of tokens 1…L−1, [B, L−1], over the tokens that count in `weights_BL` [B, L]; 0 without any."""
  weights_BL = weights_BL[:, 1:]
  return jnp.sum(values_BL * weights_BL, axis=1) / jnp.maximum(jnp.sum(weights_BL, axis=1), 1)


def _shares(values_L: jax.Array, weights_L: jax.Array) -> jax.Array:
  weights_L = weights_L[1:].astype(jnp.float32)
  return values_L * weights_L / jnp.maximum(jnp.sum(weights_L), 1e-9)


def _weighted_mean(values_L: jax.Array, weights_L: jax.Array) -> jax.Array:
  return jnp.sum(_shares(values_L, weights_L))


def margin(logits_LV: jax.Array, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
  """Mean over counted tokens of log(p/(1−p)): the model output function of DsDm and TRAK."""
  return _weighted_mean(token_margin(logits_LV, tokens_L), weights_L)


def log_likelihood(logits_LV: jax.Array, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
  """Mean over counted tokens of log p, in nats."""
  return _weighted_mean(token_log_probability(logits_LV, tokens_L), weights_L)


def margin_shares(logits_LV: jax.Array, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
  """Contribution of each of tokens 1…L−1 to `margin`, shape [L−1]: for scores of single tokens."""
  return _shares(token_margin(logits_LV, tokens_L), weights_L)


def log_likelihood_shares(logits_LV: jax.Array, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
  """Contribution of each of tokens 1…L−1 to `log_likelihood`, shape [L−1]."""
  return _shares(token_log_probability(logits_LV, tokens_L), weights_L)

"""AdamW with warm-up and cosine decay, as in the paper."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dsdm_jax.lm.partition import path_name


def make(config: ConfigDict) -> optax.GradientTransformation:
  """Everything of AdamW but the learning rate, which the train step multiplies in.

  Kept apart so that runs of different length share one compiled step.
  """
  clip = optax.clip_by_global_norm(config.gradient_clip) if config.gradient_clip else optax.identity()
  return optax.chain(
    clip,
    optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps, eps_root=config.adam_eps_root),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
  )


def decay_mask(params: Any) -> Any:
  """True for matrices (kernels and embeddings), False for norms and biases."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path_name(path).rsplit('/', 1)[-1] in ('kernel', 'embedding'), params
  )


def learning_rate(config: ConfigDict, step: jax.Array, steps: jax.Array) -> jax.Array:
  """Rate of step `step` (0-based) of `steps`: linear from zero over the warm-up, then a cosine to its last fraction."""
  step, steps = jnp.asarray(step, jnp.float32), jnp.asarray(steps, jnp.float32)
  warmup = jnp.minimum(float(config.warmup_steps), steps / 2)  # a short run still gets its peak
  rise = (step + 1) / jnp.maximum(warmup, 1)
  progress = jnp.clip((step - warmup) / jnp.maximum(steps - warmup, 1), 0, 1)
  floor = config.final_learning_rate
  fall = floor + (1 - floor) * 0.5 * (1 + jnp.cos(math.pi * progress))
  return config.learning_rate * jnp.minimum(rise, fall)

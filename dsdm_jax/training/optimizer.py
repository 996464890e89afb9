"""The optimizer of the config, without its learning rate, and the learning rate of each step."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dsdm_jax.config.validate import load_callable
from dsdm_jax.config.values import arguments as arguments_of
from dsdm_jax.errors import UserError
from dsdm_jax.lm.partition import path_name

_MOMENTS = ('mu', 'nu')  # names of first and second moments in all states of optax


def make(config: ConfigDict) -> optax.GradientTransformation:
  """Gradient clip, optimizer and decoupled weight decay; the train step subtracts rate · update.

  The learning rate is separate so that runs of different length share one compiled step. Other optimizers of optax are
  built with rate 1, and their updates are negated.

  Raises:
    UserError: there is no such optimizer, or it does not take these arguments.
  """
  clip = optax.clip_by_global_norm(config.gradient_clip) if config.gradient_clip else optax.identity()
  if config.optimizer == 'adamw':
    core = optax.chain(
      optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps, eps_root=config.adam_eps_root),
      optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )
  else:
    core = _named(config)
  dtypes = {name: config[f'{name}_dtype'] for name in _MOMENTS}
  if set(dtypes.values()) != {'float32'}:
    core = _stored_as(core, dtypes)
  return optax.chain(clip, core)


def _named(config: ConfigDict) -> optax.GradientTransformation:
  """Any other optimizer: a name in optax or 'package.module:function', called with keyword arguments."""
  name = config.optimizer
  build = load_callable(name, 'optimizer') if ':' in name else _of_optax(name)
  arguments = arguments_of(config.optimizer_arguments)
  known = inspect.signature(build).parameters
  if 'learning_rate' in known:
    arguments = {'learning_rate': 1.0, **arguments}
  decays = 'weight_decay' in known
  if decays:
    arguments = {'weight_decay': config.weight_decay, **arguments}
    arguments |= {mask: decay_mask for mask in ('mask', 'weight_decay_mask') if mask in known}
  try:
    core = build(**arguments)
  except (TypeError, ValueError) as error:
    raise UserError(
      f'optimizer = {name!r} with optimizer_arguments = {config.optimizer_arguments!r}: {error}; it takes '
      f'{", ".join(known)}'
    ) from error
  if not decays and config.weight_decay:
    core = optax.chain(core, optax.add_decayed_weights(-config.weight_decay, mask=decay_mask))
  return optax.chain(core, optax.scale(-1.0))


def _of_optax(name: str) -> Callable[..., optax.GradientTransformation]:
  function: Any = optax
  for part in name.split('.'):
    function = getattr(function, part, None)
  if not callable(function) or not name.islower():
    raise UserError(
      f'optimizer = {name!r} is not in optax {optax.__version__}; use one such as lion, adafactor or contrib.muon, '
      "or 'package.module:function'"
    )
  return function


def _stored_as(inner: optax.GradientTransformation, dtypes: dict[str, str]) -> optax.GradientTransformation:
  """`inner` with moments that are computed in float32 and stored in `dtypes`."""

  def cast(state: Any, stored: bool) -> Any:
    def of_field(path: tuple[Any, ...], x: Any) -> Any:
      names = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey) and k.name in dtypes]
      return x.astype(dtypes[names[0]] if stored else jnp.float32) if names else x

    return jax.tree_util.tree_map_with_path(of_field, state)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    updates, state = inner.update(updates, cast(state, False), params, **extra)
    return updates, cast(state, True)

  return optax.GradientTransformation(lambda params: cast(inner.init(params), True), update)


def decay_mask(params: Any) -> Any:
  """True for matrices (kernels and embeddings), False for norms and biases."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path_name(path).rsplit('/', 1)[-1] in ('kernel', 'embedding'), params
  )


def learning_rate(config: ConfigDict, step: jax.Array, steps: jax.Array) -> jax.Array:
  """Learning rate of step `step` (0-based) of `steps`: linear warm-up from zero, then `config.schedule`.

  cosine (the paper's) and linear decay from the peak to `final_learning_rate` of it over the rest; wsd
  (arXiv 2404.06395) stays at the peak and decays linearly over the last `decay_share` of all steps; constant stays.
  """
  step, steps = jnp.asarray(step, jnp.float32), jnp.asarray(steps, jnp.float32)
  warmup = jnp.minimum(float(config.warmup_steps), steps / 2)  # a short run still reaches the peak
  rise = (step + 1) / jnp.maximum(warmup, 1)
  start = jnp.maximum(warmup, steps * (1 - config.decay_share)) if config.schedule == 'wsd' else warmup
  progress = jnp.clip((step - start) / jnp.maximum(steps - start, 1), 0, 1)
  floor = config.final_learning_rate
  if config.schedule == 'cosine':
    fall = floor + (1 - floor) * 0.5 * (1 + jnp.cos(math.pi * progress))
  else:
    fall = jnp.ones(()) if config.schedule == 'constant' else 1 - (1 - floor) * progress
  return config.learning_rate * jnp.minimum(rise, fall)

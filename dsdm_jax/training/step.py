"""One training step, the same for proxies and for full pretraining."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.core.config import load_callable
from dsdm_jax.core.mesh import batch_sharding, replicated
from dsdm_jax.lm import partition
from dsdm_jax.lm.outputs import token_log_probability
from dsdm_jax.training import optimizer


class TrainState(NamedTuple):
  """Attributes: step, int32 scalar; params and rest (what is no parameter), NNX states; opt_state of optax."""

  step: jax.Array
  params: nnx.State
  rest: nnx.State
  opt_state: Any


def build_model(model_config: ConfigDict, vocab_size: int, length: int, rngs: nnx.Rngs) -> nnx.Module:
  """Calls the config's model factory."""
  return load_callable(model_config.factory)(model_config, vocab_size, length, rngs)


def abstract_model(model_config: ConfigDict, vocab_size: int, length: int) -> nnx.Module:
  """The model with shapes in place of arrays."""
  return nnx.eval_shape(lambda: build_model(model_config, vocab_size, length, nnx.Rngs(0)))


class Trainer:
  """The compiled functions of one model and optimizer on one mesh.

  Attributes:
    abstract: TrainState of `ShapeDtypeStruct`s with shardings; what a checkpoint is restored into.
    init: key → TrainState, laid out over the mesh from the first byte.
    step: (TrainState, tokens_BL, weight_B, steps) → (TrainState, {'loss', 'gradient_norm', 'learning_rate'}). Its
      first argument is donated. The loss is Σ_n weight_n · (mean nll of row n) / B: a row of weight zero is left out
      without the others weighing more, which is what datamodels are about.
  """

  def __init__(self, model_config: ConfigDict, config: ConfigDict, vocab_size: int, length: int, mesh: Mesh):
    self.graphdef, _, _ = nnx.split(abstract_model(model_config, vocab_size, length), nnx.Param, ...)
    self._config = config
    self._optimizer = optimizer.make(config)

    def init(key: jax.Array) -> TrainState:
      model = build_model(model_config, vocab_size, length, nnx.Rngs(key))
      _, params, rest = nnx.split(model, nnx.Param, ...)
      return TrainState(jnp.zeros((), jnp.int32), params, rest, self._optimizer.init(params))

    shapes = jax.eval_shape(init, jax.random.key(0))
    self.shardings = partition.shardings(shapes, mesh)
    self.abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings
    )
    batch = batch_sharding(mesh)
    self.batch_sharding = batch
    self.init = jax.jit(init, out_shardings=self.shardings)
    self.step = jax.jit(
      self.apply,
      in_shardings=(self.shardings, batch, batch, replicated(mesh)),
      out_shardings=(self.shardings, replicated(mesh)),
      donate_argnums=0,
    )

  def logits(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array) -> jax.Array:
    """The model's forward pass: logits_BLV; pure."""
    return nnx.merge(self.graphdef, params, rest)(tokens_BL)

  def apply(
    self, state: TrainState, tokens_BL: jax.Array, weight_B: jax.Array, steps: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """The pure function behind `step`."""

    def loss_fn(params: nnx.State) -> jax.Array:
      logits_BLV = self.logits(params, state.rest, tokens_BL)
      nll_BL = -jax.vmap(token_log_probability)(logits_BLV, tokens_BL)
      return jnp.sum(weight_B * jnp.mean(nll_BL, axis=1)) / tokens_BL.shape[0]

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
    rate = optimizer.learning_rate(self._config, state.step, steps)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    metrics = {'loss': loss, 'gradient_norm': _norm(grads), 'learning_rate': rate}
    return TrainState(state.step + 1, params, state.rest, opt_state), metrics


def _norm(tree: Any) -> jax.Array:
  """Euclidean norm over all leaves; optax has it under a name that changes between its versions."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


@functools.lru_cache(maxsize=8)
def _trainer(model_json: str, train_json: str, vocab_size: int, length: int, mesh: Mesh) -> Trainer:
  return Trainer(ConfigDict(json.loads(model_json)), ConfigDict(json.loads(train_json)), vocab_size, length, mesh)


def trainer(model_config: ConfigDict, config: ConfigDict, vocab_size: int, length: int, mesh: Mesh) -> Trainer:
  """A Trainer, the same object for equal arguments, so that proxies and finals of one shape compile once."""
  return _trainer(model_config.to_json(sort_keys=True), config.to_json(sort_keys=True), vocab_size, length, mesh)


StepFn = Callable[[TrainState, jax.Array, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]

"""One training step, shared by proxies, the ladder and pretraining."""

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import flops
from dsdm_jax.core.mesh import BATCH, MODEL, batch_sharding, is_one_cpu, place, replicated, rows_in_cache
from dsdm_jax.lm import attention_tpu, hugging_face, partition, products
from dsdm_jax.lm.outputs import token_log_probability
from dsdm_jax.training import optimizer


class TrainState(NamedTuple):
  """Attributes: step, int32 scalar; params and rest (all that is not a parameter), NNX states; opt_state of optax."""

  step: jax.Array
  params: nnx.State
  rest: nnx.State
  opt_state: Any


def microbatches(config: ConfigDict, batch: int, length: int, vocab_size: int, parameters: int, mesh: Mesh) -> int:
  """Number of parts of a batch of [batch, length] tokens: `microbatches` of the section `train`, or what is best at 0.

  Each part reads the weights and adds a gradient, so a CPU takes as much of logits at once.
  """
  if config.microbatches or not is_one_cpu(mesh):
    return config.microbatches or 1
  return batch // rows_in_cache(batch, length, vocab_size, 4 * parameters)


def build_model(model_config: ConfigDict, vocab_size: int, length: int, rngs: nnx.Rngs) -> nnx.Module:
  """Calls the model factory of the config."""
  return load_callable(model_config.factory)(model_config, vocab_size, length, rngs)


def abstract_model(model_config: ConfigDict, vocab_size: int, length: int) -> nnx.Module:
  """The model with shapes in place of arrays."""
  return nnx.eval_shape(lambda: build_model(model_config, vocab_size, length, nnx.Rngs(0)))


class Trainer:
  """The compiled functions of one model and optimizer on one mesh.

  Args:
    model_config: section `model` of the config.
    config: section `train`.
    vocab_size: of the pool.
    length: tokens of a row.
    mesh: to run on.
    frozen: the model is used as it is: it has no optimizer state, and `init` keeps the matrices of `model.weights` in
      the dtype of their files. Training needs them in float32, as `abstract` has them in either case.

  Attributes:
    mesh: devices that it runs on.
    models: number of models that it trains: 1.
    abstract: TrainState of `ShapeDtypeStruct`s with shardings, into which a checkpoint is restored.
    abstract_batch: tokens_BL (int32) and weight_B (float32), likewise.
    step: (TrainState, tokens_BL, weight, steps) → (TrainState, {'loss', 'gradient_norm', 'learning_rate'}). Its
      first argument is donated. With weight_B, the loss is Σ_n weight_n · (mean nll of row n) / B: a row of weight zero
      is left out and the other rows keep their weight, as datamodels require. With weight_BL, which sums to the weight
      of a row, it is Σ_nl weight_nl · nll_nl / B (see `data.order.batches.token_weights`). With `z_loss` > 0, that
      multiple of the mean squared logsumexp of the logits (PaLM, arXiv 2204.02311) is added to the loss that is
      differentiated; it is a metric of its own. As metrics, these two are divided by the mean weight of the batch, so
      that the loss is in nats per token; `gradient_norm` is that of the loss which is differentiated.
  """

  def __init__(
    self,
    model_config: ConfigDict,
    config: ConfigDict,
    vocab_size: int,
    length: int,
    mesh: Mesh,
    frozen: bool = False,
  ):
    model = abstract_model(model_config, vocab_size, length)
    self.graphdef, _, _ = nnx.split(model, nnx.Param, ...)
    self._own = getattr(model, 'gathers', None)
    self._config, self.mesh, self.models = config, mesh, 1
    self._optimizer = optax.identity() if frozen else optimizer.make(config)

    def init(key: jax.Array) -> TrainState:
      model = build_model(model_config, vocab_size, length, nnx.Rngs(key))
      _, params, rest = nnx.split(model, nnx.Param, ...)
      return TrainState(jnp.zeros((), jnp.int32), params, rest, self._optimizer.init(params))

    shapes = jax.eval_shape(init, jax.random.key(0))  # noqa: TID251 - only its shape is used
    self.shardings = partition.shardings(shapes, mesh)
    self.abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings
    )
    batch = batch_sharding(mesh)
    self.batch_sharding = batch
    self.abstract_batch = (
      jax.ShapeDtypeStruct((config.batch_size, length), jnp.int32, sharding=batch),
      jax.ShapeDtypeStruct((config.batch_size,), jnp.float32, sharding=batch),
    )
    self._model_config, self._vocab_size, self._length, self._frozen = model_config, vocab_size, length, frozen
    self._fresh, self._init = init, jax.jit(init, out_shardings=self.shardings)
    self.step = jax.jit(
      self.apply,
      in_shardings=(self.shardings, batch, batch, replicated(mesh)),
      out_shardings=(self.shardings, replicated(mesh)),
      donate_argnums=0,
    )

  @functools.cached_property
  def flop_per_step(self) -> float:
    """FLOP of one step over a whole batch. The first step reuses this trace."""
    return flops.count(self.step, self.abstract, *self.abstract_batch, jax.ShapeDtypeStruct((), jnp.int32))

  def init(self, key: jax.Array) -> TrainState:
    """The state before the first step: random from `key`, or with the pretrained weights in `model.weights`.

    Raises:
      UserError: these weights cannot be read, or do not fit the pool.
    """
    if not self._model_config.weights or self._own is None:  # a custom model may load its own weights
      return self._init(key)
    # One parameter after the other, and no random ones beside them.
    weights = hugging_face.Weights(self._model_config.weights, self._model_config, self._vocab_size, self._length)

    def read(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
      name = partition.path_name(path)
      dtype = weights.dtype(name, x.shape) if self._frozen else np.dtype(x.dtype)
      return jax.block_until_ready(place(weights.read(name, x.shape, dtype), x.sharding))

    params = jax.tree_util.tree_map_with_path(read, self.abstract.params)
    init = jax.jit(self._optimizer.init, out_shardings=self.shardings.opt_state)
    rest = jax.jit(lambda key: self._fresh(key).rest, out_shardings=self.shardings.rest)(key)
    return TrainState(place(np.zeros((), np.int32), self.shardings.step), params, rest, init(params))

  def logits(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array) -> jax.Array:
    """The model's forward pass: logits_BLV; pure."""
    if partition.is_on_device():
      return self._forward(params, rest, tokens_BL)
    with partition.over(self.mesh), attention_tpu.on_mesh(self.mesh):
      return self._forward(params, rest, tokens_BL)

  def _forward(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array) -> jax.Array:
    """Gathers weights, except those that the model gathers where it uses them."""
    own, others = self._by_place(params)
    return nnx.merge(self.graphdef, nnx.merge_state(own, partition.weights_here(others)), rest)(tokens_BL)

  def _by_place(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The weights that the model gathers where it uses them, and all others."""
    return nnx.split_state(
      params, lambda path, _: self._own is not None and bool(self._own.match('/'.join(map(str, path)))), ...
    )

  def apply(
    self, state: TrainState, tokens_BL: jax.Array, weight: jax.Array, steps: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """The pure function behind `step`."""
    (_, metrics), grads = self._gradient(state, tokens_BL, weight)
    if self.mesh.size > 1:  # each device updates its own shard
      grads = jax.lax.with_sharding_constraint(grads, self.shardings.params)
    updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
    rate = optimizer.learning_rate(self._config, state.step, steps)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    # The weights of rows that a document fills in part are not one on average.
    mean_weight = metrics.pop('weight')
    metrics = {name: value / jnp.where(mean_weight > 0, mean_weight, 1) for name, value in metrics.items()}
    metrics |= {'gradient_norm': _norm(grads), 'learning_rate': rate}
    return TrainState(state.step + 1, params, state.rest, opt_state), metrics

  def _gradient(
    self, state: TrainState, tokens_BL: jax.Array, weight: jax.Array
  ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], nnx.State]:
    """((loss, metrics), its gradient), of the whole batch or accumulated over microbatches.

    Where the devices split nothing but the batch and weights, each computes the gradient of its rows in `shard_map`, so
    that what is sent is explicit: weights are gathered within a replica, and sums of gradients are scattered within a
    replica and then added over replicas. With tensor parallelism, XLA partitions the whole computation.
    """
    batch = len(tokens_BL)

    def loss_fn(params: nnx.State, tokens_BL: jax.Array, weight: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
      with products.in_training():
        return self._loss(params, state.rest, tokens_BL, weight, batch)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if self.mesh.size == 1 or self.mesh.shape[MODEL] > 1:
      scalars, grads = self._accumulated(gradient, state.params, tokens_BL, weight)
      return scalars, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    specs = {
      partition.path_name(path): sharding.spec
      for path, sharding in jax.tree_util.tree_leaves_with_path(self.shardings.params)
    }

    def of_device(params: nnx.State, tokens_BL: jax.Array, weight: jax.Array) -> Any:
      parts = self._config.microbatches > 1
      if parts:  # gather weights once for all parts
        with partition.on_device(specs):
          own, others = self._by_place(params)
          own = partition.weights_here(own, self._model_config.compute_dtype)
          params = nnx.merge_state(own, partition.weights_here(others))
      with partition.on_device({} if parts else specs):
        scalars, grads = self._accumulated(gradient, params, tokens_BL, weight)
      grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
      return jax.lax.psum(scalars, BATCH), partition.summed(grads, specs, whole=parts)

    split = jax.tree.map(lambda sharding: sharding.spec, self.shardings.params)
    mapped = jax.shard_map(
      of_device,
      mesh=self.mesh,
      in_specs=(split, PartitionSpec(BATCH), PartitionSpec(BATCH)),
      out_specs=(PartitionSpec(), split),
      check_vma=False,
    )
    return mapped(state.params, tokens_BL, weight)

  def _accumulated(self, gradient: Any, params: nnx.State, tokens_BL: jax.Array, weight: jax.Array) -> Any:
    """`gradient` of all microbatches, added in float32."""
    batch, length = tokens_BL.shape
    parameters = sum(x.size for x in jax.tree.leaves(params))
    count = microbatches(self._config, batch, length, self._vocab_size, parameters, self.mesh)
    if count == 1:
      return gradient(params, tokens_BL, weight)

    # A part has every count-th row, so that each device has the rows of all its parts.
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), (tokens_BL, weight))

    def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
      return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, gradient(params, *part)), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, *first)
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes), parts)[0]

  def _loss(
    self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, weight: jax.Array, batch: int
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    def weighted(value_BL: jax.Array) -> jax.Array:
      if weight.ndim == 1:
        return jnp.sum(weight * jnp.mean(value_BL, axis=1)) / batch
      return jnp.sum(weight[:, 1:] * value_BL) / batch

    logits_BLV = self.logits(params, rest, tokens_BL)
    nll_BL = -jax.vmap(token_log_probability)(logits_BLV, tokens_BL)
    loss, mean_weight = weighted(nll_BL), jnp.sum(weight if weight.ndim == 1 else weight[:, 1:]) / batch
    if not self._config.z_loss:
      return loss, {'loss': loss, 'weight': mean_weight}
    square_BL = jnp.square(jax.nn.logsumexp(logits_BLV[:, :-1], axis=-1))
    z_loss = weighted(square_BL)
    return loss + self._config.z_loss * z_loss, {'loss': loss, 'z_loss': z_loss, 'weight': mean_weight}


def _norm(tree: Any) -> jax.Array:
  """Euclidean norm over all leaves; the name of this function in optax changes between versions."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


@functools.lru_cache(maxsize=8)
def _trainer(model_json: str, train_json: str, vocab_size: int, length: int, mesh: Mesh, frozen: bool) -> Trainer:
  sections = ConfigDict(json.loads(model_json)), ConfigDict(json.loads(train_json))
  return Trainer(*sections, vocab_size, length, mesh, frozen)


def trainer(
  model_config: ConfigDict, config: ConfigDict, vocab_size: int, length: int, mesh: Mesh, frozen: bool = False
) -> Trainer:
  """A Trainer, cached for equal arguments, so that proxies and final models of one shape compile once."""
  sections = model_config.to_json(sort_keys=True), config.to_json(sort_keys=True)
  return _trainer(*sections, vocab_size, length, mesh, frozen)

"""Per-example features φ: projected gradients of the output function, as one jitted step over a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsdm_jax.attribution import probes, rademacher
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.core.mesh import BATCH, MODEL, batch_sharding, is_one_cpu, place, replicated, rows_in_cache
from dsdm_jax.lm import attention_tpu, partition
from dsdm_jax.lm.outputs import OutputFn


class FeatureStep(Protocol):
  """Per-example features of one projection.

  `prepare(params, checkpoint)` binds weights and the checkpoint's own projection once; `__call__` then computes phi_BJ
  in float32 from tokens_BL (int32) and weights_BL (float32), a global batch; `jitted` is the compiled function.
  """

  dimension: int
  jitted: Any

  def apply(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array: ...

  def prepare(self, params: Any, checkpoint: int, second_moment: SecondMoment | None = None) -> Any: ...

  def __call__(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array: ...

  def describe(self) -> dict[str, Any]: ...

  def column_owner(self, column: int) -> str:
    """Name of the layer that a column of φ belongs to, for messages."""


@dataclasses.dataclass
class TwoSidedFeatures:
  """φ = Aᵀ G B of each matrix by probes (see `probes`; LoGra, arXiv 2405.13954, uses the same factorisation).

  Norm scales and biases are one more block, and other parameters are ignored. E over A and B of φ·φ' is the inner
  product of the gradients.

      features = TwoSidedFeatures(model, margin, pattern='.*', requested_dimension=4096, seed=0, mesh=mesh)
      phi_BJ = features(features.prepare(nnx.state(model, nnx.Param), checkpoint=0), tokens_BL, weights_BL)

  Args:
    model: an NNX module, tokens_BL → logits_BLV; may be abstract. It is not changed.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar, such as `lm.outputs:margin`.
    pattern: regex over paths of parameters, see `probes.plan`.
    requested_dimension: upper bound of J; `dimension` is J itself, see `probes.plan`.
    seed: of the projections.
    mesh: of `make_mesh`; the batch over `BATCH`, weights by the partition table.

  Raises:
    UserError: no parameter matches the pattern, or J is smaller than the number of layers.
  """

  model: nnx.Module
  output_fn: OutputFn
  pattern: str
  requested_dimension: int
  seed: int
  mesh: Mesh

  def __post_init__(self) -> None:
    self.layers = probes.plan(self.model, self.pattern, self.requested_dimension)
    self.dimension = self.layers[-1].stop

    graphdef, state = nnx.split(self.model)
    abstract = nnx.eval_shape(lambda s: probes.instrument(nnx.merge(graphdef, s), self.layers), state)
    self._graphdef, _, rest = nnx.split(abstract, probes.Probe, ...)
    self._vectors = self.layers[-1].vectors
    batch = batch_sharding(self.mesh)
    self.jitted = jax.jit(
      self.apply,
      in_shardings=(partition.shardings(rest, self.mesh), batch, batch),
      out_shardings=batch,
    )
    self._model_graphdef = graphdef

  def prepare(
    self,
    params: nnx.State,
    checkpoint: int,
    second_moment: SecondMoment | None = None,
    projections: probes.Projections | None = None,
  ) -> nnx.State:
    """The instrumented model's state but for the probes: weights `params`, and A and B of `checkpoint`.

    Args:
      second_moment: preconditions by scaling A and B with its rank-one approximation of each layer.
      projections: A and B of some layers; those of the others are random.
    """
    projections = probes.random_projections(self.layers, self.seed, checkpoint) | (projections or {})
    if second_moment is not None:
      projections = second_moment.into(self.layers, projections)
    model = probes.instrument(nnx.merge(self._model_graphdef, params), self.layers)
    probes.set_projections(model, self.layers, projections)
    _, _, rest = nnx.split(model, probes.Probe, ...)
    return jax.device_put(rest, partition.shardings(rest, self.mesh))

  def __call__(self, prepared: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return self.jitted(prepared, tokens_BL, weights_BL)

  def apply(self, prepared: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """phi_BJ in float32; the pure function behind `__call__`."""
    rows = rows_at_once(self.model, tokens_BL, self.mesh)
    return in_microbatches(functools.partial(self._rows, prepared), rows, tokens_BL, weights_BL)

  def _rows(self, prepared: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    prepared = partition.gathered(prepared, self.mesh)
    zeros = {x.module: jnp.zeros((*x.stack, x.a, x.b), jnp.float32) for x in self.layers if not x.vectors}
    vectors, rest = nnx.split_state(prepared, lambda path, _: '/'.join(map(str, path)) in self._vectors, ...)

    def output(
      probe_of: dict[str, jax.Array], vectors: nnx.State, tokens_L: jax.Array, weights_L: jax.Array
    ) -> jax.Array:
      flat = {(*_path(path), 'probe'): probes.Probe(value) for path, value in probe_of.items()}
      model = nnx.merge(self._graphdef, nnx.from_flat_state(flat), vectors, rest)
      return self.output_fn(model(tokens_L[None])[0], tokens_L, weights_L)

    gradients = jax.vmap(jax.grad(output, argnums=(0, 1)), in_axes=(None, None, 0, 0), spmd_axis_name=BATCH)
    with attention_tpu.on_mesh(self.mesh):
      grads, of_vectors = gradients(zeros, vectors, tokens_BL, weights_BL)
    batch = tokens_BL.shape[0]
    parts = [grads[x.module].reshape(batch, -1) for x in self.layers if not x.vectors]
    if self._vectors:
      grad_of = {'/'.join(map(str, path)): g[...] for path, g in nnx.to_flat_state(of_vectors)}
      grad_BI = jnp.concatenate([grad_of[path].reshape(batch, -1) for path in self._vectors], axis=1)
      sides = prepared[self.layers[-1].module]
      parts.append(grad_BI @ sides['input_projection'][...] * sides['output_projection'][...])
    return jnp.concatenate(parts, axis=1)

  def describe(self) -> dict[str, Any]:
    return {'projection': 'two_sided', 'layers': [dataclasses.asdict(layer) for layer in self.layers]}

  def column_owner(self, column: int) -> str:
    layer = next(layer for layer in self.layers if column < layer.stop)
    if not layer.stack:
      return layer.path
    at = np.unravel_index((column - layer.start) // (layer.a * layer.b), layer.stack)
    return f'{layer.path}, layer {".".join(map(str, at))} of the stack'


@dataclasses.dataclass
class DenseFeatures:
  """φ = R g of the gradient g of all W parameters, as in TRAK (arXiv 2303.14186) and DsDm (see `rademacher`).

      features = DenseFeatures(model, margin, dimension=4096, seed=0, mesh=mesh)
      phi_BJ = features(features.prepare(nnx.state(model, nnx.Param), checkpoint=0), tokens_BL, weights_BL)

  Args:
    model, output_fn, seed, mesh: as for `TwoSidedFeatures`.
    dimension: J.
    microbatch: rows whose gradients are held at once, over all devices; divides the batch and is a multiple of the
      mesh's `data`. Memory is about microbatch × W; R is generated once per microbatch. 0 takes the whole batch.
  """

  model: nnx.Module
  output_fn: OutputFn
  dimension: int
  seed: int
  mesh: Mesh
  microbatch: int = 0

  def __post_init__(self) -> None:
    params = nnx.state(self.model, nnx.Param)
    self._gradients = per_example(self.model, self.output_fn, self.mesh)
    batch = batch_sharding(self.mesh)
    columns = MODEL if self.dimension % self.mesh.shape[MODEL] == 0 else None
    self._layout = NamedSharding(self.mesh, PartitionSpec(BATCH, columns))
    weights = partition.shardings(params, self.mesh)
    # The scale may be None; `prepare` has placed it.
    self.jitted = jax.jit(
      self.apply, in_shardings=((weights, replicated(self.mesh), None), batch, batch), out_shardings=self._layout
    )

  def prepare(
    self, params: nnx.State, checkpoint: int, second_moment: SecondMoment | None = None
  ) -> tuple[nnx.State, list[jax.Array], nnx.State | None]:
    """(weights, keys of R, factor of each gradient entry: 1/(√v + ε), or None)."""
    weights = partition.shardings(params, self.mesh)
    # As plain numbers: typed keys cannot be placed on devices of other processes.
    with jax.ensure_compile_time_eval():  # also under `eval_shape`
      data = [np.asarray(jax.random.key_data(key)) for key in rademacher.keys(params, self.seed, checkpoint)]
    return (
      jax.device_put(params, weights),
      [jax.random.wrap_key_data(x) for x in place(data, replicated(self.mesh))],
      None if second_moment is None else jax.device_put(second_moment.scale(params), weights),
    )

  def __call__(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return self.jitted(prepared, tokens_BL, weights_BL)

  def apply(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """phi_BJ in float32; the pure function behind `__call__`."""
    return in_microbatches(functools.partial(self._rows, prepared), self.microbatch, tokens_BL, weights_BL)

  def _rows(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    params, leaf_keys, scale = prepared
    grads = self._gradients(params, tokens_BL, weights_BL)
    if scale is not None:
      grads = jax.tree.map(lambda g, s: g * s[None], grads, partition.gathered(scale, self.mesh))
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=self._layout)
    return rademacher.project(grads, leaf_keys, self.dimension, place)

  def describe(self) -> dict[str, Any]:
    return {'projection': 'dense', 'layers': 'all parameters'}

  def column_owner(self, column: int) -> str:
    del column
    return 'all parameters'


def per_example(
  model: nnx.Module, output_fn: OutputFn, mesh: Mesh
) -> Callable[[nnx.State, jax.Array, jax.Array], nnx.State]:
  """(params, tokens_BL, weights_BL) → the gradient of each row by all parameters, [B, *parameter shape]; pure."""
  graphdef, _, rest = nnx.split(model, nnx.Param, ...)

  def output(params: nnx.State, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
    return output_fn(nnx.merge(graphdef, params, rest)(tokens_L[None])[0], tokens_L, weights_L)

  rows = jax.vmap(jax.grad(output), in_axes=(None, 0, 0), spmd_axis_name=BATCH)

  def gradients(params: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> nnx.State:
    with attention_tpu.on_mesh(mesh):
      return rows(partition.gathered(params, mesh), tokens_BL, weights_BL)

  return gradients


def rows_at_once(model: nnx.Module, tokens_BL: jax.Array, mesh: Mesh, at_least: int = 0) -> int:
  """`rows_in_cache` on a single CPU device, else the whole batch; the model may be abstract."""
  batch, length = tokens_BL.shape
  if not is_one_cpu(mesh):
    return batch
  graphdef, state = nnx.split(model)
  one = jax.ShapeDtypeStruct((1, length), jnp.int32)
  logits = jax.eval_shape(lambda state, tokens_BL: nnx.merge(graphdef, state)(tokens_BL), state, one)
  return rows_in_cache(batch, length, logits.shape[-1], at_least)


def in_microbatches(
  function: Callable[..., jax.Array], rows: int, tokens_BL: jax.Array, weights_BL: jax.Array
) -> jax.Array:
  """`function(tokens_BL, weights_BL)` [B, …], `rows` examples at a time one after the other; all at once at 0."""
  batch, length = tokens_BL.shape
  if rows in (0, batch):
    return function(tokens_BL, weights_BL)
  # Row n of the batch goes to microbatch n mod (batch/rows): each device splits its own rows and sends nothing.
  split = (rows, batch // rows, length)
  inputs = tuple(x.reshape(split).swapaxes(0, 1) for x in (tokens_BL, weights_BL))
  out = jax.lax.map(lambda x: function(*x), inputs).swapaxes(0, 1)
  return out.reshape(batch, *out.shape[2:])


def _path(path: str) -> tuple[str | int, ...]:
  return tuple(int(part) if part.isdigit() else part for part in path.split('/'))

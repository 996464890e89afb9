"""Scores without features: ∇f_n·v, a directional derivative. In the dense projection φ(n)·u = ∇f_n·(Rᵀu), so v = Rᵀu.

One forward-mode pass over a batch gives it exactly, over all parameters and at any J, without a gradient and without
residuals of a backward pass. At the head's product z = h Wᵀ, the largest array, it needs no tangents: with q = ∂f/∂z
they would give ⟨q, dh Wᵀ + h dWᵀ⟩ = ⟨q W, dh⟩ + ⟨q dW, h⟩, as many products with less traffic.

Each further direction would add a pass over tangents, two products of three. The backward pass of several directions
costs three products for all of them: a layer's wrapper makes the gradient G of one row from the layer's inputs and its
outputs' gradients and gives ⟨G, v⟩ of each direction at once. No more than one layer's gradients are held.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsdm_jax.attribution import probes, rademacher
from dsdm_jax.attribution.gradients import in_microbatches, rows_at_once
from dsdm_jax.attribution.probes import ProbedLayer
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.core.mesh import BATCH, batch_sharding
from dsdm_jax.lm import attention_tpu, partition
from dsdm_jax.lm.decoder import Decoder, Table
from dsdm_jax.lm.outputs import OutputFn

Prepared = tuple[nnx.State, Any]


@jax.custom_vjp
def contracted_matmul(x: jax.Array, w_IO: jax.Array, score_K: jax.Array, v_KIO: jax.Array) -> jax.Array:
  """x @ w for x [..., I], whose cotangent with respect to `score_K` is ⟨Σ x dyᵀ, v_k⟩ in float32."""
  del score_K, v_KIO
  return x @ w_IO


def _matmul_forward(x: jax.Array, w_IO: jax.Array, score_K: jax.Array, v_KIO: jax.Array) -> tuple[jax.Array, Any]:
  del score_K
  return x @ w_IO, (x, w_IO, v_KIO)


def _matmul_backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array, None, jax.Array, None]:
  x, w_IO, v_KIO = residuals
  gradient_IO = jnp.einsum('...i,...o->io', x, dy, preferred_element_type=jnp.float32)
  return dy @ w_IO.T, None, _inner('kio,io->k', v_KIO, gradient_IO), None


contracted_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def contracted_lookup(tokens: jax.Array, w_VD: jax.Array, score_K: jax.Array, v_KVD: jax.Array) -> jax.Array:
  """Rows of `w_VD` for int32 `tokens`: `contracted_matmul` with one-hot inputs."""
  del score_K, v_KVD
  return jnp.take(w_VD, tokens, axis=0)


def _lookup_forward(tokens: jax.Array, w_VD: jax.Array, score_K: jax.Array, v_KVD: jax.Array) -> tuple[jax.Array, Any]:
  del score_K
  return jnp.take(w_VD, tokens, axis=0), (tokens, v_KVD)


def _lookup_backward(residuals: Any, dy: jax.Array) -> tuple[None, None, jax.Array, None]:
  tokens, v_KVD = residuals
  dy, (count, rows, _) = dy.astype(jnp.float32), v_KVD.shape
  if count * tokens.size < rows:
    score_K = _inner('k...d,...d->k', jnp.take(v_KVD, tokens, axis=1), dy)
  else:  # one scatter instead of a gather for each direction
    score_K = _inner('kvd,vd->k', v_KVD, jnp.zeros_like(v_KVD[0]).at[tokens].add(dy))
  return None, None, score_K, None


contracted_lookup.defvjp(_lookup_forward, _lookup_backward)

# The direction comes first: for one row at a time, XLA on CPU would otherwise copy it into columns.
_inner = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class ContractedLinear(probes.LinearWrapper):
  """A linear layer; the gradient of `score` [*stack, K] is that of the kernel along each of `direction`."""

  def __init__(self, linear: nnx.Linear, score_K: jax.Array, direction_KIO: jax.Array):
    super().__init__(linear)
    self.score, self.direction = nnx.Variable(score_K), nnx.Variable(direction_KIO)

  def product(self, x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return contracted_matmul(x, kernel_IO, self.score[...], self.direction[...])


class ContractedTable(probes.TableWrapper):
  """An embedding table, over lookups and a tied head; as `ContractedLinear`."""

  def __init__(self, embed: nnx.Embed, layer: ProbedLayer, score_K: jax.Array, direction_KVD: jax.Array):
    super().__init__(embed, layer)
    self.score, self.direction = nnx.Variable(score_K), nnx.Variable(direction_KVD)

  def lookup(self, tokens: jax.Array, table_VD: jax.Array) -> jax.Array:
    return contracted_lookup(tokens, table_VD, self.score[...], self.direction[...])

  def product(self, x: jax.Array, table_DV: jax.Array) -> jax.Array:
    return contracted_matmul(x, table_DV, self.score[...], self.direction[...].swapaxes(-1, -2))


def _ends_in_product(model: nnx.Module) -> bool:
  """Whether the logits are h Wᵀ, maybe capped: not those of a model of the user's, or with another head."""
  if type(model) is not Decoder:
    return False
  if model.head is None:
    return type(model.embedding) is Table
  return type(model.head) is nnx.Linear and not model.head.use_bias


@dataclasses.dataclass
class DirectionalScores:
  """Scores of rows for T directions, or T solved vectors u, at once.

  Args:
    model: an NNX module, tokens_BL → logits_BLV; may be abstract.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar; or an array, and then scores are of its entries
      (`lm.outputs:margin_shares` for those of tokens).
    seed: of the projection; the same as for the features that u was solved with.
    mesh: batch over `data`, weights and directions by the partition table.
    microbatch: rows that are computed at once, as for `DenseFeatures`; 0 takes the whole batch, or on one CPU
      device what its caches hold.
  """

  model: nnx.Module
  output_fn: OutputFn
  seed: int
  mesh: Mesh
  microbatch: int = 0

  def __post_init__(self) -> None:
    self._graphdef, _, self._rest = nnx.split(self.model, nnx.Param, ...)
    self._layers = list(probes.matrices(self.model))
    batch = batch_sharding(self.mesh)
    self.jitted = jax.jit(self.apply, in_shardings=(None, batch, batch), out_shardings=batch)

  def prepare(
    self, params: nnx.State, u_JT: np.ndarray | jax.Array, checkpoint: int, second_moment: SecondMoment | None = None
  ) -> Prepared:
    """Weights and Rᵀu, float32 [T, *parameter shape], laid out like the weights.

    Args:
      u_JT: float32; scores have its scale.
      second_moment: that of the features if they were preconditioned.
    """
    leaf_keys = rademacher.keys(params, self.seed, checkpoint)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    directions = jax.jit(functools.partial(rademacher.transpose, like=like))(jnp.asarray(u_JT), leaf_keys=leaf_keys)
    if second_moment is not None:
      directions = jax.tree.map(lambda v, s: v * s[None], directions, second_moment.scale(params))
    return self.placed(params, directions)

  def placed(self, params: nnx.State, directions: Any) -> Prepared:
    """Weights and directions, a pytree like `params` of [T, *parameter shape], on the devices of the mesh."""
    return jax.device_put((params, directions), partition.shardings((params, directions), self.mesh))

  def __call__(self, prepared: Prepared, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return self.jitted(prepared, tokens_BL, weights_BL)

  def apply(self, prepared: Prepared, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """score_BT in float32; axes of an array-valued output function come before T."""
    # Each part reads the directions, and should have as much of logits.
    read = 4 * sum(v.size for v in jax.tree.leaves(prepared[1]))
    rows = self.microbatch or rows_at_once(self.model, tokens_BL, self.mesh, at_least=read)
    return in_microbatches(functools.partial(self._rows, prepared), rows, tokens_BL, weights_BL)

  def _rows(self, prepared: Prepared, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    params, directions = partition.gathered(prepared, self.mesh)
    count = jax.tree.leaves(directions)[0].shape[0]

    def outputs(params: nnx.State) -> jax.Array:
      logits_BLV = nnx.merge(self._graphdef, params, self._rest)(tokens_BL)
      return jax.vmap(self.output_fn)(logits_BLV, tokens_BL, weights_BL)

    def along(direction: nnx.State) -> jax.Array:
      return jax.jvp(outputs, (params,), (direction,))[1]

    of_rows = jax.eval_shape(outputs, params).ndim == 1
    if count == 1:
      direction = jax.tree.map(lambda v: v[0], directions)
      if of_rows and _ends_in_product(self.model):
        return self._along(params, direction, tokens_BL, weights_BL)[:, None]
      return along(direction)[..., None]
    if not of_rows:
      return jax.vmap(along, out_axes=-1)(directions)
    while True:
      try:
        return self._contracted(params, directions, count, tokens_BL, weights_BL)
      except probes.TableReadError as error:  # its gradient is explicit
        self._layers = [layer for layer in self._layers if layer.path != error.path]

  def _along(self, params: nnx.State, direction: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """score_B: in forward mode up to the head's inputs h, and in reverse mode from the outputs to the logits."""

    def with_weights(weights: nnx.State) -> Decoder:
      return nnx.merge(self._graphdef, weights, self._rest)

    def output(product_BLV: jax.Array) -> jax.Array:
      logits_BLV = with_weights(params).capped(product_BLV)
      return jnp.sum(jax.vmap(self.output_fn)(logits_BLV, tokens_BL, weights_BL))

    h_BLD, dh_BLD = jax.jvp(lambda weights: with_weights(weights).hidden(tokens_BL), (params,), (direction,))
    q_BLV = jax.grad(output)(with_weights(params).project(h_BLD))

    def times(weights: nnx.State) -> jax.Array:
      [product_BLD] = jax.linear_transpose(with_weights(weights).project, h_BLD)(q_BLV)
      return product_BLD.astype(jnp.float32)

    return _inner('bld,bld->b', times(params), dh_BLD.astype(jnp.float32)) + _inner(
      'bld,bld->b', times(direction), h_BLD.astype(jnp.float32)
    )

  def _contracted(
    self, params: nnx.State, directions: Any, count: int, tokens_BL: jax.Array, weights_BL: jax.Array
  ) -> jax.Array:
    """score_BT by one backward pass."""
    direction_of = {partition.path_name(p): v for p, v in jax.tree_util.tree_leaves_with_path(directions)}
    paths = {layer.path for layer in self._layers}
    others, matrices = nnx.split_state(params, lambda path, _: '/'.join(map(str, path)) not in paths, ...)

    def output(
      score_of: dict[str, jax.Array], others: nnx.State, tokens_L: jax.Array, weights_L: jax.Array
    ) -> jax.Array:
      def wrap(module: Any, layer: ProbedLayer) -> nnx.Module:
        score_K, v_KIO = score_of[layer.path], jnp.moveaxis(direction_of[layer.path], 0, len(layer.stack))
        if isinstance(module, nnx.Embed):
          return ContractedTable(module, layer, score_K, v_KIO)
        return ContractedLinear(module, score_K, v_KIO)

      model = nnx.merge(self._graphdef, others, matrices, self._rest)
      logits_BLV = probes.instrument(model, self._layers, wrap)(tokens_L[None])
      return self.output_fn(logits_BLV[0], tokens_L, weights_L)

    zeros = {layer.path: jnp.zeros((*layer.stack, count), jnp.float32) for layer in self._layers}
    rows = jax.vmap(jax.grad(output, argnums=(0, 1)), in_axes=(None, None, 0, 0), spmd_axis_name=BATCH)
    with attention_tpu.on_mesh(self.mesh):
      score_of, gradients = rows(zeros, others, tokens_BL, weights_BL)
    parts = [score.reshape(len(tokens_BL), -1, count).sum(axis=1) for score in score_of.values()]
    parts += [
      _inner('b...,t...->bt', g.astype(jnp.float32), direction_of[partition.path_name(path)])
      for path, g in jax.tree_util.tree_leaves_with_path(gradients)
    ]
    return sum(parts, jnp.zeros((len(tokens_BL), count), jnp.float32))

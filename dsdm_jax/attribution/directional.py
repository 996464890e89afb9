"""Scores without features: ∇f_n·v, a directional derivative. In the dense projection φ(n)·u = ∇f_n·(Rᵀu), so v = Rᵀu.

One forward-mode pass over a batch gives it exactly, over all parameters and at any J, without a gradient and without
residuals of a backward pass. Each further direction would add a pass over tangents, two products of three. A gradient
costs three products and then serves all directions, so several directions take the gradients of a microbatch.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsdm_jax.attribution import rademacher
from dsdm_jax.attribution.gradients import in_microbatches, per_example
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.core.mesh import batch_sharding
from dsdm_jax.lm import partition
from dsdm_jax.lm.outputs import OutputFn

Prepared = tuple[nnx.State, Any]


@dataclasses.dataclass
class DirectionalScores:
  """Scores of rows for T directions, or T solved vectors u, at once.

  Args:
    model: an NNX module, tokens_BL → logits_BLV; may be abstract.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar; or an array, and then scores are of its entries
      (`lm.outputs:margin_shares` for those of tokens).
    seed: of the projection; the same as for the features that u was solved with.
    mesh: batch over `data`, weights and directions by the partition table.
    microbatch: rows that are computed at once, as for `DenseFeatures`; 0 takes the whole batch.
  """

  model: nnx.Module
  output_fn: OutputFn
  seed: int
  mesh: Mesh
  microbatch: int = 0

  def __post_init__(self) -> None:
    self._graphdef, _, self._rest = nnx.split(self.model, nnx.Param, ...)
    self._gradients = per_example(self.model, self.output_fn, self.mesh)
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
    return in_microbatches(functools.partial(self._rows, prepared), self.microbatch, tokens_BL, weights_BL)

  def _rows(self, prepared: Prepared, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    params, directions = partition.gathered(prepared, self.mesh)
    count = jax.tree.leaves(directions)[0].shape[0]

    def outputs(params: nnx.State) -> jax.Array:
      logits_BLV = nnx.merge(self._graphdef, params, self._rest)(tokens_BL)
      return jax.vmap(self.output_fn)(logits_BLV, tokens_BL, weights_BL)

    def along(direction: nnx.State) -> jax.Array:
      return jax.jvp(outputs, (params,), (direction,))[1]

    if count == 1:
      return along(jax.tree.map(lambda v: v[0], directions))[..., None]
    if jax.eval_shape(outputs, params).ndim == 1:
      dot = functools.partial(jnp.einsum, 'b...,t...->bt', precision=jax.lax.Precision.HIGHEST)
      gradients = self._gradients(params, tokens_BL, weights_BL)
      return sum(jax.tree.leaves(jax.tree.map(dot, gradients, directions)), jnp.zeros((len(tokens_BL), count)))
    return jax.vmap(along, out_axes=-1)(directions)

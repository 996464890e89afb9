"""Scores in the dense projection without features: φ(n)·u = ∇f_n·(Rᵀu), a directional derivative.

One forward-mode pass over a batch gives it exactly, over all parameters and at any J, without a gradient and without
residuals of a backward pass. Several targets share the pass over values; each adds a pass over tangents.
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
from dsdm_jax.attribution.gradients import in_microbatches
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.core.mesh import batch_sharding
from dsdm_jax.lm import partition
from dsdm_jax.lm.outputs import OutputFn

Prepared = tuple[nnx.State, Any]


@dataclasses.dataclass
class DirectionalScores:
  """Scores of rows for T solved vectors u at once.

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
    return jax.device_put((params, directions), partition.shardings((params, directions), self.mesh))

  def __call__(self, prepared: Prepared, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return self.jitted(prepared, tokens_BL, weights_BL)

  def apply(self, prepared: Prepared, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """score_BT in float32; axes of an array-valued output function come before T."""
    return in_microbatches(functools.partial(self._rows, prepared), self.microbatch, tokens_BL, weights_BL)

  def _rows(self, prepared: Prepared, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    params, directions = partition.gathered(prepared, self.mesh)

    def outputs(params: nnx.State) -> jax.Array:
      logits_BLV = nnx.merge(self._graphdef, params, self._rest)(tokens_BL)
      return jax.vmap(self.output_fn)(logits_BLV, tokens_BL, weights_BL)

    def along(direction: nnx.State) -> jax.Array:
      return jax.jvp(outputs, (params,), (direction,))[1]

    if jax.tree.leaves(directions)[0].shape[0] == 1:
      return along(jax.tree.map(lambda v: v[0], directions))[..., None]
    return jax.vmap(along, out_axes=-1)(directions)

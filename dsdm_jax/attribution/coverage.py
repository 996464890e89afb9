"""How much of the gradient a two-sided projection covers: the share of ‖g‖² in parameters with and without a probe.

Parameters outside `features.layers` have no probe, nor have those of layers that `probes.plan` does not know. The share
is measured on a few rows by explicit gradients, one row at a time.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsdm_jax.attribution.probes import ProbedLayer
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.core.mesh import fetch, place, replicated
from dsdm_jax.lm import attention_tpu, partition
from dsdm_jax.lm.outputs import OutputFn

ROWS = 8


@dataclasses.dataclass
class GradientCoverage:
  """Squared norms of single gradients, parameter by parameter.

  Args:
    model: an NNX module, tokens_BL → logits_BLV; may be abstract.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar.
    layers: those with a probe.
    mesh: weights and their gradient by the partition table.
  """

  model: nnx.Module
  output_fn: OutputFn
  layers: Sequence[ProbedLayer]
  mesh: Mesh

  def __post_init__(self) -> None:
    self._graphdef, params, self._rest = nnx.split(self.model, nnx.Param, ...)
    self._shardings = partition.shardings(params, self.mesh)
    alone = replicated(self.mesh)
    self._step = jax.jit(self.apply, in_shardings=((self._shardings, None), alone, alone), out_shardings=alone)

  def apply(
    self, prepared: tuple[nnx.State, nnx.State | None], tokens_L: jax.Array, weights_L: jax.Array
  ) -> dict[str, jax.Array]:
    """Path → Σ g² of one row, float32; g is multiplied by the scale if there is one."""
    params, scale = partition.gathered(prepared, self.mesh)

    def output(params: nnx.State) -> jax.Array:
      logits_BLV = nnx.merge(self._graphdef, params, self._rest)(tokens_L[None])
      return self.output_fn(logits_BLV[0], tokens_L, weights_L)

    with attention_tpu.on_mesh(self.mesh):
      gradient = jax.lax.with_sharding_constraint(jax.grad(output)(params), self._shardings)
    if scale is not None:
      gradient = jax.tree.map(jnp.multiply, gradient, scale)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return {partition.path_name(path): jnp.sum(jnp.square(g.astype(jnp.float32))) for path, g in leaves}

  def unprobed(
    self, params: nnx.State, tokens_BL: np.ndarray, weights_BL: np.ndarray, second_moment: SecondMoment | None = None
  ) -> dict[str, Any]:
    """Share of ‖g‖² in parameters without a probe, mean over the rows.

    Args:
      second_moment: gradients are first divided by its root, exactly, as in the dense projection.

    Returns:
      'share': of all of them; 'rows': how many were measured; 'parameters': path, with '*' for the number of a block →
      its own share, largest first.
    """
    params = jax.device_put(params, self._shardings)
    scale = None if second_moment is None else jax.device_put(second_moment.scale(params), self._shardings)
    probed = {path for layer in self.layers for path in layer.parameters}
    shares: dict[str, float] = {}
    for row in zip(tokens_BL, weights_BL, strict=True):
      squares = fetch(self._step((params, scale), *place(row, replicated(self.mesh))))
      total = sum(map(float, squares.values())) or 1.0
      for path, square in squares.items():
        if path not in probed:
          name = re.sub(r'(?<=/)\d+(?=/)', '*', path)
          shares[name] = shares.get(name, 0.0) + float(square) / total / len(tokens_BL)
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return {'share': sum(shares.values()), 'rows': len(tokens_BL), 'parameters': dict(ordered)}

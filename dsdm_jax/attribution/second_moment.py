"""Preconditioning by Adam's second moments: inner products of g/(√v + ε) instead of g.

Both factors of an inner product are divided, so it is g_tᵀ diag(1/v) g_z up to ε. This is not the effect of an Adam
step: that step on a row with gradient g_z moves θ by −η g_z/√v and lowers a target's loss by η g_tᵀ diag(1/√v) g_z.
Features for that effect divide g by v^(1/4) on both sides, the gradient in the coordinates in which Adam's step is a
plain gradient step, or g by √v in one factor only.

In a dense projection the division is exact. A two-sided projection has no entry of g to divide; there each matrix'
v ∈ R^{I×O} is replaced by the matrix of rank one with the same row sums r and column sums c, r cᵀ/Σr (Adafactor, arXiv
1804.04235), whose inverse root is a scaling of A's rows and of B's rows. For vectors (O = 1) this is exact.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsdm_jax.attribution.probes import ProbedLayer, Projections
from dsdm_jax.core.mesh import fetch
from dsdm_jax.errors import UserError
from dsdm_jax.lm.partition import path_name

# Lower bound of v, relative to its mean. A token that no proxy has seen has v = 0, and 1/ε = 1e8 would dominate all.
_FLOOR = 1e-6


def adam_state(opt_state: Any) -> optax.ScaleByAdamState | None:
  """The one state of Adam within an optax state; None if there is no such state, or it took no step."""
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
  states = [x for x in leaves if isinstance(x, optax.ScaleByAdamState)]
  return states[0] if len(states) == 1 and int(states[0].count) else None


@dataclasses.dataclass(frozen=True)
class SecondMoment:
  """Adam's v of every parameter.

  Attributes:
    of_path: path of the parameter → v, float32, bias-corrected.
    epsilon: Adam's ε.
    epsilon_root: Adam's ε under the root.
  """

  of_path: Mapping[str, jax.Array]
  epsilon: float
  epsilon_root: float = 0.0

  @classmethod
  def of_state(cls, opt_state: Any, b2: float, epsilon: float, epsilon_root: float = 0.0) -> 'SecondMoment':
    """From an optax state that holds one `ScaleByAdamState`.

    Raises:
      UserError: there is no such state, or it took no step.
    """
    state = adam_state(opt_state)
    if state is None:
      raise UserError(
        'features.precondition=adam needs second moments, but the proxy took no step of Adam; '
        'set --config.features.precondition=none'
      )
    correction = 1 - b2 ** int(state.count)
    leaves = jax.tree_util.tree_leaves_with_path(state.nu)
    return cls({path_name(path): v / correction for path, v in leaves}, epsilon, epsilon_root)

  def scale(self, params: Any) -> Any:
    """1/(√v + ε), v at least `_FLOOR` of its mean over the last two axes; a pytree like `params`."""

    def one(path: Any, _: Any) -> jax.Array:
      v = self.of_path[path_name(path)]
      v = jnp.maximum(v, _FLOOR * v.mean(axis=tuple(range(v.ndim))[-2:], keepdims=True))
      return 1 / (jnp.sqrt(v + self.epsilon_root) + self.epsilon)

    return jax.tree_util.tree_map_with_path(one, params)

  def into(self, layers: Sequence[ProbedLayer], projections: Projections) -> Projections:
    """A and B divided by the rank-one root of v: (D_r A)ᵀ G (D_c B) with D_r D_c entries √(Σr/(r_i c_o))."""
    scaled = {}
    for layer in layers:
      row_I, column_O = self.factors(layer)
      a, b = projections[layer.path]
      scaled[layer.path] = (a / jnp.asarray(row_I)[..., None], b / jnp.asarray(column_O)[..., None])
    return scaled

  def rank_one_error(self, layers: Sequence[ProbedLayer]) -> dict[str, float]:
    """For each layer ‖g̃ − ĝ‖/‖g̃‖ of a typical gradient, whose entries are ±√v, preconditioned both ways.

    Exact preconditioning makes each entry √v/(√v + ε), that of rank one √v/√(r cᵀ/Σr).
    """
    errors = {}
    for layer in layers:
      row_I, column_O = self.factors(layer)
      root = np.sqrt(self._of_layer(layer))
      exact = root / (np.sqrt(root**2 + self.epsilon_root) + self.epsilon)
      approximate = root / (row_I[..., :, None].astype(np.float64) * column_O[..., None, :])
      errors[layer.path] = float(np.linalg.norm(approximate - exact) / (np.linalg.norm(exact) or 1.0))
    return errors

  def factors(self, layer: ProbedLayer) -> tuple[np.ndarray, np.ndarray]:
    """float32 [*stack, I] and [*stack, O] whose outer product is √(r cᵀ/Σr) + ε, nearly."""
    v = self._of_layer(layer)
    v = np.maximum(v, _FLOOR * v.mean(axis=(-2, -1), keepdims=True)) + self.epsilon_root + self.epsilon**2
    row_I, column_O = v.mean(axis=-1), v.mean(axis=-2)
    mean = row_I.mean(axis=-1, keepdims=True)
    return np.sqrt(row_I).astype(np.float32), np.sqrt(column_O / mean).astype(np.float32)

  def _of_layer(self, layer: ProbedLayer) -> np.ndarray:
    """v [*stack, I, O] in float64."""
    parts = [np.ravel(fetch(self.of_path[path])) for path in layer.parameters]
    return np.concatenate(parts).astype(np.float64).reshape(*layer.stack, layer.inputs, layer.outputs)

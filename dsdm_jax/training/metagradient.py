"""The oracle: how the targets' outputs change with the weight of each row, by differentiating through training.

dF_k/dw at w = 1, where F_k is the mean output of a task's examples at the end of training: what a linear datamodel is
in the limit of small changes, and exact there (MAGIC, arXiv 2504.16430; REPLAY, arXiv 2503.13751). It is true of one
initialisation and order, costs some trainings for each task, and needs Adam's ε inside the root (`adam_eps_root`), as
the derivative of √v is infinite where a second moment is zero.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dsdm_jax.core import flops
from dsdm_jax.errors import UserError
from dsdm_jax.training.differentiable import ScannedTraining, TargetOutputs
from dsdm_jax.training.step import TrainState

LEAST_EPS_ROOT = 1e-8  # `adam_eps_root` below which derivatives through Adam are useless


class Metagradient:
  """Args: training; outputs: what is measured; member_KT: bool, which examples each task has.

  Attributes:
    apply: (weight_N, state before training, order_SB) → output_K; pure.
  """

  def __init__(self, training: ScannedTraining, outputs: TargetOutputs, member_KT: np.ndarray):
    mean_KT = jnp.asarray(member_KT / member_KT.sum(axis=1, keepdims=True), jnp.float32)

    def final(weight_N: jax.Array, state: TrainState, order_SB: jax.Array) -> jax.Array:
      return mean_KT @ outputs.apply(training.advance(state, weight_N, order_SB))[0]

    def gradient(weight_N: jax.Array, state: TrainState, order_SB: jax.Array) -> tuple[jax.Array, jax.Array]:
      output_K, backward = jax.vjp(lambda w: final(w, state, order_SB), weight_N)
      return output_K, jax.vmap(backward)(jnp.eye(len(output_K)))[0]

    self._training, self.apply = training, final
    self._gradient, self._final = jax.jit(gradient), jax.jit(final)

  def __call__(self, run: int | str, weight_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(output_K, derivative_KN) at the weights `weight_N`, float32.

    Raises:
      UserError: a derivative is not finite.
    """
    output_K, derivative_KN = self._gradient(jnp.asarray(weight_N, jnp.float32), *self._begin(run))
    if not np.isfinite(derivative_KN).all():
      raise UserError(
        'the derivative of training is not finite; raise proxies.train.adam_eps_root (1e-8 is the least that helps), '
        'or lower proxies.train.learning_rate'
      )
    return np.asarray(output_K), np.asarray(derivative_KN)

  def flop(self, run: int | str) -> float:
    """Operations of one call, the passes made anew on the way back among them."""
    weight_N = jax.ShapeDtypeStruct((self._training.rows,), jnp.float32)
    return flops.count(self._gradient, weight_N, *self._begin(run))

  def output(self, run: int | str, weight_N: np.ndarray) -> np.ndarray:
    """output_K alone, float32: what a finite difference is made of."""
    return np.asarray(self._final(jnp.asarray(weight_N, jnp.float32), *self._begin(run)))

  def _begin(self, run: int | str) -> tuple[TrainState, jax.Array]:
    return self._training.start(run), jnp.asarray(self._training.order(run))

"""Leading eigenvectors of each layer's covariances, as A and B of the two-sided projection in place of random ones.

For y = xW the gradient of one example is Σ_l x_l dy_lᵀ. The second moment of x over tokens is I×I, that of dy is O×O,
and AᵀGB with their leading eigenvectors keeps the directions in which inputs and output gradients have most power, as
LoGra does (arXiv 2405.13954). Inner products are then those of the projected part of G, which is
no unbiased estimate of those of G. Tables, whose inputs have V² second moments, and vectors keep random projections.

A measured layer carries a probe for each moment, whose gradient is the moment itself: reverse mode of the summed
output function gives all of them in one pass, with no weight gradient.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jax.sharding import Mesh

from dsdm_jax.attribution import probes
from dsdm_jax.attribution.probes import ProbedLayer, Projections
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.core import storage
from dsdm_jax.core.mesh import batch_sharding, batch_shards, fetch, place, replicated
from dsdm_jax.core.storage import Location
from dsdm_jax.lm import partition
from dsdm_jax.lm.outputs import OutputFn

Moments = dict[str, tuple[np.ndarray, np.ndarray]]  # path → Σ x xᵀ [*stack, I, I] and Σ dy dyᵀ [*stack, O, O]


class Moment(nnx.Variable):
  """Zeros whose gradient is a second moment."""


@jax.custom_vjp
def measured_matmul(x: jax.Array, w_IO: jax.Array, in_II: jax.Array, out_OO: jax.Array) -> jax.Array:
  """x @ w for x [..., I]; reverse mode gives `in_II` the cotangent Σ x xᵀ and `out_OO` Σ dy dyᵀ, in float32.

  Both sums are over tokens with dy ≠ 0.
  """
  del in_II, out_OO
  return x @ w_IO


def _measured_forward(
  x: jax.Array, w_IO: jax.Array, in_II: jax.Array, out_OO: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  del in_II, out_OO
  return x @ w_IO, (x, w_IO)


def _measured_backward(
  residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array]:
  x, w_IO = residuals
  x = jnp.where(jnp.any(dy != 0, axis=-1, keepdims=True), x, 0)  # padding has no part in the gradient
  in_II, out_OO = (jnp.einsum('...i,...j->ij', v, v, preferred_element_type=jnp.float32) for v in (x, dy))
  return dy @ w_IO.T, None, in_II, out_OO


measured_matmul.defvjp(_measured_forward, _measured_backward)


class MeasuredLinear(probes.LinearWrapper):
  """A linear layer whose moments' gradients are sums over tokens of x xᵀ and dy dyᵀ."""

  def __init__(self, linear: nnx.Linear, layer: ProbedLayer):
    super().__init__(linear)
    self.in_moment = Moment(jnp.zeros((*layer.stack, layer.inputs, layer.inputs), jnp.float32))
    self.out_moment = Moment(jnp.zeros((*layer.stack, layer.outputs, layer.outputs), jnp.float32))

  def product(self, x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return measured_matmul(x, kernel_IO, self.in_moment[...], self.out_moment[...])


def measured(layers: Sequence[ProbedLayer]) -> tuple[ProbedLayer, ...]:
  """The linear ones among `layers`."""
  return tuple(layer for layer in layers if layer.path.endswith('/kernel'))


@dataclasses.dataclass
class MomentStep:
  """Second moments of inputs and output gradients of the layers, summed over a batch's tokens.

  Args:
    model: an NNX module, tokens_BL → logits_BLV; may be abstract. It is not changed.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar.
    layers: of which the linear ones are measured.
    mesh: batch over `data`, weights by the partition table.
  """

  model: nnx.Module
  output_fn: OutputFn
  layers: Sequence[ProbedLayer]
  mesh: Mesh

  def __post_init__(self) -> None:
    self.layers = measured(self.layers)
    self._model_graphdef, state = nnx.split(self.model)
    abstract = nnx.eval_shape(lambda s: self._instrumented(nnx.merge(self._model_graphdef, s)), state)
    self._graphdef, self._moments, rest = nnx.split(abstract, Moment, ...)
    self._batch, self._alone = batch_sharding(self.mesh), replicated(self.mesh)
    weights = partition.shardings(rest, self.mesh)
    self._split, self._single = (
      jax.jit(self.apply, in_shardings=(weights, rows, rows), out_shardings=self._alone)
      for rows in (self._batch, self._alone)
    )

  def _instrumented(self, model: nnx.Module) -> nnx.Module:
    return probes.instrument(model, self.layers, MeasuredLinear)

  def prepare(self, params: nnx.State) -> nnx.State:
    model = self._instrumented(nnx.merge(self._model_graphdef, params))
    _, _, rest = nnx.split(model, Moment, ...)
    return jax.device_put(rest, partition.shardings(rest, self.mesh))

  def apply(
    self, prepared: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array
  ) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The pure function behind `sums`, of one batch."""
    prepared = partition.gathered(prepared, self.mesh)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), self._moments)

    def total(moments: nnx.State) -> jax.Array:
      logits_BLV = nnx.merge(self._graphdef, moments, prepared)(tokens_BL)
      return jnp.sum(jax.vmap(self.output_fn)(logits_BLV, tokens_BL, weights_BL))

    grads = {'/'.join(map(str, path)): g[...] for path, g in nnx.to_flat_state(jax.grad(total)(zeros))}
    return {x.path: (grads[f'{x.module}/in_moment'], grads[f'{x.module}/out_moment']) for x in self.layers}

  def sums(self, prepared: nnx.State, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Moments:
    """Sums over (tokens_BL, weights_BL) batches, float64. Every device computes a batch that `data` does not divide."""
    total: Moments = {
      x.path: (np.zeros((*x.stack, x.inputs, x.inputs)), np.zeros((*x.stack, x.outputs, x.outputs)))
      for x in self.layers
    }
    for batch in batches:
      alone = len(batch[0]) % batch_shards(self.mesh)
      step, rows = (self._single, self._alone) if alone else (self._split, self._batch)
      for path, sides in fetch(step(prepared, *place(batch, rows))).items():
        for into, part in zip(total[path], sides, strict=True):
          into += part
    return total


def batches(count: int, size: int, devices: int) -> list[slice]:
  """Slices of exactly `count` rows, as padding would count: batches of `size`, then one that `devices` divides, then
  single rows.
  """
  whole, rest = divmod(count, size)
  sizes = [size] * whole + [rest - rest % devices] * (rest >= devices) + [1] * (rest % devices)
  stops = np.cumsum(sizes).tolist()
  return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


@dataclasses.dataclass(frozen=True)
class Basis:
  """Attributes: projections; path → share of the moments' traces that A and B keep, mean over a scanned stack."""

  projections: Projections
  kept: dict[str, tuple[float, float]]

  @classmethod
  def leading(cls, layers: Sequence[ProbedLayer], moments: Moments, second_moment: SecondMoment | None) -> 'Basis':
    """Leading eigenvectors in orthonormal columns.

    Args:
      second_moment: x and dy are first divided by its factors, by which `SecondMoment.into` divides A and B later.
    """
    projections, kept = {}, {}
    for layer in measured(layers):
      factors = (None, None) if second_moment is None else second_moment.factors(layer)
      sides = [
        _leading(moment if factor is None else moment / (factor[..., :, None] * factor[..., None, :]), count)
        for moment, factor, count in zip(moments[layer.path], factors, (layer.a, layer.b), strict=True)
      ]
      projections[layer.path] = (jnp.asarray(sides[0][0]), jnp.asarray(sides[1][0]))
      kept[layer.path] = (sides[0][1], sides[1][1])
    return cls(projections, kept)

  def save(self, file: Location, layers: Sequence[ProbedLayer]) -> None:
    """Writes the file unless another job has: the first one is kept, unless it is damaged."""
    arrays = {'kept_N2': np.array([self.kept[layer.path] for layer in measured(layers)])}
    for number, layer in enumerate(measured(layers)):
      for side, projection in zip(('in', 'out'), self.projections[layer.path], strict=True):
        arrays[f'{side}_{number}'] = np.asarray(projection)
    if storage.marked(file) and not storage.is_marked(file):
      storage.unmark(file)
    storage.save_first_npz(file, **arrays)
    storage.mark(file)

  @classmethod
  def load(cls, file: Location, layers: Sequence[ProbedLayer]) -> 'Basis':
    with storage.load(file) as arrays:
      layers = measured(layers)
      kept = {layer.path: (float(x), float(y)) for layer, (x, y) in zip(layers, arrays['kept_N2'], strict=True)}
      sides = {
        layer.path: (jnp.asarray(arrays[f'in_{n}']), jnp.asarray(arrays[f'out_{n}'])) for n, layer in enumerate(layers)
      }
    return cls(sides, kept)


def _leading(moment: np.ndarray, count: int) -> tuple[np.ndarray, float]:
  """float32 [*stack, n, count] and the share of the trace."""
  *stack, size, _ = moment.shape
  flat = moment.reshape(-1, size, size)
  vectors, shares = [], []
  for one in flat:
    values, columns = scipy.linalg.eigh(one, subset_by_index=(size - count, size - 1))
    vectors.append(columns[:, ::-1].astype(np.float32))
    shares.append(float(values.sum() / np.trace(one)) if np.trace(one) > 0 else 1.0)
  return np.stack(vectors).reshape(*stack, size, count), math.fsum(shares) / len(shares)

"""Two-sided projected per-example gradients of linear layers, without forming a weight gradient.

For y = xW the gradient of a scalar f is G = xᵀ dy, summed over tokens, and its two-sided projection is
Aᵀ G B = (xA)ᵀ (dy B), a product of two thin matrices. A *probe* Z ∈ R^{a×b} is an extra argument of the layer whose
gradient is exactly this product, at any value of Z; the forward pass stays xW. Reverse mode with respect to the probes
alone needs the layer's dx and never its dW, which is a third of the work of a training step.

With entries of A Rademacher/√a and of B Rademacher/√b, E[⟨AᵀGB, AᵀG'B⟩] = ⟨G, G'⟩.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsdm_jax.core import prng
from dsdm_jax.errors import UserError


class Probe(nnx.Variable):
  """Zeros [*stack, a, b], float32, whose gradient is a layer's projected gradient."""


class Projection(nnx.Variable):
  """A [*stack, I, a] or B [*stack, O, b] of a probed layer, float32."""


@dataclasses.dataclass(frozen=True)
class ProbedLayer:
  """One linear layer (or a scanned stack of them) and its columns in φ.

  Attributes:
    path: 'blocks/0/attention/qkv'.
    stack: leading shape of the kernel; () for a plain layer, (layers,) for a scanned one.
    inputs, outputs: I and O.
    a, b: shape of the projected gradient.
    start: first column in φ; the layer has `columns` columns, ordered by stack, then row, then column.
  """

  path: str
  stack: tuple[int, ...]
  inputs: int
  outputs: int
  a: int
  b: int
  start: int

  @property
  def columns(self) -> int:
    return math.prod(self.stack) * self.a * self.b

  @property
  def stop(self) -> int:
    return self.start + self.columns


Projections = dict[str, tuple[jax.Array, jax.Array]]  # path of a layer → (A [*stack, I, a], B [*stack, O, b])
Residuals = tuple[jax.Array, jax.Array, jax.Array]  # xA in float32, W, B


@jax.custom_vjp
def probed_matmul(x: jax.Array, w_IO: jax.Array, probe_ab: jax.Array, a_Ia: jax.Array, b_Ob: jax.Array) -> jax.Array:
  """x @ w, whose cotangent with respect to `probe_ab` is the projected weight gradient (xA)ᵀ(dy B).

  The value does not depend on the probe. Forward mode raises TypeError, since its tangent would be a silent zero.

  Args:
    x: inputs [..., I].
    w_IO: the kernel, in the dtype of `x`; it gets no gradient.
    probe_ab: zeros in float32; its gradient is summed over all leading axes of `x`, in float32.
    a_Ia, b_Ob: the projections A and B.

  Returns:
    Outputs [..., O].
  """
  del probe_ab, a_Ia, b_Ob
  return x @ w_IO


def _probed_forward(
  x: jax.Array, w_IO: jax.Array, probe_ab: jax.Array, a_Ia: jax.Array, b_Ob: jax.Array
) -> tuple[jax.Array, Residuals]:
  # The residual is xA, not x: a columns instead of I.
  xa = jnp.matmul(x, a_Ia.astype(x.dtype), preferred_element_type=jnp.float32)
  return x @ w_IO, (xa, w_IO, b_Ob)


def _probed_backward(residuals: Residuals, dy: jax.Array) -> tuple[jax.Array, None, jax.Array, None, None]:
  xa, w_IO, b_Ob = residuals
  dyb = jnp.matmul(dy, b_Ob.astype(dy.dtype), preferred_element_type=jnp.float32)
  grad_ab = jnp.einsum('...a,...b->ab', xa, dyb, preferred_element_type=jnp.float32)
  return dy @ w_IO.T, None, grad_ab, None, None


probed_matmul.defvjp(_probed_forward, _probed_backward)


class LinearWrapper(nnx.Module):
  """Replaces an `nnx.Linear` and shares its parameters, which get no gradient. Subclasses define the matrix product."""

  def __init__(self, linear: nnx.Linear):
    self.kernel, self.bias = linear.kernel, linear.bias
    self.dtype = linear.dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel, bias = jax.lax.stop_gradient((self.kernel[...], None if self.bias is None else self.bias[...]))
    dtype = self.dtype or jnp.result_type(x, kernel)
    y = self.product(x.astype(dtype), kernel.astype(dtype))
    return y if bias is None else y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))

  @abc.abstractmethod
  def product(self, x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x @ kernel, both in the layer's dtype."""


class ProbedLinear(LinearWrapper):
  """A linear layer whose probe's gradient is the projected gradient of the kernel. Only used to compute features."""

  def __init__(self, linear: nnx.Linear, layer: ProbedLayer):
    super().__init__(linear)
    self.probe = Probe(jnp.zeros((*layer.stack, layer.a, layer.b), jnp.float32))
    self.input_projection = Projection(jnp.zeros((*layer.stack, layer.inputs, layer.a), jnp.float32))
    self.output_projection = Projection(jnp.zeros((*layer.stack, layer.outputs, layer.b), jnp.float32))

  def product(self, x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return probed_matmul(x, kernel_IO, self.probe[...], self.input_projection[...], self.output_projection[...])


def plan(model: nnx.Module, pattern: str, dimension: int) -> tuple[ProbedLayer, ...]:
  """Selects the layers to probe, and a×b for each.

  The budget is divided evenly over layers, where each layer of a scanned stack counts: a = ⌊√budget⌋, b = ⌊budget/a⌋,
  limited to I and O of the layer. Hence J = Σ a·b ≤ `dimension`.

  Args:
    model: any NNX module with `nnx.Linear` layers; may be abstract.
    pattern: regex searched in the layers' paths.
    dimension: upper bound of J.

  Raises:
    UserError: no layer matches, or J is smaller than the number of layers.
  """
  linears = [(p, m) for p, m in _linears(model) if re.search(pattern, p)]
  if not linears:
    known = ', '.join(p for p, _ in _linears(model)[:4])
    raise UserError(
      f'config.features.layers={pattern!r} matches no linear layer of the model; its layers are {known or "none"}'
    )
  count = sum(math.prod(m.kernel.shape[:-2]) for _, m in linears)
  budget = dimension // count
  if budget < 1:
    raise UserError(
      f'config.features.dimension={dimension} is less than one column for each of {count} linear layers; raise it'
    )
  layers, start = [], 0
  for path, linear in linears:
    *stack, inputs, outputs = linear.kernel.shape
    a = min(math.isqrt(budget), inputs)
    b = min(budget // a, outputs)
    a = min(budget // b, inputs)
    layers.append(ProbedLayer(path, tuple(stack), inputs, outputs, a, b, start))
    start = layers[-1].stop
  return tuple(layers)


def _linears(model: nnx.Module) -> list[tuple[str, nnx.Linear]]:
  linears = [('/'.join(map(str, p)), m) for p, m in nnx.iter_modules(model) if isinstance(m, nnx.Linear)]
  return sorted(linears, key=lambda item: item[0])


def instrument(
  model: nnx.Module,
  layers: Sequence[ProbedLayer],
  wrap: Callable[[nnx.Linear, ProbedLayer], nnx.Module] = ProbedLinear,
) -> nnx.Module:
  """Replaces each of `layers` in `model`, in place, by a wrapper that shares its parameters; returns `model`."""
  by_path = dict(_linears(model))
  for layer in layers:
    *parents, name = layer.path.split('/')
    owner: Any = model
    for part in parents:
      owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    wrapper = wrap(by_path[layer.path], layer)
    if name.isdigit():
      owner[int(name)] = wrapper
    else:
      setattr(owner, name, wrapper)
  return model


def random_projections(layers: Sequence[ProbedLayer], seed: int, checkpoint: int) -> Projections:
  """Entries ±1/√a of A and ±1/√b of B, independent over layers, sides and checkpoints.

  Args:
    layers: as `plan` returns them.
    seed: root of the random streams, which are named by layer and side; the result does not depend on the devices.
    checkpoint: number of the checkpoint. Each has its own projections.
  """
  projections = {}
  for layer in layers:
    sides = []
    for side, rows, columns in (('in', layer.inputs, layer.a), ('out', layer.outputs, layer.b)):
      key = prng.stream(seed, 'projection', 'two_sided', checkpoint, layer.path, side)
      shape = (*layer.stack, rows, columns)
      sides.append(jax.random.rademacher(key, shape, jnp.float32) / math.sqrt(columns))
    projections[layer.path] = (sides[0], sides[1])
  return projections


def set_projections(model: nnx.Module, projections: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
  """Sets A and B of each probed layer of `model`, in place."""
  for path, module in nnx.iter_modules(model):
    if isinstance(module, ProbedLinear):
      a, b = projections['/'.join(map(str, path))]
      module.input_projection[...] = a
      module.output_projection[...] = b

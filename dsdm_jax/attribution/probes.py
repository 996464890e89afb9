"""Two-sided projected per-example gradients of all parameters, without forming a weight gradient.

For y = xW the gradient of a scalar f is G = xᵀ dy, summed over tokens, and its two-sided projection is
Aᵀ G B = (xA)ᵀ (dy B), a product of two thin matrices. A *probe* Z ∈ R^{a×b} is an extra argument of the layer whose
gradient is exactly this product, at any value of Z; the forward pass stays xW. Reverse mode with respect to the probes
alone needs the layer's dx and never its dW, which is a third of the work of a training step.

An embedding table W ∈ R^{V×D} is a linear layer whose x is one-hot, so that xA is a row of A. A tied head h Wᵀ adds
(dlogits A)ᵀ (h B) to the same probe. Norm scales and biases are small enough for their gradients themselves: all of
them are one vector g, and AᵀG B is Aᵀg.

With entries of A Rademacher/√a and of B Rademacher/√b, E[⟨AᵀGB, AᵀG'B⟩] = ⟨G, G'⟩.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsdm_jax.core import prng
from dsdm_jax.errors import UserError
from dsdm_jax.lm.decoder import Table


class Probe(nnx.Variable):
  """Zeros [*stack, a, b], float32, whose gradient is a layer's projected gradient."""


class Projection(nnx.Variable):
  """A [*stack, I, a] or B [*stack, O, b] of a probed layer, float32."""


VECTORS = 'vectors'  # path of the layer of all norm scales and biases


@dataclasses.dataclass(frozen=True)
class ProbedLayer:
  """One matrix (or a scanned stack of them), or all vectors together, and its columns in φ.

  Attributes:
    path: of the parameter, 'blocks/0/attention/qkv/kernel' or 'embedding/embedding'; or `VECTORS`.
    stack: leading shape of the matrix; () for a plain layer, (layers,) for a scanned one.
    inputs, outputs: I and O; V and D of a table; the length of all vectors, and 1.
    a, b: shape of the projected gradient.
    start: first column in φ; the layer has `columns` columns, ordered by stack, then row, then column.
    vectors: paths of the vectors, in order.
  """

  path: str
  stack: tuple[int, ...]
  inputs: int
  outputs: int
  a: int
  b: int
  start: int
  vectors: tuple[str, ...] = ()

  @property
  def parameters(self) -> tuple[str, ...]:
    """Paths of the layer's parameters."""
    return self.vectors or (self.path,)

  @property
  def module(self) -> str:
    """Path of the module that holds probe, A and B."""
    return 'probed_vectors' if self.vectors else self.path.rpartition('/')[0]

  @property
  def columns(self) -> int:
    return math.prod(self.stack) * self.a * self.b

  @property
  def stop(self) -> int:
    return self.start + self.columns


Projections = dict[str, tuple[jax.Array, jax.Array]]  # path of a layer → (A [*stack, I, a], B [*stack, O, b])
Residuals = tuple[jax.Array, jax.Array, jax.Array]  # xA in float32, W, B; or tokens, A, B


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
  return dy @ w_IO.T, None, _projected(xa, dy, b_Ob), None, None


def _projected(xa: jax.Array, dy: jax.Array, b_Ob: jax.Array) -> jax.Array:
  """(xA)ᵀ(dy B), in float32."""
  dyb = jnp.matmul(dy, b_Ob.astype(dy.dtype), preferred_element_type=jnp.float32)
  return jnp.einsum('...a,...b->ab', xa, dyb, preferred_element_type=jnp.float32)


probed_matmul.defvjp(_probed_forward, _probed_backward)


@jax.custom_vjp
def probed_lookup(
  tokens: jax.Array, w_VD: jax.Array, probe_ab: jax.Array, a_Va: jax.Array, b_Db: jax.Array
) -> jax.Array:
  """Rows of `w_VD` for int32 `tokens`: `probed_matmul` with one-hot inputs, for which xA is a row of A."""
  del probe_ab, a_Va, b_Db
  return jnp.take(w_VD, tokens, axis=0)


def _lookup_forward(
  tokens: jax.Array, w_VD: jax.Array, probe_ab: jax.Array, a_Va: jax.Array, b_Db: jax.Array
) -> tuple[jax.Array, Residuals]:
  del probe_ab
  return jnp.take(w_VD, tokens, axis=0), (tokens, a_Va, b_Db)


def _lookup_backward(residuals: Residuals, dy: jax.Array) -> tuple[None, None, jax.Array, None, None]:
  tokens, a_Va, b_Db = residuals
  return None, None, _projected(jnp.take(a_Va, tokens, axis=0), dy, b_Db), None, None


probed_lookup.defvjp(_lookup_forward, _lookup_backward)


class LinearWrapper(nnx.Module):
  """Replaces an `nnx.Linear` and shares its parameters. Subclasses define the matrix product."""

  def __init__(self, linear: nnx.Linear):
    self.kernel, self.bias = linear.kernel, linear.bias
    self.dtype = linear.dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
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
    _attach(self, layer)

  def product(self, x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return probed_matmul(x, kernel_IO, self.probe[...], self.input_projection[...], self.output_projection[...])


class TableReadError(UserError):
  """The model reads a table itself. Attributes: path, of the table."""

  def __init__(self, path: str):
    super().__init__(
      f'the model reads the table {path} itself, so its projected gradient would be incomplete: look rows up with '
      "nnx.Embed's __call__ and use its attend(x) for a tied head, or exclude the table with --config.features.layers"
    )
    self.path = path


class TableWrapper(nnx.Module):
  """Replaces an `nnx.Embed` and shares its table. Subclasses define the lookup and the head's matrix product.

  Raises:
    TableReadError: the model reads the table itself, so wrapping lookup and head would miss a part of its gradient.
  """

  def __init__(self, embed: nnx.Embed, layer: ProbedLayer):
    self.embedding_table, self.path = embed.embedding, layer.path
    self.num_embeddings, self.features, self.dtype = embed.num_embeddings, embed.features, embed.dtype

  @property
  def embedding(self) -> jax.Array:
    raise TableReadError(self.path)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    return self.lookup(tokens, self.embedding_table[...].astype(self.dtype))

  def attend(self, x: jax.Array) -> jax.Array:
    return self.product(x.astype(self.dtype), self.embedding_table[...].astype(self.dtype).T)

  @abc.abstractmethod
  def lookup(self, tokens: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Rows of the table."""

  @abc.abstractmethod
  def product(self, x: jax.Array, table_DV: jax.Array) -> jax.Array:
    """x @ table."""


class ProbedTable(TableWrapper):
  """An embedding table whose probe's gradient is that of the table, over lookups and a tied head."""

  def __init__(self, embed: nnx.Embed, layer: ProbedLayer):
    super().__init__(embed, layer)
    self.probe = Probe(jnp.zeros((*layer.stack, layer.a, layer.b), jnp.float32))
    _attach(self, layer)

  def lookup(self, tokens: jax.Array, table_VD: jax.Array) -> jax.Array:
    return probed_lookup(tokens, table_VD, self.probe[...], self.input_projection[...], self.output_projection[...])

  def product(self, x: jax.Array, table_DV: jax.Array) -> jax.Array:
    # The product's input is h and its output has V entries: A and B change places, and the probe is transposed.
    return probed_matmul(x, table_DV, self.probe[...].T, self.output_projection[...], self.input_projection[...])


class ProbedVectors(nnx.Module):
  """Holds A and B of the vectors."""

  def __init__(self, layer: ProbedLayer):
    _attach(self, layer)


def _attach(module: Any, layer: ProbedLayer) -> None:
  module.input_projection = Projection(jnp.zeros((*layer.stack, layer.inputs, layer.a), jnp.float32))
  module.output_projection = Projection(jnp.zeros((*layer.stack, layer.outputs, layer.b), jnp.float32))


def probed(module: nnx.Linear | nnx.Embed, layer: ProbedLayer) -> nnx.Module:
  """The wrapper of a linear layer or an embedding that has a probe."""
  return ProbedTable(module, layer) if isinstance(module, nnx.Embed) else ProbedLinear(module, layer)


def plan(model: nnx.Module, pattern: str, dimension: int) -> tuple[ProbedLayer, ...]:
  """Selects the layers to probe, and a×b for each.

  The budget is divided evenly over layers, where each layer of a scanned stack counts and all vectors count as one:
  a = ⌊√budget⌋, b = ⌊budget/a⌋, limited to I and O of the layer. Hence J = Σ a·b ≤ `dimension`.

  Args:
    model: any NNX module; may be abstract. Kernels of its `nnx.Linear`, tables of its `nnx.Embed`, and parameters that
      have one axis or are called scale or bias can have a probe.
    pattern: regex searched in the paths of these parameters.
    dimension: upper bound of J.

  Raises:
    UserError: no parameter matches, or J is smaller than the number of layers.
  """
  shapes = {'/'.join(map(str, path)): x.shape for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  matrices = [path for path in _matrices(model) if re.search(pattern, path)]
  small = [path for path, shape in shapes.items() if shape and (len(shape) == 1 or path.endswith(('/scale', '/bias')))]
  vectors = tuple(path for path in small if re.search(pattern, path))
  if not matrices and not vectors:
    raise UserError(
      f'config.features.layers={pattern!r} matches no parameter that can have a probe; these are '
      f'{", ".join([*_matrices(model), *small][:4]) or "none"} and so on'
    )
  count = sum(math.prod(shapes[path][:-2]) for path in matrices) + bool(vectors)
  budget = dimension // count
  if budget < 1:
    raise UserError(
      f'config.features.dimension={dimension} is less than one column for each of {count} layers; raise it'
    )
  sizes: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [(path, shapes[path], ()) for path in matrices]
  if vectors:
    sizes.append((VECTORS, (sum(math.prod(shapes[path]) for path in vectors), 1), vectors))
  layers, start = [], 0
  for path, (*stack, inputs, outputs), parts in sizes:
    a = min(math.isqrt(budget), inputs)
    b = min(budget // a, outputs)
    a = min(budget // b, inputs)
    layers.append(ProbedLayer(path, tuple(stack), inputs, outputs, a, b, start, parts))
    start = layers[-1].stop
  return tuple(layers)


def matrices(model: nnx.Module) -> tuple[ProbedLayer, ...]:
  """All linear layers and tables of the model, without columns."""
  layers = []
  for path, module in _matrices(model).items():
    *stack, inputs, outputs = (module.kernel if isinstance(module, nnx.Linear) else module.embedding).shape
    layers.append(ProbedLayer(path, tuple(stack), inputs, outputs, a=0, b=0, start=0))
  return tuple(layers)


def linears(model: nnx.Module) -> tuple[ProbedLayer, ...]:
  """All linear layers of the model, without columns."""
  return tuple(layer for layer in matrices(model) if layer.path.endswith('/kernel'))


def least_flop(layers: Sequence[ProbedLayer], length: int, heads: Collection[str] = ()) -> float:
  """FLOP that the probes add for one row of `length` tokens: xA, dy B and their product, and Aᵀg of the vectors.

  `heads` are paths of the tables that are tied heads as well.
  """
  total = 0
  for x in layers:
    row, column, product = 2 * x.inputs * x.a, 2 * x.outputs * x.b, 2 * x.a * x.b
    if x.vectors:
      total += row
    elif x.path.endswith('/kernel'):
      total += math.prod(x.stack) * length * (row + column + product)
    else:  # rows of A are looked up, and only a head multiplies by it
      total += math.prod(x.stack) * length * (column + product)
      total += length * (row + column + product) * (x.path in heads)
  return float(total)


def _matrices(model: nnx.Module) -> dict[str, nnx.Linear | nnx.Embed]:
  """Path of the kernel or table → its module, in order; none of a subclass that may compute something else."""
  matrices = {}
  for path, module in nnx.iter_modules(model):
    kind = type(module)
    if kind.__call__ is nnx.Linear.__call__:
      matrices['/'.join(map(str, (*path, 'kernel')))] = module
    elif kind.__call__ is nnx.Embed.__call__ and kind.attend in (nnx.Embed.attend, Table.attend):
      matrices['/'.join(map(str, (*path, 'embedding')))] = module
  return dict(sorted(matrices.items()))


def instrument(
  model: nnx.Module,
  layers: Sequence[ProbedLayer],
  wrap: Callable[[Any, ProbedLayer], nnx.Module] = probed,
) -> nnx.Module:
  """Replaces the module of each matrix in `model`, in place and everywhere, by a wrapper that shares its parameters.

  Vectors stay where they are; the model gets a module with their A and B. Returns `model`.
  """
  matrices = _matrices(model)
  wrappers = {id(matrices[x.path]): wrap(matrices[x.path], x) for x in layers if not x.vectors}
  for _, owner in list(nnx.iter_modules(model)):
    for name, child in list(nnx.iter_children(owner)):
      if id(child) in wrappers:
        if isinstance(name, int):
          owner[name] = wrappers[id(child)]
        else:
          setattr(owner, name, wrappers[id(child)])
  for layer in layers:
    if layer.vectors:
      setattr(model, layer.module, ProbedVectors(layer))
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


def set_projections(
  model: nnx.Module, layers: Sequence[ProbedLayer], projections: Mapping[str, tuple[jax.Array, jax.Array]]
) -> None:
  """Sets A and B of each of `layers` of `model`, in place."""
  modules = {'/'.join(map(str, path)): module for path, module in nnx.iter_modules(model)}
  for layer in layers:
    module: Any = modules[layer.module]
    module.input_projection[...], module.output_projection[...] = projections[layer.path]

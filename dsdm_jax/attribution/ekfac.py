"""Curvature of matrices without a projection: EK-FAC, from a sample of rows.

A linear layer y = xW has the gradient G = Σ_l x_l dy_lᵀ [I, O] for one row. With Q_in the eigenvectors of the second
moment of x over tokens, and Q_out those of dy,

    λ = E[(Q_inᵀ G Q_out)²]                                        [I, O], over rows
    v = Q_in [(Q_inᵀ ḡ Q_out) / (λ + damping · mean λ)] Q_outᵀ

is the damped inverse of E[vec(G) vec(G)ᵀ] times ḡ, if that matrix is diagonal in this basis (EK-FAC: George et al.,
arXiv 1806.03884; for influence functions Grosse et al., arXiv 2308.03296). It is what the Gram matrix is to projected
gradients, one block for each matrix. Embeddings, heads and other matrices keep their own coordinates, Q = I. Norm
scales and biases take no part. The score of row n is the derivative of its output function along v, ∇f_n·v.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dsdm_jax.attribution import covariances, probes
from dsdm_jax.attribution.covariances import MomentStep
from dsdm_jax.attribution.gradients import per_example
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.core import flops, storage
from dsdm_jax.core.mesh import batch_sharding, batch_shards, fetch, place, replicated
from dsdm_jax.core.storage import Location
from dsdm_jax.lm import partition
from dsdm_jax.lm.outputs import OutputFn

# A matrix with a side more than this many times as long as the other, such as an untied head, keeps its coordinates.
_LONG = 6

ENTRIES = 2**26  # of gradients that a host solves at once, or those of one direction

Means = Mapping[str, jax.Array]  # path of a matrix → [K, S, I, O], of which each device has a part


@dataclasses.dataclass(frozen=True)
class Factors:
  """EK-FAC of one matrix or a stack of S, float32.

  Attributes:
    in_SII, out_SOO: eigenvectors in columns; None for a matrix that keeps its own coordinates.
    square_SIO: λ.
  """

  in_SII: np.ndarray | None
  out_SOO: np.ndarray | None
  square_SIO: np.ndarray

  def damped(self, damping: float) -> np.ndarray:
    """λ + damping · mean λ, float64 [S, I, O]."""
    square_SIO = self.square_SIO.astype(np.float64)
    square_SIO += damping * square_SIO.mean(axis=(-2, -1), keepdims=True)
    return square_SIO

  def solve(self, mean_KSIO: np.ndarray, damped_SIO: np.ndarray) -> np.ndarray:
    """v [K, S, I, O] in float32; a matrix without any gradient gets v = 0."""
    rotated = _rotate(mean_KSIO.astype(np.float64), self.in_SII, self.out_SOO)
    rotated /= np.where(damped_SIO > 0, damped_SIO, np.inf)
    flipped = (None if side is None else side.swapaxes(-1, -2) for side in (self.in_SII, self.out_SOO))
    return _rotate(rotated, *flipped).astype(np.float32)


def _rotate(x: Any, in_SII: Any, out_SOO: Any) -> Any:
  """Q_inᵀ x Q_out for x [..., S, I, O]."""
  return x if in_SII is None else in_SII.swapaxes(-1, -2) @ x @ out_SOO


@dataclasses.dataclass
class WholeGradients:
  """Explicit gradients of rows by all matrices, as features without a projection, and what EK-FAC needs of them.

  A matrix is a parameter of two axes or more that is not named `bias` or `scale`, as those of a scanned stack are;
  leading axes are a stack.

  Args:
    model: an NNX module, tokens_BL → logits_BLV; may be abstract.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar.
    mesh: batch over `data`, weights by the partition table.
    rows: whose gradients are held at once, over all devices; a multiple of the mesh's `data`.

  Attributes:
    shapes: path of each matrix → (S, I, O).
    dimension: number of their entries.
    mean_step: the compiled step of `means`, (prepared, tokens_BL, weights_BL, by_BK) → path → [K, S, I, O].
  """

  model: nnx.Module
  output_fn: OutputFn
  mesh: Mesh
  rows: int

  def __post_init__(self) -> None:
    self._gradients = per_example(self.model, self.output_fn, self.mesh)
    self._parameters = {
      path: x.shape
      for path, x in _by_path(nnx.state(self.model, nnx.Param)).items()
      if len(x.shape) > 1 and path.rpartition('/')[2] not in ('bias', 'scale')
    }
    self.shapes = {path: (math.prod(shape[:-2]), *shape[-2:]) for path, shape in self._parameters.items()}
    self.dimension = sum(map(math.prod, self.shapes.values()))
    layers = [
      layer for layer in probes.linears(self.model) if max(sides := (layer.inputs, layer.outputs)) <= _LONG * min(sides)
    ]
    self._turned = [layer.path for layer in layers]
    self._moments = MomentStep(self.model, self.output_fn, layers, self.mesh) if layers else None
    batch = batch_sharding(self.mesh)
    self.jitted = jax.jit(self.apply, in_shardings=(None, batch, batch), out_shardings=batch)
    self._split = {path: self._sharding(path, (1, *shape)) for path, shape in self.shapes.items()}
    self._squares, self.mean_step = (
      jax.jit(function, in_shardings=(None, batch, batch, batch), out_shardings=out)
      for function, out in ((self._apply_squares, replicated(self.mesh)), (self._apply_means, self._split))
    )

  def prepare(self, params: nnx.State, checkpoint: int, second_moment: SecondMoment | None = None) -> nnx.State:
    del checkpoint, second_moment
    return jax.device_put(params, partition.shardings(params, self.mesh))

  def __call__(self, prepared: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return self.jitted(prepared, tokens_BL, weights_BL)

  def apply(self, prepared: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """phi_BJ in float32, matrices in the order of `shapes`."""
    grads = self._matrices(prepared, tokens_BL, weights_BL)
    return jnp.concatenate([g.reshape(len(tokens_BL), -1) for g in grads.values()], axis=1)

  def describe(self) -> dict[str, Any]:
    return {'projection': 'ekfac', 'layers': 'all matrices'}

  def column_owner(self, column: int) -> str:
    stops = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
    return list(self.shapes)[int(np.searchsorted(stops, column, side='right'))]

  @property
  def factor_entries(self) -> int:
    """Numbers in all factors of one model."""
    return self.dimension + sum(s * (i * i + o * o) for s, i, o in (self.shapes[path] for path in self._turned))

  def factors(self, params: nnx.State, tokens_NL: np.ndarray, weights_NL: np.ndarray) -> dict[str, Factors]:
    """Path → factors, from all of these rows."""
    bases: dict[str, Any] = dict.fromkeys(self.shapes, (None, None))
    if self._moments is not None:
      parts = covariances.batches(len(tokens_NL), self.rows, batch_shards(self.mesh))
      batches = [(tokens_NL[part], weights_NL[part]) for part in parts]
      moments = self._moments.sums(self._moments.prepare(params), batches)
      for path in self._turned:
        sides = [np.linalg.eigh(moment)[1].astype(np.float32) for moment in moments[path]]
        bases[path] = tuple(x.reshape(-1, *x.shape[-2:]) for x in sides)
    ones_N1 = np.ones((len(tokens_NL), 1), np.float32)
    placed = jax.tree.map(lambda x: place(x, replicated(self.mesh)), bases)
    squares = fetch(self._sum(self._squares, (self.prepare(params, 0), placed), tokens_NL, weights_NL, ones_N1))
    return {
      path: Factors(in_SII, out_SOO, squares[path] / np.float32(len(tokens_NL)))
      for path, (in_SII, out_SOO) in bases.items()
    }

  def means(self, params: nnx.State, tokens_TL: np.ndarray, weights_TL: np.ndarray, weight_KT: np.ndarray) -> Means:
    """Σ_t weight(k, t) · gradient of example t, for each weighting k."""
    by_TK = np.asarray(weight_KT.T, np.float32)
    return self._sum(self.mean_step, self.prepare(params, 0), tokens_TL, weights_TL, by_TK)

  def blocks(self, means: Sequence[Means], path: str) -> Iterator[np.ndarray]:
    """The means of one matrix on the host, some at a time: [k, S, I, O]. All processes must call it."""
    size = max(1, ENTRIES // math.prod(self.shapes[path]))
    for part in means:
      count = len(part[path])
      for start in range(0, count, size):
        yield fetch(jax.lax.slice_in_dim(part[path], start, min(start + size, count)))

  def place(self, path: str, direction_KSIO: np.ndarray) -> jax.Array:
    """Directions of one matrix as [K, *parameter shape] on the devices, laid out like it."""
    shape = self._parameters[path]
    return place(direction_KSIO.reshape(-1, *shape), self._sharding(path, (1, *shape)))

  def flop(self, params: nnx.State, rows: int, weightings: int, length: int) -> tuple[float, float]:
    """FLOP of `factors` from so many rows of `length` tokens, and of `means` for so many weightings of them.

    Eigenvectors of an n×n matrix count as 9 n³.
    """
    batch = tuple(jax.ShapeDtypeStruct((1, length), dtype) for dtype in (jnp.int32, jnp.float32))
    by_1K = jax.ShapeDtypeStruct((1, weightings), jnp.float32)
    bases: dict[str, Any] = dict.fromkeys(self.shapes, (None, None))
    eigenvectors = of_row = 0.0
    for path in self._turned:
      s, *sides = self.shapes[path]
      bases[path] = tuple(jax.ShapeDtypeStruct((s, n, n), jnp.float32) for n in sides)
      eigenvectors += sum(9.0 * s * n**3 for n in sides)
    if self._moments is not None:
      of_row += flops.count(self._moments.apply, self._moments.prepare(params), *batch)
    of_row += flops.count(self._apply_squares, (params, bases), *batch, by_1K)
    return of_row * rows + eigenvectors, flops.count(self._apply_means, params, *batch, by_1K) * rows

  def split(self, u_JK: np.ndarray) -> dict[str, np.ndarray]:
    """Path → directions [K, S, I, O] of columns whose entries are in the order of `shapes`."""
    stops = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
    parts = zip(self.shapes.items(), np.split(u_JK.T, stops[:-1], axis=1), strict=True)
    return {path: part.reshape(-1, *shape) for (path, shape), part in parts}

  def tree(self, directions: Mapping[str, np.ndarray | jax.Array], params: nnx.State) -> nnx.State:
    """Directions of each path as a pytree like `params`, [K, *parameter shape]; zeros where there is no matrix."""
    count = len(next(iter(directions.values())))

    def one(path: Any, x: jax.Array) -> np.ndarray | jax.Array:
      part = directions.get(partition.path_name(path))
      return np.zeros((count, *x.shape), np.float32) if part is None else part.reshape(count, *x.shape)

    return jax.tree_util.tree_map_with_path(one, params)

  def _sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(self.mesh, partition.spec(path, shape, self.mesh))

  def _sum(self, step: Any, prepared: Any, tokens_NL: np.ndarray, weights_NL: np.ndarray, by_NK: np.ndarray) -> Any:
    """Sum of `step` over batches. The last one is filled up with rows that weigh nothing."""
    total = None
    for start in range(0, len(tokens_NL), self.rows):
      parts = (x[start : start + self.rows] for x in (tokens_NL, weights_NL, by_NK))
      filled = tuple(np.pad(x, ((0, self.rows - len(x)), (0, 0))) for x in parts)
      part = step(prepared, *place(filled, batch_sharding(self.mesh)))
      total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total

  def _matrices(self, params: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> dict[str, jax.Array]:
    """Path → gradients [B, S, I, O] in float32."""
    grads = _by_path(self._gradients(params, tokens_BL, weights_BL))
    return {
      path: grads[path].astype(jnp.float32).reshape(len(tokens_BL), *shape) for path, shape in self.shapes.items()
    }

  def _apply_squares(self, prepared: Any, tokens_BL: jax.Array, weights_BL: jax.Array, by_B1: jax.Array) -> Any:
    """Path → Σ (Q_inᵀ G Q_out)²."""
    params, bases = prepared
    counted_B = by_B1[:, 0, None, None, None] > 0  # a row of padding has no tokens, and its gradient may be NaN
    with jax.default_matmul_precision('highest'):
      grads = self._matrices(params, tokens_BL, weights_BL)
      squares = {path: jnp.square(_rotate(g, *bases[path])) for path, g in grads.items()}
    return {path: jnp.where(counted_B, square, 0).sum(axis=0) for path, square in squares.items()}

  def _apply_means(self, params: Any, tokens_BL: jax.Array, weights_BL: jax.Array, by_BK: jax.Array) -> Any:
    """Path → Σ_b weight(b, k) G_b."""
    counted_B = jnp.any(by_BK != 0, axis=1)[:, None, None, None]
    return {
      path: jnp.einsum('bsio,bk->ksio', jnp.where(counted_B, g, 0), by_BK, precision=jax.lax.Precision.HIGHEST)
      for path, g in self._matrices(params, tokens_BL, weights_BL).items()
    }


def joined(parts: Sequence[jax.Array]) -> jax.Array:
  """Directions of one matrix, one part after the other, on the devices that have the parts."""
  if len(parts) == 1:
    return parts[0]
  return jax.jit(lambda parts: jnp.concatenate(parts), out_shardings=parts[0].sharding)(parts)


@functools.partial(jax.jit, donate_argnums=0)
def scaled(direction: jax.Array, scale_K: np.ndarray) -> jax.Array:
  """Directions [K, …] divided by float32 `scale_K`, in their place."""
  whole = jnp.broadcast_to(scale_K.reshape(-1, *(1,) * (direction.ndim - 1)), direction.shape)
  return direction / jax.lax.optimization_barrier(whole)  # else XLA multiplies by the inverse, which rounds twice


def _by_path(tree: Any) -> dict[str, Any]:
  return {partition.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def save(file: Location, factors: Mapping[str, Factors]) -> None:
  """Writes the file unless another job has, and marks it."""
  arrays: dict[str, np.ndarray] = {'paths': np.array(list(factors))}
  for number, f in enumerate(factors.values()):
    arrays[f'square_{number}'] = f.square_SIO
    arrays |= {f'{n}_{number}': x for n, x in (('in', f.in_SII), ('out', f.out_SOO)) if x is not None}
  if storage.marked(file) and not storage.is_marked(file):
    storage.unmark(file)
  storage.save_first_npz(file, **arrays)
  storage.mark(file)


def load(file: Location) -> dict[str, Factors]:
  """Path → factors.

  Raises:
    UserError: the file is damaged.
  """
  with storage.load(file) as arrays:
    return {
      str(path): Factors(arrays.get(f'in_{n}'), arrays.get(f'out_{n}'), arrays[f'square_{n}'])
      for n, path in enumerate(arrays['paths'])
    }

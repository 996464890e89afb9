"""The partition table: the mesh axis over which each axis of a parameter is sharded."""

import contextlib
import contextvars
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsdm_jax.core.mesh import BATCH, DATA, MODEL, REPLICA

# First match wins. Matmul weights are [inputs, outputs]: column-parallel into heads and MLP, row-parallel out of them
# (Megatron, arXiv 1909.08053); the other axis is sharded over `data` (FSDP), never over `replica`. A leading layer axis
# is not sharded.
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r'(qkv|up|head)/kernel', (DATA, MODEL)),
  (r'(qkv|up)/bias', (MODEL,)),
  (r'(out|down)/kernel', (MODEL, DATA)),
  (r'embedding/embedding', (MODEL, DATA)),
)


SAVED = 'saved'  # name of arrays that the backward pass uses again, for policies of `jax.checkpoint`

# The mesh that a model is traced for, where its own code adds sharding constraints.
_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar('mesh', default=None)
# Where a model is traced for one device: how its weights are split.
_SPECS: contextvars.ContextVar[Mapping[str, PartitionSpec] | None] = contextvars.ContextVar('specs', default=None)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """PartitionSpec of the parameter at `path` ('blocks/0/attention/qkv/kernel').

  An axis that the mesh axis does not divide is not sharded, nor is a parameter that is not in the table.
  """
  for pattern, axes in _TABLE:
    if re.search(pattern, path):
      padded = (None,) * (len(shape) - len(axes)) + axes
      return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(padded, shape, strict=True)))
  return PartitionSpec()


def path_name(path: tuple[Any, ...]) -> str:
  """'a/b/0/kernel' for a key path of `jax.tree_util`, without the wrapper that NNX puts around arrays."""
  keys = (getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k))) for k in path)
  return '/'.join(str(k) for k in keys if str(k) != 'value')


def shardings(tree: Any, mesh: Mesh) -> Any:
  """NamedShardings for a pytree of parameters, or of anything whose paths end in those of parameters (μ, ν)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec(path_name(path), x.shape, mesh)), tree
  )


def gathered(tree: Any, mesh: Mesh) -> Any:
  """Gathers `tree` over `data`, inside a jitted function, for a batch that is sharded over `BATCH`.

  Without this constraint XLA may shard activations by features instead and communicate those for every batch.
  """
  return jax.tree_util.tree_map_with_path(lambda path, x: _constrained(path, x, mesh), tree)


def _constrained(path: tuple[Any, ...], x: jax.Array, mesh: Mesh) -> jax.Array:
  axes = [None if axis == DATA else axis for axis in spec(path_name(path), x.shape, mesh)]
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


@contextlib.contextmanager
def over(mesh: Mesh) -> Iterator[None]:
  """For a model that is traced inside on a whole batch, `weights_here` and `batch_here` add sharding constraints."""
  token = _MESH.set(mesh if mesh.size > 1 else None)
  try:
    yield
  finally:
    _MESH.reset(token)


@contextlib.contextmanager
def on_device(specs: Mapping[str, PartitionSpec]) -> Iterator[None]:
  """For code that is traced inside `shard_map`, on the rows and the part of the weights of one device.

  Args:
    specs: path of each parameter of the model → its `spec`; empty if all weights are whole.
  """
  tokens = _MESH.set(None), _SPECS.set(specs)
  try:
    yield
  finally:
    _MESH.reset(tokens[0])
    _SPECS.reset(tokens[1])


def is_on_device() -> bool:
  """Whether this is traced inside `on_device`."""
  return _SPECS.get() is not None


def weights_here(tree: Any, dtype: Any = None) -> Any:
  """Whole weights of one block, inside a scan or a rematerialized function; or of a model.

  They are gathered over `data`, one block at a time. The backward pass uses those that a policy of `jax.checkpoint`
  saves under the name `SAVED`, or gathers them again. In `on_device`, what is gathered is cast to `dtype` first, and
  each device receives the sum of the gradients of its own part alone (reduce-scatter).
  """
  mesh, specs = _MESH.get(), _SPECS.get()
  if mesh is not None:
    return gathered(tree, mesh)
  if not specs:
    return tree
  return jax.tree_util.tree_map_with_path(lambda path, x: _whole(x, _spec_of(path_name(path), specs), dtype), tree)


def _spec_of(path: str, specs: Mapping[str, PartitionSpec]) -> PartitionSpec:
  """Of the parameter at `path` of a block, which is the end of paths of the model; all blocks have the same shapes."""
  return next(spec for of, spec in specs.items() if f'/{of}'.endswith(f'/{path}'))


def _axis(split: PartitionSpec, ndim: int) -> int | None:
  """The axis over `data` of an array of `ndim` axes, which may lack the axis of layers."""
  return split.index(DATA) - len(split) + ndim if DATA in split else None


def _whole(x: jax.Array, split: PartitionSpec, dtype: Any) -> jax.Array:
  axis = _axis(split, x.ndim)
  if axis is None:
    return x
  whole = jax.lax.all_gather(x if dtype is None else x.astype(dtype), DATA, axis=axis, tiled=True)
  return checkpoint_name(whole, SAVED)


def summed(tree: Any, specs: Mapping[str, PartitionSpec], whole: bool) -> Any:
  """Gradients of all devices, summed, inside `shard_map`: of each device's part of the weights.

  Args:
    tree: gradients by the weights of the model.
    specs: as in `on_device`.
    whole: whether they are by whole weights; otherwise what is split is summed over `data` already.
  """

  def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    axis = _axis(specs[path_name(path)], x.ndim)
    if axis is None:
      return jax.lax.psum(x, BATCH)
    if whole:
      x = jax.lax.psum_scatter(x, DATA, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(x, REPLICA) if jax.lax.axis_size(REPLICA) > 1 else x

  return jax.tree_util.tree_map_with_path(one, tree)


def batch_here(x_BLD: jax.Array) -> jax.Array:
  """Shards activations over the batch only, as they are between blocks."""
  mesh = _MESH.get()
  return x_BLD if mesh is None else jax.lax.with_sharding_constraint(x_BLD, NamedSharding(mesh, PartitionSpec(BATCH)))

"""The partition table: the mesh axis over which each axis of a parameter is sharded."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsdm_jax.core.mesh import DATA, MODEL

# First match wins. Matmul weights are [inputs, outputs]: column-parallel into heads and MLP, row-parallel out of them
# (Megatron, arXiv 1909.08053); the other axis is sharded over `data` (FSDP). A leading layer axis is not sharded.
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r'(qkv|up|head)/kernel', (DATA, MODEL)),
  (r'(qkv|up)/bias', (MODEL,)),
  (r'(out|down)/kernel', (MODEL, DATA)),
  (r'embedding/embedding', (MODEL, DATA)),
)


# The mesh that a model is traced for, where its own code adds sharding constraints.
_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar('mesh', default=None)


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
  """Gathers `tree` over `data`, inside a jitted function, for a batch that is sharded over `data`.

  Without this constraint XLA may shard activations by features instead and communicate those for every batch.
  """
  return jax.tree_util.tree_map_with_path(lambda path, x: gathered_leaf(path, x, mesh), tree)


def gathered_leaf(path: tuple[Any, ...], x: jax.Array, mesh: Mesh) -> jax.Array:
  axes = [None if axis == DATA else axis for axis in spec(path_name(path), x.shape, mesh)]
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


@contextlib.contextmanager
def over(mesh: Mesh) -> Iterator[None]:
  """Enables `weights_here` and `batch_here` for a model that is traced inside; elsewhere they do nothing."""
  token = _MESH.set(mesh if mesh.size > 1 else None)
  try:
    yield
  finally:
    _MESH.reset(token)


def weights_here(tree: Any) -> Any:
  """`gathered` for the weights of one block, inside a scan or a rematerialized function.

  One block's weights are gathered at a time, and the backward pass gathers them again where it rematerializes.
  """
  mesh = _MESH.get()
  return tree if mesh is None else gathered(tree, mesh)


def batch_here(x_BLD: jax.Array) -> jax.Array:
  """Shards activations over the batch only, as they are between blocks."""
  mesh = _MESH.get()
  return x_BLD if mesh is None else jax.lax.with_sharding_constraint(x_BLD, NamedSharding(mesh, PartitionSpec(DATA)))

"""The partition table: which axis of which parameter is split over which mesh axis."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsdm_jax.core.mesh import DATA, MODEL

# First match wins. Matmul weights are [inputs, outputs]: column-parallel into heads and MLP, row-parallel out of them
# (Megatron, arXiv 1909.08053); the other axis is split over `data` (FSDP). A leading layer axis stays whole.
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r'(qkv|up|head)/kernel', (DATA, MODEL)),
  (r'(qkv|up)/bias', (MODEL,)),
  (r'(out|down)/kernel', (MODEL, DATA)),
  (r'embedding/embedding', (MODEL, DATA)),
)


# The mesh that a model is being traced for, where its own code has to say what lies where.
_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar('mesh', default=None)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """PartitionSpec of the parameter at `path` ('blocks/0/attention/qkv/kernel').

  An axis that its mesh axis does not divide stays whole, and so does every parameter that the table does not name.
  """
  for pattern, axes in _TABLE:
    if re.search(pattern, path):
      padded = (None,) * (len(shape) - len(axes)) + axes
      return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(padded, shape, strict=True)))
  return PartitionSpec()


def path_name(path: tuple[Any, ...]) -> str:
  """'a/b/0/kernel' for a key path of `jax.tree_util`; the wrapper that NNX puts around arrays does not show."""
  keys = (getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k))) for k in path)
  return '/'.join(str(k) for k in keys if str(k) != 'value')


def shardings(tree: Any, mesh: Mesh) -> Any:
  """NamedShardings for a pytree of parameters, or of anything whose paths end in those of parameters (μ, ν)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec(path_name(path), x.shape, mesh)), tree
  )


def gathered(tree: Any, mesh: Mesh) -> Any:
  """`tree`, inside a jitted function, with what `data` splits put together again: what a batch over `data` works with.

  Left to itself XLA may split activations by features instead and send those, batch after batch.
  """
  return jax.tree_util.tree_map_with_path(lambda path, x: gathered_leaf(path, x, mesh), tree)


def gathered_leaf(path: tuple[Any, ...], x: jax.Array, mesh: Mesh) -> jax.Array:
  axes = [None if axis == DATA else axis for axis in spec(path_name(path), x.shape, mesh)]
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


@contextlib.contextmanager
def over(mesh: Mesh) -> Iterator[None]:
  """While a model is traced in here, `weights_here` and `batch_here` work; elsewhere they do nothing."""
  token = _MESH.set(mesh if mesh.size > 1 else None)
  try:
    yield
  finally:
    _MESH.reset(token)


def weights_here(tree: Any) -> Any:
  """`gathered` for the weights of one block, inside a scan or a rematerialised function.

  So the weights of one block are whole at a time, and the backward pass gathers them again where it rematerialises.
  """
  mesh = _MESH.get()
  return tree if mesh is None else gathered(tree, mesh)


def batch_here(x_BLD: jax.Array) -> jax.Array:
  """Activations split over the batch, and whole otherwise, as they are between blocks."""
  mesh = _MESH.get()
  return x_BLD if mesh is None else jax.lax.with_sharding_constraint(x_BLD, NamedSharding(mesh, PartitionSpec(DATA)))

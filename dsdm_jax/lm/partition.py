"""The partition table: which axis of which parameter is split over which mesh axis."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsdm_jax.core.mesh import DATA, MODEL

# First match wins. Matmul weights are [inputs, outputs]: column-parallel into heads and MLP, row-parallel out of them
# (Megatron, arXiv 1909.08053); the other axis is split over `data` (FSDP). A leading layer axis stays whole.
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r'(qkv|up|head)/kernel', (DATA, MODEL)),
  (r'(out|down)/kernel', (MODEL, DATA)),
  (r'embedding/embedding', (MODEL, DATA)),
)


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

  def whole(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    axes = [None if axis == DATA else axis for axis in spec(path_name(path), x.shape, mesh)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

  return jax.tree_util.tree_map_with_path(whole, tree)

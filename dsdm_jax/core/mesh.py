"""The device mesh: axis `data` splits batches, axis `model` splits weights."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

DATA = 'data'
MODEL = 'model'


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
  """Mesh of shape (data, model) over `devices` (default: all) from `config.mesh`; `data=-1` takes what is left."""
  devices = jax.devices() if devices is None else devices
  model = config.model
  data = len(devices) // model if config.data == -1 else config.data
  grid = np.asarray(devices).reshape(data, model)
  return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over `data`, the rest whole."""
  return NamedSharding(mesh, PartitionSpec(DATA))


def place(tree: Any, sharding: NamedSharding) -> Any:
  """Host arrays, the same on every process, as global arrays of which each process holds its devices' part."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def share(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Positions in a batch of `batch_size` that devices of this process hold, ascending, int64; one process holds all.

  Args:
    sharding: of a batch, one of whose axes is split over `data`.
    batch_size: a multiple of the size of `data`.
  """
  along = NamedSharding(sharding.mesh, PartitionSpec(DATA))
  parts = along.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts if index is not None]))


def assemble(tree: Any, sharding: NamedSharding, batch_size: int) -> Any:
  """Host arrays of which each process has its `share` of the batch, as global arrays.

  Args:
    tree: arrays whose axis of the batch, the one that `sharding` splits over `data`, is as long as the share.
    sharding: of the global arrays.
    batch_size: of the global arrays.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  axis, mine = sharding.spec.index(DATA), share(sharding, batch_size)

  def whole(x: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      first, stop, _ = index[axis].indices(batch_size)
      begin = int(np.searchsorted(mine, first))
      return x[(*index[:axis], slice(begin, begin + stop - first), *index[axis + 1 :])]

    shape = (*x.shape[:axis], batch_size, *x.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(whole, tree)


def fetch(tree: Any) -> Any:
  """Arrays as whole NumPy arrays on every process, also where each holds a part alone. All processes must call."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def whole(x: Any) -> Any:
    split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    return multihost_utils.process_allgather(x, tiled=True) if split else np.asarray(x)

  return jax.tree.map(whole, tree)

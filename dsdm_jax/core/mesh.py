"""The device mesh: axis `data` shares batches, axis `model` shares weights."""

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


def fetch(tree: Any) -> Any:
  """Arrays as whole NumPy arrays on every process, also where each holds a part alone. All processes must call."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def whole(x: Any) -> Any:
    split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    return multihost_utils.process_allgather(x, tiled=True) if split else np.asarray(x)

  return jax.tree.map(whole, tree)

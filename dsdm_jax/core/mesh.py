"""The device mesh: axes `replica` and `data` split batches, axes `data` and `model` split weights.

Each replica has all weights. A replica lies within one TPU slice, so that sums of gradients alone cross the data-center
network between slices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dsdm_jax.errors import UserError

REPLICA = 'replica'
DATA = 'data'
MODEL = 'model'
BATCH = (REPLICA, DATA)  # axes that split batches


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
  """Mesh of shape (replica, data, model) over `devices` (default: all).

  Args:
    config: section `mesh`; `replicas=0` makes one for each slice, and `data=-1` takes what is left.
    devices: TPUs of several slices have different `slice_index`. All others are one slice, in their order.

  Raises:
    UserError: a replica would not lie within a slice.
  """
  devices = jax.devices() if devices is None else devices
  tpus = [device for device in devices if device.platform == 'tpu']  # of a GPU, `slice_index` is its host
  slices = len({getattr(device, 'slice_index', 0) for device in tpus}) or 1
  replicas = config.replicas or slices
  if replicas % slices or len(devices) % (replicas * config.model):
    raise UserError(
      f'config key mesh.replicas = {config.replicas} with mesh.model = {config.model} must cut {slices} TPU slices of '
      f'{len(devices) // slices} devices into equal replicas, none of which spans two slices; set '
      f'--config.mesh.replicas={slices}, and --config.mesh.model=1 or another divisor'
    )
  data = len(devices) // (replicas * config.model) if config.data == -1 else config.data
  shape = replicas // slices, data, config.model
  if slices == 1:
    grid = np.asarray(devices).reshape(shape)
  else:
    grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, allow_split_physical_axes=True)
  return Mesh(grid, (REPLICA, DATA, MODEL), axis_types=(AxisType.Auto,) * 3)


def one_device() -> Mesh:
  """Mesh of the first device of this process."""
  return Mesh(
    np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1), (REPLICA, DATA, MODEL), axis_types=(AxisType.Auto,) * 3
  )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
  """Number of devices that share a batch; its size is a multiple."""
  return mesh.shape[REPLICA] * mesh.shape[DATA]


def is_one_cpu(mesh: Mesh) -> bool:
  """Whether the mesh is a single CPU device, where arrays larger than its caches cost the most."""
  return mesh.size == 1 and mesh.devices.flat[0].platform == 'cpu'


def rows_in_cache(batch: int, length: int, vocab_size: int, at_least: int = 0) -> int:
  """How many rows of a batch, a divisor of it, a CPU computes at once.

  Logits, float32 [rows, length, vocab_size], are the largest arrays of a small model and pass through memory several
  times. At once are 256 tokens, below which products become slow, or more up to 4 MiB of logits or `at_least` bytes.
  """
  most = max(2**22, at_least) // (4 * length * vocab_size)
  enough = [rows for rows in range(1, batch + 1) if batch % rows == 0 and rows * length >= min(256, batch * length)]
  return max((rows for rows in enough if rows <= most), default=enough[0])


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over `BATCH`, the rest whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def place(tree: Any, sharding: NamedSharding) -> Any:
  """Host arrays, the same on every process, as global arrays of which each process holds its devices' part."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def share(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Positions in a batch of `batch_size` that devices of this process hold, ascending, int64; one process holds all.

  Args:
    sharding: of a batch, one of whose axes is split over `BATCH`.
    batch_size: a multiple of `batch_shards`.
  """
  along = NamedSharding(sharding.mesh, PartitionSpec(BATCH))
  parts = along.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts if index is not None]))


@dataclasses.dataclass(frozen=True)
class Team:
  """The processes whose devices hold the same rows of a batch: one of several teams, usually of one process each.

  Attributes:
    count: number of teams.
    index: of this process's team.
    leads: whether this process writes what its team computes.
  """

  count: int = 1
  index: int = 0
  leads: bool = True


def team(mesh: Mesh) -> Team:
  """The team of this process. It has several processes where axis `model` spans them.

  Raises:
    UserError: some processes hold a part of each other's rows.
  """
  if jax.process_count() == 1:
    return Team()
  size, held = batch_shards(mesh), dict[int, set[int]]()
  for place, devices in enumerate(mesh.devices.reshape(size, -1)):
    for device in devices:
      held.setdefault(device.process_index, set()).add(place)
  rows_of = {process: tuple(sorted(rows)) for process, rows in held.items()}
  teams = sorted(set(rows_of.values()))
  if sum(map(len, teams)) != size or len(set(map(len, teams))) > 1:
    raise UserError(
      f'mesh.model = {mesh.shape[MODEL]} splits rows unevenly among {jax.process_count()} processes; set it to a '
      'divisor or a multiple of the devices of a process'
    )
  mine = rows_of[jax.process_index()]
  first = min(process for process, rows in rows_of.items() if rows == mine)
  return Team(len(teams), teams.index(mine), first == jax.process_index())


def local(x: jax.Array, count: int) -> np.ndarray:
  """The first `count` rows of a batch that this process's devices hold, in the order of `share`.

  Nothing else crosses to the host.
  """
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  rows = np.empty((count, *x.shape[1:]), x.dtype)
  begin = 0
  for start in sorted(parts):
    part = parts[start]
    end = min(begin + len(part), count)
    if begin < end:
      rows[begin:end] = np.asarray(part if end - begin == len(part) else part[: end - begin])
    begin = end
  return rows


def on_one_device(x: jax.Array) -> jax.Array:
  """The rows of `local`, on one of this process's devices."""
  parts, device = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}, jax.local_devices()[0]
  return jnp.concatenate([jax.device_put(parts[start], device) for start in sorted(parts)])


def total(x: np.ndarray) -> np.ndarray:
  """The sum of an array over all processes, on each of them: float32, reduced on the devices."""
  if jax.process_count() == 1:
    return x
  devices = np.asarray(sorted(jax.devices(), key=lambda device: device.process_index))
  mesh = Mesh(devices.reshape(jax.process_count(), -1)[:, :1], ('process', 'device'))
  parts = multihost_utils.host_local_array_to_global_array(
    np.asarray(x, np.float32)[None], mesh, PartitionSpec('process')
  )
  return np.asarray(jax.jit(lambda x: x.sum(axis=0), out_shardings=replicated(mesh))(parts))


def assemble(tree: Any, sharding: NamedSharding, batch_size: int) -> Any:
  """Host arrays of which each process has its `share` of the batch, as global arrays.

  Args:
    tree: arrays whose axis of the batch, the one that `sharding` splits over `BATCH`, is as long as the share.
    sharding: of the global arrays.
    batch_size: of the global arrays.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  axis, mine = sharding.spec.index(BATCH), share(sharding, batch_size)

  def whole(x: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      first, stop, _ = index[axis].indices(batch_size)
      begin = int(np.searchsorted(mine, first))
      return x[(*index[:axis], slice(begin, begin + stop - first), *index[axis + 1 :])]

    shape = (*x.shape[:axis], batch_size, *x.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(whole, tree)


def greatest(numbers: Sequence[int], mesh: Mesh) -> jax.Array:
  """The greatest of each of `numbers` over all processes, int32, reduced on the devices of `mesh`.

  It returns at once; reading the result waits for the devices. All processes must call it.
  """
  rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  mine_1K = np.asarray(numbers, np.int32)[None]
  return _greatest(mesh)(jax.make_array_from_callback((mesh.size, len(numbers)), rows, lambda _: mine_1K))


@functools.lru_cache(maxsize=8)
def _greatest(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x_PK: x_PK.max(axis=0), out_shardings=replicated(mesh))


def fetch(tree: Any) -> Any:
  """Arrays as whole NumPy arrays on every process, also where each holds a part alone. All processes must call."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def whole(x: Any) -> Any:
    split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    return multihost_utils.process_allgather(x, tiled=True) if split else np.asarray(x)

  return jax.tree.map(whole, tree)

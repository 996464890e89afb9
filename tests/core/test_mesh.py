"""Layout of the mesh: replicas within TPU slices, and one slice in the order of its devices."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest

from configs import base
from dsdm_jax.core import mesh
from dsdm_jax.errors import UserError


def config(replicas: int = 0, data: int = -1, model: int = 1):
  wanted = base.get_config().mesh
  wanted.update({'replicas': replicas, 'data': data, 'model': model})
  return wanted


@pytest.mark.parametrize(
  ('keys', 'shape'), [((), (1, 8, 1)), ((0, 2, 4), (1, 2, 4)), ((2, -1, 2), (2, 2, 2)), ((8,), (8, 1, 1))]
)
def test_devices_without_slices_keep_their_order(keys, shape):
  found = mesh.make_mesh(config(*keys))
  assert found.devices.shape == shape
  assert found.devices.flatten().tolist() == jax.devices()
  assert mesh.batch_shards(found) == shape[0] * shape[1]
  assert mesh.batch_sharding(found).shard_shape((16, 3)) == (16 // (shape[0] * shape[1]), 3)


@pytest.mark.parametrize(
  ('batch', 'length', 'vocab', 'at_least', 'rows'),
  [
    (32, 256, 4_096, 0, 1),  # 4 MiB of logits in a row
    (16, 128, 1_024, 0, 8),
    (32, 16, 50_257, 0, 16),  # 256 tokens
    (30, 256, 1_024, 0, 3),  # divides the batch
    (31, 64, 1_024, 0, 31),  # a prime
    (34, 16, 50_257, 0, 17),
    (32, 256, 4_096, 2**25, 8),
    (32, 12, 48, 0, 32),
    (1, 16, 50_257, 0, 1),
  ],
)
def test_a_cpu_computes_what_its_caches_hold(batch, length, vocab, at_least, rows):
  assert mesh.rows_in_cache(batch, length, vocab, at_least) == rows


class Devices(NamedTuple):
  devices: np.ndarray
  size: int


def test_one_cpu_device_is_neither_several_nor_a_tpu():
  assert mesh.is_one_cpu(mesh.one_device()) and not mesh.is_one_cpu(mesh.make_mesh(config()))
  assert not mesh.is_one_cpu(Devices(np.array([Tpu((0, 0, 0), 0)], object), 1))


@dataclasses.dataclass(frozen=True)
class Tpu:
  """What JAX's layout of a mesh looks at."""

  coords: tuple[int, int, int]
  slice_index: int
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v5p'


def test_replicas_lie_within_a_slice():
  tpus = [Tpu((x, y, 0), slice_) for x in range(2) for y in range(4) for slice_ in (0, 1)]
  for replicas in (0, 2, 4):
    found = mesh.make_mesh(config(replicas, model=2), tpus)
    assert found.devices.shape == (replicas or 2, 16 // (replicas or 2) // 2, 2)
    of_replica = [{tpu.slice_index for tpu in replica.flat} for replica in found.devices]
    assert of_replica == sorted(of_replica, key=min) and all(len(slices) == 1 for slices in of_replica)
  for replicas, model in ((1, 1), (3, 1), (2, 16), (16, 2)):
    with pytest.raises(UserError, match=f'mesh.replicas = {replicas} with mesh.model = {model} must cut 2 TPU slices'):
      mesh.make_mesh(config(replicas, model=model), tpus)


def test_greatest_of_one_process_is_its_own():
  np.testing.assert_array_equal(mesh.greatest((15, 0), mesh.make_mesh(config(2, 2, 2))), [15, 0])

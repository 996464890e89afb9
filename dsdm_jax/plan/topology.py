"""TPU chips and slices to plan for; libtpu compiles for them on any machine.

The figures of the chips are from cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x (read in 2026). Those pages
give the link bandwidth of both directions together; here it is what a chip can receive, half of that. The bandwidth of
the data-center network is per chip, or that of a pod divided by its chips.
"""

import dataclasses
import importlib.util
import math
import os

import jax

from dsdm_jax.core.tensorflow_start import held_stderr
from dsdm_jax.errors import UserError

HOW_TO_GET_LIBTPU = 'pip install -r requirements-tpu.txt (libtpu is on the Python package index and needs no TPU)'


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip.

  Attributes:
    name: in `plan.topology`.
    peak_flops: FLOP/s of bfloat16 products.
    hbm_bytes: size of the HBM.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s that the chip receives over all ports.
    network_bandwidth: bytes/s that the chip receives from other slices; 0 if Google does not publish it.
    torus_axes: of the interconnect.
    largest: chips of the largest slice; that of v5p is less than its pod of 8,960 chips.
    accelerator: name for gcloud.
    cores_counted: gcloud's count for one chip.
    devices: of JAX in one chip. libtpu plans for the two cores of a v4 chip apart; on a TPU VM they are one device.
  """

  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  torus_axes: int
  largest: int
  accelerator: str
  cores_counted: int = 1
  devices: int = 1

  @property
  def device(self) -> 'Chip':
    """The share of one JAX device."""
    return dataclasses.replace(
      self,
      peak_flops=self.peak_flops / self.devices,
      hbm_bytes=self.hbm_bytes / self.devices,
      hbm_bandwidth=self.hbm_bandwidth / self.devices,
      link_bandwidth=self.link_bandwidth / self.devices,
      network_bandwidth=self.network_bandwidth / self.devices,
      devices=1,
    )

  def accelerator_type(self, chips: int) -> str:
    """The name of a slice for `gcloud --accelerator-type`: v5p counts cores, two per chip."""
    return f'{self.accelerator}-{chips * self.cores_counted}'

  @property
  def ring_bandwidth(self) -> float:
    """Bytes/s received by a collective around one axis of the torus."""
    return self.link_bandwidth / self.torus_axes


CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', 275e12, 32e9, 1_200e9, 300e9, 0.0, 3, 4_096, 'v4', cores_counted=2, devices=2),
    Chip('v5e', 197e12, 16e9, 819e9, 200e9, 3.125e9, 2, 256, 'v5litepod'),
    Chip('v5p', 459e12, 95e9, 2_765e9, 600e9, 6.25e9, 3, 6_144, 'v5p', cores_counted=2),
    Chip('v6e', 918e12, 32e9, 1_600e9, 400e9, 12.5e9, 2, 256, 'v6e'),
    Chip('tpu7x', 2_307e12, 192e9, 7_380e9, 600e9, 12.5e9, 3, 9_216, 'tpu7x', devices=2),
  )
}


def chip(topology: str) -> Chip:
  """The chip of 'v5e:16x16'.

  Raises:
    UserError: the chip is unknown.
  """
  name = topology.partition(':')[0]
  if name not in CHIPS:
    raise UserError(
      f'config key plan.topology = {topology!r} must start with one of {", ".join(CHIPS)}; set for example '
      '--config.plan.topology=v5e:2x4'
    )
  return CHIPS[name]


def available() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec('libtpu') is not None


def chips(topology: str) -> int:
  """Number of chips of 'v5p:4x4x8'.

  Raises:
    UserError: the chip is unknown, or its largest slice is smaller.
  """
  kind = chip(topology)
  shape = [int(n) for n in topology.partition(':')[2].split('x')]
  if len(shape) > kind.torus_axes or math.prod(shape) > kind.largest:
    raise UserError(
      f'config key plan.topology = {topology!r} is more than the largest slice of {kind.name} has: {kind.torus_axes} '
      f'axes and {kind.largest:,} chips; use an existing slice, and plan.slices for several'
    )
  return math.prod(shape)


def hosts(topology: str) -> int:
  """Number of hosts: up to 8 chips of v5e and v6e share one, otherwise 4 chips.

  Raises:
    UserError: the chip is unknown.
  """
  count = chips(topology)
  return 1 if chip(topology).name in ('v5e', 'v6e') and count <= 8 else -(-count // 4)


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """The devices of some slices to compile for; no array can be placed on them.

  Raises:
    UserError: libtpu does not support the topology, or the network between slices of that chip is not known.
  """
  from jax.experimental import topologies

  count = chips(topology)
  if slices > 1 and not chip(topology).network_bandwidth:
    raise UserError(
      f'config key plan.slices = {slices} with plan.topology = {topology!r}: Google does not publish the bandwidth of '
      'the network between slices of this chip; set --config.plan.slices=1, or another chip'
    )
  expected = count * chip(topology).devices * slices
  # libtpu takes a host to have 2 × 2 chips, unless the slice is a single chip.
  host = {'chips_per_host_bounds': (1, 1, 1)} if count == 1 else {}
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  with held_stderr():  # libtpu reports that there is no TPU
    try:
      devices = topologies.get_topology_desc(platform='tpu', topology_name=topology, num_slices=slices, **host).devices
    except Exception as error:  # libtpu raises various exceptions for an unknown name
      reason = ' '.join(str(error).split())[:160]
      raise UserError(
        f'config key plan.topology = {topology!r} is unknown to libtpu ({reason}); use an existing slice'
      ) from error
  if len(devices) != expected:
    raise ValueError(f'{slices} × {topology} has {expected} devices and libtpu gives {len(devices)}')
  return devices

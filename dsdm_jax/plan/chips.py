"""What one TPU chip can do, from the maker's pages: cloud.google.com/tpu/docs/v5e, /v5p and /v6e (read in 2026).

The pages give link bandwidth for both directions together; here it is what a chip can receive, half of that.
"""

import dataclasses

from dsdm_jax.core import flops
from dsdm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Attributes: HBM in bytes; HBM in bytes/s; links in bytes/s received over all ports; axes of the torus; how gcloud
  names it, and how many it counts for a chip. Its peak stands in `core.flops`.
  """

  name: str
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  torus_axes: int
  accelerator: str
  cores_counted: int = 1

  def accelerator_type(self, chips: int) -> str:
    """What `gcloud --accelerator-type` calls a slice of so many chips: v5p counts cores, two a chip."""
    return f'{self.accelerator}-{chips * self.cores_counted}'

  @property
  def peak_flops(self) -> float:
    """Of bfloat16 products, FLOP/s."""
    return flops.PEAKS[self.name]

  @property
  def ring_bandwidth(self) -> float:
    """Bytes/s received where a collective runs around one axis of the torus alone."""
    return self.link_bandwidth / self.torus_axes


CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v5e', 16e9, 819e9, 200e9, 2, 'v5litepod'),
    Chip('v5p', 95e9, 2_765e9, 600e9, 3, 'v5p', cores_counted=2),
    Chip('v6e', 32e9, 1_600e9, 400e9, 2, 'v6e'),
  )
}


def chip(topology: str) -> Chip:
  """The chip of 'v5e:16x16'.

  Raises:
    UserError: no chip of that name.
  """
  name = topology.partition(':')[0]
  if name not in CHIPS:
    raise UserError(
      f'config key plan.topology = {topology!r} names no chip of {", ".join(CHIPS)}; set for example '
      '--config.plan.topology=v5e:2x4'
    )
  return CHIPS[name]

"""DsDm: dataset selection with datamodels (Engstrom, Feldmann, Madry, ICML 2024) on JAX."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from dsdm_jax.api import Run

__version__ = '0.1.0'


def load(workdir: str | os.PathLike, verify: bool = True) -> 'Run':
  """Opens a run for a notebook: its pool, scores, selections and results; see `dsdm_jax.api.load`."""
  from dsdm_jax import api  # here, so that `import dsdm_jax` costs nothing

  return api.load(workdir, verify)

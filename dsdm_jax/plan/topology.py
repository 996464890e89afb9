"""TPU slices that are not there: libtpu compiles for them on any machine."""

import contextlib
import importlib.util
import math
import os

import jax

from dsdm_jax.core.tensorflow_start import held_stderr
from dsdm_jax.errors import UserError
from dsdm_jax.plan.chips import chip

HOW_TO_GET_LIBTPU = 'pip install -r requirements-tpu.txt (libtpu is on the Python package index and needs no TPU)'


def available() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec('libtpu') is not None


def chips(topology: str) -> int:
  """Number of chips of 'v5p:4x4x8'.

  Raises:
    UserError: no such chip.
  """
  chip(topology)
  return math.prod(int(n) for n in topology.partition(':')[2].split('x'))


def devices(topology: str) -> list[jax.Device]:
  """The devices of a slice to compile for. No array can be put on them.

  Raises:
    UserError: libtpu does not know the topology.
  """
  from jax.experimental import topologies

  count = chips(topology)
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  with quiet():
    try:
      found = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except Exception as error:  # a boundary: libtpu raises what it likes about a name
      reason = ' '.join(str(error).split())[:160]
      raise UserError(
        f'config key plan.topology = {topology!r} is unknown to libtpu ({reason}); give a slice that exists'
      ) from error
  if len(found) != count:
    raise ValueError(f'{topology} has {count} chips and libtpu gives {len(found)} devices')
  return found


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]  # a generator of nothing
  """Holds back what libtpu prints about the TPU that is not there, until the block raises."""
  with held_stderr():
    yield

"""A roofline of compiled programs: seconds, bytes and money on chips, without any measurement.

A step takes at least the longest of compute, HBM traffic and communication over links and between slices, if all of
them overlap perfectly, and at most their sum, if nothing overlaps. Estimates are the range between these two.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax

from dsdm_jax.core.tensorflow_start import held_stderr
from dsdm_jax.errors import UserError
from dsdm_jax.plan import hlo
from dsdm_jax.plan.programs import Work
from dsdm_jax.plan.topology import Chip

_USED = re.compile(r'Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm', re.IGNORECASE)
_UNIT = {'K': 2**10, 'M': 2**20, 'G': 2**30}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """One program that libtpu compiled, on one chip.

  Attributes:
    memory_bytes: arguments, results and temporaries; for a program that does not fit, the memory that it needs.
    temporary_bytes: temporaries alone.
    refused: libtpu refused it because it does not fit.
    text: of the program; '' if it was refused.
  """

  memory_bytes: float
  temporary_bytes: float
  refused: bool
  text: str


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Seconds of one run of a program: for each resource alone, then the lower and upper bound of the run."""

  compute: float
  hbm: float
  link: float
  network: float
  low: float
  high: float

  @property
  def bound(self) -> str:
    """The resource that takes longest."""
    times = {'compute': self.compute, 'HBM': self.hbm, 'links': self.link, 'network': self.network}
    return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The estimate of one stage, as in the JSON file. Ranges are [low, high], empty if the program does not fit."""

  stage: str
  parameters: int
  batch: int
  batch_per_chip: float
  runs: int
  fits: bool
  memory_bytes: float
  temporary_bytes: float
  hbm_bytes_of_chip: float
  largest_batch: int | None
  collectives: list[dict[str, Any]]
  flop_per_run: float
  least_flop_per_run: float
  hbm_bytes_per_run: float
  link_bytes_per_run: float
  network_bytes_per_run: float
  seconds_per_run: list[float]
  bound: str
  mfu: list[float]
  tokens_per_second: list[float]
  hours: list[float]
  advice: str
  unknown_trips: int  # loops with unknown trip count, which are counted once


class Compiler:
  """Compiles ahead of time for one slice, and caches programs: stages that train the same model share one."""

  def __init__(self) -> None:
    self._known: dict[str, Compiled] = {}

  def __call__(self, work: Work, batch: int | None = None) -> Compiled:
    """Compiles the program of `work` with a global batch of `batch`; `refused` is set if it does not fit.

    Raises:
      jax.errors.JaxRuntimeError: libtpu fails for another reason.
    """
    with held_stderr():  # libtpu reports that there is no TPU
      lowered = work.lower(batch)
      text = lowered.as_text()
      if text not in self._known:
        self._known[text] = _compile(lowered)
    return self._known[text]


def _compile(lowered: Any) -> Compiled:
  try:
    program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    used = _USED.search(str(error))
    return Compiled(float(used[1]) * _UNIT[used[2]] if used else float('inf'), 0.0, True, '')
  memory = program.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  text = program.as_text() or ''
  return Compiled(float(held + memory.temp_size_in_bytes), float(memory.temp_size_in_bytes), False, text)


def seconds(flop: float, passes: int, program: hlo.Program, chip: Chip) -> Seconds:
  """Seconds of one run on one chip.

  Args:
    flop: on one chip.
    passes: bfloat16 products per counted product.
    program: the compiled program.
    chip: that it runs on.
  """
  compute, hbm = flop * passes / chip.peak_flops, program.hbm_bytes / chip.hbm_bandwidth
  link, ring = program.link_bytes / chip.link_bandwidth, program.link_bytes / chip.ring_bandwidth
  network = program.network_bytes / chip.network_bandwidth if program.network_bytes else 0.0
  low = max(compute, hbm, link, network)
  return Seconds(compute, hbm, link, network, low, compute + hbm + ring + network)


def fits(compiled: Compiled, chip: Chip) -> bool:
  return not compiled.refused and compiled.memory_bytes <= chip.hbm_bytes


def _needed_bytes(compiled: Compiled, chip: Chip) -> float:
  """Memory in bytes, more than the chip has if the program was refused."""
  return max(compiled.memory_bytes, chip.hbm_bytes * (1 + 1e-9)) if compiled.refused else compiled.memory_bytes


def largest(parts: int, memory: float, room: float, memory_of: Callable[[int], float]) -> int:
  """The largest number of rows per chip, below `parts`, that needs at most `room` bytes; 0 if there is none.

  Memory never decreases with rows and is mostly linear in them: the search alternates between linear interpolation and
  bisection.

  Args:
    parts: a number of rows that does not fit.
    memory: bytes of `parts` rows; infinity if unknown.
    room: bytes.
    memory_of: rows → bytes.
  """
  low, high = 0, parts
  known, guess = {0: 0.0, parts: memory}, True
  while high - low > 1:
    middle = (low + high) // 2
    if guess:
      (x, a), (y, b) = sorted(known.items(), key=lambda point: abs(point[1] - room))[:2]
      if math.isfinite(a + b) and a != b:
        middle = min(max(math.floor(x + (room - a) / (b - a) * (y - x)), low + 1), high - 1)
    known[middle] = memory_of(middle)
    low, high = (middle, high) if known[middle] <= room else (low, middle)
    guess = not guess or high - low == 1
  return low


def estimate(work: Work, compiler: Compiler, chip: Chip, chips: int, share: int, calibration: float) -> Estimate:
  """Compiles `work` and models it.

  Args:
    work: the program.
    compiler: for the slice.
    chip: kind of chip.
    chips: number of chips.
    share: devices that share a batch.
    calibration: measured seconds per modelled second.

  Raises:
    UserError: the devices do not divide the batch.
  """
  if work.batch % share:
    raise UserError(
      f'config key {work.batch_key} = {work.batch} must be a multiple of {share}, the chips that share it'
    )
  compiled = compiler(work)
  does_fit = fits(compiled, chip)
  best = None
  if not does_fit:
    best = share * largest(
      work.batch // share,
      compiled.memory_bytes,
      chip.hbm_bytes,
      lambda rows: _needed_bytes(compiler(work, rows * share), chip),
    )
  program = hlo.analyse(compiled.text)
  flop = work.flop()
  time = seconds(flop / chips, work.passes, program, chip)
  ends = [time.low * calibration, time.high * calibration] if does_fit else []
  least = work.least_flop * work.passes / chips / chip.peak_flops
  return Estimate(
    stage=work.stage,
    parameters=work.parameters,
    batch=work.batch,
    batch_per_chip=work.batch / share,
    runs=work.runs,
    fits=does_fit,
    memory_bytes=compiled.memory_bytes,
    temporary_bytes=compiled.temporary_bytes,
    hbm_bytes_of_chip=chip.hbm_bytes,
    largest_batch=best,
    collectives=[dataclasses.asdict(c) for c in program.collectives],
    flop_per_run=flop,
    least_flop_per_run=work.least_flop,
    hbm_bytes_per_run=program.hbm_bytes,
    link_bytes_per_run=program.link_bytes,
    network_bytes_per_run=program.network_bytes,
    seconds_per_run=ends,
    bound=time.bound,
    mfu=[least / s for s in reversed(ends)],
    tokens_per_second=[work.tokens / s for s in reversed(ends)],
    hours=[work.runs * s / 3_600 for s in ends],
    advice='' if does_fit else advice(work, best or 0),
    unknown_trips=program.unknown_trips,
  )


def advice(work: Work, best: int) -> str:
  """The keys to change if a program does not fit."""
  ways = [f'--config.{work.batch_key}={best}'] if best else []
  ways += [f'--config.{work.remat_key}=True'] if work.remat_key else []
  ways.append('a larger --config.mesh.model')
  return f'{work.stage} does not fit: set ' + ', or '.join(ways)

"""Work of the hosts of a slice: seconds and memory of each stage, from unit costs measured by `bench host`.

Every host reads, copies, writes and scores the rows that its own chips compute. Seconds are those of one processor; a
host of a TPU has a hundred or more, and reading and writing overlap with the chips.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.attribution.accumulators import CHUNK_ROWS
from dsdm_jax.attribution.ekfac import ENTRIES
from dsdm_jax.training.proxies import checkpoints


@dataclasses.dataclass(frozen=True)
class Units:
  """Processor seconds and bytes, measured by `python -m dsdm_jax.bench host` (docs/limits.md)."""

  token_seconds_per_row: float = 9.9e-6  # of 1,024 tokens
  write_seconds_per_byte: float = 1.8e-9
  read_seconds_per_byte: float = 2.2e-9
  decode_seconds_per_entry: float = 1.4e-9  # of int8
  write_seconds_per_shard: float = 2.0e-3
  look_seconds_per_shard: float = 8.0e-5
  gram_seconds_per_entry: float = 9.3e-10
  reduce_seconds_per_score: float = 3.6e-8
  finish_seconds_per_row: float = 3.6e-7
  partial_bytes_per_row: float = 160.0
  selection_seconds_per_row: float = 1.1e-6
  selection_bytes_per_row: float = 27.0


UNITS = Units()
_PROCESS_BYTES = 2e9  # interpreter, JAX, TensorFlow and compiled programs
_LENGTH = 1_024  # tokens of the rows whose reading was measured
_BLOCK_BYTES = 40.0  # of an entry: float32 means and directions, and float64 copies in the basis of the factors
_START_SECONDS = 20.0  # imports, the coordinator and the first look at the devices
_HELD_SHARDS = 4  # that is filled, that is written with TensorStore's copy and the bytes of its file


@dataclasses.dataclass(frozen=True)
class HostWork:
  """One stage on one host, as in the JSON file.

  Attributes:
    seconds: of one processor.
    memory_bytes: at most, the interpreter included.
    disk_bytes: that the host writes.
  """

  stage: str
  seconds: float
  memory_bytes: float
  disk_bytes: float


def works(
  config: ConfigDict, hosts: int, rows: int, dimension: int, entries: int, columns: int, of_ekfac: tuple[int, int]
) -> list[HostWork]:
  """The stages whose hosts' work grows with the pool, and the start after a preemption.

  Args:
    hosts: of all slices.
    rows, dimension: N and J.
    entries: of the Gram matrix of one checkpoint, over all its blocks.
    columns: K, the scores of a row for all targets.
    of_ekfac: entries of EK-FAC's factors at one checkpoint, and of the largest matrix.
  """
  features, u, count = config.features, UNITS, checkpoints(config)
  stored = features.mode == 'store' and features.projection != 'ekfac'
  shards = math.ceil(rows / features.shard_rows)
  rounds = math.ceil(shards / hosts)
  own = min(rows, rounds * features.shard_rows)  # rows of the host that has most
  width = {'float32': 4, 'bfloat16': 2, 'int8': 1}[features.store_dtype] * dimension
  largest = min(features.shard_rows, rows)
  shard, held, scaled = width * largest, 2.0 * width * largest, stored and features.store_dtype == 'int8'
  reread = width * u.read_seconds_per_byte
  if scaled:  # on the host, in float32: codes, scales, their product, and the shard before
    held += 4 * 4.0 * dimension * largest
    reread += dimension * u.decode_seconds_per_entry
  tasks = len(config.targets.tasks)
  read = own * u.token_seconds_per_row * count * config.pool.length / _LENGTH
  result = []
  if stored:
    written = own * width * count
    seconds = read + written * u.write_seconds_per_byte + rounds * count * u.write_seconds_per_shard
    result.append(HostWork('features', seconds, _PROCESS_BYTES + _HELD_SHARDS * shard, written))
    seconds = count * (own * reread + rounds * entries * u.gram_seconds_per_entry)
    # The sums of one checkpoint in float64, a factor, and a product in float32.
    result.append(HostWork('gram', seconds, _PROCESS_BYTES + held + 20.0 * entries, 8.0 * entries * count))
    read = own * count * reread
  partial = min(own, CHUNK_ROWS / hosts + features.shard_rows) * u.partial_bytes_per_row * tasks
  seconds = read + own * (count * columns * u.reduce_seconds_per_score + tasks * u.finish_seconds_per_row)
  scored = 24.0 * min(features.shard_rows, rows) * columns * count  # a shard's scores in float32, and in float64
  mixed = (4.0 * tasks + 12) * rows  # on the first host
  memory = max(partial + scored + held * stored, mixed)
  if features.projection == 'ekfac':
    factors, largest = of_ekfac
    means = 8.0 * tasks * dimension  # of one checkpoint; the first host keeps those of all until they are written
    # While a matrix is solved: the file of factors and its arrays, a block with its copies, the means of the matrix.
    solving = 8.0 * factors + _BLOCK_BYTES * max(ENTRIES, largest) + 16.0 * tasks * largest
    writing = 24.0 * count * dimension  # an array, its file and a copy
    memory = means * count + max(memory, solving + means, writing)
  memory += _PROCESS_BYTES
  result.append(HostWork('scores', seconds, memory, own * u.partial_bytes_per_row * tasks))
  memory = _PROCESS_BYTES + rows * u.selection_bytes_per_row
  result.append(HostWork('selection', rows * u.selection_seconds_per_row, memory, 0.0))
  # Each host looks at its part of the shards, and the first at all of them when the stage ends.
  looked = (rounds + shards) * count * u.look_seconds_per_shard * stored
  result.append(HostWork('start after a preemption', _START_SECONDS + looked, _PROCESS_BYTES, 0.0))
  return result


def text(works: Sequence[dict[str, Any]], hosts: int) -> list[str]:
  """One line for each stage."""
  lines = [f'Work of each of {hosts} hosts, from measured unit costs (docs/limits.md):']
  for work in works:
    disk = f', {work["disk_bytes"] / 1e9:,.1f} GB written' if work['disk_bytes'] else ''
    lines.append(
      f'{work["stage"]}: {work["seconds"]:,.0f} s of one processor, at most {work["memory_bytes"] / 1e9:,.1f} GB of '
      f'memory{disk}'
    )
  return lines

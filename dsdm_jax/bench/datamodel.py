"""Speed and memory of the datamodel: `python -m dsdm_jax.bench datamodel --dimension 4096 --rows 100000`.

Times Gram matrix, Cholesky and scores over random features, and compares them with the matrix-product peak of the same
machine, measured in the same run. With `--solve-only` the Gram matrix is random as well, so that large J can be tried
without hours of matrix products. Prints one line of JSON.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.sources import RowSource, Shard
from dsdm_jax.core import prng


class Repeated(RowSource):
  """One shard in memory, repeated until there are `rows` rows: measures the datamodel and not the disk."""

  def __init__(self, rows: int, dimension: int, shard_rows: int):
    self.rows, self.dimension = rows, dimension
    rng = prng.numpy_stream(0, 'bench', 'datamodel')
    self.phi_BJ = rng.standard_normal((min(shard_rows, rows), dimension), np.float32)

  def from_row(self, row: int) -> Iterator[Shard]:
    for start in range(row, self.rows, len(self.phi_BJ)):
      stop = min(start + len(self.phi_BJ), self.rows)
      yield start, stop, self.phi_BJ[: stop - start]


def matmul_peak(dimension: int, repeats: int = 4) -> float:
  """FLOP/s of the fastest of several float32 products of `dimension` cubed, at the precision of the Gram matrix."""
  x = jnp.asarray(prng.numpy_stream(0, 'bench', 'matmul').standard_normal((dimension, dimension), np.float32))
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
  multiply(x, x).block_until_ready()
  best = float('inf')
  for _ in range(repeats):
    began = time.perf_counter()
    multiply(x, x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * dimension**3 / best


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--rows', type=int, default=100_000)
  parser.add_argument('--dimension', type=int, default=4_096)
  parser.add_argument('--shard-rows', type=int, default=1_024)
  parser.add_argument('--columns', type=int, default=3, help='number of targets')
  parser.add_argument('--solve-only', action='store_true')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  rows, dimension = flags.rows, flags.dimension
  source = Repeated(rows, dimension, flags.shard_rows)
  right_KJ = prng.numpy_stream(0, 'bench', 'targets').standard_normal((flags.columns, dimension))
  before = matmul_peak(min(dimension, 4_096))
  clock = [time.perf_counter()]
  if flags.solve_only:
    # A float64 matrix with a spectrum like a Gram matrix: low rank and a small diagonal.
    thin = source.phi_BJ[:256].astype(np.float64)
    thin /= len(thin) ** 0.5
    gram = [thin.T @ thin]
  else:
    gram = datamodel.gram(source)
  clock.append(time.perf_counter())
  solution = datamodel.solve(gram, datamodel.whole(dimension), right_KJ, 0.1, overwrite=True)
  clock.append(time.perf_counter())
  if not flags.solve_only:
    for _ in datamodel.score_shards(source, solution.u_JK):
      pass
  clock.append(time.perf_counter())
  peak = max(before, matmul_peak(min(dimension, 4_096)))
  flop = 2.0 * rows * dimension**2 + dimension**3 / 3 + 2.0 * rows * dimension * flags.columns
  line: dict[str, float] = {'rows': rows, 'dimension': dimension}
  line |= dict(zip(('gram_seconds', 'solve_seconds', 'score_seconds'), np.diff(clock).tolist(), strict=True))
  line['peak_gflops'] = peak / 1e9
  if not flags.solve_only:
    line['share_of_peak'] = flop / (clock[-1] - clock[0]) / peak
  scale = 1 if sys.platform == 'darwin' else 1_024  # ru_maxrss is in bytes on macOS and in KiB on Linux
  line['largest_memory_gib'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
  rounded = {key: value if isinstance(value, int) else float(f'{value:.4g}') for key, value in line.items()}
  print(json.dumps({**rounded, 'device': jax.devices()[0].device_kind, 'cpus': os.cpu_count()}))

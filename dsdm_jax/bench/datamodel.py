"""Speed and memory of the datamodel: `python -m dsdm_jax.bench.datamodel --dimension 4096 --rows 100000`.

Gram, Cholesky and scores over made-up features, against the matmul peak of the same machine measured in the same run.
With `--solve-only` the Gram matrix is made up as well, so that large J can be tried without hours of matmuls. Prints
one line of JSON.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.sources import RowSource, Shard
from dsdm_jax.core import prng


class Repeated(RowSource):
  """Rows of one shard in memory, over and over: what is measured is the datamodel and not the disk."""

  def __init__(self, rows: int, dimension: int, shard_rows: int):
    self.rows, self.dimension = rows, dimension
    rng = prng.numpy_stream(0, 'bench', 'datamodel')
    self._phi_BJ = rng.standard_normal((min(shard_rows, rows), dimension), np.float32)

  def from_row(self, row: int) -> Iterator[Shard]:
    for start in range(row, self.rows, len(self._phi_BJ)):
      stop = min(start + len(self._phi_BJ), self.rows)
      yield start, stop, self._phi_BJ[: stop - start]


def matmul_peak(dimension: int, repeats: int = 4) -> float:
  """FLOP/s of the best of several float32 matmuls of `dimension` cubed, at the precision that the Gram uses."""
  x = jnp.asarray(prng.numpy_stream(0, 'bench', 'matmul').standard_normal((dimension, dimension), np.float32))
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
  multiply(x, x).block_until_ready()
  best = float('inf')
  for _ in range(repeats):
    began = time.perf_counter()
    multiply(x, x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * dimension**3 / best


def measure(rows: int, dimension: int, shard_rows: int, columns: int, solve_only: bool) -> dict[str, float]:
  """Seconds of each step, share of the matmul peak over all of them, and the process's largest memory in GiB."""
  found: dict[str, float] = {'rows': rows, 'dimension': dimension}
  source = Repeated(rows, dimension, shard_rows)
  right_KJ = prng.numpy_stream(0, 'bench', 'targets').standard_normal((columns, dimension))
  before = matmul_peak(min(dimension, 4_096))
  began = time.perf_counter()
  if solve_only:
    # A float64 matrix with a spectrum like a Gram's: low rank and a small diagonal.
    thin = source._phi_BJ[:256].astype(np.float64)
    thin /= len(thin) ** 0.5
    parts = [thin.T @ thin]
  else:
    parts = datamodel.gram(source)
  found['gram_seconds'] = time.perf_counter() - began
  began = time.perf_counter()
  solution = datamodel.solve(parts, datamodel.whole(dimension), right_KJ, 0.1, overwrite=True)
  found['solve_seconds'] = time.perf_counter() - began
  began = time.perf_counter()
  if not solve_only:
    for _ in datamodel.score_shards(source, solution.u_JK):
      pass
  found['score_seconds'] = time.perf_counter() - began
  after = matmul_peak(min(dimension, 4_096))
  seconds = found['gram_seconds'] + found['solve_seconds'] + found['score_seconds']
  flop = 2.0 * rows * dimension**2 + dimension**3 / 3 + 2.0 * rows * dimension * columns
  found['peak_gflops'] = max(before, after) / 1e9
  if not solve_only:
    found['share_of_peak'] = flop / seconds / max(before, after)
  scale = 1 if sys.platform == 'darwin' else 1_024  # ru_maxrss is in bytes there and in KiB here
  found['largest_memory_gib'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
  return found


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.bench.datamodel')
  parser.add_argument('--rows', type=int, default=100_000)
  parser.add_argument('--dimension', type=int, default=4_096)
  parser.add_argument('--shard-rows', type=int, default=1_024)
  parser.add_argument('--columns', type=int, default=3, help='targets that are scored')
  parser.add_argument('--solve-only', action='store_true')
  given = parser.parse_args(argv)
  found = measure(given.rows, given.dimension, given.shard_rows, given.columns, given.solve_only)
  rounded = {key: value if isinstance(value, int) else float(f'{value:.4g}') for key, value in found.items()}
  sys.stdout.write(json.dumps({**rounded, 'device': jax.devices()[0].device_kind, 'cpus': os.cpu_count()}) + '\n')


if __name__ == '__main__':
  main()

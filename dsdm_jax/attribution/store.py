"""Features on disk: one TensorStore array [N, J] per checkpoint, written shard by shard of fixed row ranges."""

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import tensorstore as ts

from dsdm_jax.core import atomic
from dsdm_jax.core.errors import UserError, as_os_error


class FeatureStore:
  """Rows of features in a zarr3 array with one checksummed (crc32c) chunk per shard.

  A shard counts as written only once its marker stands beside the array, since zarr reads a missing chunk as zeros.

  Args:
    path: folder of the array.
    rows, dimension: N and J.
    shard_rows: rows of a shard; the last may be short.
    dtype: 'bfloat16' or 'float32', as stored.
  """

  def __init__(self, path: Path, rows: int, dimension: int, shard_rows: int, dtype: str):
    self.rows, self.dimension, self.shard_rows, self.dtype = rows, dimension, shard_rows, np.dtype(dtype)
    self._done = Path(path).absolute().with_suffix('.done')
    self._done.mkdir(parents=True, exist_ok=True)
    self._array = ts.open(
      {
        'driver': 'zarr3',
        'kvstore': {'driver': 'file', 'path': str(Path(path).absolute())},
        'metadata': {
          'shape': [rows, dimension],
          'data_type': dtype,
          'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [shard_rows, dimension]}},
          'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}],
        },
      },
      open=True,
      create=True,
    ).result()

  @property
  def shards(self) -> int:
    return -(-self.rows // self.shard_rows)

  def bounds(self, shard: int) -> tuple[int, int]:
    """First row and the row after the last."""
    return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

  def missing(self) -> list[int]:
    """Shards that are not written yet."""
    return [s for s in range(self.shards) if not self._marker(s).is_file()]

  def write(self, shard: int, phi_BJ: np.ndarray) -> None:
    """Writes one shard, waits until it is on disk, then marks it.

    Raises:
      OSError: the disk is full, or will not take it for another reason.
    """
    start, stop = self.bounds(shard)
    try:
      self._array[start:stop].write(phi_BJ.astype(self.dtype)).result()
    except ValueError as error:
      raise as_os_error(error, self._done.with_suffix('.zarr')) or error from error
    atomic.write_json(self._marker(shard), {'rows': [start, stop]})

  def read(self, shard: int) -> np.ndarray:
    """One shard as stored.

    Raises:
      UserError: it was never written, or its checksum is wrong.
    """
    start, stop = self.bounds(shard)
    try:
      json.loads(self._marker(shard).read_bytes())
      return self._array[start:stop].read().result()
    except (OSError, ValueError) as error:
      reason = str(error).splitlines()[0][:160]
      raise UserError(
        f'features of rows {start} to {stop - 1} in {self._done.with_suffix(".zarr")} cannot be read ({reason}); '
        'delete the features folder of the workdir and start again'
      ) from error

  def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start, stop, phi_BJ) for each shard, in order."""
    for shard in range(self.shards):
      start, stop = self.bounds(shard)
      yield start, stop, self.read(shard)

  def _marker(self, shard: int) -> Path:
    return self._done / f'{shard:06d}.json'

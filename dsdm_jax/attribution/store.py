"""Features on disk: one TensorStore array [N, J] per checkpoint, written shard by shard of fixed row ranges."""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore as ts

from dsdm_jax.attribution import completion_markers
from dsdm_jax.attribution.quantization import Blocks, Rounding
from dsdm_jax.errors import UserError, as_os_error

Shard = tuple[int, int, np.ndarray]


class FeatureStore:
  """Rows of features in a zarr3 array with one checksummed (crc32c) chunk per shard.

  A shard counts as written only once its marker stands beside the array, since zarr reads a missing chunk as zeros, and
  only while its bytes are those that were marked.

  Args:
    path: folder of the array.
    rows, dimension: N and J.
    shard_rows: rows of a shard; the last may be short.
    dtype: 'bfloat16', 'float32' or 'int8', as stored.
    blocks: columns that share a scale in int8; None is one block of all.
    basis: names what the columns are, where seed and settings do not; stands in each shard's marker.
    origin: names the run; stands there too. '' takes shards of any.
  """

  def __init__(
    self,
    path: Path,
    rows: int,
    dimension: int,
    shard_rows: int,
    dtype: str,
    blocks: Blocks | None = None,
    basis: str = '',
    origin: str = '',
  ):
    self._basis, self._origin = basis, origin
    self.rows, self.dimension, self.shard_rows = rows, dimension, shard_rows
    self.rounding = Rounding(dtype, blocks or ((0, dimension),))
    self._done = Path(path).absolute().with_suffix('.done')
    self._done.mkdir(parents=True, exist_ok=True)
    self._array = _open(path, (rows, dimension), shard_rows, dtype)
    self._scales = None
    if self.rounding.scaled:
      scales = (rows, len(self.rounding.blocks))
      self._scales = _open(path.with_suffix('.scales.zarr'), scales, shard_rows, 'float32')

  @property
  def shards(self) -> int:
    return -(-self.rows // self.shard_rows)

  def bounds(self, shard: int) -> tuple[int, int]:
    """First row and the row after the last."""
    return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

  def missing(self) -> list[int]:
    """Shards that are not written yet, or whose bytes have changed since; all files are read for it.

    Raises:
      UserError: some are of another run, or were written with another basis.
    """
    missing = []
    for shard in range(self.shards):
      marker = self._marker(shard)
      said = completion_markers.read(marker, self._chunks(shard), self._origin)
      if said is None:
        missing.append(shard)
      elif self._basis and said.get('basis', '') != self._basis:
        raise UserError(
          f'shard {shard} of {self._done.with_suffix(".zarr")} was made with another basis of eigenvectors: jobs with '
          f'disks of their own must begin with one copy of the basis_*.npz files; delete {marker} to make it anew'
        )
    return missing

  def write(self, shard: int, phi_BJ: np.ndarray) -> None:
    """Writes one shard, waits until it is on disk, then marks it.

    Raises:
      OSError: the disk is full, or will not take it for another reason.
    """
    start, stop = self.bounds(shard)
    marker = self._marker(shard)
    try:
      # What a damaged shard left: of a short one TensorStore would read the old chunk first, and fail.
      for file in (marker, *self._chunks(shard)):
        file.unlink(missing_ok=True)
      codes_BJ, scale_BK = self.rounding.encode(phi_BJ)
      self._array[start:stop].write(codes_BJ).result()
      if self._scales is not None and scale_BK is not None:
        self._scales[start:stop].write(scale_BK).result()
    except ValueError as error:
      raise as_os_error(error, self._done.with_suffix('.zarr')) or error from error
    basis = {'basis': self._basis} if self._basis else {}
    completion_markers.write(marker, self._chunks(shard), self._origin, rows=[start, stop], **basis)

  def fill(self, shards: Sequence[int], coming: Iterable[Shard]) -> Iterator[tuple[int, np.ndarray]]:
    """Writes `shards` as they come, each while the next one is made; yields each and its features beforehand.

    Raises:
      OSError: as `write`.
    """
    with ThreadPoolExecutor(1) as writer:
      written: Future | None = None
      for shard, (_, _, phi_BJ) in zip(shards, coming, strict=True):
        if written is not None:
          written.result()
        yield shard, phi_BJ
        written = writer.submit(self.write, shard, phi_BJ)
      if written is not None:
        written.result()

  def read(self, shard: int) -> np.ndarray:
    """One shard as stored, of int8 the float32 that it stands for.

    Raises:
      UserError: it was never written, or its checksum is wrong.
    """
    start, stop = self.bounds(shard)
    try:
      json.loads(self._marker(shard).read_bytes())
      for file in self._chunks(shard):
        file.stat()  # a chunk that is not there would read as zeros
      codes_BJ = self._array[start:stop].read().result()
      scale_BK = None if self._scales is None else self._scales[start:stop].read().result()
      return self.rounding.decode(codes_BJ, scale_BK)
    except (OSError, ValueError, RecursionError) as error:
      reason = ' '.join(str(error).split())[:160]
      raise UserError(
        f'features of rows {start} to {stop - 1} in {self._done.with_suffix(".zarr")} cannot be read ({reason}); '
        'start the same command again, which makes this shard anew'
      ) from error

  def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start, stop, phi_BJ) for each shard, in order."""
    return self.starting(0)

  def starting(self, row: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """The shards from `row` on, which begins one."""
    for shard in range(row // self.shard_rows, self.shards):
      start, stop = self.bounds(shard)
      yield start, stop, self.read(shard)

  def _chunks(self, shard: int) -> list[Path]:
    """Files that hold a shard."""
    arrays = ['.zarr'] if self._scales is None else ['.zarr', '.scales.zarr']
    return [self._done.with_suffix(array) / 'c' / str(shard) / '0' for array in arrays]

  def _marker(self, shard: int) -> Path:
    return self._done / f'{shard:06d}.json'


def _open(path: Path, shape: tuple[int, int], shard_rows: int, dtype: str) -> ts.TensorStore:
  spec = {
    'driver': 'zarr3',
    'kvstore': {'driver': 'file', 'path': str(Path(path).absolute())},
    'store_data_equal_to_fill_value': True,  # so that a chunk which is not there was lost, and is not one of zeros
    'metadata': {
      'shape': list(shape),
      'data_type': dtype,
      'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [shard_rows, shape[1]]}},
      'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}],
    },
  }
  try:
    return ts.open(spec, open=True, create=True).result()
  except ValueError as error:
    if found := as_os_error(error, path):
      raise found from error
    raise UserError(
      f'{path}/zarr.json cannot be read or is of another store ({" ".join(str(error).split())[:160]}); delete it and '
      'start again, shards that are whole are kept'
    ) from error

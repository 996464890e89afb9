"""Features on disk: one TensorStore array [N, J] per checkpoint, and the reader of a finished features stage.

A completion marker beside the files says which of them are finished. It is a JSON file `<stage>/<name>.done/<id>.json`:

    {"origin": digest of what the run was started from,
     "files": {path relative to <stage>: {"bytes": size, "sha256": hexadecimal digest}}, …}

The entries of `files` have the form of those in a manifest: each file is hashed once, when it is written, and once more
only where a killed stage resumes. A file without a marker is not finished. A resumed stage recomputes files that have
changed since they were marked, and refuses those of a run with other settings whose folder was copied over this one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from dsdm_jax.attribution.quantization import Blocks, Quantizer, column_blocks
from dsdm_jax.attribution.sources import RowSource, Shard
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError, as_os_error

if TYPE_CHECKING:
  from dsdm_jax.attribution.extractor import FeatureExtractor


def mark(marker: Path, files: Sequence[Path], origin: str, **more: Any) -> None:
  """Marks `files`, which are complete on disk, as finished.

  Args:
    marker: file of the marker.
    origin: identifies the run.
    more: further entries of the marker.
  """
  stage = marker.parent.parent
  entries = {
    file.relative_to(stage).as_posix(): {'bytes': file.stat().st_size, 'sha256': storage.checksum(file)}
    for file in files
  }
  storage.write_json(marker, {'origin': origin, 'files': entries, **more})


def read_marker(marker: Path, files: Sequence[Path], origin: str, *, verify: bool = True) -> dict[str, Any] | None:
  """Content of the marker, or None if it is missing or unreadable or `files` are not as they were marked.

  Args:
    origin: of the run that reads; '' accepts files of any run.
    verify: hash the files; otherwise only their sizes are compared.

  Raises:
    UserError: the marker is of another run.
  """
  stage = marker.parent.parent
  try:
    content = dict(json.loads(marker.read_bytes()))
    marked_origin, entries = str(content['origin']), dict(content['files'])
    marked = {stage / name: (int(entry['bytes']), str(entry['sha256'])) for name, entry in entries.items()}
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
    return None
  if origin and marked_origin != origin:
    raise UserError(
      f'{files[0]} is of a run with other settings, pool, targets or proxies (see {marker}); delete that marker to '
      'recompute it, and merge only folders of copies of one workdir'
    )
  unchanged = marked.keys() == set(files) and all(
    file.is_file() and file.stat().st_size == size and (not verify or storage.checksum(file) == sha256)
    for file, (size, sha256) in marked.items()
  )
  return content if unchanged else None


class FeatureStore(RowSource):
  """Rows of features in a zarr3 array with one checksummed (crc32c) chunk per shard. It needs no workdir:

      store = FeatureStore(Path('features.zarr'), rows=N, dimension=J, shard_rows=1024, dtype='bfloat16')
      for shard in store.missing():
        store.write(shard, phi_BJ)  # float32, rows `store.bounds(shard)`
      gram(store)

  A shard is written once its completion marker exists, since zarr reads a missing chunk as zeros, and as long as its
  bytes are those that were marked. Reading gives phi_BJ in the stored dtype, or float32 for int8.

  Args:
    path: folder of the array, named `*.zarr`; created if absent. Markers go to `*.done` beside it.
    rows, dimension: N and J.
    shard_rows: rows of a shard; the last may be short.
    dtype: 'bfloat16', 'float32' or 'int8', as stored.
    blocks: columns that share a scale in int8; None is one block of all columns.
    basis: digest of the projection where seed and settings do not determine it; written to each marker.
    origin: identifies the run; written to each marker. '' accepts shards of any run.

  Raises:
    UserError: the array at `path` is unreadable, or has another shape or dtype.
    OSError: the disk is full, or fails otherwise.
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
    self.quantizer = Quantizer(dtype, blocks or ((0, dimension),))
    self._done = Path(path).absolute().with_suffix('.done')
    self._done.mkdir(parents=True, exist_ok=True)
    self._array = _open(path, (rows, dimension), shard_rows, dtype)
    self._scales = None
    if self.quantizer.scaled:
      scales = (rows, len(self.quantizer.blocks))
      self._scales = _open(Path(path).with_suffix('.scales.zarr'), scales, shard_rows, 'float32')

  @property
  def shards(self) -> int:
    return -(-self.rows // self.shard_rows)

  def bounds(self, shard: int) -> tuple[int, int]:
    """First row and the row after the last."""
    return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

  def missing(self, *, verify: bool = True) -> list[int]:
    """Shards that are not written, or whose bytes have changed since.

    Args:
      verify: read and hash all files, as a resume does; otherwise only their sizes are compared.

    Raises:
      UserError: some are of another run, or were written with another basis.
    """
    missing = []
    for shard in range(self.shards):
      marker = self._marker(shard)
      content = read_marker(marker, self._chunks(shard), self._origin, verify=verify)
      if content is None:
        missing.append(shard)
      elif self._basis and content.get('basis', '') != self._basis:
        raise UserError(
          f'shard {shard} of {self._done.with_suffix(".zarr")} was computed with another basis of eigenvectors; jobs '
          f'with separate disks must start from one copy of the basis_*.npz files; delete {marker} to recompute it'
        )
    return missing

  def write(self, shard: int, phi_BJ: np.ndarray) -> None:
    """Writes one shard of float32 features, waits until it is on disk, then marks it.

    Raises:
      OSError: the disk is full, or fails otherwise.
    """
    start, stop = self.bounds(shard)
    marker = self._marker(shard)
    try:
      # TensorStore reads the old chunk of a short shard before it writes, and fails if that is damaged.
      for file in (marker, *self._chunks(shard)):
        file.unlink(missing_ok=True)
      codes_BJ, scale_BK = self.quantizer.encode(phi_BJ)
      self._array[start:stop].write(codes_BJ).result()
      if self._scales is not None and scale_BK is not None:
        self._scales[start:stop].write(scale_BK).result()
    except ValueError as error:
      raise as_os_error(error, self._done.with_suffix('.zarr')) or error from error
    basis = {'basis': self._basis} if self._basis else {}
    mark(marker, self._chunks(shard), self._origin, rows=[start, stop], **basis)

  def fill(self, shards: Sequence[int], coming: Iterable[Shard]) -> Iterator[tuple[int, np.ndarray]]:
    """Writes `shards` as they come, each while the next one is computed; yields each and its features before that.

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
    """One shard as stored; int8 is decoded to float32.

    Raises:
      UserError: it was never written, or its checksum is wrong.
    """
    start, stop = self.bounds(shard)
    try:
      json.loads(self._marker(shard).read_bytes())
      for file in self._chunks(shard):
        file.stat()  # zarr reads a missing chunk as zeros
      codes_BJ = self._array[start:stop].read().result()
      scale_BK = None if self._scales is None else self._scales[start:stop].read().result()
      return self.quantizer.decode(codes_BJ, scale_BK)
    except (OSError, ValueError, RecursionError) as error:
      reason = ' '.join(str(error).split())[:160]
      raise UserError(
        f'features of rows {start} to {stop - 1} in {self._done.with_suffix(".zarr")} cannot be read ({reason}); '
        'run the same command again to recompute this shard'
      ) from error

  def from_row(self, row: int) -> Iterator[Shard]:
    for shard in range(-(-row // self.shard_rows), self.shards):
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
    'store_data_equal_to_fill_value': True,  # so that a missing chunk is a lost one and not one of zeros
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
    if os_error := as_os_error(error, path):
      raise os_error from error
    raise UserError(
      f'{path}/zarr.json cannot be read or belongs to another store ({" ".join(str(error).split())[:160]}); delete '
      'it and run again, which keeps complete shards'
    ) from error


def open_store(
  folder: Path, checkpoint: int, semantics: Mapping[str, Any], basis: str = '', origin: str = ''
) -> FeatureStore:
  """The store of one checkpoint in the folder of a features stage, as its manifest describes it."""
  rows, dimension = semantics['rows'], semantics['dimension']
  path, blocks = folder / f'features_{checkpoint}.zarr', column_blocks(semantics, dimension)
  return FeatureStore(path, rows, dimension, semantics['shard_rows'], semantics['store_dtype'], blocks, basis, origin)


class Features:
  """A finished features stage, opened for reading.

  Args:
    artifact: of the stage.
    context: of the stage that reads, with pool and proxies among its inputs. Modes that store no features need it to
      recompute them.
    targets: of the stage `target_features`, for `target`; by default the one among the context's inputs.
  """

  def __init__(self, artifact: Artifact, context: Context | None = None, targets: Artifact | None = None):
    self._path, self._context = artifact.path, context
    self._targets = targets or (context.inputs.get('target_features') if context else None)
    self.semantics = artifact.semantics
    self.rows, self.dimension = self.semantics['rows'], self.semantics['dimension']
    self.checkpoints = self.semantics['checkpoints']

  def pool(self, checkpoint: int) -> RowSource:
    """Features of the pool's rows at one checkpoint, in the dtype of the store even where none is written."""
    mode = self.semantics['mode']
    if mode == 'store':
      return open_store(self._path, checkpoint, self.semantics)
    extractor = self.extractor()
    source = extractor.source(checkpoint, extractor.prepare(checkpoint)[0])
    return source if mode == 'stream' else extractor.directional(checkpoint, source)

  def extractor(self) -> 'FeatureExtractor':
    """Computes what is not stored."""
    if self._context is None:
      raise ValueError('features that are not stored are recomputed from pool and proxies, which needs a context')
    from dsdm_jax.attribution.extractor import FeatureExtractor  # with all of training, which stored rows do not need

    return FeatureExtractor(self._context, Pool(self._context.inputs['pool']), self._path)

  def target(self, task: str, checkpoint: int) -> np.ndarray:
    """phi_TJ of the target split of `task`, float32."""
    if self._targets is None:
      raise ValueError('features of targets are in another artifact, that of the stage target_features')
    return storage.load(self._targets.path / f'{task}_{checkpoint}.npy')

"""Features on disk: one TensorStore array [N, J] per checkpoint, and the reader of a finished features stage.

A completion marker beside the files says which of them are finished. It is a JSON file `<stage>/<name>.done/<id>.json`:

    {"origin": digest of what the run was started from,
     "files": {path relative to <stage>: {"bytes": size, "sha256": hexadecimal digest}}, …}

The entries of `files` have the form of those in a manifest: each file is hashed once, by the process that wrote it. A
resumed stage hashes files again up to a GiB of shards, each process a part of them; of larger stores it compares sizes,
and each read checks the crc32c of its chunk. A file without a marker is not finished. A resumed stage recomputes files
that have changed since they were marked, and refuses those of a run with other settings whose folder was copied over
this one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from dsdm_jax.attribution.quantization import Blocks, Encoded, Quantizer, column_blocks
from dsdm_jax.attribution.sources import RowSource, Shard, deal
from dsdm_jax.core import artifacts, processes, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.mesh import Team, make_mesh, team
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location, Named
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError, as_os_error

_THREADS = 16  # that look at files at the same time, which takes turns on a network

if TYPE_CHECKING:
  from dsdm_jax.attribution.extractor import FeatureExtractor


def mark(marker: Location, files: Sequence[Location], origin: str, **more: Any) -> None:
  """Marks `files`, which are complete on disk, as finished.

  Args:
    marker: file of the marker.
    origin: identifies the run.
    more: further entries of the marker.
  """
  stage, entries = marker.parent.parent, {}
  for file in files:
    digest = storage.checksum(file)
    storage.remember(file, digest)  # although it was written a moment ago: nobody else writes it
    entries['/'.join(file.parts[len(stage.parts) :])] = {'bytes': storage.size(file), 'sha256': digest}
  storage.write_json(marker, {'origin': origin, 'files': entries, **more})


def read_marker(
  marker: Location, files: Sequence[Location], origin: str, *, verify: bool = True
) -> dict[str, Any] | None:
  """Content of the marker, or None if it is missing or unreadable or `files` are not as they were marked.

  Args:
    origin: of the run that reads; '' accepts files of any run.
    verify: hash the files; otherwise only their sizes are compared.

  Raises:
    UserError: the marker is of another run.
  """
  stage = marker.parent.parent
  try:
    content = dict(json.loads(storage.read(marker)))
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
    _size(file) == size and (not verify or storage.checksum(file) == sha256) for file, (size, sha256) in marked.items()
  )
  if unchanged and not verify:  # the commit takes checksums from whoever wrote the files
    for file, (_, sha256) in marked.items():
      storage.remember(file, sha256)
  return content if unchanged else None


def _size(file: Location) -> int:
  try:
    return storage.size(file)
  except (FileNotFoundError, NotADirectoryError):
    return -1


class FeatureStore(RowSource):
  """Rows of features in a zarr3 array with one checksummed (crc32c) chunk per shard. It needs no workdir:

      store = FeatureStore(Path('features.zarr'), rows=N, dimension=J, shard_rows=1024, dtype='bfloat16')
      for shard in store.missing():
        store.write(shard, phi_BJ)  # float32, rows `store.bounds(shard)`
      gram(store)

  Processes of one run give their `team`: each then reads and writes its own shards.

  A shard is written once its completion marker exists, since zarr reads a missing chunk as zeros, and as long as its
  bytes are those that were marked. Reading gives phi_BJ in the stored dtype, or float32 for int8.

  Args:
    path: location of the array, named `*.zarr`; created if absent. Markers go to `*.done` beside it.
    rows, dimension: N and J.
    shard_rows: rows of a shard; the last may be short.
    dtype: 'bfloat16', 'float32' or 'int8', as stored.
    blocks: columns that share a scale in int8; None is one block of all columns.
    basis: digest of the projection where seed and settings do not determine it; written to each marker.
    origin: identifies the run; written to each marker. '' accepts shards of any run.
    team: of this process; by default it reads all shards.

  Raises:
    UserError: the array at `path` is unreadable, or has another shape or dtype.
    OSError: the disk is full, or fails otherwise.
  """

  def __init__(
    self,
    path: Named,
    rows: int,
    dimension: int,
    shard_rows: int,
    dtype: str,
    blocks: Blocks | None = None,
    basis: str = '',
    origin: str = '',
    team: Team = Team(),  # noqa: B008  frozen
  ):
    self.team = team
    self._basis, self._origin = basis, origin
    self.rows, self.dimension, self.shard_rows = rows, dimension, shard_rows
    self.quantizer = Quantizer(dtype, blocks or ((0, dimension),))
    self._path = storage.absolute(storage.locate(path))
    self._folder, self._name = self._path.parent, self._path.name.removesuffix('.zarr')
    self._done = self._folder / f'{self._name}.done'
    storage.make_folder(self._done)
    self._array = _open(self._path, (rows, dimension), shard_rows, dtype)
    self._scales = None
    if self.quantizer.scaled:
      scales = (rows, len(self.quantizer.blocks))
      self._scales = _open(self._folder / f'{self._name}.scales.zarr', scales, shard_rows, 'float32')

  @property
  def shards(self) -> int:
    return -(-self.rows // self.shard_rows)

  def bounds(self, shard: int) -> tuple[int, int]:
    """First row and the row after the last."""
    return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

  def missing(self, *, verify: bool = True) -> list[int]:
    """Shards that are not written, or whose bytes have changed since. With a team, all processes call it together.

    Args:
      verify: read and hash all files of a store of up to a GiB, as a resume does; otherwise only sizes are compared.

    Raises:
      UserError: some are of another run, or were written with another basis.
    """
    width = np.dtype(self.quantizer.dtype).itemsize * self.dimension
    verify = verify and self.rows * width <= artifacts.LARGE

    def check(shards: Sequence[int]) -> list[bool]:
      with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda shard: self._is_missing(shard, verify), shards))

    shards = range(self.shards)
    missing = check(shards) if self.team.count == 1 else processes.divide(shards, check)
    return [shard for shard in shards if missing[shard]]

  def _is_missing(self, shard: int, verify: bool) -> bool:
    marker = self._marker(shard)
    content = read_marker(marker, self._chunks(shard), self._origin, verify=verify)
    if content is None:
      return True
    if self._basis and content.get('basis', '') != self._basis:
      raise UserError(
        f'shard {shard} of {self._path} was computed with another basis of eigenvectors; jobs '
        f'with separate disks must start from one copy of the basis_*.npz files; delete {marker} to recompute it'
      )
    return False

  def write(self, shard: int, phi_BJ: np.ndarray | Encoded) -> None:
    """Writes one shard, float32 or already encoded, waits until it is on disk, then marks it.

    Raises:
      OSError: the disk is full, or fails otherwise.
    """
    start, stop = self.bounds(shard)
    marker = self._marker(shard)
    encoded = phi_BJ if isinstance(phi_BJ, Encoded) else self.quantizer.encode(phi_BJ)
    try:
      # TensorStore reads the old chunk of a short shard before it writes, and fails if that is damaged.
      for file in (marker, *self._chunks(shard)):
        storage.unlink(file)
      self._array[start:stop].write(np.asarray(encoded.codes_BJ)).result()
      if self._scales is not None:
        self._scales[start:stop].write(np.asarray(encoded.scale_BK)).result()
    except ValueError as error:
      raise as_os_error(error, str(self._path)) or error from error
    basis = {'basis': self._basis} if self._basis else {}
    mark(marker, self._chunks(shard), self._origin, rows=[start, stop], **basis)

  def fill(self, coming: Iterable[tuple[int, int, np.ndarray | Encoded]]) -> Iterator[tuple[int, int]]:
    """Writes shards as they come, each while the next one is computed; yields the rows of each before it is written.

    Raises:
      OSError: as `write`.
    """
    with ThreadPoolExecutor(1) as writer:
      written: Future | None = None
      for start, stop, phi_BJ in coming:
        if written is not None:
          written.result()
        yield start, stop
        if stop > start and self.team.leads:
          written = writer.submit(self.write, start // self.shard_rows, phi_BJ)
      if written is not None:
        written.result()

  def read(self, shard: int) -> np.ndarray:
    """One shard as stored; int8 is decoded to float32.

    Raises:
      UserError: it was never written, or its checksum is wrong.
    """
    start, stop = self.bounds(shard)
    try:
      json.loads(storage.read(self._marker(shard)))
      for file in self._chunks(shard):
        storage.size(file)  # zarr reads a missing chunk as zeros
      codes_BJ = self._array[start:stop].read().result()
      scale_BK = None if self._scales is None else self._scales[start:stop].read().result()
      return self.quantizer.decode(Encoded(codes_BJ, scale_BK, None))
    except (OSError, ValueError, RecursionError) as error:
      reason = ' '.join(str(error).split())[:160]
      raise UserError(
        f'features of rows {start} to {stop - 1} in {self._path} cannot be read ({reason}); '
        f'delete {self._marker(shard)} and run the same command again to recompute this shard'
      ) from error

  def from_row(self, row: int) -> Iterator[Shard]:
    shards = [self.bounds(shard) for shard in range(-(-row // self.shard_rows), self.shards)]
    for (start, stop), _ in deal(shards, self.team):
      phi_BJ = self.read(start // self.shard_rows) if stop > start else self._nothing
      yield start, stop, phi_BJ

  @property
  def _nothing(self) -> np.ndarray:
    return np.zeros((0, self.dimension), np.float32 if self.quantizer.scaled else self.quantizer.dtype)

  def _chunks(self, shard: int) -> list[Location]:
    """Files that hold a shard."""
    arrays = ['.zarr'] if self._scales is None else ['.zarr', '.scales.zarr']
    return [self._folder / f'{self._name}{array}' / 'c' / str(shard) / '0' for array in arrays]

  def _marker(self, shard: int) -> Location:
    return self._done / f'{shard:06d}.json'


def _open(path: Location, shape: tuple[int, int], shard_rows: int, dtype: str) -> ts.TensorStore:
  spec = {
    'driver': 'zarr3',
    'kvstore': storage.kvstore(path),
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
    if os_error := as_os_error(error, str(path)):
      raise os_error from error
    raise UserError(
      f'{path}/zarr.json cannot be read or belongs to another store ({" ".join(str(error).split())[:160]}); delete '
      'it and run again, which keeps complete shards'
    ) from error


def open_store(
  folder: Location,
  checkpoint: int,
  semantics: Mapping[str, Any],
  basis: str = '',
  origin: str = '',
  team: Team = Team(),  # noqa: B008  frozen
) -> FeatureStore:
  """The store of one checkpoint in the folder of a features stage, as its manifest describes it."""
  rows, dimension, shard_rows = (semantics[key] for key in ('rows', 'dimension', 'shard_rows'))
  path, blocks = folder / f'features_{checkpoint}.zarr', column_blocks(semantics, dimension)
  return FeatureStore(path, rows, dimension, shard_rows, semantics['store_dtype'], blocks, basis, origin, team)


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
    """Features of the pool's rows at one checkpoint, in the dtype of the store even where none is written.

    Of several processes each reads its own shards.
    """
    mode = self.semantics['mode']
    if mode == 'store':
      own = Team() if self._context is None else team(make_mesh(self._context.config.mesh))
      return open_store(self._path, checkpoint, self.semantics, team=own)
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

"""Stage `features`: φ of every row of the pool and of every target example, for each checkpoint of each proxy."""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.attribution import completion_markers, covariances, coverage
from dsdm_jax.attribution.covariances import Basis, MomentStep
from dsdm_jax.attribution.coverage import Unprobed
from dsdm_jax.attribution.datamodel import RowSource
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.gradients import DenseFeatures, FeatureStep, TwoSidedFeatures
from dsdm_jax.attribution.quantization import Blocks, Rounding
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.attribution.sources import DirectionalSource, PoolPass, Recomputed
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import artifacts, flops, processes, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.mesh import DATA, batch_sharding, fetch, make_mesh, place
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.errors import UserError
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.proxies import checkpoint_steps, checkpoints
from dsdm_jax.training.step import abstract_model, trainer

_FIDELITY_ROWS = 512  # of the first shard, whose inner products are compared before and after rounding


def run(context: Context) -> dict | None:
  """Leaves, for each checkpoint c of a proxy, `<task>_<c>.npy` [T, J] (float32) and in mode `store` `features_<c>.zarr`
  [N, J].

  None where this is one of several jobs and what the others make is not all there.
  """
  config = context.config
  pool, targets = Pool(context.inputs['pool']), Targets(context.inputs['targets'])
  proxies = ProxySteps(context, pool, context.out)
  step = proxies.step
  context.log.event('features', **step.describe(), dimension=step.dimension, batch_size=proxies.batch_size)
  context.log.say(f'  {_picked(step, config.features.dimension)}')
  stored, origin = config.features.mode == 'store', _origin(context)
  two_sided = isinstance(step, TwoSidedFeatures)
  count, rows = checkpoints(config), pool.num_rows
  total = count * rows if stored else 0
  notes = []
  with context.log.bar(total=total, desc='features', unit='row') as bar:
    for checkpoint in range(count):
      prepared, note = proxies.prepare(checkpoint)
      notes.append(note)
      if two_sided:
        _unprobed(context, proxies, checkpoint)
      _target_features(context, step, prepared, checkpoint, targets, proxies.mesh, origin)
      if stored:
        _pool_features(context, step, proxies.source(checkpoint, prepared), checkpoint, bar, origin)
  # Only now: by the time that this job has ended, others may have filled what was missing when it began.
  if not processes.decide(lambda: all(_complete(context, targets, rows, step, c, origin) for c in range(count))):
    return None
  store = {k: config.features[k] for k in ('mode', 'shard_rows', 'store_dtype', 'precondition', 'basis')}
  for name in notes[0]:
    store[name] = [note[name] for note in notes]
  for name, file_of, here in (('fidelity', _fidelity_file, stored), ('unprobed', _unprobed_file, two_sided)):
    if here:
      store[name] = [json.loads(file_of(context.out, checkpoint).read_text()) for checkpoint in range(count)]
  if stored:
    kept = min(fidelity['top_overlap'] for fidelity in store['fidelity'])
    context.log.say(f'  {config.features.store_dtype} keeps {kept:.1%} of what is closest to each row in float32')
  return {
    **step.describe(),
    'dimension': step.dimension,
    'rows': rows,
    'checkpoints': count,
    **store,
  }


class ProxySteps:
  """What makes features of one run's proxies.

  Args:
    folder: of the features stage, finished or not; bases of eigenvectors lie there.
  """

  def __init__(self, context: Context, pool: Pool, folder: Path):
    config = context.config
    self._context, self._pool, self._folder, self.mesh = context, pool, folder, make_mesh(config.mesh)
    self._compiled = trainer(config.proxies.model, config.proxies.train, pool.vocab_size, pool.length, self.mesh)
    self.step = feature_step(config, pool.vocab_size, pool.length, self.mesh)
    self.batch_size, self._microbatch = step_rows(config.features, self.mesh)

  def prepare(self, checkpoint: int) -> tuple[Any, dict[str, Any]]:
    """The step's own form of checkpoint `checkpoint`, and what is to be said of it in the manifest.

    'rank_one_error': each layer's error of a rank-one second moment; 'basis_kept': share of the traces of each layer's
    two second moments that eigenvectors keep. Both where there are such.
    """
    params, moment = self.weights(checkpoint)
    if not isinstance(self.step, TwoSidedFeatures):
      return self.step.prepare(params, checkpoint, moment), {}
    notes: dict[str, Any] = {}
    if moment is not None:
      notes['rank_one_error'] = moment.rank_one_error(self.step.layers)
    if self._context.config.features.basis == 'random':
      return self.step.prepare(params, checkpoint, moment), notes
    basis = self._basis(checkpoint, params, moment, self.step)
    return self.step.prepare(params, checkpoint, moment, basis.projections), notes | {'basis_kept': basis.kept}

  def _basis(
    self, checkpoint: int, params: nnx.State, moment: SecondMoment | None, features: TwoSidedFeatures
  ) -> Basis:
    """Eigenvectors from the stage's folder, made where there are none. Rounding may turn them: all jobs must share."""
    file = basis_file(self._folder, checkpoint)
    if not processes.decide(file.is_file):
      settings = self._context.config.features
      tokens_NL, weights_NL = self._first_rows(settings.basis_rows)
      step = self._moments
      prepared = step.prepare(params)
      parts = covariances.batches(len(tokens_NL), self.batch_size, self.mesh.shape[DATA])
      moments = step.sums(prepared, [(tokens_NL[part], weights_NL[part]) for part in parts])
      row = tokens_NL[:1], weights_NL[:1]
      self._context.add_flop(flops.count(step.apply, prepared, *row) * len(tokens_NL))
      basis = Basis.leading(features.layers, moments, moment)
      if self._context.first:
        basis.save(file, features.layers)
      processes.wait()
    return Basis.load(file, features.layers)

  def unprobed(self, checkpoint: int) -> dict[str, Any]:
    """What parameters without a probe carry of the gradient, see `Unprobed.share`."""
    params, moment = self.weights(checkpoint)
    step = self._whole_gradient
    tokens_BL, weights_BL = self._first_rows(coverage.ROWS)
    self._context.add_flop(flops.count(step.apply, (params, None), tokens_BL[0], weights_BL[0]) * len(tokens_BL))
    return step.share(params, tokens_BL, weights_BL, moment)

  # Both are compiled once, and serve all proxies.

  @functools.cached_property
  def _moments(self) -> MomentStep:
    assert isinstance(self.step, TwoSidedFeatures)
    return MomentStep(self.step.model, self.step.output_fn, self.step.layers, self.mesh)

  @functools.cached_property
  def _whole_gradient(self) -> Unprobed:
    assert isinstance(self.step, TwoSidedFeatures)
    return Unprobed(self.step.model, self.step.output_fn, self.step.layers, self.mesh)

  def _first_rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of the pool's first rows, a sample, as their order is random."""
    tokens_BL = self._pool.tokens(np.arange(min(count, self._pool.num_rows)))
    weights_BL = np.ones(tokens_BL.shape, np.float32)
    weights_BL[:, 0] = 0
    return tokens_BL, weights_BL

  def source(self, checkpoint: int, prepared: Any) -> Recomputed:
    """Features of the pool's rows, made whenever they are read."""
    features = self._context.config.features

    def check(phi_BJ: np.ndarray, first: int) -> None:
      check_finite(self.step, phi_BJ, first, _name(self._context.config, checkpoint))

    rows = PoolPass(self.step, prepared, self._pool, self.batch_size, self.mesh, self._context.add_flop, check)
    rounding = Rounding(features.store_dtype, blocks(self.step.describe(), self.step.dimension))
    return Recomputed(rows, self._pool.num_rows, self.step.dimension, features.shard_rows, rounding)

  def directional(self, checkpoint: int, source: Recomputed) -> DirectionalSource:
    """Scores of the pool's rows by directional derivatives; the Gram matrix is of features."""
    config = self._context.config
    features = config.features
    model = abstract_model(without_kernels(config.proxies.model), self._pool.vocab_size, self._pool.length)
    output_fn = load_callable(features.output_fn)
    scorer = DirectionalScores(model, output_fn, config.seed, self.mesh, self._microbatch)
    params, moment = self.weights(checkpoint)

    def start(u_JT: np.ndarray) -> PoolPass:
      prepared = scorer.prepare(params, u_JT, checkpoint, moment)
      return PoolPass(scorer, prepared, self._pool, self.batch_size, self.mesh, self._context.add_flop)

    return DirectionalSource(source, features.gram_rows or self._pool.num_rows, start)

  def weights(self, checkpoint: int) -> tuple[nnx.State, SecondMoment | None]:
    """Of proxy `checkpoint`, and Adam's second moments where features are divided by their root."""
    config = self._context.config
    made, each = self._context.inputs['proxies'], config.proxies.checkpoints
    proxy, place = divmod(checkpoint, each)
    step = checkpoint_steps(made.semantics['steps'], each)[place] if place < each - 1 else None  # the end is the newest
    state = load_state(made.path / f'proxy_{proxy}', self._compiled, step)
    if config.features.precondition == 'none':
      return state.params, None
    train = config.proxies.train
    return state.params, SecondMoment.of_state(state.opt_state, train.adam_b2, train.adam_eps, train.adam_eps_root)


def without_kernels(model: ConfigDict) -> ConfigDict:
  """The same model with attention that has a forward mode; it computes the same."""
  plain = model.copy_and_resolve_references()
  with plain.unlocked():
    plain.attention = 'xla'
  return plain


def step_rows(features: ConfigDict, mesh: Mesh) -> tuple[int, int]:
  """Rows of a step and of its microbatches (0: not cut) on this mesh, over all devices.

  They are `features.batch_size` and `features.microbatch`, made up to what the devices of `data` share evenly: what
  fills a step up is computed and thrown away. So a stage may go on with any number of devices.
  """
  microbatch = _made_up(features.microbatch, mesh.shape[DATA])
  return _made_up(features.batch_size, microbatch or mesh.shape[DATA]), microbatch


def _made_up(rows: int, parts: int) -> int:
  return -(-rows // parts) * parts


def feature_step(config: ConfigDict, vocab_size: int, length: int, mesh: Mesh) -> FeatureStep:
  """The step that `features.projection` names, for the proxies' model."""
  model = abstract_model(config.proxies.model, vocab_size, length)
  output_fn = load_callable(config.features.output_fn)
  if config.features.projection == 'dense':
    _, microbatch = step_rows(config.features, mesh)
    return DenseFeatures(model, output_fn, config.features.dimension, config.seed, mesh, microbatch)
  return TwoSidedFeatures(model, output_fn, config.features.layers, config.features.dimension, config.seed, mesh)


def _picked(step: FeatureStep, wished: int) -> str:
  described = step.describe()
  if described['projection'] == 'dense':
    return f'dense projection of all parameters to J = {step.dimension}'
  sizes = sorted({(layer['a'], layer['b']) for layer in described['layers']})
  shapes = ', '.join(f'{a}×{b}' for a, b in sizes)
  return f'two-sided projection: {shapes} for each linear layer, J = {step.dimension} (wished for {wished})'


def _origin(context: Context) -> str:
  return artifacts.origin(context.out)


def _pool_features(
  context: Context, step: FeatureStep, source: Recomputed, checkpoint: int, bar: tqdm.tqdm, origin: str
) -> None:
  """Computes what is not there yet of this job's shards; a shard is written while the next one is computed."""
  features = context.config.features
  columns = blocks(step.describe(), step.dimension)

  def open_() -> FeatureStore:
    return open_store(context.out, checkpoint, source.rows, step.dimension, features, columns, origin)

  # Process 0 opens it first, and makes it where there is none.
  lacking, store = processes.decide(lambda: _lacking(open_(), context.out, checkpoint)), open_()
  mine = _share(store.shards, features)
  missing = [shard for shard in lacking if shard in mine]
  bar.update(source.rows - sum(stop - start for start, stop in map(store.bounds, missing)))
  coming = source.ranges(map(store.bounds, missing))
  if not context.first:  # takes part in the steps, and process 0 writes
    for _ in coming:
      pass
    return
  for shard, phi_BJ in store.fill(missing, coming):
    if shard == 0:
      fidelity = store.rounding.fidelity(phi_BJ[:_FIDELITY_ROWS])
      storage.write_json(_fidelity_file(context.out, checkpoint), fidelity)
    bar.update(len(phi_BJ))


def _lacking(store: FeatureStore, folder: Path, checkpoint: int) -> list[int]:
  """Shards to be made: with the first one goes the report of fidelity."""
  missing = store.missing()
  return missing if 0 in missing or _fidelity_file(folder, checkpoint).is_file() else [0, *missing]


def _fidelity_file(folder: Path, checkpoint: int) -> Path:
  return folder / f'fidelity_{checkpoint}.json'


def _unprobed(context: Context, proxies: ProxySteps, checkpoint: int) -> None:
  """Says and keeps what parameters without a probe carry, once for a proxy: by one of the jobs."""
  file, features = _unprobed_file(context.out, checkpoint), context.config.features
  if checkpoint % features.jobs != features.job or processes.decide(file.is_file):
    return
  found = proxies.unprobed(checkpoint)
  if context.first:
    storage.write_json(file, found)
  context.log.event('unprobed', checkpoint=checkpoint, share=found['share'])
  largest = ', '.join(f'{path} {share:.0%}' for path, share in list(found['parameters'].items())[:2])
  context.log.say(
    f'  proxy {_name(context.config, checkpoint)}: parameters without a probe carry {found["share"]:.0%} of ‖g‖² of '
    f'{found["rows"]} rows, and features do not see it ({largest})'
  )


def _unprobed_file(folder: Path, checkpoint: int) -> Path:
  return folder / f'unprobed_{checkpoint}.json'


def _share(count: int, features: ConfigDict) -> range:
  """Which of `count` shards are this job's: neighbours, and for no job more than one beyond any other's."""
  return range(count * features.job // features.jobs, count * (features.job + 1) // features.jobs)


def _complete(context: Context, targets: Targets, rows: int, step: FeatureStep, checkpoint: int, origin: str) -> bool:
  if not all(_target_stands(context.out, task, checkpoint, origin) for task in targets.tasks):
    return False
  if isinstance(step, TwoSidedFeatures) and not _unprobed_file(context.out, checkpoint).is_file():
    return False
  features = context.config.features
  if features.mode != 'store':
    return True
  columns = blocks(step.describe(), step.dimension)
  store = open_store(context.out, checkpoint, rows, step.dimension, features, columns, origin)
  return not _lacking(store, context.out, checkpoint)


def _target_files(folder: Path, task: str, checkpoint: int) -> tuple[Path, Path]:
  """(features of a target's examples, their marker)."""
  return folder / f'{task}_{checkpoint}.npy', folder / 'targets.done' / f'{task}_{checkpoint}.json'


def _target_stands(folder: Path, task: str, checkpoint: int, origin: str) -> bool:
  file, marker = _target_files(folder, task, checkpoint)
  return completion_markers.read(marker, [file], origin) is not None


def _target_features(
  context: Context, step: FeatureStep, prepared: Any, checkpoint: int, targets: Targets, mesh: Mesh, origin: str
) -> None:
  features = context.config.features
  batch, _ = step_rows(features, mesh)
  for number, task in enumerate(targets.tasks, start=checkpoint * len(targets.tasks)):
    stands = functools.partial(_target_stands, context.out, task, checkpoint, origin)
    if number % features.jobs != features.job or processes.decide(stands):
      continue
    examples = targets.examples(task, 'target')
    parts = []
    for start in range(0, len(examples.tokens_TL), batch):
      tokens_BL, weights_BL = (
        _padded(x[start : start + batch], batch) for x in (examples.tokens_TL, examples.weights_TL)
      )
      tokens_BL, weights_BL = place((tokens_BL, weights_BL), batch_sharding(mesh))
      parts.append(fetch(step(prepared, tokens_BL, weights_BL)))
    context.add_flop(flops.count(step.apply, prepared, tokens_BL, weights_BL) * len(parts))
    phi_TJ = np.concatenate(parts)[: len(examples.tokens_TL)]
    check_finite(step, phi_TJ, 0, _name(context.config, checkpoint), f'example of target {task}')
    if context.first:
      file, marker = _target_files(context.out, task, checkpoint)
      storage.save_npy(file, phi_TJ)
      marker.parent.mkdir(exist_ok=True)
      completion_markers.write(marker, [file], origin)


def _padded(array: np.ndarray, batch: int) -> np.ndarray:
  return np.pad(array, [(0, batch - len(array))] + [(0, 0)] * (array.ndim - 1))


def _name(config: ConfigDict, checkpoint: int) -> str:
  each = config.proxies.checkpoints
  proxy, place = divmod(checkpoint, each)
  return f'{proxy}' if each == 1 else f'{proxy}, checkpoint {place + 1} of {each}'


def check_finite(step: FeatureStep, phi_BJ: np.ndarray, first: int, proxy: int | str, what: str = 'row') -> None:
  """Raises UserError naming the first row, its layer and the proxy if anything is NaN or infinite."""
  bad = np.argwhere(~np.isfinite(phi_BJ))
  if len(bad):
    row, column = bad[0]
    raise UserError(
      f'feature of {what} {first + row} is {phi_BJ[row, column]} in {step.column_owner(int(column))} of proxy '
      f'{proxy}; nothing of its shard was kept: look at that text, or lower proxies.train.learning_rate and train '
      'the proxies anew'
    )


def open_store(
  folder: Path, checkpoint: int, rows: int, dimension: int, features: ConfigDict, columns: Blocks, origin: str
) -> FeatureStore:
  path, basis = folder / f'features_{checkpoint}.zarr', basis_file(folder, checkpoint)
  digest = hashlib.sha256(basis.read_bytes()).hexdigest() if features.basis == 'eigenvectors' else ''
  return FeatureStore(path, rows, dimension, features.shard_rows, features.store_dtype, columns, digest, origin)


def basis_file(folder: Path, checkpoint: int) -> Path:
  return folder / f'basis_{checkpoint}.npz'


def blocks(described: Mapping[str, Any], dimension: int) -> Blocks:
  """Columns of each layer, each of a scanned stack apart; all columns in a dense projection."""
  if described['projection'] == 'dense':
    return ((0, dimension),)
  sizes = [layer['a'] * layer['b'] for layer in described['layers'] for _ in range(math.prod(layer['stack']))]
  stops = np.cumsum(sizes).tolist()
  return tuple(zip([0, *stops[:-1]], stops, strict=True))


class Features:
  """A finished features stage, opened for reading.

  Args:
    context: of the stage that reads, with pool and proxies among its inputs; rows of modes that keep no features are
      made from them.
  """

  def __init__(self, artifact: Artifact, context: Context | None = None):
    self._path, self._context = artifact.path, context
    semantics = artifact.semantics
    self.rows, self.dimension = semantics['rows'], semantics['dimension']
    self.checkpoints = semantics['checkpoints']
    self.semantics = semantics

  def pool(self, checkpoint: int) -> RowSource:
    """Features of the pool's rows at one checkpoint, in the dtype of the store whether there is one or not."""
    mode = self.semantics['mode']
    if mode != 'store':
      if self._context is None:
        raise ValueError(f'features of mode {mode} are made from pool and proxies, and no context was given')
      proxies = ProxySteps(self._context, Pool(self._context.inputs['pool']), self._path)
      source = proxies.source(checkpoint, proxies.prepare(checkpoint)[0])
      return source if mode == 'stream' else proxies.directional(checkpoint, source)
    path = self._path / f'features_{checkpoint}.zarr'
    said = self.semantics
    columns = blocks(said, self.dimension)
    return FeatureStore(path, self.rows, self.dimension, said['shard_rows'], said['store_dtype'], columns)

  def target(self, task: str, checkpoint: int) -> np.ndarray:
    """phi_TJ of the target split of `task`, float32."""
    return np.load(self._path / f'{task}_{checkpoint}.npy', allow_pickle=False)

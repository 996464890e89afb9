"""The compiled programs of a run, one for each stage that runs on an accelerator, and how often each runs.

They are the stages' own functions with the shapes of the config, on abstract arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.attribution import datamodel, probes, sources
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.ekfac import WholeGradients
from dsdm_jax.attribution.extractor import feature_step, step_rows, without_kernels
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.attribution.quantization import column_blocks
from dsdm_jax.attribution.solve import by_layers
from dsdm_jax.config.validate import load_callable
from dsdm_jax.config.values import Prefilter
from dsdm_jax.core import flops
from dsdm_jax.core.mesh import batch_sharding, batch_shards
from dsdm_jax.errors import UserError
from dsdm_jax.lm import attention
from dsdm_jax.lm.decoder import Decoder
from dsdm_jax.selection.candidates import find
from dsdm_jax.training import ladder
from dsdm_jax.training.proxies import checkpoints
from dsdm_jax.training.step import abstract_model, trainer

Arguments = tuple[Any, ...]
# The cost of the selection, as far as a plan has them; other stages train final models.
SELECTION = ('proxies', 'features', 'gram', 'target_means', 'scores')
BYTES_PER_TOKEN = 4.0  # of text, to estimate the number of rows from the pool's bytes
_HIGHEST_PASSES = 6  # bfloat16 products per float32 product with Precision.HIGHEST
_STORED_BYTES = {'float32': 4, 'bfloat16': 2, 'int8': 1}


@dataclasses.dataclass(frozen=True)
class Work:
  """One program and how often it runs.

  Attributes:
    stage: of the pipeline; 'gram', 'target_means' (EK-FAC) and 'scores' are parts of the datamodel stage, 'ladder 2' is
      a rung of the ladder.
    program: global batch → (jitted function, abstract arguments).
    batch: rows of one run of the program, over all chips.
    batch_key: config key of `batch`.
    runs: total number of runs.
    parameters: of the model.
    tokens: of one run; 0 if its inputs are features.
    least_flop: of one run of the algorithm, without recomputation, and with the whole attention square.
    passes: bfloat16 products per product of the program.
    remat_key: config key that trades time for memory; '' if there is none.
  """

  stage: str
  program: Callable[[int], tuple[Any, Arguments]]
  batch: int
  batch_key: str
  runs: int
  parameters: int
  tokens: int
  least_flop: float
  passes: int = 1
  remat_key: str = ''

  def flop(self) -> float:
    """FLOP of one run of the program, over all chips."""
    function, arguments = self.program(self.batch)
    return flops.count(function, *arguments)

  def lower(self, batch: int | None = None) -> Any:
    function, arguments = self.program(batch or self.batch)
    return function.lower(*arguments)


@dataclasses.dataclass(frozen=True)
class Model:
  """Cost of one token: weights in matrix products, FLOP of a forward pass; and the number of parameters."""

  matmul_weights: int
  forward_flop: float
  parameters: int

  @classmethod
  def of(cls, config: ConfigDict, vocab_size: int, length: int) -> 'Model':
    plain = without_kernels(config)
    with plain.unlocked():
      plain.remat = False
    model = abstract_model(plain, vocab_size, length)
    graphdef, state = nnx.split(model)
    tokens_BL = jax.ShapeDtypeStruct((1, length), jnp.int32)
    forward = flops.count(lambda state, tokens_BL: nnx.merge(graphdef, state)(tokens_BL), state, tokens_BL)
    if isinstance(model, Decoder):  # add the part of the attention square that it skips
      square = 4 * config.layers * length**2 * config.width
      forward += square * (1 - attention.computed_share(length))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(nnx.merge(graphdef, state), nnx.Param))
    kernels = sum(x.size for path, x in leaves if x.ndim > 1 and "'kernel'" in str(path))
    tied = all("'head'" not in str(path) for path, _ in leaves)
    table = max((x.size for path, x in leaves if "'embedding'" in str(path[-2:])), default=0)
    return cls(kernels + (table if tied else 0), forward / length, sum(x.size for _, x in leaves))


def works(config: ConfigDict, mesh: Mesh) -> list[Work]:
  """The programs of `config` on `mesh`, in the order of the stages."""
  length, vocab_size = config.pool.length, config.pool.vocab_size
  proxy, final = (Model.of(m, vocab_size, length) for m in (config.proxies.model, config.model))
  return [
    _training_work('proxies', config, mesh, proxy),
    _features(config, mesh, proxy),
    *_datamodel(config, mesh, proxy),
    _training_work('pretraining', config, mesh, final),
    *_ladder(config, mesh),
  ]


def rows(config: ConfigDict) -> int:
  """N of the plan: `plan.rows`, or an estimate from the pool's bytes.

  Raises:
    UserError: neither is set.
  """
  if not config.plan.rows and not config.pool.max_bytes:
    raise UserError('config key plan.rows = 0 must be set to the number of rows, because pool.max_bytes is 0')
  return config.plan.rows or max(1, int(config.pool.max_bytes / BYTES_PER_TOKEN / config.pool.length))


def scored_rows(config: ConfigDict) -> int:
  """Rows that get features or scores: N, or at most what a prefilter keeps."""
  prefilter, options = Prefilter.parse(config.selection.prefilter), config.selection
  if prefilter is None:
    return rows(config)
  return min(rows(config), round(prefilter.factor * options.examples) * len(options.targets))


def stored_bytes(config: ConfigDict, dimension: int) -> float:
  """Size of the feature store, over all checkpoints of all proxies."""
  if config.features.mode != 'store' or config.features.projection == 'ekfac':
    return 0.0
  return float(checkpoints(config) * scored_rows(config) * dimension * _STORED_BYTES[config.features.store_dtype])


def final_runs(config: ConfigDict) -> int:
  """Number of models that the pretraining stage trains."""
  targets = [len(config.selection.targets) if find(m).targeted else 1 for m in config.selection.methods]
  return sum(targets) * config.pretraining.seeds


def dimension(config: ConfigDict, mesh: Mesh) -> int:
  """The actual J, after rounding by the features."""
  return feature_step(config, config.pool.vocab_size, config.pool.length, mesh).dimension


def _shape(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _training(
  model: ConfigDict, train: ConfigDict, config: ConfigDict, mesh: Mesh
) -> Callable[[int], tuple[Any, Arguments]]:
  made = trainer(model, train, config.pool.vocab_size, config.pool.length, mesh)  # one trace for equal settings

  def program(batch: int) -> tuple[Any, Arguments]:
    tokens_BL, weight_B = _shape(mesh, jnp.int32, batch, config.pool.length), _shape(mesh, jnp.float32, batch)
    return made.step, (made.abstract, tokens_BL, weight_B, jax.ShapeDtypeStruct((), jnp.int32))

  return program


def _remat_key(model: ConfigDict, section: str) -> str:
  """'' if rematerialization is on already."""
  return '' if model.remat else f'{section}.remat'


def _training_work(stage: str, config: ConfigDict, mesh: Mesh, model: Model) -> Work:
  """The work of stage `proxies` or `pretraining`."""
  proxies, train = config.proxies, config[stage].train
  if stage == 'proxies':
    model_config, section, models = proxies.model, 'proxies.model', proxies.count
    examples = int(proxies.epochs * round(proxies.subset_share * rows(config)))
  else:
    model_config, section, models = config.model, 'model', final_runs(config)
    examples = config.selection.examples * config.selection.epochs
  tokens = train.batch_size * config.pool.length
  return Work(
    stage=stage,
    program=_training(model_config, train, config, mesh),
    batch=train.batch_size,
    batch_key=f'{stage}.train.batch_size',
    runs=examples // train.batch_size * models,
    parameters=model.parameters,
    tokens=tokens,
    least_flop=3 * model.forward_flop * tokens,
    remat_key=_remat_key(model_config, section),
  )


def _ladder(config: ConfigDict, mesh: Mesh) -> list[Work]:
  """A program for each rung, at the size of the arms' growth; the search tries at least four more models."""
  length, vocab_size, train = config.pool.length, config.pool.vocab_size, config.pretraining.train
  works, models = [], config.ladder.seeds + (4 if config.ladder.step > 1 else 0)

  def flop(model: ConfigDict) -> float:
    function, arguments = _training(model, train, config, mesh)(train.batch_size)
    return flops.count(function, *arguments)

  for rung in ladder.plan(config, vocab_size, length, flop) if config.ladder.rungs else ():
    model, tokens = Model.of(rung.model, vocab_size, length), train.batch_size * length
    work = Work(
      stage=f'ladder {rung.factor:g}',
      program=_training(rung.model, train, config, mesh),
      batch=train.batch_size,
      batch_key='pretraining.train.batch_size',
      runs=rung.steps * models,
      parameters=model.parameters,
      tokens=tokens,
      least_flop=3 * model.forward_flop * tokens,
      remat_key=_remat_key(config.model, 'model'),
    )
    works.append(work)
  return works


def _features(config: ConfigDict, mesh: Mesh, model: Model) -> Work:
  features, length = config.features, config.pool.length
  step = feature_step(config, config.pool.vocab_size, length, mesh)
  batch = step.rows if isinstance(step, WholeGradients) else step_rows(features, mesh)[0]
  abstract = nnx.state(abstract_model(config.proxies.model, config.pool.vocab_size, length), nnx.Param)
  prepared = jax.eval_shape(lambda params: step.prepare(params, 0), abstract)
  read = {
    'store': scored_rows(config),
    'stream': 2 * scored_rows(config),
    'jvp': min(features.gram_rows or scored_rows(config), scored_rows(config)),
  }[features.mode]
  tokens = batch * length
  if isinstance(step, WholeGradients):  # a pass for the eigenvectors and one for the eigenvalues
    read, least = 2 * min(features.basis_rows, rows(config)), 3 * model.forward_flop * tokens
  elif isinstance(step, TwoSidedFeatures):
    heads = ('embedding/embedding',) if config.proxies.model.tied_embeddings else ()
    least = (3 * model.forward_flop - 2 * model.matmul_weights) * tokens
    least += batch * probes.least_flop(step.layers, length, heads)
  else:
    least = 3 * model.forward_flop * tokens + 2.0 * batch * model.parameters * step.dimension

  def program(batch: int) -> tuple[Any, Arguments]:
    return step.jitted, (prepared, *_rows_of(mesh, batch, length))

  return Work(
    'features',
    program,
    batch,
    'features.batch_size',
    math.ceil(read / batch) * checkpoints(config),
    model.parameters,
    tokens,
    least,
    remat_key=_remat_key(config.proxies.model, 'proxies.model'),
  )


def _rows_of(mesh: Mesh, batch: int, length: int) -> Arguments:
  return _shape(mesh, jnp.int32, batch, length), _shape(mesh, jnp.float32, batch, length)


def _datamodel(config: ConfigDict, mesh: Mesh, model: Model) -> list[Work]:
  features = config.features
  step = feature_step(config, config.pool.vocab_size, config.pool.length, mesh)
  if isinstance(step, WholeGradients):
    return [_target_means(config, mesh, model, step), _directional(config, mesh, model)]
  j, shard = step.dimension, features.shard_rows
  columns = column_blocks(step.describe(), j) if by_layers(config.datamodel.gram, features.projection) else ((0, j),)
  dtype = jnp.bfloat16 if features.store_dtype == 'bfloat16' else jnp.float32
  add_shard = datamodel._partial_gram(columns, mesh)
  scored = scored_rows(config)
  sampled = min(features.gram_rows or scored, scored) if features.mode == 'jvp' else scored
  shard = -(-shard // batch_shards(mesh)) * batch_shards(mesh)  # padded as in the stage

  def gram(batch: int) -> tuple[Any, Arguments]:
    return jax.jit(add_shard), (_shape(mesh, dtype, batch, j),)

  runs, least = math.ceil(sampled / shard), 2.0 * shard * sum((stop - start) ** 2 for start, stop in columns)
  work = functools.partial(Work, batch=shard, batch_key='features.shard_rows', parameters=model.parameters, tokens=0)
  count, passes = checkpoints(config), _HIGHEST_PASSES
  added = work('gram', gram, runs=runs * count, least_flop=least, passes=passes)
  if features.mode == 'jvp':
    return [added, _directional(config, mesh, model)]
  targets = solved_vectors(config)

  def scores(batch: int) -> tuple[Any, Arguments]:
    u_JK = jax.ShapeDtypeStruct((j, targets), jnp.float32)
    return sources.dot, (_shape(mesh, dtype, batch, j), u_JK)

  runs, least = math.ceil(scored / shard), 2.0 * shard * j * targets
  return [added, work('scores', scores, runs=runs * count, least_flop=least, passes=passes)]


def _target_means(config: ConfigDict, mesh: Mesh, model: Model, step: WholeGradients) -> Work:
  """Mean gradients of the targets for EK-FAC, of `targets.max_examples` examples for each of them."""
  length, batch, weightings = config.pool.length, step.rows, config.datamodel.groups + config.datamodel.examples
  abstract = nnx.state(abstract_model(config.proxies.model, config.pool.vocab_size, length), nnx.Param)
  prepared = jax.eval_shape(lambda params: step.prepare(params, 0), abstract)

  def program(batch: int) -> tuple[Any, Arguments]:
    return step.mean_step, (prepared, *_rows_of(mesh, batch, length), _shape(mesh, jnp.float32, batch, weightings))

  targets = len(config.targets.tasks) + bool(config.targets.breadth)
  return Work(
    'target_means',
    program,
    batch,
    'features.batch_size',
    math.ceil(config.targets.max_examples / batch) * targets * checkpoints(config),
    model.parameters,
    batch * length,
    3 * model.forward_flop * batch * length + 2.0 * batch * weightings * step.dimension,
    remat_key=_remat_key(config.proxies.model, 'proxies.model'),
  )


def gram_entries(config: ConfigDict, mesh: Mesh) -> int:
  """Entries of all blocks of the Gram matrix of one checkpoint; 0 for EK-FAC, which has none."""
  if config.features.projection == 'ekfac':
    return 0
  step = feature_step(config, config.pool.vocab_size, config.pool.length, mesh)
  layered = by_layers(config.datamodel.gram, config.features.projection)
  blocks = column_blocks(step.describe(), step.dimension) if layered else ((0, step.dimension),)
  return sum((stop - start) ** 2 for start, stop in blocks)


def ekfac_entries(config: ConfigDict, mesh: Mesh) -> tuple[int, int]:
  """Entries of EK-FAC's factors of one checkpoint, and of the largest matrix; zeros with other projections."""
  step = feature_step(config, config.pool.vocab_size, config.pool.length, mesh)
  if not isinstance(step, WholeGradients):
    return 0, 0
  return step.factor_entries, max(map(math.prod, step.shapes.values()))


def score_columns(config: ConfigDict) -> int:
  """Scores of a row for all targets: of their means, groups, examples and resamples."""
  d = config.datamodel
  return len(config.targets.tasks) * (1 + d.groups + d.examples + d.bootstrap)


def solved_vectors(config: ConfigDict) -> int:
  """Solved vectors of all targets; of EK-FAC those that are scored."""
  d = config.datamodel
  sums = 0 if config.features.projection == 'ekfac' else 1 + d.bootstrap
  return (len(config.targets.tasks) + bool(config.targets.breadth)) * (sums + d.groups + d.examples)


def _directional(config: ConfigDict, mesh: Mesh, model: Model) -> Work:
  length, targets = config.pool.length, solved_vectors(config)
  batch, microbatch = step_rows(config.features, mesh)
  abstract = abstract_model(without_kernels(config.proxies.model), config.pool.vocab_size, length)
  output_fn = load_callable(config.features.output_fn)
  scorer = DirectionalScores(abstract, output_fn, config.seed, mesh, microbatch)
  params = nnx.state(abstract, nnx.Param)
  directions = jax.tree.map(lambda x: jax.ShapeDtypeStruct((targets, *x.shape), jnp.float32), params)
  prepared = jax.eval_shape(scorer.placed, params, directions)

  def program(batch: int) -> tuple[Any, Arguments]:
    return scorer.jitted, (prepared, *_rows_of(mesh, batch, length))

  tokens = batch * length
  return Work(
    'scores',
    program,
    batch,
    'features.batch_size',
    math.ceil(scored_rows(config) / batch) * checkpoints(config),
    model.parameters,
    tokens,
    3 * model.forward_flop * tokens + (2.0 * batch * targets * model.parameters if targets > 1 else 0),
  )

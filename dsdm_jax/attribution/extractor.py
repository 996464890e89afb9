"""What is computed from trained proxies: features of the pool's rows, scores by derivatives, and output functions."""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.attribution import covariances, coverage, ekfac
from dsdm_jax.attribution.covariances import Basis, MomentStep
from dsdm_jax.attribution.coverage import GradientCoverage
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.ekfac import Factors, WholeGradients
from dsdm_jax.attribution.gradients import DenseFeatures, FeatureStep, TwoSidedFeatures
from dsdm_jax.attribution.quantization import Quantizer, column_blocks
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.attribution.sources import DirectionalSource, PoolPass, Recomputed, ahead
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import flops, processes, storage
from dsdm_jax.core.mesh import assemble, batch_shards, fetch, make_mesh, place, share
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.data.order.batches import row_range_batches
from dsdm_jax.data.pool.pool import Pool, PoolRows, prefiltered_rows
from dsdm_jax.errors import UserError
from dsdm_jax.lm.outputs import OutputFn, counted_mean, token_log_probability
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.proxies import checkpoint_steps, trainer_of
from dsdm_jax.training.step import Trainer, TrainState, abstract_model


class FeatureExtractor:
  """Features of one run's proxies, checkpoint by checkpoint.

  Args:
    context: of the stage, with the proxies among its inputs.
    pool: whose rows are read.
    folder: of the features stage, finished or not; bases of eigenvectors are read from it, and written to it if absent.

  Attributes:
    scored: the rows that get features or scores: those that a prefilter keeps. Bases and factors are of the whole pool.
  """

  def __init__(self, context: Context, pool: Pool, folder: Location):
    config = context.config
    self._context, self._pool, self._folder, self.mesh = context, pool, folder, make_mesh(config.mesh)
    self.scored = PoolRows(pool, prefiltered_rows(context.inputs.get('prefilter')))
    self._trainer = trainer_of(config.proxies, pool, self.mesh)
    self.step = feature_step(config, pool.vocab_size, pool.length, self.mesh)
    self.batch_size, self._microbatch = step_rows(config.features, self.mesh)

  def prepare(self, checkpoint: int) -> tuple[Any, dict[str, Any]]:
    """The step's own form of checkpoint `checkpoint`, and notes for the manifest, where they apply.

    'rank_one_error': each layer's error of a rank-one second moment; 'basis_kept': share of the traces of each layer's
    two covariances that the eigenvectors keep.
    """
    params, moment = self.weights(checkpoint)
    if not isinstance(self.step, TwoSidedFeatures):
      return self.step.prepare(params, checkpoint, moment), {}
    notes: dict[str, Any] = {}
    if moment is not None:
      notes['rank_one_error'] = moment.rank_one_error(self.step.layers)
    if self._context.config.features.basis == 'random':
      return self.step.prepare(params, checkpoint, moment), notes
    # All jobs share one basis: rounding may rotate eigenvectors.
    file = basis_file(self._folder, checkpoint)
    if self._context.out == self._folder:  # stages that read features do not pay for their basis
      rows = min(self._context.config.features.basis_rows, self._pool.num_rows)
      prepared = self._moments.prepare(params)
      self._context.add_flop(flops.count(self._moments.apply, prepared, *_rows(1, self._pool.length)) * rows)
    if not processes.decide(lambda: storage.is_marked(file)):
      tokens_NL, weights_NL = self._first_rows(self._context.config.features.basis_rows)
      prepared = self._moments.prepare(params)
      parts = covariances.batches(len(tokens_NL), self.batch_size, batch_shards(self.mesh))
      moments = self._moments.sums(prepared, [(tokens_NL[part], weights_NL[part]) for part in parts])
      leading = Basis.leading(self.step.layers, moments, moment)  # on all processes: each may hold a part of `moment`
      if self._context.first:
        leading.save(file, self.step.layers)
      processes.wait()
    basis = Basis.load(file, self.step.layers)
    return self.step.prepare(params, checkpoint, moment, basis.projections), notes | {'basis_kept': basis.kept}

  def make_factors(self, checkpoint: int, mine: bool) -> bool:
    """Computes EK-FAC of a checkpoint from the first `features.basis_rows` rows, unless another job does or has.

    Returns:
      Whether they are written.
    """
    file, (params, _) = factors_file(self._folder, checkpoint), self.weights(checkpoint)
    tokens_NL, weights_NL = self._first_rows(self._context.config.features.basis_rows)
    self._context.add_flop(self.whole.flop(params, len(tokens_NL), 1, self._pool.length)[0])
    if processes.decide(lambda: storage.is_marked(file)):
      return True
    if mine:
      factors = self.whole.factors(params, tokens_NL, weights_NL)
      if self._context.first:
        ekfac.save(file, factors)
        self._context.cost.save()
      processes.wait()
    return mine

  def factors(self, checkpoint: int) -> dict[str, Factors]:
    """EK-FAC of a checkpoint, as the features stage wrote it."""
    return ekfac.load(factors_file(self._folder, checkpoint))

  @property
  def whole(self) -> WholeGradients:
    assert isinstance(self.step, WholeGradients)
    return self.step

  def mean_gradients(
    self, checkpoint: int, tokens_TL: np.ndarray, weights_TL: np.ndarray, weight_KT: np.ndarray
  ) -> ekfac.Means:
    """Path → mean gradient of target examples for each weighting, [K, S, I, O], on the devices."""
    params, _ = self.weights(checkpoint)
    self._context.add_flop(self.whole.flop(params, len(tokens_TL), len(weight_KT), tokens_TL.shape[1])[1])
    return self.whole.means(params, tokens_TL, weights_TL, weight_KT)

  def coverage(self, checkpoint: int, measured: bool) -> dict[str, Any]:
    """Share of the gradient in parameters without a probe, see `GradientCoverage.unprobed`; empty if `measured`."""
    params, moment = self.weights(checkpoint)
    step = self._coverage
    tokens_BL, weights_BL = self._first_rows(coverage.ROWS)
    self._context.add_flop(flops.count(step.apply, (params, None), tokens_BL[0], weights_BL[0]) * len(tokens_BL))
    return {} if measured else step.unprobed(params, tokens_BL, weights_BL, moment)

  # Both are compiled once and serve all proxies.

  @functools.cached_property
  def _moments(self) -> MomentStep:
    assert isinstance(self.step, TwoSidedFeatures)
    return MomentStep(self.step.model, self.step.output_fn, self.step.layers, self.mesh)

  @functools.cached_property
  def _coverage(self) -> GradientCoverage:
    assert isinstance(self.step, TwoSidedFeatures)
    return GradientCoverage(self.step.model, self.step.output_fn, self.step.layers, self.mesh)

  def _first_rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of the pool's first rows: a random sample, as the pool's order is random."""
    rows = np.arange(min(count, self._pool.num_rows))
    return self._pool.tokens(rows), self._pool.weights(rows)

  def source(self, checkpoint: int, prepared: Any) -> Recomputed:
    """Features of the pool's rows, computed on each read."""
    features = self._context.config.features

    def refuse(row: int, column: int, value: float) -> UserError:
      return not_finite(self.step, row, column, value, checkpoint_name(self._context.config, checkpoint))

    rows = PoolPass(self.step, prepared, self.scored, self.batch_size, self.mesh, self._context.add_flop)
    quantizer = Quantizer(features.store_dtype, column_blocks(self.step.describe(), self.step.dimension))
    return Recomputed(rows, self.scored.num_rows, self.step.dimension, features.shard_rows, quantizer, refuse)

  def directional(self, checkpoint: int, source: Recomputed) -> DirectionalSource:
    """Scores of the pool's rows by directional derivatives; the Gram matrix is made of the features of `source`."""
    config = self._context.config
    model = abstract_model(without_kernels(config.proxies.model), self._pool.vocab_size, self._pool.length)
    output_fn = load_callable(config.features.output_fn)
    scorer = DirectionalScores(model, output_fn, config.seed, self.mesh, self._microbatch)
    params, moment = self.weights(checkpoint)

    def start(u_JT: Any) -> PoolPass:
      if isinstance(self.step, WholeGradients):
        prepared = scorer.placed(params, self.whole.tree(u_JT, params))
      else:
        prepared = scorer.prepare(params, u_JT, checkpoint, moment)
      return PoolPass(scorer, prepared, self.scored, self.batch_size, self.mesh, self._context.add_flop)

    return DirectionalSource(source, config.features.gram_rows or source.rows, start)

  def weights(self, checkpoint: int) -> tuple[nnx.State, SecondMoment | None]:
    """Weights of a checkpoint, and Adam's second moments where features are preconditioned by them."""
    config = self._context.config
    proxies, each = self._context.inputs['proxies'], config.proxies.checkpoints
    proxy, place = divmod(checkpoint, each)
    name = f'proxy_{proxy}'
    last = place == each - 1
    step = proxies.last_step(name) if last else checkpoint_steps(proxies.semantics['steps'], each)[place]
    state = load_state(proxies.path / name, self._trainer, step)
    if config.features.precondition == 'none':
      return state.params, None
    train = config.proxies.train
    return state.params, SecondMoment.of_state(state.opt_state, train.adam_b2, train.adam_eps, train.adam_eps_root)


def _rows(count: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Shapes of tokens_BL and weights_BL, to count operations with."""
  return jax.ShapeDtypeStruct((count, length), jnp.int32), jax.ShapeDtypeStruct((count, length), jnp.float32)


def without_kernels(model: ConfigDict) -> ConfigDict:
  """The same model with attention that has a forward mode; it computes the same function."""
  plain = model.copy_and_resolve_references()
  with plain.unlocked():
    plain.attention = 'xla'
  return plain


def step_rows(features: ConfigDict, mesh: Mesh) -> tuple[int, int]:
  """Rows of a step and of its microbatches (0: one for the whole step), over all devices of this mesh.

  `features.batch_size` and `features.microbatch` are rounded up to a multiple of `batch_shards`, and the
  padding is dropped. A stage can therefore resume on any number of devices.
  """

  def round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple

  microbatch = round_up(features.microbatch, batch_shards(mesh))
  return round_up(features.batch_size, microbatch or batch_shards(mesh)), microbatch


def feature_step(config: ConfigDict, vocab_size: int, length: int, mesh: Mesh) -> FeatureStep:
  """The step that `features.projection` names, for the proxies' model. Stages of one run share its compilation."""
  output_fn = load_callable(config.features.output_fn)
  facts = [config.proxies.model.to_dict(), {k: v for k, v in config.features.items() if k not in ('job', 'jobs')}]
  key = json.dumps([*facts, config.seed, vocab_size, length], sort_keys=True), output_fn, mesh
  if key not in _steps:
    _steps.clear()
    _steps[key] = _feature_step(config, output_fn, vocab_size, length, mesh)
  return _steps[key]


_steps: dict[Any, FeatureStep] = {}  # of the last settings


def _feature_step(config: ConfigDict, output_fn: OutputFn, vocab_size: int, length: int, mesh: Mesh) -> FeatureStep:
  model = abstract_model(config.proxies.model, vocab_size, length)
  batch, microbatch = step_rows(config.features, mesh)
  if config.features.projection == 'ekfac':
    return WholeGradients(model, output_fn, mesh, microbatch or batch)
  if config.features.projection == 'dense':
    return DenseFeatures(model, output_fn, config.features.dimension, config.seed, mesh, microbatch)
  return TwoSidedFeatures(model, output_fn, config.features.layers, config.features.dimension, config.seed, mesh)


def not_finite(
  step: FeatureStep, row: int, column: int, value: float, proxy: int | str, what: str = 'row'
) -> UserError:
  """The error of a feature that is NaN or infinite; it names the row, the layer and the proxy."""
  return UserError(
    f'feature of {what} {row} is {value} in {step.column_owner(column)} of proxy {proxy}; its shard was not written: '
    'look at that text, or lower proxies.train.learning_rate and train the proxies again'
  )


def check_finite(step: FeatureStep, phi_TJ: np.ndarray, proxy: int | str, what: str) -> None:
  """Raises `not_finite` of the first example whose feature is NaN or infinite."""
  bad = np.argwhere(~np.isfinite(phi_TJ))
  if len(bad):
    row, column = map(int, bad[0])
    raise not_finite(step, row, column, float(phi_TJ[row, column]), proxy, what)


def checkpoint_name(config: ConfigDict, checkpoint: int) -> str:
  """Proxy and place of a checkpoint, for messages."""
  each = config.proxies.checkpoints
  proxy, place = divmod(checkpoint, each)
  return f'{proxy}' if each == 1 else f'{proxy}, checkpoint {place + 1} of {each}'


def basis_file(folder: Location, checkpoint: int) -> Location:
  return folder / f'basis_{checkpoint}.npz'


def factors_file(folder: Location, checkpoint: int) -> Location:
  return folder / f'factors_{checkpoint}.npz'


def basis_digest(folder: Location, checkpoint: int, basis: str) -> str:
  """SHA-256 of the eigenvectors; '' for random projections, which seed and settings determine."""
  return hashlib.sha256(storage.read(basis_file(folder, checkpoint))).hexdigest() if basis == 'eigenvectors' else ''


class ProxyOutputs:
  """Compiled forward passes of the proxies' model: output functions of examples, probabilities of the pool's tokens.

  Args:
    trainer: of the proxies' model.
    output_fn: (logits_LV, tokens_L, weights_L) → scalar.
    batch_size: examples per step over all devices.
  """

  def __init__(self, trainer: Trainer, output_fn: OutputFn, batch_size: int):
    self._trainer, self._output_fn, self._batch_size = trainer, output_fn, batch_size
    batch = trainer.batch_sharding
    states = trainer.shardings.params, trainer.shardings.rest
    self._output = jax.jit(self._apply_output, in_shardings=(*states, batch, batch), out_shardings=batch)
    self._probability = jax.jit(self._apply_probability, in_shardings=(*states, batch, batch), out_shardings=batch)
    self.flop = 0.0

  def _logits(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array) -> jax.Array:
    return nnx.merge(self._trainer.graphdef, params, rest)(tokens_BL)

  def _apply_output(self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return jax.vmap(self._output_fn)(self._logits(params, rest, tokens_BL), tokens_BL, weights_BL)

  def _apply_probability(
    self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array
  ) -> jax.Array:
    logits_BLV = self._logits(params, rest, tokens_BL)
    return counted_mean(jnp.exp(jax.vmap(token_log_probability)(logits_BLV, tokens_BL)), weights_BL)

  def of_examples(self, state: TrainState, tokens_TL: np.ndarray, weights_TL: np.ndarray) -> np.ndarray:
    """The output function of each example, float32 [T]."""
    parts, size = [], self._batch_size
    for start in range(0, len(tokens_TL), size):
      rows = tokens_TL[start : start + size], weights_TL[start : start + size]
      padded = tuple(np.pad(x, ((0, size - len(x)), (0, 0))) for x in rows)
      tokens_BL, weights_BL = place(padded, self._trainer.batch_sharding)
      parts.append(fetch(self._output(state.params, state.rest, tokens_BL, weights_BL)))
    self.flop += len(parts) * flops.count(self._apply_output, state.params, state.rest, tokens_BL, weights_BL)
    return np.concatenate(parts)[: len(tokens_TL)]

  def mean_probability(self, state: TrainState, pool: Pool, progress: Callable[[int], object]) -> np.ndarray:
    """Probability of the true token, mean over the tokens of each row that the loss counts; float32 [N]."""
    parts = []
    sharding, size = self._trainer.batch_sharding, self._batch_size
    mine = share(sharding, size)
    for tokens, rows_B, valid_B in ahead(row_range_batches(pool, 0, pool.num_rows, size, mine)):
      batch = assemble((tokens, pool.weights(rows_B[mine])), sharding, size)
      parts.append(fetch(self._probability(state.params, state.rest, *batch))[valid_B])
      progress(len(parts[-1]))
    self.flop += len(parts) * flops.count(self._apply_probability, state.params, state.rest, *batch)
    return np.concatenate(parts)

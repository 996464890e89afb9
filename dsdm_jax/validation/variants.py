"""Variants of the datamodel that differ from a reference in one choice each, their proxies, and their scores.

The reference has two proxies, their last checkpoints and the full Gram matrix. `BEST` combines the best choices.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.attribution import covariances, datamodel
from dsdm_jax.attribution.covariances import Basis, MomentStep
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.ekfac import WholeGradients
from dsdm_jax.attribution.extractor import feature_step, step_rows
from dsdm_jax.attribution.gradients import FeatureStep, TwoSidedFeatures
from dsdm_jax.attribution.quantization import Blocks, column_blocks
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.attribution.sources import RowSource, unit_rows
from dsdm_jax.core import prng
from dsdm_jax.core.mesh import one_device
from dsdm_jax.data.targets.targets import text_mask
from dsdm_jax.lm.outputs import counted_mean, token_log_probability
from dsdm_jax.training.differentiable import ScannedTraining
from dsdm_jax.training.step import TrainState

EARLY, MIDDLE, LATE = range(3)  # indices of the checkpoints of one proxy
STOPS = (1 / 3, 2 / 3, 1.0)
_CACHED = 16  # feature matrices, each of one checkpoint, that stay in memory for later variants


@dataclasses.dataclass(frozen=True)
class Kind:
  """Attributes: width of the model and length of its training, as multiples of the config's."""

  width: float = 1.0
  length: float = 1.0


USUAL = Kind()


@dataclasses.dataclass(frozen=True)
class Proxy:
  """Attributes: training that it belongs to; its state at each of `STOPS`."""

  training: ScannedTraining
  states: tuple[TrainState, ...]


class ProxyPool:
  """Proxies that are trained on random subsets of the rows, with other seeds than the models of the truth.

  Args:
    config: of the run, with `proxies.train` of the setting.
    vocab_size: of the tokens.
    tokens_NL: all rows.
    weights_NL: 1 for tokens that the loss counts, else 0; None counts all.
  """

  def __init__(self, config: ConfigDict, vocab_size: int, tokens_NL: np.ndarray, weights_NL: np.ndarray | None = None):
    self._config, self._vocab_size, self._tokens_NL, self._weights_NL = config, vocab_size, tokens_NL, weights_NL
    self.training = functools.lru_cache(maxsize=None)(self._make_training)
    self._trained = functools.lru_cache(maxsize=None)(self._train)

  def __call__(self, kind: Kind, number: int) -> Proxy:
    """Proxy `number` of a kind; its rows and their order are the same for all kinds."""
    return self._trained(kind, number)

  def _train(self, kind: Kind, number: int) -> Proxy:
    training = self.training(kind)
    weight_MN = np.zeros((1, training.rows), np.float32)
    order = prng.numpy_stream(self._config.seed, 'validation', 'proxy', number).permutation(training.rows)
    weight_MN[0, order[: round(self._config.proxies.subset_share * training.rows)]] = 1
    states = training.train(f'proxy {number}', weight_MN, STOPS)
    return Proxy(training, tuple(jax.tree.map(lambda x: x[0], s) for s in states))

  def _make_training(self, kind: Kind) -> ScannedTraining:
    proxies, epochs = self._config.proxies, kind.length * self._config.validation.epochs
    model = scaled(proxies.model, kind.width)
    rows = self._tokens_NL, epochs, self._config.seed, self._weights_NL
    return ScannedTraining(model, proxies.train, self._vocab_size, *rows)


def scaled(model: ConfigDict, width: float) -> ConfigDict:
  """The model's config at `width` times the width, with the same number of heads."""
  model = ConfigDict(model.to_dict())
  model.width, model.mlp_width = round(model.width * width), round(model.mlp_width * width)
  return model


Changes = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to compute scores; all other choices are those of the config.

  Attributes:
    name: in the table.
    proxies: number of proxies.
    checkpoints: of each proxy: `EARLY`, `MIDDLE` and `LATE`; scores are averaged over them.
    features: keys of `config.features` to override.
    damping: multiple of `datamodel.damping`.
    gram: full, layers, joint, or none for gradient dot products.
    unit_norm, q: as in `config.datamodel`.
    kind: of the proxies.
  """

  name: str
  proxies: int = 2
  checkpoints: tuple[int, ...] = (LATE,)
  features: Changes = ()
  damping: float = 1.0
  gram: str = 'full'
  unit_norm: bool = False
  q: bool = False
  kind: Kind = USUAL


REFERENCE = Variant('reference')
EKFAC: Changes = (('projection', 'ekfac'), ('basis_rows', 128))  # no projection; `gram` says nothing
BEST = 'Gram by layers, 4 proxies, three checkpoints'

VARIANTS: tuple[Variant, ...] = (
  REFERENCE,
  Variant('1 proxy', proxies=1),
  Variant('4 proxies', proxies=4),
  Variant('early checkpoint', checkpoints=(EARLY,)),
  Variant('middle checkpoint', checkpoints=(MIDDLE,)),
  Variant('three checkpoints', checkpoints=(EARLY, MIDDLE, LATE)),
  Variant('4 proxies, three checkpoints', proxies=4, checkpoints=(EARLY, MIDDLE, LATE)),
  Variant('half the width', kind=Kind(width=0.5)),
  Variant('twice the width', kind=Kind(width=2.0)),
  Variant('half the epochs', kind=Kind(length=0.5)),
  Variant('twice the epochs', kind=Kind(length=2.0)),
  Variant('J = 256', features=(('dimension', 256),)),
  Variant('J = 8,192', features=(('dimension', 8_192),)),
  Variant('eigenvectors', features=(('basis', 'eigenvectors'),)),
  Variant('eigenvectors, J = 8,192', features=(('basis', 'eigenvectors'), ('dimension', 8_192))),
  Variant('dense, J = 2,048', features=(('projection', 'dense'),)),
  Variant('dense, J = 256', features=(('projection', 'dense'), ('dimension', 256))),
  Variant('damping × 0.01', damping=0.01),
  Variant('damping × 0.1', damping=0.1),
  Variant('damping × 10', damping=10.0),
  Variant('damping × 100', damping=100.0),
  Variant('Gram by layers', gram='layers'),
  Variant('Gram by layers, damping × 10', gram='layers', damping=10.0),
  Variant('Gram by layers, J = 8,192', gram='layers', features=(('dimension', 8_192),)),
  Variant('Gram by layers, 4 proxies', gram='layers', proxies=4),
  Variant('Gram by layers, three checkpoints', gram='layers', checkpoints=(EARLY, MIDDLE, LATE)),
  Variant(BEST, gram='layers', proxies=4, checkpoints=(EARLY, MIDDLE, LATE)),
  Variant('EK-FAC', features=EKFAC),
  Variant('EK-FAC, 1 proxy', features=EKFAC, proxies=1),
  Variant('EK-FAC, 4 proxies', features=EKFAC, proxies=4),
  Variant('EK-FAC, three checkpoints', features=EKFAC, checkpoints=(EARLY, MIDDLE, LATE)),
  Variant('EK-FAC, early checkpoint', features=EKFAC, checkpoints=(EARLY,)),
  Variant('EK-FAC, damping × 0.1', features=EKFAC, damping=0.1),
  Variant('EK-FAC, damping × 10', features=EKFAC, damping=10.0),
  Variant('EK-FAC, 512 rows', features=(*EKFAC, ('basis_rows', 512))),
  Variant('joint Gram', gram='joint'),
  Variant('no curvature', gram='none'),
  Variant('no curvature, unit norm', gram='none', unit_norm=True),
  Variant('unit norm', unit_norm=True),
  Variant("Adam's second moment", features=(('precondition', 'adam'),)),
  Variant('dense, Adam', features=(('projection', 'dense'), ('precondition', 'adam'))),
  Variant('dense, Adam, no curvature', features=(('projection', 'dense'), ('precondition', 'adam')), gram='none'),
  Variant('Q', q=True),
  Variant('log-likelihood', features=(('output_fn', 'dsdm_jax.lm.outputs:log_likelihood'),)),
)


class Rows(RowSource):
  """Features in memory as a row source of shards."""

  def __init__(self, phi_NJ: np.ndarray, shard: int = 1_024):
    self.phi_NJ, self._shard = phi_NJ, shard
    self.rows, self.dimension = phi_NJ.shape

  def from_row(self, row: int) -> Iterator[tuple[int, int, np.ndarray]]:
    for start in range(row, self.rows, self._shard):
      stop = min(start + self._shard, self.rows)
      yield start, stop, self.phi_NJ[start:stop]


class Scorer:
  """Scores of all rows for each target example, for any variant.

  Args:
    config: of the run.
    proxies: (kind, number) → the trained proxy.
    vocab_size: of the tokens.
    tokens_NL: the rows.
    tokens_TL, weights_TL: the target examples.
    weights_NL: as `ProxyPool`.
    filled_NL: False for the padding of rows; None where there is none.
  """

  def __init__(
    self,
    config: ConfigDict,
    proxies: Callable[[Kind, int], Proxy],
    vocab_size: int,
    tokens_NL: np.ndarray,
    tokens_TL: np.ndarray,
    weights_TL: np.ndarray,
    weights_NL: np.ndarray | None = None,
    filled_NL: np.ndarray | None = None,
  ):
    self._config, self._proxies, self._vocab_size = config, proxies, vocab_size
    self._mesh = one_device()
    weights_NL = np.ones(tokens_NL.shape, np.float32) if weights_NL is None else np.array(weights_NL)
    weights_NL[:, 0] = 0.0
    self._tokens = np.concatenate([tokens_NL, tokens_TL]).astype(np.int32)
    self._weights = np.concatenate([weights_NL, weights_TL]).astype(np.float32)
    filled_NL = np.ones(tokens_NL.shape, bool) if filled_NL is None else filled_NL
    self._filled = np.concatenate([filled_NL, text_mask(weights_TL)]).astype(np.float32)
    self._rows = len(tokens_NL)
    self._step = functools.lru_cache(maxsize=None)(self._make_step)
    self._directional = functools.lru_cache(maxsize=None)(self._make_directional)
    self._features = functools.lru_cache(maxsize=_CACHED)(self._make_features)

  def __call__(self, variant: Variant) -> np.ndarray:
    """score_NT, float32; higher is better."""
    parts = [(p, c) for p in range(variant.proxies) for c in variant.checkpoints]
    if variant.gram == 'joint':
      score_NT = self._joint(variant, parts)
    else:
      score_NT = np.mean([self._one(variant, *part) for part in parts], axis=0)
    if variant.q:
      proxies = [self._proxies(variant.kind, number) for number in range(variant.proxies)]
      score_NT = score_NT * (1 - np.mean([self._probability(p) for p in proxies], axis=0))[:, None]
    return score_NT.astype(np.float32)

  def _one(self, variant: Variant, proxy: int, checkpoint: int) -> np.ndarray:
    step = self._step(variant.features, variant.kind.width)
    if isinstance(step, WholeGradients):
      return self._by_ekfac(step, variant, self._proxies(variant.kind, proxy).states[checkpoint].params)
    phi_XJ, layers = self._features_of(variant, proxy, checkpoint)
    phi_NJ, phi_TJ = phi_XJ[: self._rows], phi_XJ[self._rows :]
    if variant.gram == 'none':
      return phi_NJ @ phi_TJ.T
    columns = layers if variant.gram == 'layers' else datamodel.whole(phi_NJ.shape[1])
    rows = Rows(phi_NJ)
    parts = datamodel.gram(rows, columns)
    u_JT = datamodel.solve(parts, columns, phi_TJ, self._damping(variant), overwrite=True).u_JK
    return datamodel.scores(rows, u_JT)

  def _by_ekfac(self, step: WholeGradients, variant: Variant, params: nnx.State) -> np.ndarray:
    options = self._changed(variant.features, variant.kind.width).features
    sample = slice(min(options.basis_rows, self._rows))
    factors = step.factors(params, self._tokens[sample], self._weights[sample])
    targets = self._tokens[self._rows :], self._weights[self._rows :]
    means = step.means(params, *targets, np.eye(len(targets[0])))
    directions = {
      path: f.solve(np.asarray(means[path]), f.damped(self._damping(variant))) for path, f in factors.items()
    }
    scorer = self._directional(variant.features, variant.kind.width)
    prepared, parts = scorer.placed(params, step.tree(directions, params)), []
    for start in range(0, self._rows, step.rows):
      stop = min(start + step.rows, self._rows)
      batch = (jnp.asarray(_padded(x[start:stop], step.rows)) for x in (self._tokens, self._weights))
      parts.append(np.asarray(scorer(prepared, *batch))[: stop - start])
    return np.concatenate(parts)

  def _joint(self, variant: Variant, parts: Sequence[tuple[int, int]]) -> np.ndarray:
    phi = [self._features_of(variant, *part)[0] for part in parts]
    phi_XJ = np.concatenate(phi, axis=1)
    stops = np.cumsum([p.shape[1] for p in phi]).tolist()
    rows, columns = Rows(phi_XJ[: self._rows]), datamodel.whole(phi_XJ.shape[1])
    gram_JJ = datamodel.gram(rows, columns)[0]
    scale_J = datamodel.equalise(gram_JJ, tuple(zip([0, *stops[:-1]], stops, strict=True)))
    right_TJ = phi_XJ[self._rows :] * scale_J
    u_JT = datamodel.solve([gram_JJ], columns, right_TJ, self._damping(variant), overwrite=True).u_JK
    return datamodel.scores(rows, u_JT * scale_J[:, None])

  def _damping(self, variant: Variant) -> float:
    return variant.damping * self._config.datamodel.damping

  def _features_of(self, variant: Variant, proxy: int, checkpoint: int) -> tuple[np.ndarray, Blocks]:
    phi_XJ, columns = self._features(variant.features, variant.kind, proxy, checkpoint)
    return (unit_rows(phi_XJ) if variant.unit_norm else phi_XJ), columns

  def _make_features(self, features: Changes, kind: Kind, proxy: int, checkpoint: int) -> tuple[np.ndarray, Blocks]:
    step, config = self._step(features, kind.width), self._changed(features, kind.width)
    state = self._proxies(kind, proxy).states[checkpoint]
    moment = None
    if config.features.precondition == 'adam':
      train = config.proxies.train
      moment = SecondMoment.of_state(state.opt_state, train.adam_b2, train.adam_eps, train.adam_eps_root)
    batch, _ = step_rows(config.features, self._mesh)
    prepared = self._prepare(step, config, state, proxy * len(STOPS) + checkpoint, moment)
    parts = []
    for start in range(0, len(self._tokens), batch):
      tokens_BL, weights_BL = (_padded(x[start : start + batch], batch) for x in (self._tokens, self._weights))
      parts.append(step(prepared, jnp.asarray(tokens_BL), jnp.asarray(weights_BL)))
    phi_XJ = np.concatenate([np.asarray(part) for part in parts])[: len(self._tokens)]
    return phi_XJ, column_blocks(step.describe(), step.dimension)

  def _prepare(
    self, step: FeatureStep, config: ConfigDict, state: TrainState, number: int, moment: SecondMoment | None
  ) -> Any:
    if config.features.basis == 'random' or not isinstance(step, TwoSidedFeatures):
      return step.prepare(state.params, number, moment)
    measure = MomentStep(step.model, step.output_fn, step.layers, self._mesh)
    count, size = min(config.features.basis_rows, self._rows), config.features.batch_size
    parts = covariances.batches(count, size, devices=1)
    moments = measure.sums(measure.prepare(state.params), [(self._tokens[p], self._weights[p]) for p in parts])
    return step.prepare(state.params, number, moment, Basis.leading(step.layers, moments, moment).projections)

  def _make_step(self, features: Changes, width: float) -> FeatureStep:
    return feature_step(self._changed(features, width), self._vocab_size, self._tokens.shape[1], self._mesh)

  def _make_directional(self, features: Changes, width: float) -> DirectionalScores:
    step = self._step(features, width)
    assert isinstance(step, WholeGradients)
    return DirectionalScores(step.model, step.output_fn, self._config.seed, self._mesh)

  def _changed(self, features: Changes, width: float) -> ConfigDict:
    config = ConfigDict(self._config.to_dict())
    config.features.update({'projection': 'two_sided', 'mode': 'store', 'basis_rows': 512} | dict(features))
    config.proxies.model = scaled(config.proxies.model, width)
    return config

  def _probability(self, proxy: Proxy) -> np.ndarray:
    """Mean probability of the counted tokens of each row under one proxy, float32 [N], as that of the datamodel's Q."""

    def probability(model: nnx.Module, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
      return counted_mean(jnp.exp(_likelihood(model, tokens_BL)), weights_BL)

    return self._forward(proxy, probability, self._tokens[: self._rows], self._weights[: self._rows])

  def loss(self, proxy: Proxy) -> np.ndarray:
    """Nats per token of each row under one proxy, float32 [N]."""

    def loss(model: nnx.Module, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
      return -counted_mean(_likelihood(model, tokens_BL), weights_BL)

    return self._forward(proxy, loss, self._tokens[: self._rows], self._weights[: self._rows])

  def embeddings(self, proxy: Proxy) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the last hidden states over the tokens of rows and of target examples; float32 [N, D], [T, D]."""

    def mean(model: nnx.Module, tokens_BL: jax.Array, counted_BL: jax.Array) -> jax.Array:
      x_BLD = model.hidden(tokens_BL).astype(jnp.float32)
      return jnp.einsum('bld,bl->bd', x_BLD, counted_BL) / jnp.maximum(counted_BL.sum(axis=1), 1)[:, None]

    embedding_XD = self._forward(proxy, mean, self._tokens, self._filled)
    return embedding_XD[: self._rows], embedding_XD[self._rows :]

  def _forward(self, proxy: Proxy, function: Callable, *arrays: np.ndarray) -> np.ndarray:
    """`function`(model, *arrays_BL), batch by batch."""
    graphdef, state = proxy.training.trainer.graphdef, proxy.states[LATE]
    step = jax.jit(lambda params, rest, *arrays_BL: function(nnx.merge(graphdef, params, rest), *arrays_BL))
    batch, size = self._config.features.batch_size, len(arrays[0])
    parts = [
      step(state.params, state.rest, *(_padded(x[s : s + batch], batch) for x in arrays)) for s in range(0, size, batch)
    ]
    return np.concatenate([np.asarray(part) for part in parts])[:size]


def _likelihood(model: nnx.Module, tokens_BL: jax.Array) -> jax.Array:
  return jax.vmap(token_log_probability)(model(tokens_BL), tokens_BL)


def _padded(array: np.ndarray, batch: int) -> np.ndarray:
  return np.pad(array, [(0, batch - len(array))] + [(0, 0)] * (array.ndim - 1))

"""Datamodels that differ from a reference in one way each, the best ways together, and their scores of every example.

The reference is the plain one: two proxies, their last checkpoints, the full Gram matrix.
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
from dsdm_jax.attribution.extractor import feature_step, step_rows
from dsdm_jax.attribution.gradients import FeatureStep, TwoSidedFeatures
from dsdm_jax.attribution.quantization import Blocks, column_blocks
from dsdm_jax.attribution.second_moment import SecondMoment
from dsdm_jax.attribution.sources import RowSource, unit_rows
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.data.targets.targets import text_mask
from dsdm_jax.lm.outputs import token_log_probability
from dsdm_jax.training.step import TrainState
from dsdm_jax.validation.proxy_pool import EARLY, LATE, MIDDLE, STOPS, USUAL, Kind, Proxy, scaled

_KEPT = 16  # features of one checkpoint each that stay in memory for the variants to come

Changes = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to make scores; what is not said is the config's.

  Attributes:
    name: in the table.
    proxies: how many.
    checkpoints: of each proxy, `EARLY`, `MIDDLE` and `LATE`; scores are averaged over them.
    features: keys of `config.features` that are other.
    damping: times `datamodel.damping`.
    gram: full, layers, joint, or none for the gradient's dot product.
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
  """Features of rows in memory, as a source of one shard after the other."""

  def __init__(self, phi_NJ: np.ndarray, shard: int = 1_024):
    self.phi_NJ, self._shard = phi_NJ, shard
    self.rows, self.dimension = phi_NJ.shape

  def from_row(self, row: int) -> Iterator[tuple[int, int, np.ndarray]]:
    for start in range(row, self.rows, self._shard):
      stop = min(start + self._shard, self.rows)
      yield start, stop, self.phi_NJ[start:stop]


class Scorer:
  """Scores of all rows for each target example, by any variant.

  Args:
    config: of the run.
    proxies: (kind, place) → the trained proxy.
    vocab_size: of the tokens.
    tokens_NL: the rows.
    tokens_TL, weights_TL: the target examples.
  """

  def __init__(
    self,
    config: ConfigDict,
    proxies: Callable[[Kind, int], Proxy],
    vocab_size: int,
    tokens_NL: np.ndarray,
    tokens_TL: np.ndarray,
    weights_TL: np.ndarray,
  ):
    self._config, self._proxies, self._vocab_size = config, proxies, vocab_size
    self._mesh = make_mesh(ConfigDict({'data': 1, 'model': 1}), jax.local_devices()[:1])
    weights_NL = np.ones(tokens_NL.shape, np.float32)
    weights_NL[:, 0] = 0.0
    self._tokens = np.concatenate([tokens_NL, tokens_TL]).astype(np.int32)
    self._weights = np.concatenate([weights_NL, weights_TL]).astype(np.float32)
    self._rows = len(tokens_NL)
    self._step = functools.lru_cache(maxsize=None)(self._make_step)
    self._features = functools.lru_cache(maxsize=_KEPT)(self._make_features)

  def __call__(self, variant: Variant) -> np.ndarray:
    """score_NT, float32; higher is better."""
    parts = [(p, c) for p in range(variant.proxies) for c in variant.checkpoints]
    if variant.gram == 'joint':
      score_NT = self._joint(variant, parts)
    else:
      score_NT = np.mean([self._one(variant, *part) for part in parts], axis=0)
    if variant.q:
      proxies = [self._proxies(variant.kind, place) for place in range(variant.proxies)]
      score_NT = score_NT * (1 - np.mean([self._probability(p) for p in proxies], axis=0))[:, None]
    return score_NT.astype(np.float32)

  def _one(self, variant: Variant, proxy: int, checkpoint: int) -> np.ndarray:
    phi_XJ, layers = self._features_of(variant, proxy, checkpoint)
    phi_NJ, phi_TJ = phi_XJ[: self._rows], phi_XJ[self._rows :]
    if variant.gram == 'none':
      return phi_NJ @ phi_TJ.T
    columns = layers if variant.gram == 'layers' else datamodel.whole(phi_NJ.shape[1])
    rows = Rows(phi_NJ)
    parts = datamodel.gram(rows, columns)
    u_JT = datamodel.solve(parts, columns, phi_TJ, self._damping(variant), overwrite=True).u_JK
    return datamodel.scores(rows, u_JT)

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
      tokens_BL, weights_BL = (_filled(x[start : start + batch], batch) for x in (self._tokens, self._weights))
      parts.append(step(prepared, jnp.asarray(tokens_BL), jnp.asarray(weights_BL)))
    phi_XJ = np.concatenate([np.asarray(part) for part in parts])[: len(self._tokens)]
    return phi_XJ, column_blocks(step.describe(), step.dimension)

  def _prepare(
    self, step: FeatureStep, config: ConfigDict, state: TrainState, place: int, moment: SecondMoment | None
  ) -> Any:
    if config.features.basis == 'random' or not isinstance(step, TwoSidedFeatures):
      return step.prepare(state.params, place, moment)
    measure = MomentStep(step.model, step.output_fn, step.layers, self._mesh)
    count, size = min(config.features.basis_rows, self._rows), config.features.batch_size
    parts = covariances.batches(count, size, devices=1)
    moments = measure.sums(measure.prepare(state.params), [(self._tokens[p], self._weights[p]) for p in parts])
    return step.prepare(state.params, place, moment, Basis.leading(step.layers, moments, moment).projections)

  def _make_step(self, features: Changes, width: float) -> FeatureStep:
    return feature_step(self._changed(features, width), self._vocab_size, self._tokens.shape[1], self._mesh)

  def _changed(self, features: Changes, width: float) -> ConfigDict:
    config = ConfigDict(self._config.to_dict())
    config.features.update(dict(features))
    config.proxies.model = scaled(config.proxies.model, width)
    return config

  def _probability(self, proxy: Proxy) -> np.ndarray:
    """Mean predicted-token probability of each row under one proxy."""
    return self._forward(proxy, lambda model, t: jnp.exp(_likelihood(model, t)).mean(1), self._tokens[: self._rows])

  def loss(self, proxy: Proxy) -> np.ndarray:
    """Nats per token of each row under one proxy, float32 [N]."""
    return self._forward(proxy, lambda model, t: -_likelihood(model, t).mean(1), self._tokens[: self._rows])

  def embeddings(self, proxy: Proxy) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the model's last states over a text's tokens, of rows and of target examples; float32 [N, D], [T, D]."""

    def mean(model: nnx.Module, tokens_BL: jax.Array, here_BL: jax.Array) -> jax.Array:
      x_BLD = model.hidden(tokens_BL).astype(jnp.float32)
      return jnp.einsum('bld,bl->bd', x_BLD, here_BL) / jnp.maximum(here_BL.sum(axis=1), 1)[:, None]

    embedding_XD = self._forward(proxy, mean, self._tokens, text_mask(self._weights).astype(np.float32))
    return embedding_XD[: self._rows], embedding_XD[self._rows :]

  def _forward(self, proxy: Proxy, function: Callable, *arrays: np.ndarray) -> np.ndarray:
    """`function`(model, *arrays_BL), a batch at a time."""
    graphdef, state = proxy.training.trainer.graphdef, proxy.states[LATE]
    step = jax.jit(lambda params, rest, *arrays_BL: function(nnx.merge(graphdef, params, rest), *arrays_BL))
    batch, size = self._config.features.batch_size, len(arrays[0])
    parts = [
      step(state.params, state.rest, *(_filled(x[s : s + batch], batch) for x in arrays)) for s in range(0, size, batch)
    ]
    return np.concatenate([np.asarray(part) for part in parts])[:size]


def _likelihood(model: nnx.Module, tokens_BL: jax.Array) -> jax.Array:
  return jax.vmap(token_log_probability)(model(tokens_BL), tokens_BL)


def _filled(array: np.ndarray, batch: int) -> np.ndarray:
  return np.pad(array, [(0, batch - len(array))] + [(0, 0)] * (array.ndim - 1))

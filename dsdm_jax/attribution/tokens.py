"""Contribution of each token of a row to the row's score.

The output function is a mean over tokens, so φ(n)·u = ∇f_n·v is a sum of their shares, for the direction v in parameter
space that corresponds to u: u itself in EK-FAC, Rᵀu in the dense projection; in the two-sided one A U Bᵀ in each probed
matrix and zero elsewhere, as ⟨AᵀGB, U⟩ = ⟨G, A U Bᵀ⟩.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.ekfac import WholeGradients
from dsdm_jax.attribution.extractor import FeatureExtractor, without_kernels
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.attribution.score_arrays import ScoreArrays
from dsdm_jax.attribution.scores import Q, proxy_weights, seen
from dsdm_jax.config import validate as config_lib
from dsdm_jax.config.validate import load_callable
from dsdm_jax.config.values import CALLABLE
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.mesh import batch_sharding, fetch, place
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.lm import partition
from dsdm_jax.lm.outputs import OutputFn
from dsdm_jax.training.step import abstract_model


class TokenScores:
  """Scores of single tokens, from the finished stages of a run. Writes nothing.

  Args:
    inputs: 'pool', 'proxies', 'features' and 'datamodel'.
    batch_size: rows that are computed at once.
    functions: 'module:function' names outside dsdm_jax that the run's settings may import.

  Raises:
    UserError: the settings name a function that is not among these; rows have unit norm, or the output function has no
      function `<name>_shares` beside it.
  """

  def __init__(self, inputs: Mapping[str, Artifact], batch_size: int = 8, functions: Collection[str] = ()):
    self._datamodel, self._proxies = inputs['datamodel'], inputs['proxies']
    if self._datamodel.semantics['unit_norm']:
      raise UserError('datamodel.unit_norm divides a row by its norm, which is no sum over tokens; set it to False')
    settings = inputs['features'].config
    for key, name in settings.items():  # of a workdir, which may come from anyone
      named = isinstance(name, str) and CALLABLE.fullmatch(name)
      if named and not name.startswith('dsdm_jax.lm.') and name not in functions:
        raise UserError(
          f'{key} of the run is the function {name}; if you trust its module, name it: '
          f'dsdm_jax.load(..., functions=({name!r},))'
        )
    sections = ('seed', 'features', 'proxies')
    config = config_lib.nested({k: v for k, v in settings.items() if k.partition('.')[0] in sections})
    with config.unlocked():
      config.features.update({'batch_size': batch_size, 'microbatch': 0})
      config.mesh = {'replicas': 1, 'data': -1, 'model': 1}
    name = config.features.output_fn
    try:
      output_fn: OutputFn = load_callable(f'{name}_shares')
    except UserError as error:
      raise UserError(
        f'scores of tokens need the share of each token in {name}: write a function '
        f'{name.partition(":")[2]}_shares beside it, (logits_LV, tokens_L, weights_L) → shares of tokens 1…L−1, whose '
        'sum it is'
      ) from error
    self._config, self._pool = config, Pool(inputs['pool'])
    self._arrays = ScoreArrays(self._datamodel.path, self._datamodel.manifest.get('files'))
    folder = inputs['features'].path
    log, cost = Log(folder, 'tokens', enabled=False), Cost(folder, enabled=False)
    self._extractor = FeatureExtractor(Context(config, folder, inputs, log, cost, first=False), self._pool, folder)
    model = abstract_model(without_kernels(config.proxies.model), self._pool.vocab_size, self._pool.length)
    self._scorer = DirectionalScores(model, output_fn, config.seed, self._extractor.mesh)

  def __call__(self, task: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """float32 [B, L]: contribution of each token of each row to the row's score for `task`; zero for the first.

    They sum to the score before features are quantized for the store and, if it is averaged over unseen proxies,
    before `scores.level`. NaN for rows that a prefilter left out.
    """
    semantics, rows_B = self._datamodel.semantics, np.asarray(rows, np.int64)
    if self._arrays.scored_N is not None and not (scored_B := self._arrays.scored_N[rows_B]).all():
      share_BL = np.full((len(rows_B), self._pool.length), np.nan, np.float32)
      share_BL[scored_B] = self(task, rows_B[scored_B])
      return share_BL
    u_CJ = self._arrays[f'u_{task}_CJ']
    q_B = np.ones(len(rows_B))
    if semantics['q'] != 'none':
      q_B = 1 - storage.load(self._datamodel.path / Q)[rows_B]
    if semantics['gram'] == 'joint':  # one datamodel, whose scores are sums over checkpoints
      weight_CB = np.ones((len(u_CJ), len(rows_B)))
    else:
      proxies = self._config.proxies
      seen_PB = seen(self._proxies, proxies.count, self._pool.num_rows)[:, rows_B]
      weight_CB = proxy_weights(np.repeat(seen_PB, proxies.checkpoints, axis=0), semantics['average'][task])
    total_BL = np.zeros((len(rows_B), self._pool.length))
    tokens_BL, weights_BL = self._pool.tokens(rows_B), self._pool.weights(rows_B)
    for checkpoint, (u_J, weight_B) in enumerate(zip(u_CJ, weight_CB, strict=True)):
      scale = max(float(np.abs(u_J).max()), np.finfo(np.float64).tiny)  # keeps float32 far from its limits
      share_BL = self._of_checkpoint(checkpoint, (u_J / scale).astype(np.float32), tokens_BL, weights_BL)
      total_BL[:, 1:] += share_BL * scale * (weight_B * q_B)[:, None]
    return total_BL.astype(np.float32)

  def _of_checkpoint(
    self, checkpoint: int, u_J: np.ndarray, tokens_NL: np.ndarray, weights_NL: np.ndarray
  ) -> np.ndarray:
    """Shares [N, L−1] of tokens 1…L−1."""
    step, size = self._extractor.step, self._extractor.batch_size
    params, moment = self._extractor.weights(checkpoint)
    if isinstance(step, TwoSidedFeatures):
      prepared = self._scorer.placed(params, _direction(step, self._extractor.prepare(checkpoint)[0], params, u_J))
    elif isinstance(step, WholeGradients):
      prepared = self._scorer.placed(params, step.tree(step.split(u_J[:, None]), params))
    else:
      prepared = self._scorer.prepare(params, u_J[:, None], checkpoint, moment)
    parts = [np.zeros((0, self._pool.length - 1))]
    for start in range(0, len(tokens_NL), size):
      rows = [x[start : start + size] for x in (tokens_NL, weights_NL)]
      filled = tuple(np.pad(x_BL, [(0, size - len(x_BL)), (0, 0)]) for x_BL in rows)
      placed = place(filled, batch_sharding(self._extractor.mesh))
      parts.append(fetch(self._scorer(prepared, *placed))[: len(rows[0]), :, 0])
    return np.concatenate(parts)


def _direction(step: TwoSidedFeatures, prepared: nnx.State, params: nnx.State, u_J: np.ndarray) -> Any:
  """A U Bᵀ of each probed parameter and zeros, float32 [1, *parameter shape], a pytree like `params`."""
  sides, shapes = ({'/'.join(map(str, path)): x[...] for path, x in nnx.to_flat_state(s)} for s in (prepared, params))
  directions: dict[str, jax.Array] = {}
  for layer in step.layers:
    u = u_J[layer.start : layer.stop].reshape(*layer.stack, layer.a, layer.b)
    a, b = sides[f'{layer.module}/input_projection'], sides[f'{layer.module}/output_projection']
    whole = jnp.einsum('...ia,...ab,...ob->...io', a, jnp.asarray(u), b)
    stops = np.cumsum([shapes[path].size for path in layer.parameters])
    directions |= dict(zip(layer.parameters, jnp.split(whole.ravel(), stops[:-1]), strict=True))

  def one(path: Any, x: jax.Array) -> jax.Array:
    direction = directions.get(partition.path_name(path), jnp.zeros(x.size, jnp.float32))
    return direction.reshape(1, *x.shape)

  return jax.tree_util.tree_map_with_path(one, params)

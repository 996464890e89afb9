"""What each token of a row adds to the row's score.

The output function is a mean over tokens, so φ(n)·u = ∇f_n·v is a sum of their shares for the direction v in parameter
space that stands for u: Rᵀu in the dense projection; in the two-sided one A U Bᵀ in each probed kernel, and zero in
all else, as ⟨AᵀGB, U⟩ = ⟨G, A U Bᵀ⟩.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsdm_jax.attribution import ensemble
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.features import ProxySteps, without_kernels
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.attribution.scores import SOLUTION, seen
from dsdm_jax.config import validate as config_lib
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.mesh import batch_sharding, fetch, place
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.lm import partition
from dsdm_jax.training.step import abstract_model


class TokenScores:
  """Scores of single tokens, from the finished stages of a run; nothing is written.

  Args:
    inputs: 'pool', 'proxies', 'features' and 'datamodel'.
    batch_size: rows that are worked on at once.

  Raises:
    UserError: these stages do not say what tokens add: their rows have unit norm, their output function has no
      function `<name>_shares` beside it, or they were made before solutions were kept.
  """

  def __init__(self, inputs: Mapping[str, Artifact], batch_size: int = 8):
    self._datamodel, self._proxies = inputs['datamodel'], inputs['proxies']
    said = self._datamodel.semantics
    if said['unit_norm']:
      raise UserError('datamodel.unit_norm divides a row by its norm, which is no sum over tokens; set it to False')
    if not (self._datamodel.path / SOLUTION).is_file():
      raise UserError(
        f'{self._datamodel.path} was made before solutions were kept; delete it and run --stage=datamodel again'
      )
    settings = inputs['features'].settings
    config = config_lib.nested({k: v for k, v in settings.items() if k.partition('.')[0] in _SECTIONS})
    with config.unlocked():
      config.features.update({'batch_size': batch_size, 'microbatch': 0})
      config.mesh = {'data': -1, 'model': 1}
      if 'checkpoints' not in config.proxies:  # features of before this key
        config.proxies.checkpoints = 1
    self._output_fn = _shares(config.features.output_fn)
    self._config, self._pool = config, Pool(inputs['pool'])
    folder = inputs['features'].path
    log, cost = Log(folder, 'tokens', enabled=False), Cost(folder, enabled=False)
    self._steps = ProxySteps(Context(config, folder, inputs, log, cost, first=False), self._pool, folder)
    model = abstract_model(without_kernels(config.proxies.model), self._pool.vocab_size, self._pool.length)
    self._scorer = DirectionalScores(model, self._output_fn, config.seed, self._steps.mesh)

  def __call__(self, task: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """float32 [B, L]: what each token of each row adds to the row's score for `task`; nothing for the first.

    They sum up to the score as it is before features are rounded for the store; and, where only proxies speak that did
    not see the row, before a row that all saw is brought to the level of the others.
    """
    said, rows_B = self._datamodel.semantics, np.asarray(rows, np.int64)
    with np.load(self._datamodel.path / SOLUTION, allow_pickle=False) as arrays:
      u_CJ = arrays[f'u_{task}_CJ']
      q_B = arrays['q_N'][rows_B] if 'q_N' in arrays else np.ones(len(rows_B))
    if said['gram'] == 'joint':  # one datamodel, whose scores are sums over checkpoints
      weight_CB = np.ones((len(u_CJ), len(rows_B)))
    else:
      proxies = self._config.proxies
      seen_PB = seen(self._proxies, proxies.count, self._pool.num_rows)[:, rows_B]
      weight_CB = ensemble.weights(np.repeat(seen_PB, proxies.checkpoints, axis=0), said['average'][task])
    total_BL = np.zeros((len(rows_B), self._pool.length))
    tokens_BL = self._pool.tokens(rows_B)
    for checkpoint, (u_J, weight_B) in enumerate(zip(u_CJ, weight_CB, strict=True)):
      scale = max(float(np.abs(u_J).max()), np.finfo(np.float64).tiny)  # float32 stays far from its limits
      share_BL = self._of_checkpoint(checkpoint, (u_J / scale).astype(np.float32), tokens_BL)
      total_BL[:, 1:] += share_BL * scale * (weight_B * q_B)[:, None]
    return total_BL.astype(np.float32)

  def _of_checkpoint(self, checkpoint: int, u_J: np.ndarray, tokens_NL: np.ndarray) -> np.ndarray:
    """Shares [N, L−1] of tokens 1…L−1."""
    step, size = self._steps.step, self._steps.batch_size
    params, moment = self._steps.weights(checkpoint)
    if isinstance(step, TwoSidedFeatures):
      prepared = params, _direction(step, self._steps.prepare(checkpoint)[0], params, u_J)
      prepared = jax.device_put(prepared, partition.shardings(prepared, self._steps.mesh))
    else:
      prepared = self._scorer.prepare(params, u_J[:, None], checkpoint, moment)
    weights_BL = np.ones((size, self._pool.length), np.float32)
    weights_BL[:, 0] = 0
    parts = [np.zeros((0, self._pool.length - 1))]
    for start in range(0, len(tokens_NL), size):
      tokens_BL = tokens_NL[start : start + size]
      filled_BL = np.pad(tokens_BL, [(0, size - len(tokens_BL)), (0, 0)])
      placed = place((filled_BL, weights_BL), batch_sharding(self._steps.mesh))
      parts.append(fetch(self._scorer(prepared, *placed))[: len(tokens_BL), :, 0])
    return np.concatenate(parts)


_SECTIONS = ('seed', 'features', 'proxies')


def _shares(output_fn: str) -> Callable[..., jax.Array]:
  try:
    return load_callable(f'{output_fn}_shares')
  except UserError as error:
    name = output_fn.partition(':')[2]
    raise UserError(
      f'scores of tokens need what each token adds to {output_fn}: write a function {name}_shares beside it, '
      '(logits_LV, tokens_L, weights_L) → shares of tokens 1…L−1 that sum up to it'
    ) from error


def _direction(step: TwoSidedFeatures, prepared: nnx.State, params: nnx.State, u_J: np.ndarray) -> Any:
  """A U Bᵀ of each probed kernel and zeros, float32 [1, *parameter shape], a pytree like `params`."""
  sides = {'/'.join(map(str, path)): value[...] for path, value in nnx.to_flat_state(prepared)}
  kernels = {}
  for layer in step.layers:
    u = u_J[layer.start : layer.stop].reshape(*layer.stack, layer.a, layer.b)
    a, b = sides[f'{layer.path}/input_projection'], sides[f'{layer.path}/output_projection']
    kernels[f'{layer.path}/kernel'] = jnp.einsum('...ia,...ab,...ob->...io', a, jnp.asarray(u), b)

  def one(path: Any, x: jax.Array) -> jax.Array:
    kernel = kernels.get(partition.path_name(path))
    return jnp.zeros((1, *x.shape), jnp.float32) if kernel is None else kernel[None]

  return jax.tree_util.tree_map_with_path(one, params)

"""Stage `datamodel`: features → scores of every row for every target and for their mix."""

import numpy as np
import scipy.stats

from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.features import Features
from dsdm_jax.core import atomic
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.stage import Context
from dsdm_jax.data.targets import Targets

MIX = 'mix'


def run(context: Context) -> dict:
  """Leaves `scores.npz` (`score_<task>_N`, `score_<task>_CN`, `score_mix_N`) and `report.json`."""
  config = context.config
  features, targets = Features(context.inputs['features']), Targets(context.inputs['targets'])
  by_checkpoint, spectra = [], []
  passes = 2 * features.rows * features.checkpoints
  with context.log.bar(total=passes, desc='datamodel', unit='row') as bar:
    for checkpoint in range(features.checkpoints):
      store = features.pool(checkpoint)
      gram_JJ = datamodel.gram(store, bar.update)
      mean_TJ = np.stack([features.target(t, checkpoint).mean(axis=0, dtype=np.float64) for t in targets.tasks])
      u_JT = datamodel.solve(gram_JJ, mean_TJ, config.datamodel.damping)
      by_checkpoint.append(datamodel.scores(store, u_JT, bar.update))
      spectra.append(datamodel.spectrum(gram_JJ))
      context.add_flop(_flop(features.rows, features.dimension, len(targets.tasks)))
  score_CNT = np.stack(by_checkpoint)
  seen_CN = _seen(context.inputs['proxies'], features)
  arrays = {}
  for i, task in enumerate(targets.tasks):
    arrays[f'score_{task}_CN'] = score_CNT[:, :, i]
    arrays[f'score_{task}_N'] = score_CNT[:, :, i].mean(axis=0)
  tasks_TN = np.stack([arrays[f'score_{t}_N'] for t in targets.tasks])
  arrays[f'score_{MIX}_N'] = mix(tasks_TN, config.datamodel.mix)
  atomic.save_npz(context.out / 'scores.npz', **arrays)
  report = {
    'spectrum': spectra,
    'damping': config.datamodel.damping,
    'tasks': list(targets.tasks),
    'subset_effect': {t: _subset_effect(arrays[f'score_{t}_CN'], seen_CN) for t in targets.tasks},
    'checkpoint_agreement': {t: _agreement(arrays[f'score_{t}_CN']) for t in targets.tasks},
  }
  atomic.write_json(context.out / 'report.json', report)
  return {
    'sign': 'higher: training on the row raises the output function of the target',
    'output_fn': context.inputs['features'].settings['features.output_fn'],
    'scale': 'invariant to the scale of features; mean over proxies',
    'q': 'none',
    'damping': config.datamodel.damping,
    'mix': config.datamodel.mix,
    'tasks': list(targets.tasks),
  }


def mix(score_TN: np.ndarray, rule: str) -> np.ndarray:
  """One score per row out of one per task: plain mean (paper), mean of z-scores, or mean of ranks in [0, 1]."""
  if rule == 'zscore':
    spread = score_TN.std(axis=1, keepdims=True)
    score_TN = (score_TN - score_TN.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
  elif rule == 'rank':
    score_TN = (scipy.stats.rankdata(score_TN, axis=1) - 1) / max(score_TN.shape[1] - 1, 1)
  return score_TN.mean(axis=0).astype(np.float32)


def _flop(rows: int, dimension: int, targets: int) -> float:
  """Gram, Cholesky with its eigenvalues, and the two passes of scores."""
  return 2.0 * rows * dimension**2 + dimension**3 * (1 / 3 + 4 / 3) + 2.0 * rows * dimension * targets


def _seen(proxies: Artifact, features: Features) -> np.ndarray:
  """Whether proxy c trained on row n, bool [C, N]."""
  seen_CN = np.zeros((features.checkpoints, features.rows), bool)
  for checkpoint in range(features.checkpoints):
    seen_CN[checkpoint, np.load(proxies.path / f'subset_{checkpoint}.npy', allow_pickle=False)] = True
  return seen_CN


def _subset_effect(score_CN: np.ndarray, seen_CN: np.ndarray) -> dict[str, float]:
  """Mean score of rows that a proxy trained on, and of the others, in standard deviations of its scores."""
  z_CN = (score_CN - score_CN.mean(axis=1, keepdims=True)) / np.maximum(score_CN.std(axis=1, keepdims=True), 1e-30)
  inside, outside = z_CN[seen_CN], z_CN[~seen_CN]
  return {
    'inside_mean_sd': float(inside.mean()) if inside.size else 0.0,
    'outside_mean_sd': float(outside.mean()) if outside.size else 0.0,
  }


def _agreement(score_CN: np.ndarray) -> float:
  """Mean Spearman correlation between the scores of two proxies; 1 if there is only one."""
  count = len(score_CN)
  pairs = [(i, j) for i in range(count) for j in range(i)]
  values = [scipy.stats.spearmanr(score_CN[i], score_CN[j]).statistic for i, j in pairs]
  return float(np.mean(values)) if values else 1.0


class Scores:
  """A finished datamodel stage, opened for reading."""

  def __init__(self, artifact: Artifact):
    with np.load(artifact.path / 'scores.npz', allow_pickle=False) as arrays:
      self._arrays = dict(arrays)
    self.tasks = tuple(artifact.semantics['tasks'])
    self._rule = artifact.semantics['mix']

  def score_N(self, target: str) -> np.ndarray:
    """Score of each row for a task, for 'mix' (all tasks), or for tasks joined by '+'; float32, higher is better."""
    if '+' not in target:
      return self._arrays[f'score_{target}_N']
    return mix(np.stack([self._arrays[f'score_{t}_N'] for t in target.split('+')]), self._rule)

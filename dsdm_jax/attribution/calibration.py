"""What a score is worth: log-likelihood on the target for training budget spent on a row.

The bank of `--stage=validation` has models trained on many subsets of its rows. If scores s are right up to a scale b,
a target's log-likelihood after training on a subset S of N rows is c + b · Σ_{n∈S} s(n), with another c for each family
of subsets. The least-squares b over all families says what a score is worth: a row that has the whole weight of 1 % of
the budget, 0.01 · N, and not that of an average row, adds b · 0.01 · N · (s − mean s) nats per token.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.core import prng, storage
from dsdm_jax.core.artifacts import Artifact

FILE = 'bank.npz'  # of the validation stage
SHARE = 0.01  # of the training budget
_RESAMPLES = 1_000
_ARRAYS = 'row_N', 'family_S', 'weight_SN', 'truth_SK'


@dataclasses.dataclass(frozen=True)
class Bank:
  """Subsets of some rows of a pool, and what models trained on them reached.

  Attributes:
    row_N: int, these rows in the pool.
    family_S: name of each subset's family.
    weight_SN: bool, which of them it has.
    truth_SK: mean log-likelihood of each task in nats per token, over seeds and examples.
    tasks: K names.
  """

  row_N: np.ndarray
  family_S: np.ndarray
  weight_SN: np.ndarray
  truth_SK: np.ndarray
  tasks: tuple[str, ...]

  def save(self, folder: storage.Location) -> None:
    arrays = {name: getattr(self, name) for name in _ARRAYS}
    storage.save_npz(folder / FILE, **arrays, tasks=np.array(self.tasks))

  @classmethod
  def load(cls, artifact: Artifact) -> 'Bank | None':
    """The bank of a finished validation; None if it is of a version without one."""
    if FILE not in artifact.manifest['files']:
      return None
    with storage.load(artifact.path / FILE) as arrays:
      if not {*_ARRAYS} <= {*arrays.files}:
        return None
      return cls(**{name: arrays[name] for name in _ARRAYS}, tasks=tuple(arrays['tasks'].tolist()))

  def worth(self, score_N: np.ndarray, tasks: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Nats per token on the mean of `tasks` for 1 % of the budget and a score higher by 1.

    Args:
      score_N: one score per row of the pool; those of the bank's rows count, and none of them is NaN.
      tasks: names.
      seed: of the bootstrap over subsets of each family.

    Returns:
      `nats_per_token`; `error`, its standard error over subsets; `families`, the same number from each family alone.
      None where subsets do not differ in score.
    """
    truth_S = self.truth_SK[:, [self.tasks.index(task) for task in tasks]].mean(axis=1)
    # A score of 1 and the weight 0.01 · N would add 1 to this prediction.
    predicted_S = self.weight_SN @ score_N[self.row_N].astype(np.float64) / (SHARE * len(self.row_N))
    families = {str(name): np.flatnonzero(self.family_S == name) for name in np.unique(self.family_S)}
    rng = prng.numpy_stream(seed, 'validation', 'calibration')
    drawn = [rng.integers(len(at), size=(_RESAMPLES, len(at))) for at in families.values()]
    whole = [_moments(predicted_S[at][None], truth_S[at][None]) for at in families.values()]
    resampled = [
      _moments(predicted_S[at][draw], truth_S[at][draw]) for at, draw in zip(families.values(), drawn, strict=True)
    ]
    slope, slope_R = (_slope(np.sum(moments, axis=0)) for moments in (whole, resampled))
    known_R = slope_R[np.isfinite(slope_R)]
    return {
      'nats_per_token': _or_none(slope[0]),
      'error': float(known_R.std(ddof=1)) if len(known_R) > 1 else None,
      'families': {name: _or_none(_slope(m)[0]) for name, m in zip(families, whole, strict=True)},
    }


def _moments(x_RS: np.ndarray, y_RS: np.ndarray) -> np.ndarray:
  """Sums of products of deviations from the family's mean: [Σxy, Σxx] for each resample, [2, R]."""
  x_RS, y_RS = (z - z.mean(axis=1, keepdims=True) for z in (x_RS, y_RS))
  return np.stack([(x_RS * y_RS).sum(axis=1), (x_RS * x_RS).sum(axis=1)])


def _slope(moments_2R: np.ndarray) -> np.ndarray:
  least = np.finfo(np.float64).tiny
  return np.where(moments_2R[1] > least, moments_2R[0] / np.maximum(moments_2R[1], least), np.nan)


def _or_none(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


def describe(validation: Artifact | None, scores: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> dict[str, Any]:
  """What exports say about the scale of scores.

  Args:
    validation: of the run, if it is finished.
    scores: target → (score_N, its tasks).
  """
  bank = None if validation is None else Bank.load(validation)
  if bank is None:
    return {'calibration': 'not calibrated: the run has no validation (--stage=validation)'}
  text = (
    f'nats per token on the target for each {SHARE:.0%} of the training budget spent on a row, and each unit of its '
    f'score above the mean; from {len(bank.weight_SN)} subsets of {len(bank.row_N)} rows'
  )
  known = {name: of for name, of in scores.items() if set(of[1]) <= {*bank.tasks}}
  if any(np.isnan(score_N[bank.row_N]).any() for score_N, _ in known.values()):
    return {'calibration': 'not calibrated: a prefilter left rows of the validation without scores'}
  worth = {name: bank.worth(score_N, tasks) for name, (score_N, tasks) in known.items()}
  return {'calibration': {'unit': text, 'targets': worth}}

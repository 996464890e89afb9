"""Scores of several checkpoints into one: which proxies speak for a row, and how far they agree.

A proxy memorises its own subset: gradients of rows that it trained on are smaller, and their scores may be shifted.
Averaging only over proxies that did not see a row removes that.
"""

import dataclasses

import numpy as np
import scipy.stats

ALL, UNSEEN, AUTO = 'all', 'unseen', 'auto'
# Inside and outside means that differ by more than this many standard deviations of the scores call for UNSEEN.
_SHIFT = 0.1


def weights(seen_CN: np.ndarray, average: str) -> np.ndarray:
  """Weight of each checkpoint in the score of each row, float64 [C, N]; they sum to one over checkpoints.

  Args:
    seen_CN: whether proxy c trained on row n.
    average: 'all', or 'unseen' for the proxies that did not see the row. A row that all of them saw takes all.
  """
  use_CN = np.ones(seen_CN.shape) if average == ALL else (~seen_CN).astype(np.float64)
  use_CN[:, use_CN.sum(axis=0) == 0] = 1
  return use_CN / use_CN.sum(axis=0, keepdims=True)


@dataclasses.dataclass
class SubsetEffect:
  """Running means of scores inside and outside of the proxies' subsets, for K columns of scores.

  Attributes:
    count, total, square: over (inside, outside) first, [2, C], [2, C, K], [2, C, K].
  """

  count: np.ndarray
  total: np.ndarray
  square: np.ndarray

  @classmethod
  def empty(cls, checkpoints: int, columns: int) -> 'SubsetEffect':
    shape = (2, checkpoints, columns)
    return cls(np.zeros(shape[:2]), np.zeros(shape), np.zeros(shape))

  def add(self, score_CBK: np.ndarray, seen_CB: np.ndarray) -> None:
    score_CBK = score_CBK.astype(np.float64)
    for side, mask_CB in enumerate((seen_CB, ~seen_CB)):
      self.count[side] += mask_CB.sum(axis=1)
      self.total[side] += np.einsum('cb,cbk->ck', mask_CB, score_CBK)
      self.square[side] += np.einsum('cb,cbk->ck', mask_CB, np.square(score_CBK))

  @property
  def difference_CK(self) -> np.ndarray:
    """Mean inside minus mean outside; 0 for a checkpoint that saw everything or nothing."""
    both_C = self.count.min(axis=0) > 0
    mean = self.total / np.maximum(self.count, 1)[:, :, None]
    return np.where(both_C[:, None], mean[0] - mean[1], 0.0)

  @property
  def deviation_CK(self) -> np.ndarray:
    """Standard deviation over all rows."""
    count_C1 = self.count.sum(axis=0)[:, None]
    mean_CK = self.total.sum(axis=0) / count_C1
    return np.sqrt(np.maximum(self.square.sum(axis=0) / count_C1 - mean_CK**2, 0))

  def describe(self, column: int, each: int = 1) -> dict[str, float]:
    """Inside and outside means of one column, in standard deviations of the scores, over checkpoints.

    `shift_sd` is their difference, `shift_error_sd` its standard error if rows are independent, and `each` checkpoints
    of one proxy say no more than one.
    """
    deviation_C = np.maximum(self.deviation_CK[:, column], 1e-300)
    middle_C = self.total.sum(axis=0)[:, column] / self.count.sum(axis=0)
    rows = np.maximum(self.count.sum(axis=1), 1)
    sides = [
      float(((self.total[s, :, column] - middle_C * self.count[s]) / deviation_C).sum() / rows[s]) for s in (0, 1)
    ]
    return {
      'inside_mean_sd': sides[0],
      'outside_mean_sd': sides[1],
      'shift_sd': sides[0] - sides[1],
      'shift_error_sd': float(np.sqrt((each / rows).sum())),
    }


def choose(average: str, effect: dict[str, float]) -> str:
  """What `auto` comes to: 'unseen' where the shift is above 0.1 sd and twice its standard error, otherwise 'all'."""
  if average != AUTO:
    return average
  shift = abs(effect['shift_sd'])
  return UNSEEN if shift > _SHIFT and shift > 2 * effect['shift_error_sd'] else ALL


def level(score_NK: np.ndarray, seen_CN: np.ndarray, difference_CK: np.ndarray) -> np.ndarray:
  """`unseen` scores with rows that every proxy saw brought to the level of the others.

  Those rows have only inside scores; what inside scores are shifted by, on average, is taken off. In place.
  """
  score_NK[seen_CN.all(axis=0)] -= difference_CK.mean(axis=0).astype(score_NK.dtype)
  return score_NK


def by_proxy(score_CN: np.ndarray, each: int) -> np.ndarray:
  """score_PN: means over the `each` checkpoints of one proxy, which stand one after the other."""
  return score_CN.reshape(-1, each, score_CN.shape[1]).mean(axis=1)


def agreement(score_PN: np.ndarray) -> float:
  """Mean Spearman correlation between the scores of two proxies; 1 if there is only one."""
  count = len(score_PN)
  pairs = [(i, j) for i in range(count) for j in range(i)]
  values = [scipy.stats.spearmanr(score_PN[i], score_PN[j]).statistic for i, j in pairs]
  return float(np.mean(values)) if values else 1.0

"""What of the target examples is scored: their mean, groups, single ones, and resamples, each a column of one matmul.

A score is linear in the target's feature, so any weighting of the examples costs a column of u and no pass of its own.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.stats

from dsdm_jax.core import prng

# Shares of the pool at which the stability of a selection is told.
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)


@dataclasses.dataclass(frozen=True)
class Columns:
  """Weightings of one task's examples.

  Attributes:
    weight_KT: float64; row 0 is the mean of all, then come the groups, the first examples one by one, the resamples.
      Each row sums to 1.
    group_T: int32, the group of each example.
    clusters: documents that the examples come from; the examples themselves where no documents are known.
    groups, resamples, examples: how many rows of each kind.
  """

  weight_KT: np.ndarray
  group_T: np.ndarray
  clusters: int
  groups: int
  resamples: int
  examples: int = 0

  @property
  def group_rows(self) -> slice:
    return slice(1, 1 + self.groups)

  @property
  def example_rows(self) -> slice:
    return slice(1 + self.groups, 1 + self.groups + self.examples)

  @property
  def resample_rows(self) -> slice:
    return slice(1 + self.groups + self.examples, 1 + self.groups + self.examples + self.resamples)


def make(documents: Sequence[str], groups: int, resamples: int, seed: int, task: str, examples: int = 0) -> Columns:
  """Columns for examples of `documents`.

  Examples of one document are not independent: they share a group, and resamples draw documents, with replacement.
  Where all examples name the same document, which says nothing, each is taken for a document of its own.

  Args:
    documents: of each example, in order.
    groups: wished for; at most one a document.
    resamples: bootstrap replicates; none where there is only one document, since nothing is known of the spread then.
    seed: of the groups and of the resamples.
    task: names their random streams.
    examples: the first so many examples are scored one by one as well; at most all.
  """
  names, cluster_T = np.unique(np.asarray(documents), return_inverse=True)
  if len(names) == 1:
    cluster_T = np.arange(len(documents))
  clusters = int(cluster_T.max()) + 1
  count = len(cluster_T)
  groups = min(groups, clusters)
  order = prng.numpy_stream(seed, 'datamodel', 'groups', task).permutation(clusters)
  group_T = (order % groups)[cluster_T].astype(np.int32)
  resamples = resamples if clusters > 1 else 0
  rng = prng.numpy_stream(seed, 'datamodel', 'bootstrap', task)
  drawn_RM = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
  examples = min(examples, count)
  group_GT = group_T[None] == np.arange(groups)[:, None]
  weight_KT = np.concatenate([np.ones((1, count)), group_GT, np.eye(examples, count), drawn_RM[:, cluster_T]])
  weight_KT = weight_KT / weight_KT.sum(axis=1, keepdims=True)
  return Columns(weight_KT, group_T, clusters, groups, resamples, examples)


def half_width(clusters: int, confidence: float) -> float:
  """How many standard errors an interval reaches to either side: Student's t with clusters − 1 degrees of freedom."""
  return float(scipy.stats.t.ppf(0.5 + confidence / 2, max(clusters - 1, 1)))


def overlap(a_N: np.ndarray, b_N: np.ndarray, count: int) -> float:
  """Share of the `count` highest of `a_N` that are also among the `count` highest of `b_N`; ties go to lower rows."""
  first, second = (np.argsort(-x, kind='stable')[:count] for x in (a_N, b_N))
  return len(np.intersect1d(first, second)) / count


def stability(score_N: np.ndarray, replicate_RN: np.ndarray) -> dict[str, float]:
  """For each share of the rows: the mean overlap of the top rows by `score_N` with those by each replicate."""
  found = {}
  for share in SHARES:
    count = round(share * len(score_N))
    if count and len(replicate_RN):
      found[f'{share:g}'] = float(np.mean([overlap(score_N, r_N, count) for r_N in replicate_RN]))
  return found

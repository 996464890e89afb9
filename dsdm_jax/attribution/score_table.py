"""All scores of one pass over the features: means over checkpoints, groups, standard errors, stability."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from dsdm_jax.attribution import datamodel, ensemble, target_weights
from dsdm_jax.attribution.accumulators import Partials
from dsdm_jax.attribution.datamodel import Progress, RowSource
from dsdm_jax.attribution.target_weights import Columns

# Rows on which the stability of selections is measured: a fixed stride over the pool, whose rows are in random order.
_SAMPLE = 65_536
_PEAKS = 20  # rows at either end that are kept of a single example's scores


def mix(score_TN: np.ndarray, rule: str) -> np.ndarray:
  """One score per row out of one per task: plain mean (paper), mean of z-scores, or mean of ranks in [0, 1]."""
  if rule == 'zscore':
    spread = score_TN.std(axis=1, keepdims=True)
    score_TN = (score_TN - score_TN.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
  elif rule == 'rank':
    score_TN = (scipy.stats.rankdata(score_TN, axis=1) - 1) / max(score_TN.shape[1] - 1, 1)
  return score_TN.mean(axis=0).astype(np.float32)


def mix_error(error_TN: np.ndarray, score_TN: np.ndarray, rule: str) -> np.ndarray | None:
  """Standard error of the mixed score, tasks' examples being independent; None for ranks, which are not linear."""
  if rule == 'rank':
    return None
  spread = score_TN.std(axis=1, keepdims=True) if rule == 'zscore' else np.ones((len(score_TN), 1))
  scaled_TN = error_TN / np.where(spread > 0, spread, 1)
  return (np.sqrt(np.square(scaled_TN).sum(axis=0)) / len(score_TN)).astype(np.float32)


@dataclasses.dataclass
class Task:
  """Scores of one task, float32.

  Attributes:
    by_member_CN: of each datamodel of the ensemble.
    by_proxy_PN: the same, averaged over the checkpoints of each proxy; of the joint datamodel alone, where it is one.
    groups_NG: of groups of its examples, averaged over members.
    examples_NE: of its first examples one by one, averaged over members.
    score_N: of all its examples.
    error_N: standard error of score_N over the documents of its examples; zeros where there are no resamples.
    sample_SR: scores by each resample, of a sample of the rows.
    average: what was averaged over, 'all' or 'unseen'.
    subset_effect: means of rows inside and outside of the proxies' subsets; None where there is one joint member.
  """

  by_member_CN: np.ndarray
  by_proxy_PN: np.ndarray
  groups_NG: np.ndarray
  examples_NE: np.ndarray
  score_N: np.ndarray
  error_N: np.ndarray
  sample_SR: np.ndarray
  average: str
  subset_effect: dict[str, float] | None

  def multiply(self, q_N: np.ndarray, sample_S: np.ndarray) -> None:
    """Multiplies each score of row n by q(n), in place."""
    for array in (self.by_member_CN, self.by_proxy_PN, self.score_N, self.error_N):
      array *= q_N
    self.groups_NG *= q_N[:, None]
    self.examples_NE *= q_N[:, None]
    self.sample_SR *= q_N[sample_S][:, None]


@dataclasses.dataclass
class _Averages:
  """One way to average over members, filled shard by shard: mean and groups [N, tasks, …], errors, sample."""

  weight_CN: np.ndarray
  kept_NK: np.ndarray
  error_NT: np.ndarray
  sample_SK: np.ndarray


def sample_rows(rows: int) -> np.ndarray:
  return np.arange(0, rows, -(-rows // _SAMPLE))


def make(
  sources: Sequence[RowSource],
  u: Sequence[np.ndarray],
  table: Sequence[Columns],
  seen_PN: np.ndarray,
  average: str,
  progress: Progress,
  partials: Partials,
  each: int = 1,
) -> list[Task]:
  """Scores all rows for all columns of all tasks in one pass.

  Args:
    sources: features of the pool, of each member.
    u: u_JK of each member, for the columns of all tasks in order.
    table: the columns.
    seen_PN: whether proxy p trained on row n; not asked where there is one joint member.
    average: 'all', 'unseen' or 'auto'.
    progress: told the rows of each shard, once for each member.
    partials: keep the scores of shards, and those that an earlier attempt kept are not made anew.
    each: members of one proxy, one after the other.
  """
  rows, members = sources[0].rows, len(sources)
  joint = members < each * len(seen_PN)
  if joint:  # there is no proxy to leave out
    seen_PN, average, each = np.zeros((members, rows), bool), ensemble.ALL, 1
  seen_CN = np.repeat(seen_PN, each, axis=0)
  first = np.cumsum([0, *(len(c.weight_KT) for c in table)])
  kept = np.concatenate([np.arange(f, f + c.resample_rows.start) for f, c in zip(first, table, strict=False)])
  resampled = [np.arange(f + c.resample_rows.start, f + len(c.weight_KT)) for f, c in zip(first, table, strict=False)]
  sample_S = sample_rows(rows)
  score_CNT = np.empty((members, rows, len(table)), np.float32)
  effect = ensemble.SubsetEffect.empty(members, int(first[-1]))
  modes = {
    mode: _Averages(
      ensemble.weights(seen_CN, mode), np.empty((rows, len(kept)), np.float32),
      np.zeros((rows, len(table)), np.float32), np.empty((len(sample_S), int(first[-1])), np.float32),
    )
    for mode in ((ensemble.ALL, ensemble.UNSEEN) if average == ensemble.AUTO else (average,))
  }  # fmt: skip
  passes = [
    partials.kept(f'scores_{number}', functools.partial(datamodel.score_shards, source, u_JK))
    for number, (source, u_JK) in enumerate(zip(sources, u, strict=True))
  ]
  for shards in zip(*passes, strict=True):
    start, stop, _ = shards[0]
    score_CBK = np.stack([score_BK for _, _, score_BK in shards])
    score_CNT[:, start:stop] = score_CBK[:, :, first[:-1]]
    effect.add(score_CBK, seen_CN[:, start:stop])
    inside_S = (sample_S >= start) & (sample_S < stop)
    for mode in modes.values():
      mean_BK = np.einsum('cbk,cb->bk', score_CBK, mode.weight_CN[:, start:stop], optimize=True)
      mode.kept_NK[start:stop] = mean_BK[:, kept]
      mode.sample_SK[inside_S] = mean_BK[sample_S[inside_S] - start]
      for task, at in enumerate(resampled):
        if len(at) > 1:
          mode.error_NT[start:stop, task] = mean_BK[:, at].std(axis=1, ddof=1)
    progress((stop - start) * members)
  if ensemble.UNSEEN in modes:
    mode = modes[ensemble.UNSEEN]
    ensemble.level(mode.kept_NK, seen_CN, effect.difference_CK[:, kept])
    ensemble.level(mode.sample_SK, seen_CN[:, sample_S], effect.difference_CK)
  tasks = []
  begin = 0
  for index, c in enumerate(table):
    described = effect.describe(int(first[index]), each)
    taken = ensemble.choose(average, described)
    mode, end = modes[taken], begin + c.resample_rows.start
    kept_NK, score_CN = mode.kept_NK[:, begin:end], score_CNT[:, :, index].copy()
    tasks.append(Task(
      score_CN, ensemble.by_proxy(score_CN, each), kept_NK[:, c.group_rows].copy(), kept_NK[:, c.example_rows].copy(),
      kept_NK[:, 0].copy(), mode.error_NT[:, index].copy(), mode.sample_SK[:, resampled[index]].copy(), taken,
      None if joint else described,
    ))  # fmt: skip
    begin = end
  return tasks


def arrays(names: Sequence[str], tasks: Sequence[Task], table: Sequence[Columns], rule: str) -> dict[str, np.ndarray]:
  """What `scores.npz` holds."""
  found: dict[str, np.ndarray] = {}
  for name, task, c in zip(names, tasks, table, strict=True):
    found[f'score_{name}_N'] = task.score_N
    found[f'score_{name}_CN'] = task.by_member_CN
    found[f'groups_{name}_NG'] = task.groups_NG
    found[f'group_{name}_T'] = c.group_T
    if c.examples:
      rows_EM, score_EM = peaks(task.examples_NE)
      found[f'example_rows_{name}_EM'], found[f'example_score_{name}_EM'] = rows_EM, score_EM
    if c.resamples > 1:
      found[f'error_{name}_N'] = task.error_N
    if len(task.by_proxy_PN) > 1:
      found[f'spread_{name}_N'] = task.by_proxy_PN.std(axis=0, ddof=1)
  score_TN = np.stack([task.score_N for task in tasks])
  found['score_mix_N'] = mix(score_TN, rule)
  error_N = mix_error(np.stack([task.error_N for task in tasks]), score_TN, rule)
  if error_N is not None and all(c.resamples > 1 for c in table):
    found['error_mix_N'] = error_N
  return found


def peaks(examples_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows with the highest, then with the lowest scores for each example, and these scores.

  Returns:
    rows_EM: int64, at most `_PEAKS` of the highest, best first, then as many of the lowest, lowest first. Equal scores:
      the lower row first.
    score_EM: float32, in standard deviations of the example's own scores from their mean.
  """
  rows, scores = [], []
  for score_N in examples_NE.T.astype(np.float64):
    score_N = score_N - score_N.mean()
    score_N /= score_N.std() or 1.0
    count = min(_PEAKS, len(score_N) // 2)
    ends_M = np.concatenate([_first(-score_N, count), _first(score_N, count)])
    rows.append(ends_M)
    scores.append(score_N[ends_M].astype(np.float32))
  return np.stack(rows), np.stack(scores)


def _first(key_N: np.ndarray, count: int) -> np.ndarray:
  """The `count` rows of the lowest keys, in order, lower rows first among equals."""
  if not count:
    return np.zeros(0, np.int64)
  near = np.flatnonzero(key_N <= np.partition(key_N, count - 1)[count - 1])
  return near[np.argsort(key_N[near], kind='stable')][:count]


def report(names: Sequence[str], tasks: Sequence[Task], rule: str) -> dict[str, Any]:
  """Effects of subsets, agreement of proxies, stability of selections, of each task and of the mix."""
  sample_S = sample_rows(len(tasks[0].score_N))
  score_TS = np.stack([task.score_N[sample_S] for task in tasks])
  stable = {n: target_weights.stability(s, t.sample_SR.T) for n, s, t in zip(names, score_TS, tasks, strict=True)}
  resamples = min(t.sample_SR.shape[1] for t in tasks)
  mixed_RS = [mix(np.stack([t.sample_SR[:, r] for t in tasks]), rule) for r in range(resamples)]
  stable['mix'] = target_weights.stability(mix(score_TS, rule), np.array(mixed_RS))
  return {
    'subset_effect': {n: t.subset_effect for n, t in zip(names, tasks, strict=True)},
    'average': {n: t.average for n, t in zip(names, tasks, strict=True)},
    'checkpoint_agreement': {n: ensemble.agreement(t.by_proxy_PN) for n, t in zip(names, tasks, strict=True)},
    'top_overlap_over_targets': stable,
  }

"""Stage `datamodel`: features → scores of every row for every target and for their mix; and their reader.

A proxy memorises its own subset: gradients of rows that it trained on are smaller, and their scores may be shifted.
Averaging only over proxies that did not train on a row ('unseen') removes that.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from dsdm_jax.attribution import damping, datamodel, solve
from dsdm_jax.attribution.accumulators import Accumulator, Progress
from dsdm_jax.attribution.extractor import ProxyOutputs, step_rows
from dsdm_jax.attribution.solve import Solved, TargetWeights
from dsdm_jax.attribution.store import Features
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.progress import Bar
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.errors import UserError
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import trainer

SOLUTION = 'solution.npz'  # u_<task>_CJ of each task, and q_N if scores are multiplied by it
ALL, UNSEEN, AUTO = 'all', 'unseen', 'auto'  # which proxies the score of a row is averaged over
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)  # of the pool, at which the overlap of two selections is measured
_SHIFT = 0.1  # 'auto' is 'unseen' if inside and outside means differ by more than this many standard deviations
_SAMPLE = 65_536  # rows on which stability is measured: a fixed stride over the pool, whose order is random
_PEAKS = 20  # rows at either end that are saved of a single example's scores


def run(context: Context) -> dict:
  """Writes `scores.npz`, `report.json` and `solution.npz`; `docs/datamodel.md` lists their arrays and numbers."""
  config, options = context.config, context.config.datamodel
  features, targets = Features(context.inputs['features'], context), Targets(context.inputs['targets'])
  names, examples = targets.tasks, [targets.examples(task, 'target') for task in targets.tasks]
  weights = [
    TargetWeights.of_documents(
      [r['document'] for r in e.records], options.groups, options.bootstrap, config.seed, name, options.examples
    )
    for name, e in zip(names, examples, strict=True)
  ]
  accumulator, mesh, proxies = Accumulator(context.out, context.cost.save), make_mesh(config.mesh), config.proxies
  by_ekfac = features.semantics['projection'] == 'ekfac'
  seen_PN, q_N = seen(context.inputs['proxies'], proxies.count, features.rows), None
  passes = (1 if options.gram == 'joint' else features.checkpoints) * (1 if by_ekfac else 2)
  passes += proxies.count if options.q else 0
  context.log.describe(f'{len(names)} targets × {features.rows:,} rows')
  with context.log.bar(total=passes * features.rows, unit='row') as bar:
    held_out = None
    if options.damping_rule == 'auto':
      forward, states = _proxies(context)
      outputs = [[forward.of_examples(state, e.tokens_TL, e.weights_TL) for e in examples] for state in states]
      context.add_flop(forward.flop)
      held_out = solve.HeldOutProxies(seen_PN, [np.stack(task) for task in zip(*outputs, strict=True)])
    if by_ekfac:
      solved = solve.by_ekfac(features, context, examples, weights, options.damping)
    else:
      mode, members = solve.open_members(features, names, options.gram, options.unit_norm)
      solved = solve.solve(mode, members, weights, options, mesh, bar.update, accumulator, held_out)
    tasks = score_tasks(solved, weights, seen_PN, options.average, bar.update, accumulator)
    if options.q:
      q_N = 1 - _mean_probability(context, bar)
      for task in tasks:
        task.multiply(q_N, sample_rows(features.rows))
  # Gram, solves, and the pass of scores
  for member, solution in () if by_ekfac else zip(solved.members, solved.solutions, strict=True):
    sizes, rows = [stop - start for start, stop in member.blocks], member.source.rows
    solves = 1 if solved.choice is None else len(damping.FACTORS)
    context.add_flop(
      sum(2.0 * rows * size**2 + solves * size**3 / 3 for size in sizes)
      + 2.0 * rows * member.source.dimension * solution.u_JK.shape[1]
    )
  for name, task in zip(names, tasks, strict=True):
    _check(name, task.score_N)

  report = {
    'subset_effect': {n: t.subset_effect for n, t in zip(names, tasks, strict=True)},
    'average': {n: t.average for n, t in zip(names, tasks, strict=True)},
    'checkpoint_agreement': {n: agreement(t.by_proxy_PN) for n, t in zip(names, tasks, strict=True)},
    'top_overlap_over_targets': _stability(names, tasks, options.mix),
    'tasks': list(names),
    'spectrum': solved.spectra,
    'condition': [list(s.condition) for s in solved.solutions],
    'damping': solved.damping,
    'damping_choice': None if solved.choice is None else solved.choice.as_json(),
  }
  first = np.cumsum([0, *(len(w.weight_KT) for w in weights)])
  if solved.norm_CK is not None:  # scores along one direction, Σ_t v_t/√(ḡᵀPḡ), order rows as the mix of z-scores does
    scaled = [
      t.by_member_CN / np.maximum(n_C, 1e-300)[:, None]
      for t, n_C in zip(tasks, solved.norm_CK.T[first[:-1]], strict=True)
    ]
    report['one_direction_mix'] = agreement(
      np.stack([np.sum(scaled, axis=(0, 1)), mix(np.stack([t.score_N for t in tasks]), 'zscore')])
    )
  if context.first:
    # u of the mean of each task's examples; a joint datamodel has the columns of all checkpoints side by side.
    u = {
      f'u_{name}_CJ': np.concatenate([s.u_JK[:, at] for s in solved.solutions]).reshape(features.checkpoints, -1)
      for name, at in zip(names, first, strict=False)
    }
    storage.save_npz(context.out / 'scores.npz', **_arrays(names, tasks, weights, options.mix))
    storage.save_npz(context.out / SOLUTION, **u, **({} if q_N is None else {'q_N': q_N}))
    storage.write_json(context.out / 'report.json', report)
  accumulator.clear()  # only now: until then, a kill must not lose the passes
  for name, task in zip(names, tasks, strict=True):
    if task.subset_effect and task.average == UNSEEN and options.average == AUTO:
      shift = task.subset_effect['shift_sd']
      context.log.say(f'  {name}: proxies shift rows of their own subset by {shift:+.2f} sd; using unseen proxies only')
  scale = 'goes with the square of the features' if options.recentre else 'invariant to the scale of features'
  if options.gram == 'joint':
    scale += '; one datamodel of all proxies'
  else:
    each = proxies.checkpoints
    scale += '; mean over ' + ('proxies' if each == 1 else f'{each} checkpoints of each proxy')
  return {
    'sign': 'higher: training on the row raises the output function of the target',
    'output_fn': context.inputs['features'].settings['features.output_fn'],
    'scale': scale,
    'q': 'times 1 − mean predicted-token probability, which is averaged over proxies' if options.q else 'none',
    'average': report['average'],
    'damping': solved.damping,
    'confidence': options.confidence,
    'half_width': {n: half_width(w.clusters, options.confidence) for n, w in zip(names, weights, strict=True)},
    'mix': options.mix,
    'tasks': list(names),
    **{key: options[key] for key in ('damping_rule', 'gram', 'target_share', 'unit_norm', 'recentre')},
  }


def _mean_probability(context: Context, bar: Bar) -> np.ndarray:
  """Mean predicted-token probability of each row, averaged over proxies; float32 [N]."""
  passes, states = _proxies(context)
  pool = Pool(context.inputs['pool'])
  mean_N = np.mean([passes.mean_probability(state, pool, bar.update) for state in states], axis=0)
  context.add_flop(passes.flop)
  return mean_N.astype(np.float32)


def _proxies(context: Context) -> tuple[ProxyOutputs, Any]:
  """The compiled forward passes, and the proxies' states one after the other."""
  config, pool = context.config, Pool(context.inputs['pool'])
  mesh = make_mesh(config.mesh)
  compiled = trainer(config.proxies.model, config.proxies.train, pool.vocab_size, pool.length, mesh)
  passes = ProxyOutputs(compiled, load_callable(config.features.output_fn), step_rows(config.features, mesh)[0])
  proxies, names = context.inputs['proxies'], [f'proxy_{c}' for c in range(config.proxies.count)]
  return passes, (load_state(proxies.path / name, compiled, proxies.last_step(name)) for name in names)


def _check(name: str, score_N: np.ndarray) -> None:
  """Raises UserError if the scores order nothing: not finite, or the same for all rows."""
  if not np.isfinite(score_N).all():
    raise UserError(
      f'the score of row {int(np.argmin(np.isfinite(score_N)))} for target {name} is not a number; '
      'raise datamodel.damping, or recompute the features'
    )
  if len(score_N) > 1 and float(np.ptp(score_N)) <= 1e-6 * float(np.abs(score_N).max()):
    raise UserError(
      f'all rows have the same score for target {name}, so they cannot be ranked: the features are all equal or '
      'unrelated to this target; check features.layers and features.output_fn'
    )


def seen(proxies: Artifact, count: int, rows: int) -> np.ndarray:
  """Whether proxy p trained on row n, bool [P, N]; no row if it is a model of others that was not trained."""
  seen_PN = np.zeros((count, rows), bool)
  for proxy in range(count if proxies.semantics['steps'] else 0):
    seen_PN[proxy, storage.load(proxies.path / f'subset_{proxy}.npy')] = True
  return seen_PN


@dataclasses.dataclass
class TaskScores:
  """Scores of one task, float32.

  Attributes:
    by_member_CN: of each datamodel.
    by_proxy_PN: the same, averaged over the checkpoints of each proxy; of the joint datamodel if there is one.
    groups_NG: of groups of its examples, averaged over members.
    examples_NE: of its first examples one by one, averaged over members.
    score_N: of all its examples.
    error_N: standard error of score_N over the documents of its examples; zeros without resamples.
    sample_SR: scores by each resample, of the rows `sample_rows`.
    average: 'all' or 'unseen', the proxies averaged over.
    subset_effect: means of rows inside and outside of the proxies' subsets; None for a joint datamodel.
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
  """One way to average over members, filled shard by shard: means of all but resamples, errors, sample."""

  weight_CN: np.ndarray
  mean_NK: np.ndarray
  error_NT: np.ndarray
  sample_SK: np.ndarray


def sample_rows(rows: int) -> np.ndarray:
  return np.arange(0, rows, -(-rows // _SAMPLE))


def score_tasks(
  solved: Solved,
  weights: Sequence[TargetWeights],
  seen_PN: np.ndarray,
  average: str,
  progress: Progress,
  accumulator: Accumulator,
) -> list[TaskScores]:
  """Scores all rows for all weightings of all tasks in one pass.

  Args:
    solved: the datamodels, for the weightings of all tasks in order.
    weights: of each task.
    seen_PN: whether proxy p trained on row n; ignored by a joint datamodel, which leaves no proxy out.
    average: 'all', 'unseen' or 'auto'.
    progress: called with the rows of each shard, once for each member.
    accumulator: saves the scores of shards, so that a killed pass resumes.
  """
  members = solved.members
  rows, count = members[0].source.rows, len(members)
  if solved.mode == 'joint':
    seen_PN, average = np.zeros((count, rows), bool), ALL
  each = count // len(seen_PN)
  seen_CN = np.repeat(seen_PN, each, axis=0)
  first = np.cumsum([0, *(len(w.weight_KT) for w in weights)])
  means = np.concatenate([np.arange(f, f + w.resample_rows.start) for f, w in zip(first, weights, strict=False)])
  resamples = [np.arange(f + w.resample_rows.start, f + len(w.weight_KT)) for f, w in zip(first, weights, strict=False)]
  sample_S = sample_rows(rows)
  score_CNT = np.empty((count, rows, len(weights)), np.float32)
  effect = SubsetEffect.empty(count, int(first[-1]))
  averages = {
    rule: _Averages(
      proxy_weights(seen_CN, rule),
      np.empty((rows, len(means)), np.float32),
      np.zeros((rows, len(weights)), np.float32),
      np.empty((len(sample_S), int(first[-1])), np.float32),
    )
    for rule in ((ALL, UNSEEN) if average == AUTO else (average,))
  }
  passes = [
    accumulator.shards(f'scores_{c}', functools.partial(datamodel.score_shards, member.source, solution.u_JK))
    for c, (member, solution) in enumerate(zip(members, solved.solutions, strict=True))
  ]
  for shards in zip(*passes, strict=True):
    start, stop, _ = shards[0]
    score_CBK = np.stack([score_BK for _, _, score_BK in shards])
    score_CNT[:, start:stop] = score_CBK[:, :, first[:-1]]
    effect.add(score_CBK, seen_CN[:, start:stop])
    inside_S = (sample_S >= start) & (sample_S < stop)
    for a in averages.values():
      mean_BK = np.einsum('cbk,cb->bk', score_CBK, a.weight_CN[:, start:stop], optimize=True)
      a.mean_NK[start:stop] = mean_BK[:, means]
      a.sample_SK[inside_S] = mean_BK[sample_S[inside_S] - start]
      for task, at in enumerate(resamples):
        if len(at) > 1:
          a.error_NT[start:stop, task] = mean_BK[:, at].std(axis=1, ddof=1)
    progress((stop - start) * count)
  if UNSEEN in averages:
    a = averages[UNSEEN]
    level(a.mean_NK, seen_CN, effect.difference_CK[:, means])
    level(a.sample_SK, seen_CN[:, sample_S], effect.difference_CK)
  tasks, begin = [], 0
  for task, w in enumerate(weights):
    described = effect.describe(int(first[task]), each)
    rule = resolve_average(average, described)
    a, end = averages[rule], begin + w.resample_rows.start
    mean_NK, score_CN = a.mean_NK[:, begin:end], score_CNT[:, :, task].copy()
    tasks.append(
      TaskScores(
        by_member_CN=score_CN,
        by_proxy_PN=by_proxy(score_CN, each),
        groups_NG=mean_NK[:, w.group_rows].copy(),
        examples_NE=mean_NK[:, w.example_rows].copy(),
        score_N=mean_NK[:, 0].copy(),
        error_N=a.error_NT[:, task].copy(),
        sample_SR=a.sample_SK[:, resamples[task]].copy(),
        average=rule,
        subset_effect=None if solved.mode == 'joint' else described,
      )
    )
    begin = end
  return tasks


def proxy_weights(seen_CN: np.ndarray, average: str) -> np.ndarray:
  """Weight of each checkpoint in the score of each row, float64 [C, N]; they sum to one over checkpoints.

  Args:
    seen_CN: whether the proxy of checkpoint c trained on row n.
    average: 'all', or 'unseen' for the proxies that did not train on the row. A row that all trained on takes all.
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
    """Mean inside minus mean outside; 0 for a checkpoint that trained on everything or nothing."""
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

    `shift_sd` is their difference, `shift_error_sd` its standard error for independent rows; the `each` checkpoints of
    one proxy count as one draw of rows.
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


def resolve_average(average: str, effect: Mapping[str, float]) -> str:
  """'auto' is 'unseen' if the shift exceeds 0.1 sd and twice its standard error, and 'all' otherwise."""
  if average != AUTO:
    return average
  shift = abs(effect['shift_sd'])
  return UNSEEN if shift > _SHIFT and shift > 2 * effect['shift_error_sd'] else ALL


def level(score_NK: np.ndarray, seen_CN: np.ndarray, difference_CK: np.ndarray) -> np.ndarray:
  """Subtracts, in place, the mean shift from `unseen` scores of rows that every proxy trained on.

  Those rows have only inside scores; this brings them to the level of the others.
  """
  score_NK[seen_CN.all(axis=0)] -= difference_CK.mean(axis=0).astype(score_NK.dtype)
  return score_NK


def by_proxy(score_CN: np.ndarray, each: int) -> np.ndarray:
  """score_PN: means over the `each` checkpoints of one proxy, which are adjacent."""
  return score_CN.reshape(-1, each, score_CN.shape[1]).mean(axis=1)


def agreement(score_PN: np.ndarray) -> float:
  """Mean Spearman correlation between the scores of two proxies; 1 if there is only one."""
  count = len(score_PN)
  pairs = [(i, j) for i in range(count) for j in range(i)]
  values = [scipy.stats.spearmanr(score_PN[i], score_PN[j]).statistic for i, j in pairs]
  return float(np.mean(values)) if values else 1.0


def mix(score_TN: np.ndarray, rule: str) -> np.ndarray:
  """One score per row out of one per task: plain mean (paper), mean of z-scores, or mean of ranks in [0, 1]."""
  if rule == 'zscore':
    spread = score_TN.std(axis=1, keepdims=True)
    score_TN = (score_TN - score_TN.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
  elif rule == 'rank':
    score_TN = (scipy.stats.rankdata(score_TN, axis=1) - 1) / max(score_TN.shape[1] - 1, 1)
  return score_TN.mean(axis=0).astype(np.float32)


def mix_error(error_TN: np.ndarray, score_TN: np.ndarray, rule: str) -> np.ndarray | None:
  """Standard error of the mixed score for independent tasks; None for ranks, which are not linear."""
  if rule == 'rank':
    return None
  spread = score_TN.std(axis=1, keepdims=True) if rule == 'zscore' else np.ones((len(score_TN), 1))
  scaled_TN = error_TN / np.where(spread > 0, spread, 1)
  return (np.sqrt(np.square(scaled_TN).sum(axis=0)) / len(score_TN)).astype(np.float32)


def half_width(clusters: int, confidence: float) -> float:
  """Half length of an interval in standard errors: Student's t with clusters − 1 degrees of freedom."""
  return float(scipy.stats.t.ppf(0.5 + confidence / 2, max(clusters - 1, 1)))


def overlap(a_N: np.ndarray, b_N: np.ndarray, count: int) -> float:
  """Share of the `count` highest of `a_N` that are also among the `count` highest of `b_N`; ties go to lower rows."""
  first, second = (np.argsort(-x, kind='stable')[:count] for x in (a_N, b_N))
  return len(np.intersect1d(first, second)) / count


def stability(score_N: np.ndarray, replicate_RN: np.ndarray) -> dict[str, float]:
  """For each share of the rows: the mean overlap of the top rows by `score_N` with those by each replicate."""
  counts = {f'{share:g}': round(share * len(score_N)) for share in SHARES if len(replicate_RN)}
  return {
    share: float(np.mean([overlap(score_N, r_N, count) for r_N in replicate_RN]))
    for share, count in counts.items()
    if count
  }


def _stability(names: Sequence[str], tasks: Sequence[TaskScores], rule: str) -> dict[str, dict[str, float]]:
  """Stability of selections over resamples of the target examples, of each task and of the mix."""
  sample_S = sample_rows(len(tasks[0].score_N))
  score_TS = np.stack([task.score_N[sample_S] for task in tasks])
  stable = {n: stability(s, t.sample_SR.T) for n, s, t in zip(names, score_TS, tasks, strict=True)}
  resamples = min(t.sample_SR.shape[1] for t in tasks)
  mixed_RS = [mix(np.stack([t.sample_SR[:, r] for t in tasks]), rule) for r in range(resamples)]
  return stable | {'mix': stability(mix(score_TS, rule), np.array(mixed_RS))}


def _arrays(
  names: Sequence[str], tasks: Sequence[TaskScores], weights: Sequence[TargetWeights], rule: str
) -> dict[str, np.ndarray]:
  """Content of `scores.npz`."""
  arrays: dict[str, np.ndarray] = {}
  for name, task, w in zip(names, tasks, weights, strict=True):
    arrays[f'score_{name}_N'] = task.score_N
    arrays[f'score_{name}_CN'] = task.by_member_CN
    arrays[f'groups_{name}_NG'] = task.groups_NG
    arrays[f'group_{name}_T'] = w.group_T
    if w.examples:
      rows_EM, score_EM = peaks(task.examples_NE)
      arrays[f'example_rows_{name}_EM'], arrays[f'example_score_{name}_EM'] = rows_EM, score_EM
    if w.resamples > 1:
      arrays[f'error_{name}_N'] = task.error_N
    if len(task.by_proxy_PN) > 1:
      arrays[f'spread_{name}_N'] = task.by_proxy_PN.std(axis=0, ddof=1)
  score_TN = np.stack([task.score_N for task in tasks])
  arrays['score_mix_N'] = mix(score_TN, rule)
  error_N = mix_error(np.stack([task.error_N for task in tasks]), score_TN, rule)
  if error_N is not None and all(w.resamples > 1 for w in weights):
    arrays['error_mix_N'] = error_N
  return arrays


def peaks(examples_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows with the highest, then with the lowest scores for each example, and these scores.

  Returns:
    rows_EM: int64, at most `_PEAKS` of the highest, best first, then as many of the lowest, lowest first. Equal scores:
      the lower row first.
    score_EM: float32, in standard deviations of the example's own scores from their mean.
  """

  def lowest(key_N: np.ndarray, count: int) -> np.ndarray:
    if not count:
      return np.zeros(0, np.int64)
    near = np.flatnonzero(key_N <= np.partition(key_N, count - 1)[count - 1])
    return near[np.argsort(key_N[near], kind='stable')][:count]

  rows, scores = [], []
  for score_N in examples_NE.T.astype(np.float64):
    score_N = score_N - score_N.mean()
    score_N /= score_N.std() or 1.0
    count = min(_PEAKS, len(score_N) // 2)
    ends_M = np.concatenate([lowest(-score_N, count), lowest(score_N, count)])
    rows.append(ends_M)
    scores.append(score_N[ends_M].astype(np.float32))
  return np.stack(rows), np.stack(scores)


class Scores:
  """A finished datamodel stage, opened for reading."""

  def __init__(self, artifact: Artifact):
    with storage.load(artifact.path / 'scores.npz') as arrays:
      self._arrays = dict(arrays)
    self.tasks = tuple(artifact.semantics['tasks'])
    self._rule = artifact.semantics['mix']
    self._half_width = artifact.semantics['half_width']

  def score_N(self, target: str) -> np.ndarray:
    """Score of each row for a task, for 'mix' (all tasks), or for tasks joined by '+'; float32, higher is better."""
    if '+' not in target:
      return self._arrays[f'score_{target}_N']
    return mix(np.stack([self._arrays[f'score_{t}_N'] for t in target.split('+')]), self._rule)

  def interval_2N(self, target: str) -> np.ndarray:
    """Lower and upper end of the interval of each row's score for a target, over the documents of its examples.

    Errors of several tasks add up as for independent examples, with the half width of the task with the fewest
    documents.

    Raises:
      UserError: the stage made no resamples, or tasks are mixed by rank, which has no standard error.
    """
    reach_N, score_N = self.reach_N(target), self.score_N(target)
    return np.stack([score_N - reach_N, score_N + reach_N])

  def reach_N(self, target: str) -> np.ndarray:
    """Half the length of each row's interval; raises as `interval_2N`."""
    tasks = self.tasks if target == 'mix' else tuple(target.split('+'))
    if any(f'error_{task}_N' not in self._arrays for task in tasks):
      raise UserError(f'scores for {target} have no intervals; set datamodel.bootstrap to 2 or more and run again')
    if len(tasks) == 1 and target != 'mix':
      return self._half_width[target] * self._arrays[f'error_{target}_N']
    error_TN, score_TN = (np.stack([self._arrays[f'{kind}_{task}_N'] for task in tasks]) for kind in ('error', 'score'))
    error_N = mix_error(error_TN, score_TN, self._rule)
    if error_N is None:
      raise UserError(f"scores for {target} are mean ranks, which have no intervals; set datamodel.mix to 'zscore'")
    return max(self._half_width[task] for task in tasks) * error_N

  def groups_NG(self, task: str) -> np.ndarray:
    """Scores for each group of a task's examples; `group_<task>_T` has the group of each example."""
    return self._arrays[f'groups_{task}_NG']

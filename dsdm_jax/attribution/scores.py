"""Stage `datamodel`: features → scores of every row for every target and for their mix; and their reader.

A proxy memorises its own subset: gradients of rows that it trained on are smaller, and their scores may be shifted.
Averaging only over proxies that did not train on a row ('unseen') removes that.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from dsdm_jax.attribution import damping, datamodel, solve
from dsdm_jax.attribution.accumulators import Accumulator, Progress
from dsdm_jax.attribution.extractor import ProxyOutputs, step_rows
from dsdm_jax.attribution.solve import Solved, TargetWeights
from dsdm_jax.attribution.sources import column_groups
from dsdm_jax.attribution.store import Features
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import processes, storage
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
_PASSES, _Q = 'passes', 'q.npy'  # the unit of passes over the pool, and the file of one of them
# Parts of `report.json` that have an entry for each task.
_BY_TASK = ('subset_effect', 'average', 'checkpoint_agreement', 'top_overlap_over_targets')
_PEAKS = 20  # rows at either end that are saved of a single example's scores


def run(context: Context) -> dict:
  """Writes `scores.npz`, `report.json`, `solution.npz` and `samples.npz`, see `docs/datamodel.md`.

  The passes over the pool that targets do not change, and the columns of each task, are units.
  """
  config, options = context.config, context.config.datamodel
  features, targets = Features(context.inputs['features'], context), Targets(context.inputs['targets'])
  names, examples = targets.tasks, [targets.examples(task, 'target') for task in targets.tasks]
  by_ekfac = features.semantics['projection'] == 'ekfac'
  drawn = options.groups, options.bootstrap, config.seed
  weights = [
    TargetWeights.of_documents([r['document'] for r in e.records], *drawn, name, options.examples, by_ekfac)
    for name, e in zip(names, examples, strict=True)
  ]
  accumulator, mesh, proxies = (
    Accumulator(context.out, context.cost.save, keep=True),
    make_mesh(config.mesh),
    config.proxies,
  )
  chosen = options.damping_rule == 'auto'
  seen_PN = seen(context.inputs['proxies'], proxies.count, features.rows)
  of_features, earlier = context.inputs['features'].digest, context.units.previous
  of_passes = {'features': of_features, **{key: options[key] for key in ('gram', 'unit_norm', 'damping_rule', 'q')}}
  context.units.take({_PASSES: of_passes}, lambda _: ('sum_*', _Q))
  damping_before = float(earlier.semantics['damping']) if chosen and earlier is not None else options.damping

  def unfinished(damping: float) -> list[int]:
    """Places of the tasks whose columns are not there; all columns change with the damping."""
    shared = {key: value for key, value in options.items() if key != 'mix'}
    of_task = {name: {'examples': targets.digest(name), 'features': of_features} for name in names}
    others = {'blended': of_task if options.target_share else None, 'damping': damping, 'seed': config.seed}
    taken = context.units.take({_unit(name): [of_task[name], shared, others] for name in names})
    return [place for place, name in enumerate(names) if _unit(name) not in taken]

  new, solved, q_N, spent = unfinished(damping_before), None, None, context.cost.parts
  passes = (1 if options.gram == 'joint' else features.checkpoints) * (1 if by_ekfac else 2)
  passes += proxies.count if options.q else 0
  context.log.describe(f'{len(names)} targets × {features.rows:,} rows')
  with context.log.bar(total=passes * features.rows, unit='row') as bar:
    held_out = None
    if chosen:
      forward, states = _proxies(context)
      outputs = [[forward.of_examples(state, e.tokens_TL, e.weights_TL) for e in examples] for state in states]
      context.add_flop(forward.flop)
      held_out = solve.HeldOutProxies(seen_PN, [np.stack(task) for task in zip(*outputs, strict=True)])
    began, before = time.monotonic(), context.cost.flop
    if not by_ekfac and (new or chosen):
      mode, members = solve.open_members(features, names, options.gram, options.unit_norm)
      solved = solve.solve(mode, members, weights, options, mesh, bar.update, accumulator, held_out, new)
      charged = context.cost.flop - before
      if solved.damping != damping_before:
        new = unfinished(solved.damping)
        solved = solve.solve(mode, members, weights, options, mesh, bar.update, accumulator, held_out, new)
      solves = 1 if solved.choice is None else len(damping.FACTORS)
      charged += sum(
        2.0 * member.source.rows * size**2 + solves * size**3 / 3
        for member in solved.members
        for size in (stop - start for start, stop in member.blocks)
      )
      spent |= {_PASSES: time.monotonic() - began, f'{_PASSES} flop': charged}
    context.cost.flop = before + spent.get(f'{_PASSES} flop', 0.0)
    began, before = time.monotonic(), context.cost.flop
    tasks: list[TaskScores] = []
    of_new = [weights[place] for place in new]
    if new:
      if by_ekfac:
        solved = solve.by_ekfac(features, context, [examples[place] for place in new], of_new, options.damping)
      assert solved is not None
      tasks = score_tasks(solved, of_new, seen_PN, options.average, bar.update, accumulator)
      flop = (context.cost.flop - before) / len(new)
      for place, w in zip(new, of_new, strict=True):
        columns = 0 if by_ekfac else len(w.weight_KT)
        own = sum(2.0 * member.source.rows * member.source.dimension * columns for member in solved.members)
        unit = _unit(names[place])
        spent |= {unit: (time.monotonic() - began) / len(new), f'{unit} flop': flop + own}
    context.cost.flop = before + sum(spent.get(f'{_unit(name)} flop', 0.0) for name in names)
    if options.q:
      q_N = 1 - _mean_probability(context, bar)
      for task in tasks:
        task.multiply(q_N, sample_rows(features.rows))
  found = _Found.of_earlier(earlier, [name for place, name in enumerate(names) if place not in new])
  first = np.cumsum([0, *(len(w.weight_KT) for w in of_new)])
  for number, (place, task, w, at) in enumerate(zip(new, tasks, of_new, first, strict=False)):
    assert solved is not None
    _check(names[place], task.score_N)
    # u of the mean of the task's examples; a joint datamodel has the columns of all checkpoints side by side.
    u_CJ = np.concatenate([s.columns(at) for s in solved.solutions]).reshape(features.checkpoints, -1)
    norm_C = None if solved.norm_CK is None else solved.norm_CK[:, number]
    found.add(names[place], task, w, u_CJ, norm_C)
  if solved is not None:
    found.report |= {
      'spectrum': solved.spectra,
      'condition': [list(s.condition) for s in solved.solutions],
      'damping': solved.damping,
      'damping_choice': None if solved.choice is None else solved.choice.as_json(),
    }
  report, arrays = found.summarize(names, weights, options.mix)
  if context.first:
    storage.save_npz(context.out / 'scores.npz', **arrays)
    storage.save_npz(context.out / SOLUTION, **found.solution, **({} if q_N is None else {'q_N': q_N}))
    storage.save_npz(context.out / 'samples.npz', **found.samples)
    storage.write_json(context.out / 'report.json', report)
  accumulator.clear()  # only now: until then, a kill must not lose the passes
  for place, task in zip(new, tasks, strict=True):
    if task.subset_effect and task.average == UNSEEN and options.average == AUTO:
      shift = task.subset_effect['shift_sd']
      context.log.say(
        f'  {names[place]}: proxies shift rows of their own subset by {shift:+.2f} sd; using unseen proxies only'
      )
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
    'damping': report['damping'],
    'confidence': options.confidence,
    'half_width': {n: half_width(w.clusters, options.confidence) for n, w in zip(names, weights, strict=True)},
    'mix': options.mix,
    'tasks': list(names),
    **{key: options[key] for key in ('damping_rule', 'gram', 'target_share', 'unit_norm', 'recentre')},
  }


def _unit(task: str) -> str:
  return f'scores of {task}'


@dataclasses.dataclass
class _Found:
  """What the stage writes, task by task.

  Attributes:
    scores, solution, samples: arrays of the files of that name; in samples, scores by each resample, and √(ḡᵀPḡ) of
      each checkpoint for EK-FAC.
    report: `report.json`.
  """

  scores: dict[str, np.ndarray]
  solution: dict[str, np.ndarray]
  samples: dict[str, np.ndarray]
  report: dict[str, Any]

  @classmethod
  def of_earlier(cls, earlier: Artifact | None, names: Sequence[str]) -> '_Found':
    """The columns of these tasks, taken over from the finished stage."""
    if earlier is None or not names:
      return cls({}, {}, {}, {part: {} for part in _BY_TASK})
    scores, solution, samples = (_load(earlier.path / file) for file in ('scores.npz', SOLUTION, 'samples.npz'))
    report = storage.read_json(earlier.path / 'report.json', dict)
    return cls(
      {key: array for name in names for key in _keys(name) if (array := scores.get(key)) is not None},
      {key: solution[key] for key in (f'u_{name}_CJ' for name in names)},
      {key: x for n in names for key in (f'sample_{n}_SR', f'norm_{n}_C') if (x := samples.get(key)) is not None},
      {**report, **{part: {name: report[part][name] for name in names} for part in _BY_TASK}},
    )

  def add(self, name: str, task: 'TaskScores', w: TargetWeights, u_CJ: np.ndarray, norm_C: np.ndarray | None) -> None:
    self.scores |= {
      f'score_{name}_N': task.score_N,
      f'score_{name}_CN': task.by_member_CN,
      f'groups_{name}_NG': task.groups_NG,
      f'group_{name}_T': w.group_T,
    }
    if w.examples:
      rows_EM, score_EM = peaks(task.examples_NE)
      self.scores |= {f'example_rows_{name}_EM': rows_EM, f'example_score_{name}_EM': score_EM}
    if w.resamples > 1:
      self.scores[f'error_{name}_N'] = task.error_N
    if len(task.by_proxy_PN) > 1:
      self.scores[f'spread_{name}_N'] = task.by_proxy_PN.std(axis=0, ddof=1)
    self.solution[f'u_{name}_CJ'] = u_CJ
    self.samples[f'sample_{name}_SR'] = task.sample_SR
    if norm_C is not None:
      self.samples[f'norm_{name}_C'] = norm_C
    self.report['subset_effect'][name] = task.subset_effect
    self.report['average'][name] = task.average
    self.report['checkpoint_agreement'][name] = agreement(task.by_proxy_PN)
    sample_S = sample_rows(len(task.score_N))
    self.report['top_overlap_over_targets'][name] = stability(task.score_N[sample_S], task.sample_SR.T)

  def summarize(
    self, names: Sequence[str], weights: Sequence[TargetWeights], rule: str
  ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(`report.json`, the arrays of `scores.npz`), with what all tasks give together; tasks in the order of `names`."""
    score_TN = np.stack([self.scores[f'score_{name}_N'] for name in names])
    arrays = {key: self.scores[key] for name in names for key in _keys(name) if key in self.scores}
    arrays['score_mix_N'] = mix(score_TN, rule)
    if all(w.resamples > 1 for w in weights):
      error_N = mix_error(np.stack([self.scores[f'error_{name}_N'] for name in names]), score_TN, rule)
      if error_N is not None:
        arrays['error_mix_N'] = error_N
    report = self.report | {part: {name: self.report[part][name] for name in names} for part in _BY_TASK}
    report['tasks'] = list(names)
    sample_S, samples = sample_rows(score_TN.shape[1]), [self.samples[f'sample_{name}_SR'] for name in names]
    resamples = min(x_SR.shape[1] for x_SR in samples)
    mixed_RS = [mix(np.stack([x_SR[:, r] for x_SR in samples]), rule) for r in range(resamples)]
    report['top_overlap_over_targets']['mix'] = stability(mix(score_TN[:, sample_S], rule), np.array(mixed_RS))
    report.pop('one_direction_mix', None)
    if f'norm_{names[0]}_C' in self.samples:
      # Scores along one direction, Σ_t v_t/√(ḡᵀPḡ), order rows as the mix of z-scores does.
      scaled = [
        self.scores[f'score_{name}_CN'] / np.maximum(self.samples[f'norm_{name}_C'], 1e-300)[:, None] for name in names
      ]
      report['one_direction_mix'] = agreement(np.stack([np.sum(scaled, axis=(0, 1)), mix(score_TN, 'zscore')]))
    return report, arrays


def _keys(task: str) -> list[str]:
  """The arrays of a task in `scores.npz`."""
  parts = ('score_{}_N', 'score_{}_CN', 'groups_{}_NG', 'group_{}_T', 'example_rows_{}_EM', 'example_score_{}_EM')
  return [part.replace('{}', task) for part in (*parts, 'error_{}_N', 'spread_{}_N')]


def _load(file: Path) -> dict[str, np.ndarray]:
  with storage.load(file) as arrays:
    return dict(arrays)


def _mean_probability(context: Context, bar: Bar) -> np.ndarray:
  """Mean predicted-token probability of each row, averaged over proxies; float32 [N]. It is saved as `q.npy`."""
  file, spent = context.out / _Q, context.cost.parts
  if not processes.decide(lambda: storage.is_marked(file)):
    passes, states = _proxies(context)
    pool = Pool(context.inputs['pool'])
    mean_N = np.mean([passes.mean_probability(state, pool, bar.update) for state in states], axis=0)
    spent[f'{_PASSES} q'] = passes.flop
    context.cost.save()
    if context.first:
      storage.save_npy(file, mean_N.astype(np.float32))
      storage.mark(file)
    processes.wait()
  context.add_flop(spent.get(f'{_PASSES} q', 0.0))
  return storage.load(file)


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
  groups = [len(w.weight_KT) for w in weights]
  columns = column_groups(groups, sum(groups))
  tasks = [_TaskPass(w, seen_CN, average) for w in weights]
  passes = [
    accumulator.shards(
      f'scores_{c}_{sum(groups)}',
      functools.partial(
        datamodel.score_shards, member.source, solution.u_JK, groups=groups, combination_KX=solution.combination_KX
      ),
    )
    for c, (member, solution) in enumerate(zip(members, solved.solutions, strict=True))
  ]
  for shards in zip(*passes, strict=True):
    start, stop, _ = shards[0]
    for task, own in zip(tasks, columns, strict=True):
      task.add(start, stop, np.stack([score_BK[:, own] for _, _, score_BK in shards]))
    progress((stop - start) * count)
  return [task.finish(each, joint=solved.mode == 'joint') for task in tasks]


class _TaskPass:
  """The columns of one task, filled shard by shard, so that they do not depend on other tasks.

  There may be two ways to average over members: means of all columns but resamples, errors, and the sample.
  """

  def __init__(self, weights: TargetWeights, seen_CN: np.ndarray, average: str):
    self._weights, self._seen_CN, self._average = weights, seen_CN, average
    (count, rows), columns = seen_CN.shape, len(weights.weight_KT)
    self._means = slice(0, weights.resample_rows.start)
    self._sample_S = sample_rows(rows)
    self._score_CN, self._effect = np.empty((count, rows), np.float32), SubsetEffect.empty(count, columns)
    rules = (ALL, UNSEEN) if average == AUTO else (average,)
    self._weight_CN = {rule: proxy_weights(seen_CN, rule) for rule in rules}
    self._mean_NK = {rule: np.empty((rows, self._means.stop), np.float32) for rule in rules}
    self._error_N = {rule: np.zeros(rows, np.float32) for rule in rules}
    self._sample_SK = {rule: np.empty((len(self._sample_S), columns), np.float32) for rule in rules}

  def add(self, start: int, stop: int, score_CBK: np.ndarray) -> None:
    self._score_CN[:, start:stop] = score_CBK[:, :, 0]
    self._effect.add(score_CBK, self._seen_CN[:, start:stop])
    inside_S = (self._sample_S >= start) & (self._sample_S < stop)
    for rule, weight_CN in self._weight_CN.items():
      mean_BK = np.einsum('cbk,cb->bk', score_CBK, weight_CN[:, start:stop], optimize=True)
      self._mean_NK[rule][start:stop] = mean_BK[:, self._means]
      self._sample_SK[rule][inside_S] = mean_BK[self._sample_S[inside_S] - start]
      if self._weights.resamples > 1:
        self._error_N[rule][start:stop] = mean_BK[:, self._weights.resample_rows].std(axis=1, ddof=1)

  def finish(self, each: int, joint: bool) -> TaskScores:
    """The task's scores, where each proxy has `each` checkpoints."""
    if UNSEEN in self._weight_CN:
      difference_CK = self._effect.difference_CK
      level(self._mean_NK[UNSEEN], self._seen_CN, difference_CK[:, self._means])
      level(self._sample_SK[UNSEEN], self._seen_CN[:, self._sample_S], difference_CK)
    described = self._effect.describe(0, each)
    rule, w = resolve_average(self._average, described), self._weights
    mean_NK = self._mean_NK[rule]
    return TaskScores(
      by_member_CN=self._score_CN,
      by_proxy_PN=by_proxy(self._score_CN, each),
      groups_NG=mean_NK[:, w.group_rows].copy(),
      examples_NE=mean_NK[:, w.example_rows].copy(),
      score_N=mean_NK[:, 0].copy(),
      error_N=self._error_N[rule],
      sample_SR=self._sample_SK[rule][:, w.resample_rows].copy(),
      average=rule,
      subset_effect=None if joint else described,
    )


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

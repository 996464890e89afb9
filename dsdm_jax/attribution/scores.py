"""Stage `datamodel`: features → scores of every row for every target and for their mix; and their reader.

A proxy memorises its own subset: gradients of rows that it trained on are smaller, and their scores may be shifted.
Averaging only over proxies that did not train on a row ('unseen') removes that.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from dsdm_jax.attribution import damping, datamodel, score_arrays, solve
from dsdm_jax.attribution.accumulators import Accumulator, Arrays, Chunk, Progress
from dsdm_jax.attribution.extractor import ProxyOutputs, step_rows
from dsdm_jax.attribution.solve import Solved, TargetWeights
from dsdm_jax.attribution.sources import Bounds, column_groups
from dsdm_jax.attribution.store import Features
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import artifacts, processes, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.progress import Bar, counted
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.data.pool.pool import Pool, prefiltered_rows
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.errors import UserError
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.proxies import trainer_of

ALL, UNSEEN, AUTO = 'all', 'unseen', 'auto'  # which proxies the score of a row is averaged over
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)  # of the pool, at which the overlap of two selections is measured
_SHIFT = 0.1  # 'auto' is 'unseen' if inside and outside means differ by more than this many standard deviations
_SAMPLE = 65_536  # rows on which stability is measured: a fixed stride over the pool, whose order is random
_PASSES = 'passes'  # the unit of passes over the pool
Q = 'q.npy'  # the mean probability of each row
# Parts of `report.json` that have an entry for each task.
_BY_TASK = ('subset_effect', 'average', 'checkpoint_agreement', 'top_overlap_over_targets')
_PEAKS = 20  # rows at either end that are saved of a single example's scores


def run(context: Context) -> dict:
  """Writes `scores/<task>/`, `scores/mix/`, `report.json` and, if scores have a Q, `q.npy`; see `docs/datamodel.md`.

  The passes over the pool that targets do not change, and the columns of each task, are units. Each process scores and
  writes its own rows.
  """
  config, options, out = context.config, context.config.datamodel, context.out
  features, targets = Features(context.inputs['features'], context), Targets(context.inputs['targets'])
  names, examples = targets.tasks, [targets.examples(task, 'target') for task in targets.tasks]
  by_ekfac = features.semantics['projection'] == 'ekfac'
  drawn = options.groups, options.bootstrap, config.seed
  weights = [
    TargetWeights.of_documents([r['document'] for r in e.records], *drawn, name, options.examples, by_ekfac)
    for name, e in zip(names, examples, strict=True)
  ]
  accumulator, mesh, proxies = (
    Accumulator(out, context.cost.save, keep=True),
    make_mesh(config.mesh),
    config.proxies,
  )
  chosen = options.damping_rule == 'auto'
  prefilter = context.inputs.get('prefilter')
  kept_N = prefiltered_rows(prefilter)  # numbers of the rows that have scores; None for all
  of_pool = features.rows if prefilter is None else prefilter.semantics['of']
  seen_PN = seen(context.inputs['proxies'], proxies.count, of_pool)
  if kept_N is not None:
    seen_PN = seen_PN[:, kept_N]
  of_features, earlier = context.inputs['features'].digest, context.units.previous
  of_passes = {'features': of_features, **{key: options[key] for key in ('gram', 'unit_norm', 'damping_rule', 'q')}}
  context.units.take({_PASSES: of_passes}, lambda _: ('sum_*', Q))
  damping_before = float(earlier.semantics['damping']) if chosen and earlier is not None else options.damping

  def unfinished(damping: float) -> list[int]:
    """Places of the tasks whose columns are not there; all columns change with the damping."""
    shared = {key: value for key, value in options.items() if key != 'mix'}
    of_task = {name: {'examples': targets.digest(name), 'features': of_features} for name in names}
    others = {'blended': of_task if options.target_share else None, 'damping': damping, 'seed': config.seed}
    folder_of = {_unit(name): (f'{score_arrays.FOLDER}/{name}/',) for name in names}
    taken = context.units.take({_unit(name): [of_task[name], shared, others] for name in names}, folder_of.__getitem__)
    return [place for place, name in enumerate(names) if _unit(name) not in taken]

  new, solved, q_N, spent = unfinished(damping_before), None, None, context.cost.parts
  passes = (1 if options.gram == 'joint' else features.checkpoints) * (1 if by_ekfac else 2)
  passes += proxies.count if options.q else 0
  context.log.describe(f'{counted(len(names), "target")} × {counted(features.rows, "row")}')
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
        2.0 * member.source.gram_rows().rows * size**2 + solves * size**3 / 3
        for member in solved.members
        for size in (stop - start for start, stop in member.blocks)
      )
      spent |= {_PASSES: time.monotonic() - began, f'{_PASSES} flop': charged}
    context.cost.flop = before + spent.get(f'{_PASSES} flop', 0.0)
    began, before = time.monotonic(), context.cost.flop
    tasks: list[TaskColumns] = []
    of_new = [weights[place] for place in new]
    if new:
      if by_ekfac:
        solved = solve.by_ekfac(features, context, [examples[place] for place in new], of_new, options.damping)
      assert solved is not None
      name = f'scores_{artifacts.digest_of([[names[place] for place in new], solved.damping])[:12]}'
      tasks = score_tasks(solved, of_new, seen_PN, options.average, bar.update, accumulator, name)
      flop = (context.cost.flop - before) / len(new)
      for place, w in zip(new, of_new, strict=True):
        # A pass by directional derivatives multiplies no features.
        columns = 0 if features.semantics['mode'] == 'jvp' else len(w.weight_KT)
        own = sum(2.0 * member.source.rows * member.source.dimension * columns for member in solved.members)
        unit = _unit(names[place])
        spent |= {unit: (time.monotonic() - began) / len(new), f'{unit} flop': flop + own}
    context.cost.flop = before + sum(spent.get(f'{_unit(name)} flop', 0.0) for name in names)
    if options.q:
      q_N = 1 - _mean_probability(context, bar)
      q_N = q_N if kept_N is None else q_N[kept_N]
  peaks_of = write_blocks(out, [names[place] for place in new], tasks, q_N)
  in_mix = [targets.weight(name) for name in names]
  common = {} if earlier is None else storage.read_json(earlier.path / 'report.json', dict)
  if solved is not None:
    common = {
      'spectrum': solved.spectra,
      'condition': [list(s.condition) for s in solved.solutions],
      'damping': solved.damping,
      'damping_choice': None if solved.choice is None else solved.choice.as_json(),
    }
  if context.first:
    first = np.cumsum([0, *(len(w.weight_KT) for w in of_new)])
    for number, (place, task) in enumerate(zip(new, tasks, strict=True)):
      assert solved is not None
      # u of the mean of the task's examples; a joint datamodel has the columns of all checkpoints side by side.
      u_CJ = np.concatenate([s.column(first[number]) for s in solved.solutions]).reshape(features.checkpoints, -1)
      small = {'u_CJ': u_CJ, **peaks_of[number]}
      if kept_N is not None and 'example_rows_EM' in small:
        small['example_rows_EM'] = kept_N[small['example_rows_EM']]
      if solved.norm_CK is not None:
        small['norm_C'] = solved.norm_CK[:, number]
      _write_task(out, names[place], task, small, q_N)
    storage.write_json(out / 'report.json', _summarize(out, names, weights, options.mix, in_mix, common))
    if kept_N is not None:
      scored_N = np.zeros(of_pool, bool)
      scored_N[kept_N] = True
      storage.save_npy(out / score_arrays.SCORED, scored_N)
  processes.wait()
  accumulator.clear()  # only now: until then, a kill must not lose the passes
  report = storage.read_json(out / 'report.json', dict)
  for place in new:
    effect, average = report['subset_effect'][names[place]], report['average'][names[place]]
    if effect and average == UNSEEN and options.average == AUTO:
      context.log.say(
        f'  {names[place]}: proxies shift rows of their own subset by {effect["shift_sd"]:+.2f} sd; using unseen '
        'proxies only'
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
    **({} if set(in_mix) == {1.0} else {'weights': in_mix}),
    **{key: options[key] for key in ('damping_rule', 'gram', 'target_share', 'unit_norm', 'recentre')},
  }


def write_blocks(
  out: Location, names: Sequence[str], tasks: Sequence['TaskColumns'], q_N: np.ndarray | None
) -> list[dict[str, np.ndarray]]:
  """Writes the scores of all rows, block by block, each process some blocks; returns each task's peaks of examples.

  Raises:
    UserError: the scores of a task order nothing: they are not finite, or the same for all rows.
  """
  rows = tasks[0].rows if tasks else 0
  items = [(number, block) for number in range(len(tasks)) for block in score_arrays.blocks(rows)]

  def work(items: Sequence[tuple[int, tuple[int, int]]]) -> list[Any]:
    facts = []
    for number, (start, stop) in items:
      arrays = tasks[number].block(start, stop, None if q_N is None else q_N[start:stop])
      facts.append([*_range(names[number], arrays['score_N'], start), ends(arrays.pop('examples_NE'), start)])
      score_arrays.write(out, names[number], arrays, start)
    return facts

  facts, result = processes.divide(items, work), []
  for number, name in enumerate(names):
    own = [fact for (of, _), fact in zip(items, facts, strict=True) if of == number]
    _check_range(name, min(fact[0] for fact in own), max(fact[1] for fact in own), rows)
    rows_EM, score_EM = merge([fact[2] for fact in own], rows)
    result.append({'example_rows_EM': rows_EM, 'example_score_EM': score_EM} if len(rows_EM) else {})
  return result


def _range(name: str, score_B: np.ndarray, first: int = 0) -> tuple[float, float]:
  """The lowest and the highest score of a block; raises UserError if one is not finite."""
  bad = np.flatnonzero(~np.isfinite(score_B))
  if len(bad):
    raise UserError(
      f'the score of row {first + int(bad[0])} for target {name} is not a number; raise datamodel.damping, or '
      'recompute the features'
    )
  return float(score_B.min()), float(score_B.max())


def _check_range(name: str, low: float, high: float, rows: int) -> None:
  """Raises UserError if all rows have the same score."""
  if rows > 1 and high - low <= 1e-6 * max(-low, high):
    raise UserError(
      f'all rows have the same score for target {name}, so they cannot be ranked: the features are all equal or '
      'unrelated to this target; check features.layers and features.output_fn'
    )


def _write_task(
  out: Location, name: str, task: 'TaskColumns', small: dict[str, np.ndarray], q_N: np.ndarray | None
) -> None:
  """Writes what a task has beside the scores of its rows, and its part of the report."""
  sample_S, arrays = sample_rows(task.rows), score_arrays.ScoreArrays(out)
  sample_SR = task.sample_SR if q_N is None else task.sample_SR * q_N[sample_S][:, None]
  score_PS = by_proxy(arrays.rows(f'score_{name}_CN', sample_S), task.each)
  score_arrays.write(out, name, {**small, 'group_T': task.weights.group_T, 'sample_SR': sample_SR})
  part = {
    'subset_effect': task.subset_effect,
    'average': task.average,
    'checkpoint_agreement': agreement(score_PS),
    'top_overlap_over_targets': stability(arrays.rows(f'score_{name}_N', sample_S), sample_SR.T),
  }
  storage.write_json(out / score_arrays.FOLDER / name / 'report.json', part)


def _summarize(
  out: Location,
  names: Sequence[str],
  weights: Sequence[TargetWeights],
  rule: str,
  in_mix: Sequence[float],
  common: Mapping[str, Any],
) -> dict[str, Any]:
  """Writes the mix of all tasks, in which they have the weights `in_mix`; returns `report.json`, in that order."""
  arrays = score_arrays.ScoreArrays(out)
  score_TN = [arrays[f'score_{name}_N'] for name in names]
  rows = len(score_TN[0])
  mixed = {'score_N': mix(score_TN, rule, in_mix)}
  if all(w.resamples > 1 for w in weights):
    error_N = mix_error([arrays[f'error_{name}_N'] for name in names], score_TN, rule, in_mix)
    if error_N is not None:
      mixed['error_N'] = error_N
  for start, stop in score_arrays.blocks(rows):
    score_arrays.write(out, 'mix', {key: array[start:stop] for key, array in mixed.items()}, start)
  parts = {name: storage.read_json(out / score_arrays.FOLDER / name / 'report.json', dict) for name in names}
  report = {**common, **{key: {name: parts[name][key] for name in names} for key in _BY_TASK}, 'tasks': list(names)}
  sample_S, samples = sample_rows(rows), [arrays[f'sample_{name}_SR'] for name in names]
  resamples = min(x_SR.shape[1] for x_SR in samples)
  mixed_RS = [mix([x_SR[:, r] for x_SR in samples], rule, in_mix) for r in range(resamples)]
  sample_mix_S = mix([score_N[sample_S] for score_N in score_TN], rule, in_mix)
  report['top_overlap_over_targets']['mix'] = stability(sample_mix_S, np.array(mixed_RS))
  report.pop('one_direction_mix', None)
  if f'norm_{names[0]}_C' in arrays:
    # Scores along one direction, Σ_t v_t/√(ḡᵀPḡ), order rows as the mix of z-scores does.
    scaled = [
      weight * arrays.rows(f'score_{name}_CN', sample_S) / np.maximum(arrays[f'norm_{name}_C'], 1e-300)[:, None]
      for name, weight in zip(names, in_mix, strict=True)
    ]
    of_z_S = mix(score_TN, 'zscore', in_mix)[sample_S]
    report['one_direction_mix'] = agreement(np.stack([np.sum(scaled, axis=(0, 1)), of_z_S]))
  return report


def _unit(task: str) -> str:
  return f'scores of {task}'


def _mean_probability(context: Context, bar: Bar) -> np.ndarray:
  """Mean predicted-token probability of each row, averaged over proxies; float32 [N]. It is saved as `q.npy`."""
  file, spent = context.out / Q, context.cost.parts
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
  compiled = trainer_of(config.proxies, pool, mesh)
  passes = ProxyOutputs(compiled, load_callable(config.features.output_fn), step_rows(config.features, mesh)[0])
  proxies, names = context.inputs['proxies'], [f'proxy_{c}' for c in range(config.proxies.count)]
  return passes, (load_state(proxies.path / name, compiled, proxies.last_step(name)) for name in names)


def seen(proxies: Artifact, count: int, rows: int) -> np.ndarray:
  """Whether proxy p trained on row n, bool [P, N]; no row if it is a model of others that was not trained."""
  seen_PN = np.zeros((count, rows), bool)
  for proxy in range(count if proxies.semantics['steps'] else 0):
    seen_PN[proxy, storage.load(proxies.path / f'subset_{proxy}.npy')] = True
  return seen_PN


def sample_rows(rows: int) -> np.ndarray:
  return np.arange(0, rows, -(-rows // _SAMPLE))


def score_tasks(
  solved: Solved,
  weights: Sequence[TargetWeights],
  seen_PN: np.ndarray,
  average: str,
  progress: Progress,
  accumulator: Accumulator,
  name: str = 'scores',
) -> list['TaskColumns']:
  """Scores all rows for all weightings of all tasks in one pass.

  Args:
    solved: the datamodels, for the weightings of all tasks in order.
    weights: of each task.
    seen_PN: whether proxy p trained on row n; ignored by a joint datamodel, which leaves no proxy out.
    average: 'all', 'unseen' or 'auto'.
    progress: called with the rows of each round, once for each member.
    accumulator: saves the scores of shards under `name`, so that a killed pass resumes.
  """
  members = solved.members
  source, count = members[0].source, len(members)
  joint = solved.mode == 'joint'
  if joint:
    seen_PN, average = np.zeros((count, source.rows), bool), ALL
  each, rules = count // len(seen_PN), (ALL, UNSEEN) if average == AUTO else (average,)
  groups = [len(w.weight_KT) for w in weights]
  own_columns = column_groups(groups, sum(groups))

  def parts(row: int) -> Iterator[tuple[Bounds, Bounds, Arrays]]:
    passes = [
      datamodel.score_shards(member.source, solution.u_JK, row, groups, solution.combination_KX)
      for member, solution in zip(members, solved.solutions, strict=True)
    ]
    together = ((own[0][0], own[0][1], [score_BK for _, _, score_BK in own]) for own in zip(*passes, strict=True))
    for bounds, (start, stop, score_CBK) in source.with_rounds(together, row):
      seen_CB, arrays = np.repeat(seen_PN[:, start:stop], each, axis=0), dict[str, np.ndarray]()
      for number, (w, own) in enumerate(zip(weights, own_columns, strict=True)):
        of_task = _columns(
          w, np.stack([score_BK[:, own] for score_BK in score_CBK]), seen_CB, rules, start, source.rows
        )
        arrays |= {f'{number}_{key}': array for key, array in of_task.items()}
      yield bounds, (start, stop), arrays

  chunks = accumulator.columns(name, source.team, parts, lambda rows: progress(rows * count))
  return [TaskColumns(number, w, seen_PN, each, average, chunks, joint) for number, w in enumerate(weights)]


def _columns(
  weights: TargetWeights, score_CBK: np.ndarray, seen_CB: np.ndarray, rules: Sequence[str], start: int, rows: int
) -> dict[str, np.ndarray]:
  """What is needed of the scores of one task for a shard that starts at row `start`, for each way to average.

  The means over members of all columns but resamples, errors, all columns of the sample, the scores of each member for
  the mean of the examples, and the sums of `SubsetEffect`, with a first axis of length 1.
  """
  effect = SubsetEffect.empty(len(score_CBK), score_CBK.shape[2])
  effect.add(score_CBK, seen_CB)
  result = {'score_BC': score_CBK[:, :, 0].T.copy(), **{key: x[None] for key, x in vars(effect).items()}}
  step = sample_rows(rows)[:2].sum() or 1
  first = -start % step  # of the sample's rows in this shard
  for rule in rules:
    mean_BK = np.einsum('cbk,cb->bk', score_CBK, proxy_weights(seen_CB, rule), optimize=True)
    result |= {
      f'mean_{rule}_BK': mean_BK[:, : weights.resample_rows.start].astype(np.float32),
      f'sample_{rule}_SK': mean_BK[first::step].astype(np.float32),
    }
    if weights.resamples > 1:
      result[f'error_{rule}_B'] = mean_BK[:, weights.resample_rows].std(axis=1, ddof=1).astype(np.float32)
  return result


class TaskColumns:
  """Scores of one task for all rows, read block by block from what `score_tasks` computed. All are float32.

  Attributes:
    rows, each: N; checkpoints of a proxy.
    weights: of the task.
    average: 'all' or 'unseen', the proxies averaged over.
    subset_effect: means of rows inside and outside of the proxies' subsets; None for a joint datamodel.
  """

  def __init__(
    self,
    number: int,
    weights: TargetWeights,
    seen_PN: np.ndarray,
    each: int,
    average: str,
    chunks: Sequence[Chunk],
    joint: bool,
  ):
    self._number, self.weights, self._seen_PN, self.each, self._chunks = number, weights, seen_PN, each, chunks
    self.rows = seen_PN.shape[1]
    effects: dict[int, list[np.ndarray]] = {}
    for chunk in chunks:
      sums = chunk.select([f'{number}_{field.name}' for field in dataclasses.fields(SubsetEffect)])
      for (start, stop), *parts in zip(chunk.bounds, *sums.values(), strict=True):
        if stop > start:
          effects[start] = parts
    in_order = [effects[start] for start in sorted(effects)]
    effect = SubsetEffect(*(sum(parts, np.zeros_like(parts[0])) for parts in zip(*in_order, strict=True)))
    described = effect.describe(0, each)
    self._difference_CK, self.subset_effect = effect.difference_CK, None if joint else described
    self.average = resolve_average(average, described)

  def block(self, start: int, stop: int, q_B: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The scores of some rows, times `q_B` if given.

    Returns:
      score_N of all examples; score_CN of each datamodel; groups_NG of groups of examples and examples_NE of the first
      ones, averaged over datamodels; error_N, the standard error of score_N over the documents of the examples; and
      spread_N over proxies. The last two only with two or more resamples and proxies.
    """
    w, rule = self.weights, self.average
    keys = ['score_BC', f'mean_{rule}_BK', *([f'error_{rule}_B'] if w.resamples > 1 else [])]
    score_BC, mean_BK, *errors = self._rows(keys, start, stop)
    if rule == UNSEEN:
      seen_CB = np.repeat(self._seen_PN[:, start:stop], self.each, axis=0)
      level(mean_BK, seen_CB, self._difference_CK[:, : w.resample_rows.start])
    score_CN = np.ascontiguousarray(score_BC.T)
    by_proxy_PN = by_proxy(score_CN, self.each)
    arrays = {
      'score_N': mean_BK[:, 0].copy(),
      'score_CN': score_CN,
      'groups_NG': mean_BK[:, w.group_rows].copy(),
      'examples_NE': mean_BK[:, w.example_rows].copy(),
      **({'error_N': errors[0]} if errors else {}),
    }
    if q_B is not None:
      for key, array in arrays.items():
        array *= q_B[:, None] if key.startswith(('groups', 'examples')) else q_B
      by_proxy_PN *= q_B
    if len(by_proxy_PN) > 1:
      arrays['spread_N'] = by_proxy_PN.std(axis=0, ddof=1)
    return arrays

  def _rows(self, keys: Sequence[str], start: int, stop: int) -> list[np.ndarray]:
    """Some arrays [B, …] of the rows `start` to `stop` − 1."""
    result: list[np.ndarray] = []
    for chunk in self._chunks:
      if not chunk.overlaps(start, stop):
        continue
      arrays, at = list(chunk.select([f'{self._number}_{key}' for key in keys]).values()), 0
      result = result or [np.empty((stop - start, *x.shape[1:]), x.dtype) for x in arrays]
      for begin, end in chunk.bounds:
        low, high = max(begin, start), min(end, stop)
        if low < high:
          for whole, array in zip(result, arrays, strict=True):
            whole[low - start : high - start] = array[at + low - begin : at + high - begin]
        at += end - begin
    return result

  @property
  def sample_SR(self) -> np.ndarray:
    """Scores of the rows `sample_rows` by each resample."""
    sample_S, key, parts = sample_rows(self.rows), f'{self._number}_sample_{self.average}_SK', dict[int, np.ndarray]()
    for chunk in self._chunks:
      counts = [int(np.count_nonzero((sample_S >= begin) & (sample_S < end))) for begin, end in chunk.bounds]
      for (begin, _), part in zip(
        chunk.bounds, np.split(chunk.select([key])[key], np.cumsum(counts)[:-1]), strict=True
      ):
        if len(part):
          parts[begin] = part
    sample_SK = np.concatenate([parts[begin] for begin in sorted(parts)])
    if self.average == UNSEEN:
      level(sample_SK, np.repeat(self._seen_PN[:, sample_S], self.each, axis=0), self._difference_CK)
    return sample_SK[:, self.weights.resample_rows].copy()


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


def mix(score_TN: Sequence[np.ndarray], rule: str, weights: Sequence[float] = ()) -> np.ndarray:
  """One score per row out of one per task: plain mean (paper), mean of z-scores, or mean of ranks in [0, 1].

  `weights` are those of the tasks in that mean; () where all are the same. Needs memory for one task's scores beside
  those of all and the result, 12 bytes per row.
  """
  rows = len(score_TN[0])
  mix_N = np.empty(rows, np.float32)
  if rule == 'rank':
    total_N = np.zeros(rows)
    for score_N, weight in zip(score_TN, weights or [1.0] * len(score_TN), strict=True):
      total_N += weight * (scipy.stats.rankdata(score_N) - 1) / max(rows - 1, 1)
    return (total_N / (sum(weights) or len(score_TN))).astype(np.float32)
  means, spreads = [score_N.mean() for score_N in score_TN], [_spread(score_N) for score_N in score_TN]
  for start, stop in score_arrays.blocks(rows):
    parts = [score_N[start:stop] for score_N in score_TN]
    if rule == 'zscore':
      parts = [(part - mean) / spread for part, mean, spread in zip(parts, means, spreads, strict=True)]
    same = len(set(weights)) < 2
    mix_N[start:stop] = np.stack(parts).mean(axis=0) if same else np.average(parts, axis=0, weights=weights)
  return mix_N


def _spread(score_N: np.ndarray) -> Any:
  spread = score_N.std()
  return spread if spread > 0 else spread.dtype.type(1)


def mix_error(
  error_TN: Sequence[np.ndarray], score_TN: Sequence[np.ndarray], rule: str, weights: Sequence[float] = ()
) -> np.ndarray | None:
  """Standard error of the mixed score for independent tasks; None for ranks, which are not linear."""
  if rule == 'rank':
    return None
  spreads = [_spread(score_N) if rule == 'zscore' else np.float64(1) for score_N in score_TN]
  error_N = np.empty(len(error_TN[0]), np.float32)
  for start, stop in score_arrays.blocks(len(error_N)):
    parts = [of_task[start:stop] / spread for of_task, spread in zip(error_TN, spreads, strict=True)]
    if len(set(weights)) > 1:
      parts = [weight * part for part, weight in zip(parts, weights, strict=True)]
    error_N[start:stop] = np.sqrt(np.square(np.stack(parts)).sum(axis=0)) / (sum(weights) or len(score_TN))
  return error_N


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


def ends(examples_BE: np.ndarray, first: int = 0) -> list[dict[str, list[Any]]]:
  """For each example the rows of a block with the highest and the lowest scores, as JSON for `merge`.

  Args:
    first: number of the block's first row.
  """

  def lowest(key_B: np.ndarray) -> np.ndarray:
    count = min(_PEAKS, len(key_B))
    near = np.flatnonzero(key_B <= np.partition(key_B, count - 1)[count - 1])
    return near[np.argsort(key_B[near], kind='stable')][:count]

  result = []
  for score_B in examples_BE.T.astype(np.float64):
    mean, best = score_B.mean(), [lowest(-score_B), lowest(score_B)]
    result.append(
      {
        'rows': [(rows + first).tolist() for rows in best],
        'scores': [score_B[rows].tolist() for rows in best],
        'moments': [len(score_B), float(mean), float((score_B - mean).std())],
      }
    )
  return result


def merge(parts: Sequence[Sequence[Mapping[str, Any]]], rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows with the highest, then with the lowest scores for each example, and these scores.

  Args:
    parts: `ends` of each block, in order.
    rows: N.

  Returns:
    rows_EM: int64, at most `_PEAKS` of the highest, best first, then as many of the lowest, lowest first. Equal scores:
      the lower row first.
    score_EM: float32, in standard deviations of the example's own scores from their mean.
  """
  rows_EM, score_EM, count = [], [], min(_PEAKS, rows // 2)
  for of_example in zip(*parts, strict=True):
    size, mean, deviation = np.array([part['moments'] for part in of_example]).T
    whole = (size * mean).sum() / size.sum() if len(size) > 1 else mean[0]
    variance = (size * (deviation**2 + (mean - whole) ** 2)).sum() / size.sum()
    spread = (np.sqrt(variance) if len(size) > 1 else deviation[0]) or 1.0
    ends_M, of_ends_M = [], []
    for side, sign in enumerate((-1, 1)):
      row, score = (np.concatenate([part[key][side] for part in of_example]) for key in ('rows', 'scores'))
      order = np.argsort(sign * score, kind='stable')[:count]
      ends_M.append(row[order].astype(np.int64))
      of_ends_M.append(((score[order] - whole) / spread).astype(np.float32))
    rows_EM.append(np.concatenate(ends_M))
    score_EM.append(np.concatenate(of_ends_M))
  return np.array(rows_EM), np.array(score_EM)


class Scores:
  """A finished datamodel stage, opened for reading. Rows that a prefilter left out have NaN in place of a score.

  Attributes:
    arrays: name → array of the rows that have scores, see `docs/datamodel.md`; each is read when asked for.
    tasks: names of the targets.
  """

  def __init__(self, artifact: Artifact):
    self.arrays = score_arrays.ScoreArrays(artifact.path, artifact.manifest.get('files'))
    if not self.arrays:
      raise UserError(f'{artifact.path} was written by an older version of dsdm_jax; use another --workdir')
    self.tasks = tuple(artifact.semantics['tasks'])
    self._rule = artifact.semantics['mix']
    self._half_width = artifact.semantics['half_width']
    weights = artifact.semantics.get('weights') or [1.0] * len(self.tasks)
    self._weights: dict[str, float] = dict(zip(self.tasks, weights, strict=True))

  def score_N(self, target: str) -> np.ndarray:
    """Score of each row for a task, for 'mix' (all tasks), or for tasks joined by '+'; float32, higher is better."""
    if '+' not in target:
      return self.arrays.of_pool(self.arrays[f'score_{target}_N'])
    tasks = target.split('+')
    score_TN, weights = [self.arrays[f'score_{t}_N'] for t in tasks], [self._weights[t] for t in tasks]
    return self.arrays.of_pool(mix(score_TN, self._rule, weights))

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
    if any(f'error_{task}_N' not in self.arrays for task in tasks):
      raise UserError(f'scores for {target} have no intervals; set datamodel.bootstrap to 2 or more and run again')
    if len(tasks) == 1 and target != 'mix':
      return self._half_width[target] * self.arrays.of_pool(self.arrays[f'error_{target}_N'])
    error_TN, score_TN = ([self.arrays[f'{kind}_{task}_N'] for task in tasks] for kind in ('error', 'score'))
    error_N = mix_error(error_TN, score_TN, self._rule, [self._weights[task] for task in tasks])
    if error_N is None:
      raise UserError(f"scores for {target} are mean ranks, which have no intervals; set datamodel.mix to 'zscore'")
    return max(self._half_width[task] for task in tasks) * self.arrays.of_pool(error_N)

  def groups_NG(self, task: str) -> np.ndarray:
    """Scores for each group of a task's examples; `group_<task>_T` has the group of each example."""
    return self.arrays.of_pool(self.arrays[f'groups_{task}_NG'])

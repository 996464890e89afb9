"""Stage `datamodel`: features → scores of every row for every target and for their mix."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

from dsdm_jax.attribution import damping, ensemble, score_table, solve, target_weights
from dsdm_jax.attribution.accumulators import Partials
from dsdm_jax.attribution.features import Features, step_rows
from dsdm_jax.attribution.outputs import ProxyOutputs
from dsdm_jax.attribution.score_table import mix, mix_error
from dsdm_jax.attribution.solve import Member
from dsdm_jax.attribution.target_weights import Columns
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Examples, Targets
from dsdm_jax.errors import UserError
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import trainer

SOLUTION = 'solution.npz'  # u_<task>_CJ of each task, and q_N where scores are multiplied by it


def run(context: Context) -> dict:
  """Leaves `scores.npz`, `report.json` and `solution.npz`; `docs/datamodel.md` says what each array and number is."""
  options = context.config.datamodel
  features, targets = Features(context.inputs['features'], context), Targets(context.inputs['targets'])
  names, examples = targets.tasks, [targets.examples(task, 'target') for task in targets.tasks]
  table = [
    target_weights.make(
      [r['document'] for r in e.records], options.groups, options.bootstrap, context.config.seed, name, options.examples
    )
    for name, e in zip(names, examples, strict=True)
  ]
  partials = Partials(context.out)
  ensemble_ = list(solve.open_members(features, names, options.gram, options.unit_norm))
  proxies, mesh, q_N = context.config.proxies, make_mesh(context.config.mesh), None
  seen_PN = seen(context.inputs['proxies'], proxies.count, features.rows)
  total = (2 * len(ensemble_) + (proxies.count if options.q else 0)) * features.rows
  with context.log.bar(total=total, desc='datamodel', unit='row') as bar:
    if options.damping_rule == 'auto':
      observed = _outputs(context, examples)
      solved = solve.solve_auto(ensemble_, table, options, mesh, bar.update, partials, seen_PN, observed)
    else:
      solved = solve.solve(ensemble_, table, options, mesh, bar.update, partials)
    u = [solution.u_JK for solution in solved.solutions]
    tasks = score_table.make(
      [m.source for m in ensemble_], u, table, seen_PN, options.average, bar.update, partials, proxies.checkpoints
    )
    if options.q:
      q_N = 1 - _mean_probability(context, bar)
      for task in tasks:
        task.multiply(q_N, score_table.sample_rows(features.rows))
  for member, solution in zip(ensemble_, solved.solutions, strict=True):
    context.add_flop(_flop(member, solution.u_JK.shape[1], 1 if solved.choice is None else len(damping.FACTORS)))
  for name, task in zip(names, tasks, strict=True):
    _check(name, task.score_N)

  partials.clear()
  if context.first:
    storage.save_npz(context.out / 'scores.npz', **score_table.arrays(names, tasks, table, options.mix))
    kept = {} if q_N is None else {'q_N': q_N}
    storage.save_npz(context.out / SOLUTION, **_solution(names, table, u, features.checkpoints), **kept)
  report = score_table.report(names, tasks, options.mix) | {
    'tasks': list(names),
    'spectrum': solved.spectra,
    'condition': [list(s.condition) for s in solved.solutions],
    'damping': solved.damping,
    'damping_choice': None if solved.choice is None else solved.choice.as_json(),
  }
  if context.first:
    storage.write_json(context.out / 'report.json', report)
  for name, task in zip(names, tasks, strict=True):
    if task.subset_effect and task.average == ensemble.UNSEEN and options.average == ensemble.AUTO:
      shift = task.subset_effect['shift_sd']
      context.log.say(f'  {name}: proxies shift their own rows by {shift:+.2f} sd, so each speaks for the others only')
  return {
    'sign': 'higher: training on the row raises the output function of the target',
    'output_fn': context.inputs['features'].settings['features.output_fn'],
    'scale': _scale(options, proxies.checkpoints),
    'q': 'times 1 − mean predicted-token probability, which is averaged over proxies' if options.q else 'none',
    'average': report['average'],
    'damping': solved.damping,
    'confidence': options.confidence,
    'half_width': {
      n: target_weights.half_width(c.clusters, options.confidence) for n, c in zip(names, table, strict=True)
    },
    'mix': options.mix,
    'tasks': list(names),
    **{key: options[key] for key in ('damping_rule', 'gram', 'target_share', 'unit_norm', 'recentre')},
  }


def _solution(
  names: Sequence[str], table: Sequence[Columns], u: Sequence[np.ndarray], checkpoints: int
) -> dict[str, np.ndarray]:
  """u_CJ of the mean of each task's examples; a joint datamodel has the columns of all checkpoints side by side."""
  first = np.cumsum([0, *(len(c.weight_KT) for c in table)])
  return {
    f'u_{name}_CJ': np.concatenate([u_JK[:, at] for u_JK in u]).reshape(checkpoints, -1)
    for name, at in zip(names, first, strict=False)
  }


def _scale(options: ConfigDict, each: int) -> str:
  scale = 'goes with the square of the features' if options.recentre else 'invariant to the scale of features'
  if options.gram == 'joint':
    return f'{scale}; one datamodel of all proxies'
  return f'{scale}; mean over ' + ('proxies' if each == 1 else f'{each} checkpoints of each proxy')


def _outputs(context: Context, examples: Sequence[Examples]) -> list[np.ndarray]:
  """output_PT of each task: the output function of its examples at each proxy."""
  passes, states = _proxies(context)
  by_proxy = [[passes.of_examples(state, e.tokens_TL, e.weights_TL) for e in examples] for state in states]
  context.add_flop(passes.flop)
  return [np.stack(task) for task in zip(*by_proxy, strict=True)]


def _mean_probability(context: Context, bar: tqdm.tqdm) -> np.ndarray:
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
  folder = context.inputs['proxies'].path
  return passes, (load_state(folder / f'proxy_{c}', compiled) for c in range(config.proxies.count))


def _check(name: str, score_N: np.ndarray) -> None:
  """Raises UserError where scores order nothing: not finite, or the same for all rows."""
  if not np.isfinite(score_N).all():
    raise UserError(
      f'the score of row {int(np.argmin(np.isfinite(score_N)))} for target {name} is not a number; '
      'raise datamodel.damping, or make the features anew'
    )
  if len(score_N) > 1 and float(np.ptp(score_N)) <= 1e-6 * float(np.abs(score_N).max()):
    raise UserError(
      f'all rows have the same score for target {name}, so nothing can be chosen by it; the features are all equal or '
      'say nothing about this target: check features.layers and features.output_fn'
    )


def _flop(member: Member, targets: int, solves: int) -> float:
  """Gram, the solves, and the pass of scores."""
  rows = member.source.rows
  sizes = [stop - start for start, stop in member.blocks]
  grams = sum(2.0 * rows * size**2 + solves * size**3 / 3 for size in sizes)
  return grams + 2.0 * rows * member.source.dimension * targets


def seen(proxies: Artifact, count: int, rows: int) -> np.ndarray:
  """Whether proxy p trained on row n, bool [P, N]."""
  seen_PN = np.zeros((count, rows), bool)
  for proxy in range(count):
    seen_PN[proxy, np.load(proxies.path / f'subset_{proxy}.npy', allow_pickle=False)] = True
  return seen_PN


class Scores:
  """A finished datamodel stage, opened for reading."""

  def __init__(self, artifact: Artifact):
    with np.load(artifact.path / 'scores.npz', allow_pickle=False) as arrays:
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

    For several tasks their errors are added as of independent examples, and reach as far as those of the task with the
    fewest documents.

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

  def examples_EM(self, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the highest, then the lowest scores for each of the task's first examples, and these scores.

    See `tables.peaks`. Example e is the e-th of the task's target split.
    """
    return self._arrays[f'example_rows_{task}_EM'], self._arrays[f'example_score_{task}_EM']

  def groups_NG(self, task: str) -> np.ndarray:
    """Scores for each group of a task's examples; which example is in which stands in `group_<task>_T`."""
    return self._arrays[f'groups_{task}_NG']

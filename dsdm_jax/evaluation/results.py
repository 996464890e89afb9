"""From the log-probability of every item to `results.json` and the table on the terminal: pure functions, no files."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.core.errors import UserError
from dsdm_jax.evaluation import statistics

BASELINES = ('random', 'random_one_epoch')
# Beyond every arm against the baselines: the best-ranked data against the worst-ranked.
EXTRA = (('dsdm', 'bottom'),)
COMPARED_SPLIT = 'holdout'
# The target of arms that ignore targets.
UNTARGETED = 'any'
BETTER, WORSE, NEITHER = 'better', 'worse', 'no evidence'


def results(
  items: Mapping[str, np.ndarray],
  runs: Sequence[Mapping[str, Any]],
  *,
  confidence: float,
  documents: Mapping[tuple[str, str], Sequence[str]] | None = None,
  cost: Mapping[str, Mapping[str, float]],
  versions: Mapping[str, str],
  config: Mapping[str, Any],
  paired_seeds: bool = False,
) -> dict[str, Any]:
  """The content of `results.json`.

  Args:
    items: `logprob__<task>__<split>` and `accuracy__<task>__<split>` → float array [runs, items]; the log-probability
      of each item's right answer in nats per token, and 1 where the item counts as right, otherwise 0.
    runs: for each row of the arrays its `method`, `target_mix` and `seed`.
    confidence: of the intervals, above 0 and below 1.
    documents: (task, split) → the document of each item, in order; items of one document are not independent. None, or
      an absent key, takes each item for a document of its own.
    cost: stage → seconds and flop; handed through.
    versions: package → version; handed through.
    config: flat config; handed through.
    paired_seeds: compare models of the same seed, which share their initialisation, instead of arms as wholes. Both are
      valid; which is narrower depends on the correlation (see `statistics`), so it is to be fixed before looking. Seeds
      that only one of two arms has are then left out.

  Returns:
    A dict that JSON can hold. `arms`: a row per run, task and split, and `summary`: means over seeds with intervals.
    `comparisons`: the difference in log-probability on the holdout (positive = `method` is better), its interval,
    `p_value`, `p_holm` (Holm over all comparisons of the file), `verdict` (by the interval: better | worse |
    no evidence), `degrees_of_freedom`, `basis`.

  Raises:
    UserError: rows that do not match `runs`, values that are not finite, or fewer than two items of a task.
  """
  documents = documents or {}
  tables = dict(_tables(items, len(runs)))
  arms, summary, comparisons = [], [], []
  for (task, split), (logprob_RI, accuracy_RI) in tables.items():
    for run, logprob_I, accuracy_I in zip(runs, logprob_RI, accuracy_RI, strict=True):
      arms.append({
        **{key: run[key] for key in ('method', 'target_mix', 'seed')}, 'task': task, 'split': split,
        'logprob': float(logprob_I.mean()), 'accuracy': float(accuracy_I.mean()),
        'n_items': len(logprob_I),
      })  # fmt: skip
    documents_I = _documents(documents.get((task, split)), logprob_RI.shape[1], task, split)
    for arm in _arms(runs):
      values_SI = logprob_RI[_rows(runs, arm)]
      interval = _guarded(task, split, statistics.mean_interval, values_SI, confidence, documents_I)
      summary.append({
        'method': arm[0], 'target_mix': arm[1], 'task': task, 'split': split, 'seeds': len(values_SI),
        'logprob': interval.difference, 'low': interval.low, 'high': interval.high,
        'accuracy': float(accuracy_RI[_rows(runs, arm)].mean()), 'n_items': values_SI.shape[1],
      })  # fmt: skip
    if split == COMPARED_SPLIT:
      for method, baseline in _pairs(runs):
        comparisons.append(
          _comparison(logprob_RI, runs, method, baseline, task, split, confidence, documents_I, paired_seeds)
        )
  adjusted = statistics.holm([c['p_value'] for c in comparisons])
  for comparison, p_holm in zip(comparisons, adjusted, strict=True):
    comparison['p_holm'] = float(p_holm)
  return {
    'arms': arms,
    'summary': summary,
    'comparisons': comparisons,
    'confidence': confidence,
    'cost': {stage: dict(spent) for stage, spent in cost.items()},
    'versions': dict(versions),
    'config': dict(config),
  }


def table(results: Mapping[str, Any], width: int = 110) -> str:
  """Two plain-text tables: each arm's mean log-probability per task, then the differences with their intervals."""
  from rich import box
  from rich.console import Console
  from rich.table import Table

  percent = f'{100 * results["confidence"]:g} %'
  several = len({row['target_mix'] for row in results['summary']} - {UNTARGETED}) > 1
  rows = [row for row in results['summary'] if row['split'] == COMPARED_SPLIT]
  tasks = list(dict.fromkeys(row['task'] for row in rows))
  means = Table(box=box.SIMPLE)
  means.add_column('trained on', no_wrap=True)
  for task in tasks:
    means.add_column(task, justify='right')
  for method, target in dict.fromkeys((row['method'], row['target_mix']) for row in rows):
    cells = {r['task']: r for r in rows if (r['method'], r['target_mix']) == (method, target)}
    means.add_row(_arm_name(method, target, several), *(f'{cells[task]["logprob"]:.3f}' for task in tasks))

  differences = Table(box=box.SIMPLE)
  for column in ('task', 'comparison', 'difference and interval', 'p (Holm)', 'verdict'):
    right = column.startswith('p ')
    differences.add_column(column, no_wrap=True, justify='right' if right else 'left')
  for task in tasks:
    for c in (c for c in results['comparisons'] if c['task'] == task):
      differences.add_row(
        task, f'{_arm_name(c["method"], c["target_mix"], several)} − {c["baseline"]}',
        f'{c["difference"]:+.3f}  [{c["low"]:+.3f}, {c["high"]:+.3f}]', _p_text(c['p_holm']),
        c['verdict'],
      )  # fmt: skip
    differences.add_section()
  console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
  with console.capture() as captured:
    console.print('Log-probability of the right answer on held-out items (nats per token; higher is better)')
    console.print(means)
    console.print(f'Differences with {percent} intervals over seeds and items (above zero: the first is better)')
    console.print(differences)
  return '\n'.join(line.rstrip() for line in captured.get().splitlines()).strip('\n') + '\n'


def _arm_name(method: str, target_mix: str, several: bool) -> str:
  """The target is told only where arms of several targets are shown."""
  return f'{method} ({target_mix})' if several and target_mix != UNTARGETED else method


def _p_text(p: float) -> str:
  return '<0.001' if p < 0.001 else f'{p:.3f}'


def _tables(
  items: Mapping[str, np.ndarray], runs: int
) -> Iterator[tuple[tuple[str, str], tuple[np.ndarray, np.ndarray]]]:
  """((task, split), (logprob_RI, accuracy_RI)) in the order of the keys."""
  for key in items:
    if not key.startswith('logprob__'):
      continue
    task, split = key.removeprefix('logprob__').rsplit('__', 1)
    logprob_RI = np.asarray(items[key], np.float64)
    accuracy_RI = np.asarray(items[f'accuracy__{task}__{split}'], np.float64)
    if logprob_RI.ndim != 2 or logprob_RI.shape != accuracy_RI.shape or len(logprob_RI) != runs:
      raise UserError(
        f'evaluation of task {task}, split {split}: got {logprob_RI.shape} log-probabilities and '
        f'{accuracy_RI.shape} accuracies for {runs} runs; delete the evaluation folder and start again'
      )
    yield (task, split), (logprob_RI, accuracy_RI)


def _arms(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """(method, target_mix) of the runs, each once, in order."""
  return list(dict.fromkeys((run['method'], run['target_mix']) for run in runs))


def _rows(runs: Sequence[Mapping[str, Any]], arm: tuple[str, str]) -> list[int]:
  return [i for i, run in enumerate(runs) if (run['method'], run['target_mix']) == arm]


def _pairs(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
  """Arms to compare: all against each baseline, the baselines with each other once, then EXTRA."""
  arms = _arms(runs)
  seen = set()
  wanted = [(arm, name) for name in BASELINES for arm in arms]
  wanted += [(arm, other) for method, other in EXTRA for arm in arms if arm[0] == method]
  for arm, name in wanted:
    baseline = _baseline(arms, name, arm[1])
    if baseline is None or arm[0] == name or (baseline, arm) in seen:
      continue
    seen.add((arm, baseline))
    yield arm, baseline


def _baseline(arms: Sequence[tuple[str, str]], name: str, target: str) -> tuple[str, str] | None:
  """The arm called `name` for `target`; one for another target where there is none, since it ignores targets."""
  found = [arm for arm in arms if arm[0] == name]
  if not found:
    return None
  return (name, target) if (name, target) in found else found[0]


def _documents(names: Sequence[str] | None, n_items: int, task: str, split: str) -> np.ndarray | None:
  if names is None:
    return None
  if len(names) != n_items:
    raise UserError(
      f'evaluation of task {task}, split {split}: {len(names)} documents for {n_items} items; '
      'delete the evaluation folder and start again'
    )
  # A file that names no documents gives all items the same one, which says nothing about how they hang together.
  return np.asarray(names) if len(set(names)) > 1 else None


def _comparison(
  logprob_RI: np.ndarray,
  runs: Sequence[Mapping[str, Any]],
  method: tuple[str, str],
  baseline: tuple[str, str],
  task: str,
  split: str,
  confidence: float,
  documents_I: np.ndarray | None,
  paired_seeds: bool,
) -> dict[str, Any]:
  method_rows, baseline_rows = _rows(runs, method), _rows(runs, baseline)
  if paired_seeds:
    common = {runs[r]['seed'] for r in method_rows} & {runs[r]['seed'] for r in baseline_rows}
    method_rows, baseline_rows = (
      sorted((r for r in rows if runs[r]['seed'] in common), key=lambda r: runs[r]['seed'])
      for rows in (method_rows, baseline_rows)
    )
  interval = _guarded(
    task, split, statistics.crossed_difference, logprob_RI[method_rows],
    logprob_RI[baseline_rows], paired_seeds, confidence, documents_I,
  )  # fmt: skip
  verdict = NEITHER
  if interval.excludes_zero():
    verdict = BETTER if interval.difference > 0 else WORSE
  degrees = interval.degrees_of_freedom
  return {
    'method': method[0], 'target_mix': method[1], 'baseline': baseline[0], 'task': task, 'split': split,
    'difference': interval.difference, 'low': interval.low, 'high': interval.high,
    'p_value': interval.p_value, 'verdict': verdict, 'basis': interval.basis, 'paired_seeds': paired_seeds,
    'degrees_of_freedom': degrees if math.isfinite(degrees) else None,
  }  # fmt: skip


def _guarded(
  task: str, split: str, function: Callable[..., statistics.Interval], *arguments: Any
) -> statistics.Interval:
  try:
    return function(*arguments)
  except ValueError as error:
    raise UserError(
      f'evaluation of task {task}, split {split}: {error}; give the task more items '
      '(targets.max_examples, or a larger file), or look for a run that diverged'
    ) from error

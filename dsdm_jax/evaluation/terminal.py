"""Results as plain-text tables."""

from collections.abc import Mapping
from typing import Any

from dsdm_jax.evaluation.results import BENCHMARK, HOLDOUT, UNTARGETED

_INTERVAL = len('0.000 [-0.00, 0.00]')  # characters of a cell


def table(results: Mapping[str, Any], width: int = 110) -> str:
  """Each arm's mean log-probability per task, accuracies on benchmarks, then differences with their intervals."""
  from rich import box
  from rich.console import Console
  from rich.table import Table

  percent = f'{100 * results["confidence"]:g} %'
  several = len({row['target_mix'] for row in results['summary']} - {UNTARGETED}) > 1
  console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
  with console.capture() as captured:
    for split, metric, title in (
      (HOLDOUT, 'logprob', 'Log-probability of the right answer on held-out items (nats per token; higher is better)'),
      (BENCHMARK, 'accuracy', f'Accuracy on benchmarks, with {percent} intervals where they fit'),
    ):
      means = _means(Table(box=box.SIMPLE), results, split, metric, several, width)
      if means is not None:
        console.print(title)
        console.print(means)
    if results['comparisons']:
      console.print(f'Differences with {percent} intervals over seeds and items (above zero: the first is better)')
      console.print(_differences(Table(box=box.SIMPLE), results, several))
    for note in results.get('notes', ()):
      console.print(note)
  return '\n'.join(line.rstrip() for line in captured.get().splitlines()).strip('\n') + '\n'


def _means(means: Any, results: Mapping[str, Any], split: str, metric: str, several: bool, width: int) -> Any:
  rows = [row for row in results['summary'] if row['split'] == split]
  tasks = list(dict.fromkeys(row['task'] for row in rows))
  if not tasks:
    return None
  means.add_column('trained on', no_wrap=True)
  for task in tasks:
    means.add_column(task, justify='right')
  names = {arm: _arm_name(*arm, several) for arm in dict.fromkeys((row['method'], row['target_mix']) for row in rows)}
  # Intervals of log-probabilities hold how much items differ, by far the most: those of differences are told instead.
  broad = metric == 'accuracy' and max(map(len, names.values())) + len(tasks) * (_INTERVAL + 2) <= width - 4
  for arm, name in names.items():
    cells = {r['task']: r for r in rows if (r['method'], r['target_mix']) == arm}
    means.add_row(name, *(_cell(cells[task], metric, broad) for task in tasks))
  return means


def _cell(row: Mapping[str, Any], metric: str, broad: bool) -> str:
  low, high = row[f'{metric}_low'] if broad else None, row[f'{metric}_high'] if broad else None
  return f'{row[metric]:.3f}' + ('' if low is None or high is None else f' [{low:.2f}, {high:.2f}]')


def _differences(differences: Any, results: Mapping[str, Any], several: bool) -> Any:
  for column in ('task', 'comparison', 'difference and interval', 'p (Holm)', 'verdict'):
    right = column.startswith('p ')
    differences.add_column(column, no_wrap=True, justify='right' if right else 'left')
  for task in dict.fromkeys(c['task'] for c in results['comparisons']):
    for c in (c for c in results['comparisons'] if c['task'] == task):
      differences.add_row(
        task, f'{_arm_name(c["method"], c["target_mix"], several)} − {c["baseline"]}',
        f'{c["difference"]:+.3f}  [{c["low"]:+.3f}, {c["high"]:+.3f}]', _p_text(c['p_holm']),
        c['verdict'],
      )  # fmt: skip
    differences.add_section()
  return differences


def _arm_name(method: str, target_mix: str, several: bool) -> str:
  """The target is told only where arms of several targets are shown."""
  return f'{method} ({target_mix})' if several and target_mix != UNTARGETED else method


def _p_text(p: float) -> str:
  return '<0.001' if p < 0.001 else f'{p:.3f}'

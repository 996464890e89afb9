"""From the values of every item to `results.json`, whose schema is in `docs/evaluation.md`. Pure functions."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdm_jax.config.values import BREADTH
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import comparisons, statistics
from dsdm_jax.evaluation.comparisons import BASELINES, Arm, Options, Runs, arms, rows
from dsdm_jax.evaluation.suite import BENCHMARK, HOLDOUT

if TYPE_CHECKING:
  from rich.table import Table as RichTable

COMPARED_SPLITS = (HOLDOUT, BENCHMARK)
UNTARGETED = 'any'  # the target of arms that ignore targets
MEAN = 'mean'  # in place of a task: the mean over all tasks of a split
METRICS = ('logprob', 'accuracy')
OTHER_RULES = ('acc', 'acc_norm')  # lm-evaluation-harness's
_ONE_SELECTION = (
  'Intervals and verdicts of arms whose rows were chosen once speak of new seeds and new items for that one selection; '
  'proxies and scores were made once, and with other proxies the selection would have been another.'
)
_NO_EVIDENCE = 'No evidence of a difference is not evidence that arms are equal: look at how wide the interval is.'
_VERDICTS = (
  'A verdict is given where the p-value, adjusted by Holm over the comparisons of one task, is below {alpha:g}, and '
  'both arms have at least three seeds.'
)
_ONE_MODEL = (
  'Each arm has one model: intervals are over items alone, other seeds may differ by more, and no verdict is given.'
)
_LINES = (
  'Reference lines are n-gram models (counts, modified Kneser-Ney) of the rows that an arm was trained on, '
  "and unigrams of the targets' answers. A comparison on a task where one of its arms does not beat the best of them "
  'is marked (in right choices where the task has choices, else in log-probability): such a model is weaker than '
  'simple counting.'
)
_NO_MEAN = 'Fewer than two tasks are above n-grams: means are over all tasks, and are marked.'
_NO_BASELINE = "No two arms are compared: add 'random', the baseline, to selection.methods."


@dataclasses.dataclass(frozen=True)
class Items:
  """The values of every run on every item, and facts about the items.

  Attributes:
    values: `logprob__<task>__<split>` and `accuracy__<task>__<split>` → float array [runs, items]: the log-probability
      of the right answer in nats per token, and 1 where the item counts as right, else 0. Tasks with choices also have
      `acc__…` and `acc_norm__…`.
    documents: (task, split) → the document of each item, in order; items of one document are not independent, also
      those of two tasks. Each item is its own document where the key is absent.
    categories: (task, split) → the category of each item, for results that are averaged within categories first.
    tasks: the `tasks` part of `results.json`.
    lines: values of the reference lines of each run, `<line>__` before the keys of `values`; see `ngrams`.
  """

  values: Mapping[str, np.ndarray]
  documents: Mapping[tuple[str, str], Sequence[str]] = dataclasses.field(default_factory=dict)
  categories: Mapping[tuple[str, str], Sequence[str]] = dataclasses.field(default_factory=dict)
  tasks: Sequence[Mapping[str, Any]] = ()
  lines: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
  """One task and split.

  Attributes:
    values: metric → float64 [runs, items]; a result is the plain mean over items, macro averages included.
    documents_I: document of each item, or None where each item is its own.
    categories: number of categories that the results are averaged over; 1 for a plain mean over items.
    lines: reference line → metric → float64 [runs, items]; empty where there are none.
    below: metric → arms that do not beat the best of their lines; None where there are no lines.
  """

  task: str
  split: str
  values: Mapping[str, np.ndarray]
  documents_I: np.ndarray | None
  categories: int
  lines: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)
  below: Mapping[str, Collection[Arm]] | None = None

  def best_line(self, run_numbers: Sequence[int], metric: str) -> str | None:
    """The line with the highest mean over some runs and all items; None where no line has the metric."""
    means = {line: float(v[metric][run_numbers].mean()) for line, v in self.lines.items() if metric in v}
    return max(means, key=means.__getitem__) if means else None


def results(items: Items, runs: Runs, options: Options) -> dict[str, Any]:
  """The content of `results.json`, with empty `cost`, `versions` and `config` for the caller to fill in.

  Args:
    items: values of the runs.
    runs: `method`, `target_mix` and `seed` of each row of the arrays, and its `selection` where it is known.
    options: how arms are compared. Both settings of `paired_seeds` are valid; which one is narrower depends on a
      correlation (see `statistics`), so choose before looking at the results.

  Raises:
    UserError: rows that do not match `runs`, values that are not finite, or a task with fewer than two items.
  """
  tables = judged(list(read_tables(items, len(runs))), runs)
  by_arm: list[dict[str, Any]] = []
  summary: list[dict[str, Any]] = []
  compared: dict[str, list[dict[str, Any]]] = {metric: [] for metric in METRICS}
  for table in tables:
    by_arm += _arm_rows(table, runs)
    summary += _summary(table, runs, options.confidence)
    if table.split in COMPARED_SPLITS:
      for metric in METRICS:
        compared[metric] += _compare(table, metric, runs, options)
  averaged = means(tables, runs, below_lines(tables, runs))
  return {
    'arms': by_arm,
    'summary': summary,
    'comparisons': compared['logprob'],
    'accuracy_comparisons': compared['accuracy'],
    'means': {
      'summary': [row for table in averaged for row in _summary(table, runs, options.confidence)],
      'comparisons': [c for table in averaged for metric in METRICS for c in _compare(table, metric, runs, options)],
    },
    'lines': [row for table in tables for row in _line_rows(table, runs)],
    'tasks': [dict(task) for task in items.tasks],
    'notes': _notes(compared['logprob'], options.confidence) + _line_notes(tables, averaged, runs),
    'confidence': options.confidence,
    'cost': {},
    'versions': {},
    'config': {},
  }


def read_tables(items: Items, runs: int) -> Iterator[Table]:
  """A Table for each task and split, in the order of `items.values`.

  Raises:
    UserError: as `results`.
  """
  for key in items.values:
    if not key.startswith('logprob__'):
      continue
    task, split = key.removeprefix('logprob__').rsplit('__', 1)
    values = {
      metric: np.asarray(items.values[name], np.float64)
      for metric in (*METRICS, *OTHER_RULES)
      if (name := f'{metric}__{task}__{split}') in items.values
    }
    shapes = {values_RI.shape for values_RI in values.values()}
    if len(shapes) > 1 or 'accuracy' not in values or len(values['logprob']) != runs or values['logprob'].ndim != 2:
      raise UserError(
        f'evaluation of task {task}, split {split}: got arrays {sorted(values)} of {sorted(shapes)} for {runs} runs; '
        'delete the evaluation folder and start again'
      )
    lines: dict[str, dict[str, np.ndarray]] = {}
    for name, values_RI in items.lines.items():
      line, metric, *place = name.split('__', 2)
      if place == [f'{task}__{split}']:
        lines.setdefault(line, {})[metric] = np.asarray(values_RI, np.float64)
    count = 1
    if (task, split) in items.categories:
      category_I = items.categories[task, split]
      weight_I, count = statistics.macro_weights(category_I), len(set(category_I))
      values, *weighted = (
        {metric: statistics.reweighted(values_RI, weight_I) for metric, values_RI in by_metric.items()}
        for by_metric in (values, *lines.values())
      )
      lines = dict(zip(lines, weighted, strict=True))
    names, n_items = items.documents.get((task, split)), values['logprob'].shape[1]
    if names is not None and len(names) != n_items:
      raise UserError(
        f'evaluation of task {task}, split {split}: {len(names)} documents for {n_items} items; '
        'delete the evaluation folder and start again'
      )
    # A file without documents gives all its items the same one, which says nothing about which items depend on others.
    documents_I = np.asarray(names) if names is not None and len(set(names)) > 1 else None
    yield Table(task, split, values, documents_I, count, lines)


def judged(tables: Sequence[Table], runs: Runs) -> list[Table]:
  """The tables that have lines, with the arms `below` them; others as they are.

  An arm is below in what the task asks for: right choices where it has choices, which alone give lines an accuracy, and
  else the log-probability. This marks comparisons of both metrics.
  """

  def marked(table: Table) -> dict[str, Collection[Arm]]:
    decides = 'accuracy' if any('accuracy' in values for values in table.lines.values()) else 'logprob'
    return dict.fromkeys(METRICS, tuple(arm for arm in arms(runs) if _is_below(table, rows(runs, arm), decides)))

  return [dataclasses.replace(table, below=marked(table)) if table.lines else table for table in tables]


def _is_below(table: Table, own: Sequence[int], metric: str) -> bool:
  """Whether the mean over runs and items is at most that of the best line of the same runs."""
  line = table.best_line(own, metric)
  return line is not None and bool(table.values[metric][own].mean() <= table.lines[line][metric][own].mean())


def below_lines(tables: Sequence[Table], runs: Runs) -> list[tuple[str, str]]:
  """(task, split) of the judged tables that means leave out: the baseline is below its lines in log-probability.

  The baseline decides for all arms, so that they have the same tasks and no method has a say in its own test.
  """
  own = rows(runs, _baseline(runs))
  return [(t.task, t.split) for t in tables if t.below is not None and _is_below(t, own, 'logprob')]


def _baseline(runs: Runs) -> Arm:
  known = arms(runs)
  return next((arm for name in BASELINES for arm in known if arm[0] == name), known[0])


def means(tables: Sequence[Table], runs: Runs, below: Collection[tuple[str, str]] = ()) -> list[Table]:
  """The mean over the tasks of each split, and over the held-out tasks of each mix that an arm was selected for.

  Breadth is no task of either. The latter have the mix's name, such as 'lambada+squad'; a mix of all tasks gets no mean
  of its own. A mean leaves out tasks in `below`; where that leaves fewer than two, it is over all, with all arms
  `below` in log-probability, and in accuracy if the baseline is marked on one of the tasks.
  """
  tables = [table for table in tables if table.task != BREADTH or table.split == BENCHMARK]
  selections = [(split, MEAN, [table for table in tables if table.split == split]) for split in COMPARED_SPLITS]
  held_out = {table.task for table in tables if table.split == HOLDOUT}
  mixes = {'+'.join(task for task in run['target_mix'].split('+') if task != BREADTH) for run in runs}
  for mix in sorted(mix for mix in mixes if '+' in mix):
    tasks = set(mix.split('+'))
    if tasks < held_out:
      selections.append((HOLDOUT, mix, [table for table in tables if table.task in tasks and table.split == HOLDOUT]))
  averaged, baseline = [], _baseline(runs)
  for split, name, selected in selections:
    above = [table for table in selected if (table.task, table.split) not in below]
    marks: dict[str, Collection[Arm]] = dict.fromkeys(METRICS, ())
    if len(above) < 2 and len(above) < len(selected):
      above, marks['logprob'] = selected, arms(runs)
      if any(table.below and baseline in table.below['accuracy'] for table in selected):
        marks['accuracy'] = arms(runs)
    if len(above) > 1:
      mean = mean_table(above, split, name)
      has_lines = any(table.below is not None for table in above)
      averaged.append(dataclasses.replace(mean, below=marks) if has_lines else mean)
  return averaged


def mean_table(selected: Sequence[Table], split: str, name: str = MEAN) -> Table:
  """At least two tasks of a split as one Table, each task with the same weight.

  A model's seed moves all tasks at once, and a document can have items of several tasks, so the interval of a mean is
  not that of independent tasks.
  """
  counts = [table.values['logprob'].shape[1] for table in selected]
  weight_I = statistics.macro_weights(np.repeat([table.task for table in selected], counts).tolist())
  values = {
    metric: statistics.reweighted(np.concatenate([t.values[metric] for t in selected], axis=1), weight_I)
    for metric in METRICS
  }
  documents: list[Any] = []
  for table, count in zip(selected, counts, strict=True):
    own_I = table.documents_I
    documents += [f'{table.task}/{item}' for item in range(count)] if own_I is None else own_I.tolist()
  return Table(name, split, values, np.asarray(documents), len(selected))


def _arm_rows(table: Table, runs: Runs) -> Iterator[dict[str, Any]]:
  for index, run in enumerate(runs):
    yield {
      **{key: run[key] for key in ('method', 'target_mix', 'seed')},
      'task': table.task,
      'split': table.split,
      **{metric: _mean(table, metric, [index]) for metric in (*METRICS, *OTHER_RULES)},
      'n_items': table.values['logprob'].shape[1],
    }


def _summary(table: Table, runs: Runs, confidence: float) -> Iterator[dict[str, Any]]:
  """Means over seeds with intervals: a row per arm."""
  labels = {'task': table.task, 'split': table.split}
  for arm in arms(runs):
    own = rows(runs, arm)
    logprob, accuracy = (
      comparisons.guarded(labels, statistics.mean_interval, table.values[metric][own], confidence, table.documents_I)
      for metric in METRICS
    )
    accuracy = accuracy.within(0.0, 1.0)
    yield (
      {'method': arm[0], 'target_mix': arm[1], **labels, 'seeds': len(own)}
      | {'logprob': logprob.difference, 'low': logprob.low, 'high': logprob.high}
      | {'accuracy': accuracy.difference, 'accuracy_low': accuracy.low, 'accuracy_high': accuracy.high}
      | {metric: _mean(table, metric, own) for metric in OTHER_RULES}
      | {'n_items': table.values['logprob'].shape[1]}
      | _over_line(table, arm, own, confidence)
    )


def _over_line(table: Table, arm: Arm, own: Sequence[int], confidence: float) -> dict[str, Any]:
  """What an arm's log-probability is above that of its best line, seed by seed, with its interval."""
  line = table.best_line(own, 'logprob')
  over: dict[str, Any] = dict.fromkeys(('best_line', 'over_line', 'over_line_low', 'over_line_high'))
  if line is not None:
    difference_SI = table.values['logprob'][own] - table.lines[line]['logprob'][own]
    labels = {'task': table.task, 'split': table.split}
    interval = comparisons.guarded(labels, statistics.mean_interval, difference_SI, confidence, table.documents_I)
    over = dict(zip(over, (line, interval.difference, interval.low, interval.high), strict=True))
  return over | {'below_ngrams': None if table.below is None else arm in table.below['logprob']}


def _line_rows(table: Table, runs: Runs) -> Iterator[dict[str, Any]]:
  """Means over seeds: a row per arm and reference line."""
  for arm in arms(runs):
    own = rows(runs, arm)
    for line, values in table.lines.items():
      yield (
        {'method': arm[0], 'target_mix': arm[1], 'task': table.task, 'split': table.split, 'line': line}
        | {m: float(values[m][own].mean()) if m in values else None for m in (*METRICS, *OTHER_RULES)}
      )


def _mean(table: Table, metric: str, run_numbers: Sequence[int]) -> float | None:
  return float(table.values[metric][list(run_numbers)].mean()) if metric in table.values else None


def _compare(table: Table, metric: str, runs: Runs, options: Options) -> list[dict[str, Any]]:
  """Comparisons of arms; `below_ngrams` where one of the two is below its reference lines in what the task asks for."""
  compared = comparisons.compare(
    table.values[metric], runs, table.documents_I, options, task=table.task, split=table.split, metric=metric
  )
  for c in compared:
    pair = (c['method'], c['target_mix']), comparisons.baseline_arm(arms(runs), c['baseline'], c['target_mix'])
    c['below_ngrams'] = None if table.below is None else any(arm in table.below[metric] for arm in pair)
  return compared


def _notes(compared: Sequence[Mapping[str, Any]], confidence: float) -> list[str]:
  """Sentences that belong beside the intervals."""
  if not compared:
    return [_NO_BASELINE]
  notes = [_VERDICTS.format(alpha=round(1 - confidence, 6)), _NO_EVIDENCE]
  if any(c['conditional'] for c in compared):
    notes.append(_ONE_SELECTION)
  if any('items only' in c['basis'] for c in compared):
    notes.append(_ONE_MODEL)
  return notes


def _line_notes(tables: Sequence[Table], averaged: Sequence[Table], runs: Runs) -> list[str]:
  if all(table.below is None for table in tables):
    return []
  notes = [_LINES]
  if below := [f'{task} ({split})' for task, split in below_lines(tables, runs)]:
    notes.append(f'Below n-grams by the baseline, and so in no mean over tasks: {", ".join(below)}.')
  if any(table.below and table.below['logprob'] for table in averaged):
    notes.append(_NO_MEAN)
  return notes


def shortened(results: Mapping[str, Any]) -> str:
  """A sentence about the tasks of which most prompts were shortened to fit, which belongs below a headline; or ''."""
  counts: dict[str, np.ndarray] = {}  # task → its shortened prompts, and all of them
  for task in results['tasks']:
    counts.setdefault(task['task'], np.zeros(2, int))
    counts[task['task']] += task['prompts']['shortened'], task['n_items']
  most = {task: count for task, count in counts.items() if 2 * count[0] > count[1]}
  if not most:
    return ''
  listed = ', '.join(f'{task} ({lost:,} of {count:,})' for task, (lost, count) in most.items())
  return (
    f'Most prompts of {listed} are longer than pool.length: they lose shots or the beginning of their context, which '
    'may hold what the question is about.'
  )


def prompt_row(task: Mapping[str, Any]) -> tuple[str, str, str]:
  """Items, shots and cut contexts of an entry of `tasks`, in words."""
  lost = task['prompts']
  shots = ', '.join(f'{count:,} with {number}' for number, count in lost['shots'].items())
  cut = f'{lost["contexts_cut"]:,}'
  if lost['contexts_cut']:
    mean = lost['tokens_cut'] / lost['contexts_cut']
    cut += f' (by {mean:,.0f} tokens on average, at most {lost["most_tokens_cut"]:,})'
  return f'{task["n_items"]:,}', shots, cut


def text_tables(results: Mapping[str, Any], width: int = 110) -> str:
  """`results.json` as plain text, for `results.md`: means, accuracies on benchmarks, differences with intervals."""
  from rich import box
  from rich.console import Console
  from rich.table import Table as RichTable

  percent = f'{100 * results["confidence"]:g} %'
  several = len({row['target_mix'] for row in results['summary']} - {UNTARGETED}) > 1
  console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False, markup=False)
  with console.capture() as captured:
    if sentence := shortened(results):
      console.print(sentence)
    for split, metric, title in (
      (HOLDOUT, 'logprob', 'Log-probability of the right answer on held-out items (nats per token; higher is better)'),
      (BENCHMARK, 'accuracy', f'Accuracy on benchmarks, with {percent} intervals where they fit'),
    ):
      rows_of_split = [row for row in results['summary'] if row['split'] == split]
      if rows_of_split:
        console.print(title)
        console.print(_fill_means(RichTable(box=box.SIMPLE), rows_of_split, metric, several, width))
    if results['comparisons']:
      console.print(f'Differences with {percent} intervals over seeds and items (above zero: the first is better)')
      console.print(_fill_differences(RichTable(box=box.SIMPLE), results['comparisons'], several))
    if results.get('primary'):
      console.print('Primary comparisons, named before the study, with p-values adjusted over these alone')
      console.print(_fill_differences(RichTable(box=box.SIMPLE), results['primary'], several))
    if results.get('multiplier'):
      console.print(f'Compute that random data needs for the same result: multipliers with {percent} intervals')
      console.print(_fill_multipliers(RichTable(box=box.SIMPLE), results['multiplier']['arms'], several))
    if results.get('lines'):
      console.print(f'Log-probability above the best reference line, with {percent} intervals (docs/evaluation.md)')
      console.print(_fill_lines(RichTable(box=box.SIMPLE), results['summary'], several))
    if results['tasks']:
      console.print('Prompts: their shots, and contexts of which the beginning was cut')
      table = RichTable('task', 'split', 'items', 'shots', 'contexts cut', box=box.SIMPLE)
      for task in results['tasks']:
        table.add_row(task['task'], task['split'], *prompt_row(task))
      console.print(table)
    for note in results.get('notes', ()):
      console.print(note)
  return '\n'.join(line.rstrip() for line in captured.get().splitlines()).strip('\n') + '\n'


def main_table(results: Mapping[str, Any], columns: int = 80) -> str:
  """The first arm against its first baseline, task by task and with shares of right answers, in at most 80 columns."""
  compared = results['comparisons']
  if not compared:
    return _NO_BASELINE
  first = compared[0]
  pair = [c for c in compared if all(c[k] == first[k] for k in ('method', 'target_mix', 'baseline'))]
  means = {(r['method'], r['target_mix'], r['task'], r['split']): r['accuracy'] for r in results['summary']}
  chance = {(t['task'], t['split']): t.get('chance') for t in results['tasks']}
  right = f'right ({first["baseline"]}, guessing)'
  rows = [('task', 'nats/token', f'{100 * results["confidence"]:g} % interval', right, '')]
  for c in pair:
    arm = means.get((c['method'], c['target_mix'], c['task'], c['split']))
    of_baseline = [v for (m, _, t, s), v in means.items() if (m, t, s) == (c['baseline'], c['task'], c['split'])]
    baseline = of_baseline[0] if of_baseline else None
    shares = [arm, baseline, chance.get((c['task'], c['split']))]
    right = '{} ({}, {})'.format(*('–' if share is None else f'{share:.0%}' for share in shares))
    verdict = '' if min(c['seeds']) < 3 else c['verdict']
    rows.append((c['task'], f'{c["difference"]:+.3f}', f'[{c["low"]:+.3f}, {c["high"]:+.3f}]', right, verdict))
  widths = [max(len(row[n]) for row in rows) for n in range(5)]
  widths[0] = min(widths[0], columns - sum(widths[1:]) - 10)
  lines = [f'{first["method"]} − {first["baseline"]} (above zero: {first["method"]} is better)']
  for name, *cells in rows:
    short = name if len(name) <= widths[0] else f'{name[: widths[0] - 1]}…'
    shown = [cell.rjust(width) for cell, width in zip(cells[:-1], widths[1:], strict=False)]
    lines.append('  '.join(['', short.ljust(widths[0]), *shown, cells[-1]]).rstrip())
  return '\n'.join(lines)


def _fill_means(
  table: 'RichTable', summary: Sequence[Mapping[str, Any]], metric: str, several: bool, width: int
) -> 'RichTable':
  tasks = list(dict.fromkeys(row['task'] for row in summary))
  names = {arm: _arm_name(*arm, several) for arm in arms(summary)}
  # Intervals of log-probabilities mostly show how much items differ, so only those of differences are printed.
  cell_width = len('0.000 [-0.00, 0.00]') + 2
  intervals = metric == 'accuracy' and max(map(len, names.values())) + len(tasks) * cell_width <= width - 4
  table.add_column('trained on', no_wrap=True)
  for task in tasks:
    table.add_column(task, justify='right')
  for arm, name in names.items():
    cells = {}
    for row in (summary[place] for place in rows(summary, arm)):
      low, high = (row[f'{metric}_{end}'] if intervals else None for end in ('low', 'high'))
      interval = '' if low is None or high is None else f' [{low:.2f}, {high:.2f}]'
      cells[row['task']] = f'{row[metric]:.3f}{interval}'
    table.add_row(name, *(cells[task] for task in tasks))
  return table


def _fill_differences(table: 'RichTable', compared: Sequence[Mapping[str, Any]], several: bool) -> 'RichTable':
  for column in ('task', 'comparison', 'difference and interval', 'p (Holm)', 'verdict'):
    table.add_column(column, no_wrap=True, justify='right' if column.startswith('p ') else 'left')
  for task in dict.fromkeys(c['task'] for c in compared):
    for c in (c for c in compared if c['task'] == task):
      table.add_row(
        task,
        f'{_arm_name(c["method"], c["target_mix"], several)} − {c["baseline"]}',
        f'{c["difference"]:+.3f}  [{c["low"]:+.3f}, {c["high"]:+.3f}]',
        '<0.001' if c['p_holm'] < 0.001 else f'{c["p_holm"]:.3f}',
        c['verdict'],
      )
    table.add_section()
  return table


def _fill_multipliers(table: 'RichTable', multipliers: Sequence[Mapping[str, Any]], several: bool) -> 'RichTable':
  """Of the means over tasks where there are any, else of every task."""
  for column in ('task', 'trained on', 'gross', 'in seconds', 'net', 'in seconds'):
    table.add_column(column, no_wrap=True)
  averaged = [row for row in multipliers if row['task'] == MEAN]
  for row in averaged or multipliers:
    cells = (row[kind] for kind in ('gross', 'gross_seconds', 'net', 'net_seconds'))
    name = _arm_name(row['method'], row['target_mix'], several)
    table.add_row(row['task'], name, *('' if cell is None else cell['text'] for cell in cells))
  return table


def _fill_lines(table: 'RichTable', summary: Sequence[Mapping[str, Any]], several: bool) -> 'RichTable':
  for column in ('task', 'trained on', 'best line', 'model − line', ''):
    table.add_column(column, no_wrap=True)
  shown = [row for row in summary if row['best_line'] is not None]
  for task in dict.fromkeys((row['task'], row['split']) for row in shown):
    for row in (row for row in shown if (row['task'], row['split']) == task):
      table.add_row(
        row['task'],
        _arm_name(row['method'], row['target_mix'], several),
        f'{row["logprob"] - row["over_line"]:.3f} {row["best_line"]}',
        f'{row["over_line"]:+.3f}  [{row["over_line_low"]:+.3f}, {row["over_line_high"]:+.3f}]',
        'below n-grams' if row['below_ngrams'] else '',
      )
    table.add_section()
  return table


def _arm_name(method: str, target_mix: str, several: bool) -> str:
  """The method, with its target where the table has arms of several targets."""
  return f'{method} ({target_mix})' if several and target_mix != UNTARGETED else method

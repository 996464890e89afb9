"""From the values of every item to `results.json`: pure functions, no files. `docs/evaluation.md` has the schema."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import comparisons, statistics
from dsdm_jax.evaluation.comparisons import Options, Runs, arms, rows

HOLDOUT, BENCHMARK = 'holdout', 'benchmark'
COMPARED_SPLITS = (HOLDOUT, BENCHMARK)
# The target of arms that ignore targets.
UNTARGETED = 'any'
MEAN = 'mean'  # in the place of a task: over all tasks of a split
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


@dataclasses.dataclass(frozen=True)
class Table:
  """One task and split.

  Attributes:
    values: metric → float64 [runs, items]: plain means over items are the task's results, macro averages included.
    documents_I: of each item, or None where each is its own.
    categories: over which the results are averaged; 1 where items are averaged as they are.
  """

  task: str
  split: str
  values: Mapping[str, np.ndarray]
  documents_I: np.ndarray | None
  categories: int


def results(
  items: Mapping[str, np.ndarray],
  runs: Runs,
  *,
  confidence: float,
  documents: Mapping[tuple[str, str], Sequence[str]] | None = None,
  categories: Mapping[tuple[str, str], Sequence[str]] | None = None,
  tasks: Sequence[Mapping[str, Any]] = (),
  cost: Mapping[str, Mapping[str, float]],
  versions: Mapping[str, str],
  config: Mapping[str, Any],
  paired_seeds: bool = False,
  resamples: int = 10_000,
  seed: int = 0,
  baselines: tuple[str, ...] = comparisons.BASELINES,
) -> dict[str, Any]:
  """The content of `results.json`.

  Args:
    items: `logprob__<task>__<split>` and `accuracy__<task>__<split>` → float array [runs, items]; the log-probability
      of each item's right answer in nats per token, and 1 where the item counts as right, otherwise 0. `acc__…` and
      `acc_norm__…` likewise where the task has choices.
    runs: for each row of the arrays its `method`, `target_mix` and `seed`, and `selection` where it is known.
    confidence: of the intervals, above 0 and below 1.
    documents: (task, split) → the document of each item, in order; items of one document are not independent. None, or
      an absent key, takes each item for a document of its own.
    categories: (task, split) → the category of each item, where results are averaged within each category first.
    tasks: what `results.json` says of each task; handed through.
    cost: stage → seconds and flop; handed through.
    versions: package → version; handed through.
    config: flat config; handed through.
    paired_seeds: compare models of the same seed, which share their initialisation, instead of arms as wholes. Both are
      valid; which is narrower depends on the correlation (see `statistics`), so it is to be fixed before looking. Seeds
      that only one of two arms has are then left out.
    resamples: see `comparisons.Options`; seed: of the bootstrap; baselines: likewise.

  Raises:
    UserError: rows that do not match `runs`, values that are not finite, or fewer than two items of a task.
  """
  options = Options(confidence, paired_seeds, resamples, seed, baselines)
  tables = list(read_tables(items, len(runs), documents or {}, categories or {}))
  by_arm: list[dict[str, Any]] = []
  summary: list[dict[str, Any]] = []
  compared: dict[str, list[dict[str, Any]]] = {metric: [] for metric in METRICS}
  for table in tables:
    by_arm += _arm_rows(table, runs)
    summary += _summary(table, runs, confidence)
    if table.split in COMPARED_SPLITS:
      for metric in METRICS:
        compared[metric] += _compare(table, metric, runs, options)
  several = means(tables, runs)
  return {
    'arms': by_arm,
    'summary': summary,
    'comparisons': compared['logprob'],
    'accuracy_comparisons': compared['accuracy'],
    'means': {
      'summary': [row for table in several for row in _summary(table, runs, confidence)],
      'comparisons': [c for table in several for metric in METRICS for c in _compare(table, metric, runs, options)],
    },
    'tasks': [dict(task) for task in tasks],
    'notes': _notes(compared['logprob'], confidence),
    'confidence': confidence,
    'cost': {stage: dict(spent) for stage, spent in cost.items()},
    'versions': dict(versions),
    'config': dict(config),
  }


def read_tables(
  items: Mapping[str, np.ndarray],
  runs: int,
  documents: Mapping[tuple[str, str], Sequence[str]],
  categories: Mapping[tuple[str, str], Sequence[str]],
) -> Iterator[Table]:
  """A Table for each task and split of `items`, in the order of the keys; see `results`."""
  for key in items:
    if not key.startswith('logprob__'):
      continue
    task, split = key.removeprefix('logprob__').rsplit('__', 1)
    name = (task, split)
    values = {
      metric: np.asarray(items[found], np.float64)
      for metric in (*METRICS, *OTHER_RULES) if (found := f'{metric}__{task}__{split}') in items
    }  # fmt: skip
    shapes = {values_RI.shape for values_RI in values.values()}
    if len(shapes) > 1 or 'accuracy' not in values or len(values['logprob']) != runs or values['logprob'].ndim != 2:
      raise UserError(
        f'evaluation of task {task}, split {split}: got arrays {sorted(values)} of {sorted(shapes)} for {runs} runs; '
        'delete the evaluation folder and start again'
      )
    count = 1
    if name in categories:
      weight_I = statistics.macro_weights(categories[name])
      count = len(set(categories[name]))
      values = {metric: statistics.reweighted(values_RI, weight_I) for metric, values_RI in values.items()}
    documents_I = _documents(documents.get(name), values['logprob'].shape[1], task, split)
    yield Table(task, split, values, documents_I, count)


def means(tables: Sequence[Table], runs: Runs) -> list[Table]:
  """The mean over all tasks of each split, and over the held-out tasks of each mix that some arm was chosen for.

  The latter bear the mix's name, such as 'lambada+squad'; there is none for a mix of all tasks.
  """
  found = [mean_table(tables, split) for split in COMPARED_SPLITS]
  held_out = {table.task for table in tables if table.split == HOLDOUT}
  for mix in sorted({run['target_mix'] for run in runs if '+' in run['target_mix']}):
    tasks = set(mix.split('+'))
    if tasks < held_out:
      found.append(mean_table([table for table in tables if table.task in tasks], HOLDOUT, mix))
  return [table for table in found if table is not None]


def mean_table(tables: Sequence[Table], split: str, name: str = MEAN) -> Table | None:
  """All tasks of a split as one Table, each task weighing the same; None where there are fewer than two.

  A model's seed moves all tasks at once, so the interval of a mean is not that of independent tasks.
  """
  chosen = [table for table in tables if table.split == split]
  if len(chosen) < 2:
    return None
  tasks = [table.task for table in chosen for _ in range(table.values['logprob'].shape[1])]
  weight_I = statistics.macro_weights(tasks)
  values = {
    metric: statistics.reweighted(np.concatenate([t.values[metric] for t in chosen], axis=1), weight_I)
    for metric in METRICS
  }
  documents = []
  for table in chosen:
    count = table.values['logprob'].shape[1]
    own_I = np.arange(count) if table.documents_I is None else table.documents_I
    documents += [f'{table.task}/{document}' for document in own_I]
  return Table(name, split, values, np.asarray(documents), len(chosen))


def _arm_rows(table: Table, runs: Runs) -> Iterator[dict[str, Any]]:
  for index, run in enumerate(runs):
    yield {
      **{key: run[key] for key in ('method', 'target_mix', 'seed')}, 'task': table.task, 'split': table.split,
      **{metric: _mean(table, metric, [index]) for metric in (*METRICS, *OTHER_RULES)},
      'n_items': table.values['logprob'].shape[1],
    }  # fmt: skip


def _summary(table: Table, runs: Runs, confidence: float) -> Iterator[dict[str, Any]]:
  """Means over seeds with intervals: a row per arm."""
  labels = {'task': table.task, 'split': table.split}
  for arm in arms(runs):
    chosen = rows(runs, arm)
    logprob, accuracy = (
      comparisons.guarded(
        labels, statistics.mean_interval, table.values[metric][chosen], confidence, table.documents_I
      ) for metric in METRICS
    )  # fmt: skip
    yield {
      'method': arm[0], 'target_mix': arm[1], **labels, 'seeds': len(chosen),
      'logprob': logprob.difference, 'low': logprob.low, 'high': logprob.high,
      'accuracy': accuracy.difference, 'accuracy_low': accuracy.low, 'accuracy_high': accuracy.high,
      **{metric: _mean(table, metric, chosen) for metric in OTHER_RULES},
      'n_items': table.values['logprob'].shape[1],
    }  # fmt: skip


def _mean(table: Table, metric: str, chosen: Sequence[int]) -> float | None:
  return float(table.values[metric][list(chosen)].mean()) if metric in table.values else None


def _compare(table: Table, metric: str, runs: Runs, options: Options) -> list[dict[str, Any]]:
  return comparisons.compare(
    table.values[metric], runs, table.documents_I, options, task=table.task, split=table.split, metric=metric
  )


def _notes(compared: Sequence[Mapping[str, Any]], confidence: float) -> list[str]:
  """Sentences that belong beside the intervals."""
  if not compared:
    return []
  notes = [_VERDICTS.format(alpha=round(1 - confidence, 6)), _NO_EVIDENCE]
  if any(c['conditional'] for c in compared):
    notes.append(_ONE_SELECTION)
  if any('items only' in c['basis'] for c in compared):
    notes.append('One model stands for each arm: intervals are over items alone, and other seeds may differ by more.')
  return notes


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

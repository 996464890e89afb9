"""The words of the report: names, numbers, and the sentences that follow from the results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsdm_jax.config.methods import label
from dsdm_jax.data.targets.benchmarks import MEAN_CROSS_ENTROPY, SHARED_CONTINUATION
from dsdm_jax.evaluation.comparisons import BASELINES, FEWEST_SEEDS
from dsdm_jax.evaluation.results import MEAN, UNTARGETED
from dsdm_jax.evaluation.suite import BENCHMARK, HOLDOUT

# In place of what is no task. Tasks have the names that the user wrote, and are not capitalised.
_NO_TASK = {
  'mix': 'all targets together',
  'mean': 'mean of all tasks',
  'mean of benchmarks': 'mean of all benchmarks',
}
MINUS = '−'


def several_targets(targets: Iterable[str]) -> bool:
  """Whether there are arms for different targets, so that their names must include the target."""
  return len(set(targets) - {UNTARGETED}) > 1


def task_name(task: str) -> str:
  return _NO_TASK.get(task, task)


def task_key(task: str, split: str) -> str:
  """Identifies a task and split, also in file names: the task, and for a mean the split unless it is the holdout."""
  return f'{task} of {split}s' if task == MEAN and split != HOLDOUT else task


def row_task_name(row: Mapping[str, Any]) -> str:
  """Name of the task of a row of results; benchmarks are marked."""
  name = task_name(task_key(row['task'], row['split']))
  return f'{name} (benchmark)' if row['split'] == BENCHMARK and row['task'] != MEAN else name


def below(row: Mapping[str, Any]) -> str:
  """The mark of a row of results whose arm, or one of whose arms, does not beat its reference lines; or nothing."""
  return 'below n-grams' if row.get('below_ngrams') else ''


def heading(text: str) -> str:
  """Words of ours with a capital; for names of users there is none."""
  return text[:1].upper() + text[1:]


def task_heading(task: str) -> str:
  """A task as a heading: its name as it is, or words of ours with a capital."""
  return heading(_NO_TASK[task]) if task in _NO_TASK else task


def arm_name(method: str, target_mix: str, several: bool) -> str:
  """Name of an arm, with its target if there are arms of `several` targets and the method uses targets."""
  name = label(method)
  if not several or target_mix == UNTARGETED:
    return name
  return f'{name} for {task_name(target_mix)}'


def signed(value: float | None, digits: int = 2) -> str:
  """Fixed digits with a sign and a true minus, none for zero; '–' for None."""
  if value is None:
    return '–'
  text = f'{abs(value):.{digits}f}'
  if float(text) == 0:
    return text
  return ('+' if value > 0 else MINUS) + text


def plain(value: float | None, digits: int = 2) -> str:
  return signed(value, digits).removeprefix('+')


def percent(share: float | None, digits: int = 1) -> str:
  """A share in per cent, with the sign after a no-break space; '–' for None."""
  return '–' if share is None or math.isnan(share) else f'{plain(100 * share, digits)}\u00a0%'


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
  """[low, high]; nothing without an interval. A no-break space keeps it on one line."""
  if low is None and high is None:
    return ''
  return f'[{plain(low, digits)},\u00a0{plain(high, digits)}]'


def count(value: float) -> str:
  """Thousands separated by commas."""
  return f'{int(value):,}'


def scientific(value: float) -> str:
  """Two digits and a power of ten; '–' for zero."""
  if value <= 0:
    return '–'
  exponent = math.floor(math.log10(value))
  mantissa = round(value / 10**exponent, 1)
  if mantissa >= 10:
    mantissa, exponent = mantissa / 10, exponent + 1
  superscript = str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))
  return f'{mantissa:.1f}\u202f×\u202f10{superscript}'


def duration(seconds: float) -> str:
  if round(seconds, 1) < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'


def size(count: float) -> str:
  """Bytes in powers of 1,000, with three digits."""
  for unit in ('bytes', 'kB', 'MB', 'GB', 'TB'):
    if count < 999.5 or unit == 'TB':
      return f'{count:.3g} {unit}' if count < 100 else f'{count:.0f} {unit}'
    count /= 1000
  raise AssertionError


def p_value(p: float | None) -> str:
  if p is None:
    return '–'
  return '< 0.001' if p < 0.001 else f'{p:.3f}'


def joined(phrases: Sequence[str]) -> str:
  """a, b and c"""
  if len(phrases) < 2:
    return ''.join(phrases)
  return f'{", ".join(phrases[:-1])} and {phrases[-1]}'


# Arms that no headline is about: what others are compared with, and controls that must not win.
_NO_SUBJECTS = (*BASELINES, 'bottom', 'random_again', 'dsdm_shifted', 'dsdm_permuted')
_MOST_NAMED = 4  # tasks in one sentence
_CHOICE_RULES = (MEAN_CROSS_ENTROPY, SHARED_CONTINUATION)
_IN_NATS = 'In log-probability,'  # begins a sentence that follows one about right choices
_AGAINST = {'random': 'as many passes over random data', 'random_one_epoch': 'a single pass over random data'}


def subject(results: Mapping[str, Any]) -> str | None:
  """The method that headlines are about: DsDm, or else the first that is neither baseline nor control."""
  methods = dict.fromkeys(c['method'] for c in results['comparisons'])
  return 'dsdm' if 'dsdm' in methods else next((m for m in methods if m not in _NO_SUBJECTS), None)


def main_comparisons(results: Mapping[str, Any], baseline: str = '') -> list[Mapping[str, Any]]:
  """How the subject compares with `baseline` in log-probability, by task; by default with the first that the run has.

  Of several arms the one for all targets counts, or else on each task the first arm that is for it.
  """
  about = [c for c in results['comparisons'] if c['method'] == subject(results)]
  names = [name for name in BASELINES if name in {c['baseline'] for c in about}]
  baseline = baseline or next(iter(names), '')
  rows = [c for c in about if c['baseline'] == baseline]
  mixes = {c['target_mix'] for c in rows}
  if 'mix' in mixes:
    return [c for c in rows if c['target_mix'] == 'mix']
  if len(mixes) == 1:
    return rows
  own = {c['task']: c['target_mix'] for c in reversed(rows) if c['task'] in c['target_mix'].split('+')}
  return [c for c in rows if own.get(c['task']) == c['target_mix']]


def by_task(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
  """Name of each task → the comparisons of the subject with every baseline of the run."""
  tasks: dict[str, list[Mapping[str, Any]]] = {}
  for baseline in BASELINES:
    for c in main_comparisons(results, baseline):
      tasks.setdefault(row_task_name(c), []).append(c)
  return tasks


def title(results: Mapping[str, Any]) -> str:
  """The finding and its strength in one sentence: how the subject compares with random data, over the tasks.

  It is better on a task where it is better than every baseline, and worse where it is worse than any.
  """
  tasks = list(by_task(results).values())
  rows = [c for of_task in tasks for c in of_task]
  if not rows:
    return 'Data selection with datamodels'
  chosen = f'chosen by {label(rows[0]["method"])}'
  if too_few_seeds(rows):
    seeds = min(min(c['seeds']) for c in rows)
    models = f'{seeds} models of each kind are' if seeds > 1 else 'one model of each kind is'
    return f'A first look at data {chosen}: {models} too few for a verdict'
  worse = sum(any(c['verdict'] == 'worse' for c in of_task) for of_task in tasks)
  better = sum(all(c['verdict'] == 'better' for c in of_task) for of_task in tasks)
  weak = sum(any(c.get('below_ngrams') for c in of_task) for of_task in tasks)
  kind = 'tasks' if any(c['split'] == BENCHMARK for c in rows) else 'targets'

  def on(count: int) -> str:
    every = 'both' if count == 2 else f'all {count}'
    part = every if count == len(tasks) else f'{count} of {len(tasks)}'
    return f' on {part} {kind}' if len(tasks) > 1 else ''

  if better:
    sentence = f'Data {chosen} train a better model than random data{on(better)}'
    sentence += f' and a worse one on {worse}' if worse else ''
  elif worse:
    sentence = f'Data {chosen} train a worse model than random data{on(worse)}'
  else:
    sentence = f'Data {chosen} and random data train models that do not measurably differ'
  if weak:
    sentence += ', but these' if better else ', and these'
    sentence += f' models are still weaker than simple counting{on(weak) if weak < len(tasks) else ""}'
  return sentence


def headlines(results: Mapping[str, Any]) -> list[str]:
  """Sentences after the title: how much, right answers beside guessing, and what models below n-grams mean."""
  rows = main_comparisons(results)
  chosen = of_choices(results, rows)
  start = f'Compared with {_AGAINST[rows[0]["baseline"]]} at the same training budget,' if rows else ''
  # Right choices come first, unless log-probability alone shows a difference.
  first = bool(chosen) and (too_few_seeds(rows) or any(_is_decided(results, c) for c in chosen))
  sentences = [_differences(rows, _IN_NATS if first else start)]
  if chosen:
    sentences.insert(0 if first else 1, _choices(results, chosen, start if first else 'In right choices,'))
  sentences.append(_right_answers(results, [c for c in rows if c not in chosen]))
  below = [name for name, of_task in by_task(results).items() if any(c.get('below_ngrams') for c in of_task)]
  if below:
    sentences.append(
      f'On {joined(below)}, n-grams predict the right answers better than the models: tables that count which tokens '
      'follow which in the same rows. So the differences say which data help a model this small. Whether a '
      'useful model gains is open; train a larger model, or for longer, to see.'
    )
  return [sentence for sentence in sentences if sentence]


def of_choices(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The rows of tasks in which a model chooses."""
  chosen = {(t['task'], t['split']) for t in results['tasks'] if t.get('rule') in _CHOICE_RULES}
  return [row for row in rows if (row['task'], row['split']) in chosen]


def _is_decided(results: Mapping[str, Any], c: Mapping[str, Any]) -> bool:
  """Whether there is a verdict in right choices."""
  compared = right_answers(results, c)['compared']
  return compared is not None and compared['verdict'] != 'no evidence'


def _choices(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], start: str) -> str:
  """Shares of right choices beside guessing and counting, task by task."""
  decided: list[str] = []
  undecided: list[str] = []
  for c in rows:
    right = right_answers(results, c)
    compared, facts = right['compared'], []
    if compared is not None:
      low, high = (None if compared[end] is None else 100 * compared[end] for end in ('low', 'high'))
      facts.append(f'{signed(100 * compared["difference"], 0)}\u00a0points {interval(low, high, 0)}'.rstrip())
    names = ('guessing', 'chance'), ('n-grams', 'line')
    facts += [f'{name}: {percent(right[key], 0)}' for name, key in names if right[key] is not None]
    shares = f'{percent(right["first"], 0)} instead of {percent(right["second"], 0)}'
    phrases = decided if _is_decided(results, c) or too_few_seeds([c]) else undecided
    phrases.append(f'{shares} on {row_task_name(c)} ({"; ".join(facts)})')
  if not decided:
    return f'{start} chance may explain the difference: {joined(undecided)}.'
  sentence = f'{start} these models choose right in {joined(decided)}'
  return sentence + (f'; chance may explain the rest: {joined(undecided)}.' if undecided else '.')


def _differences(rows: Sequence[Mapping[str, Any]], start: str) -> str:
  """How much more likely right answers are, by verdict; differences alone where there are too few seeds."""
  if not rows:
    return ''

  def named(c: Mapping[str, Any]) -> str:
    return f'{signed(c["difference"])}\u00a0nats {interval(c["low"], c["high"])}'.rstrip()

  if too_few_seeds(rows):
    changes = 'Log-probability changes' if start == _IN_NATS else f'{start} log-probability changes'
    return f'{changes} by {joined([f"{named(c)} on {row_task_name(c)}" for c in rows])}.'
  decided = [c for c in rows if c['verdict'] != 'no evidence']
  undecided = joined([f'{row_task_name(c)} ({named(c)})' for c in rows if c['verdict'] == 'no evidence'])
  if not decided:
    return f'{start} there is no evidence of a difference on {undecided}.'
  times = [f'{math.exp(c["difference"]):.2f}\u00a0times' for c in decided]
  if len(decided) > _MOST_NAMED:
    ordered = sorted(decided, key=lambda c: c['difference'])
    phrases = [f'between {times[decided.index(ordered[0])]} and {times[decided.index(ordered[-1])]} as likely']
  else:
    phrases = [f'{x} as likely on {row_task_name(c)} ({named(c)})' for x, c in zip(times, decided, strict=True)]
  sentence = f'{start} they make the right token {joined(phrases)}'
  return sentence + (f'; chance may explain the difference on {undecided}.' if undecided else '.')


def right_answers(results: Mapping[str, Any], c: Mapping[str, Any]) -> dict[str, Any]:
  """Accuracy of both arms of a comparison on its task, their comparison, and accuracy by guessing and by n-grams."""

  def mean(method: str) -> float | None:
    rows = [r for r in results['summary'] if (r['method'], r['task'], r['split']) == (method, c['task'], c['split'])]
    own = [r for r in rows if r['target_mix'] == c['target_mix']] or rows
    return own[0]['accuracy'] if own else None

  key = ('method', 'target_mix', 'baseline', 'task', 'split')
  compared = [a for a in results['accuracy_comparisons'] if all(a[k] == c[k] for k in key)]
  facts = [t for t in results['tasks'] if (t['task'], t['split']) == (c['task'], c['split'])]
  lines = [
    x['accuracy']
    for x in results.get('lines', ())
    if all(x[k] == c[k] for k in ('method', 'target_mix', 'task', 'split')) and x['accuracy'] is not None
  ]
  return {
    'first': mean(c['method']),
    'second': mean(c['baseline']),
    'compared': compared[0] if compared else None,
    'chance': facts[0].get('chance') if facts else None,
    'line': max(lines, default=None),
  }


def _right_answers(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
  """Accuracy beside that of guessing, of the tasks on which any model has some."""
  found = [(row_task_name(c), right_answers(results, c)) for c in rows]
  phrases = []
  for name, right in found:
    if right['first'] or right['second']:
      chance = '' if right['chance'] is None else f' (guessing: {percent(right["chance"])})'
      phrases.append(f'{percent(right["first"])} instead of {percent(right["second"])}{chance} on {name}')
  if phrases:
    return f'The share of items answered right is {joined(phrases)}.'
  return 'No model answers an item right as a whole, so the measure is how likely the right answer is.' if found else ''


def too_few_seeds(rows: Sequence[Mapping[str, Any]]) -> bool:
  """Whether there are fewer models than a verdict takes."""
  return all(min(c['seeds']) < FEWEST_SEEDS for c in rows)

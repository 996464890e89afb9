"""The words of the report: names, numbers, and the sentences that follow from the results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsdm_jax.config.methods import label
from dsdm_jax.evaluation.comparisons import FEWEST_SEEDS
from dsdm_jax.evaluation.results import MEAN, UNTARGETED
from dsdm_jax.evaluation.suite import BENCHMARK, HOLDOUT

# As written inside a sentence; headings capitalise them.
TASKS = {
  'docs': 'documentation prose',
  'api_qa': 'API questions',
  'cs_algorithms': 'CS algorithms',
  'mix': 'all targets together',
  'mean': 'mean of all tasks',
  'mean of benchmarks': 'mean of all benchmarks',
}
MINUS = '−'


def several_targets(targets: Iterable[str]) -> bool:
  """Whether there are arms for different targets, so that their names must include the target."""
  return len(set(targets) - {UNTARGETED}) > 1


def task_name(task: str) -> str:
  return TASKS.get(task, task)


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
  return text[:1].upper() + text[1:]


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


def percent(share: float | None) -> str:
  """A share in per cent, without the per cent sign."""
  return plain(None if share is None else 100 * share, 1)


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
  # A no-break space keeps it on one line.
  return f'[{plain(low, digits)},\u00a0{plain(high, digits)}]'


def count(value: float) -> str:
  """Thousands separated by thin spaces."""
  return f'{int(value):,}'.replace(',', '\u202f')


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


def headlines(results: Mapping[str, Any]) -> list[str]:
  """A sentence for each baseline that DsDm is compared with; later sentences refer to the first.

  Tasks below n-grams are left out, and named in a sentence of their own.
  """
  subject = 'In log-probability, the same model trained on data chosen by DsDm at the same token budget'
  sentences: list[str] = []
  below: dict[str, None] = {}
  for baseline, against in (
    ('random', 'with as many passes over randomly chosen data'),
    ('random_one_epoch', 'with a single pass over randomly chosen data'),
  ):
    rows = _of_dsdm(results, baseline)
    below |= {row_task_name(c): None for c in rows if c.get('below_ngrams')}
    sentence = _headline([c for c in rows if not c.get('below_ngrams')], subject, against)
    if sentence:
      sentences.append(sentence)
      subject = 'It'
  if below:
    reason = 'a model does not beat n-gram counts of its own training rows, or unigrams of the answers'
    left_out = f'On {joined(list(below))} {reason}'
    if sentences:
      sentences.append(f'{left_out}, which leaves {"it" if len(below) == 1 else "them"} out here.')
    else:
      sentences.append(f'{left_out}. So this run has no result to put in a headline, and its differences say little.')
  return sentences


def _of_dsdm(results: Mapping[str, Any], baseline: str) -> list[Mapping[str, Any]]:
  """Comparisons of DsDm with `baseline`: the arm for all targets, or else each arm on its own target."""
  rows = [c for c in results['comparisons'] if (c['method'], c['baseline']) == ('dsdm', baseline)]
  mixes = {c['target_mix'] for c in rows}
  if 'mix' in mixes:
    return [c for c in rows if c['target_mix'] == 'mix']
  return [c for c in rows if len(mixes) == 1 or c['target_mix'] == c['task']]


def _headline(rows: Sequence[Mapping[str, Any]], subject: str, against: str) -> str:
  """How the arm compares on every task; empty without rows."""
  if not rows:
    return ''
  phrases = []
  for verdict in ('better', 'worse'):
    shares = [
      f'{abs(c["difference"]):.2f}\u00a0nats {interval(*sorted((abs(c["low"]), abs(c["high"]))))} on {row_task_name(c)}'
      for c in rows
      if c['verdict'] == verdict
    ]
    if shares:
      phrases.append(f'{verdict} by {joined(shares)}')
  undecided = joined(
    [f'{row_task_name(c)} {interval(c["low"], c["high"])}' for c in rows if c['verdict'] == 'no evidence']
  )
  if not phrases and _too_few_seeds(rows):
    return f'{subject} and one trained {against} get no verdict, which takes three seeds: {undecided}.'
  if not phrases:
    return f'{subject} does not measurably differ from one trained {against}: {undecided}.'
  sentence = f'{subject} is {" but ".join(phrases)} than {against}'
  if undecided:
    sentence += f'; there is no evidence of a difference on {undecided}'
  return sentence + '.'


def _too_few_seeds(rows: Sequence[Mapping[str, Any]]) -> bool:
  return all(min(c['seeds']) < FEWEST_SEEDS for c in rows)


def verdict_word(results: Mapping[str, Any]) -> str:
  """The title of the page: how DsDm compares with random data in log-probability, over the tasks."""
  compared = _of_dsdm(results, 'random')
  rows = [c for c in compared if not c.get('below_ngrams')]
  better = sum(c['verdict'] == 'better' for c in rows)
  worse = sum(c['verdict'] == 'worse' for c in rows)
  kind = 'tasks' if any(c['split'] == BENCHMARK for c in compared) else 'targets'
  if compared and not rows:
    return f'DsDm and random data: no {kind.removesuffix("s")} on which models beat n-gram counts'
  if not rows:
    return 'Dataset selection with datamodels'
  if worse == len(rows):
    return 'DsDm loses to random data in log-probability' + (f' on all {worse} {kind}' if worse > 1 else '')
  if worse:
    return f'In log-probability, DsDm beats random data on {better} and loses on {worse} of {len(rows)} {kind}'
  if not better and _too_few_seeds(rows):
    return 'DsDm and random data: too few seeds for a verdict'
  if not better:
    return 'DsDm and random data: this run shows no difference in log-probability'
  if better == len(rows):
    return 'DsDm beats random data in log-probability' + (f' on all {better} {kind}' if better > 1 else '')
  return f'DsDm beats random data in log-probability on {better} of {len(rows)} {kind}'

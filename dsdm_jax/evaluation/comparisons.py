"""Comparisons of arms: which pairs, the difference with its interval, and the verdict."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.core import prng
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import statistics

BASELINES = ('random', 'random_one_epoch')
# Besides every arm against the baselines: the best-ranked data against the worst-ranked.
EXTRA = (('dsdm', 'bottom'),)
BETTER, WORSE, NEITHER = 'better', 'worse', 'no evidence'
FEWEST_SEEDS = 3  # for a verdict over seeds

Arm = tuple[str, str]  # method, target_mix
Runs = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Options:
  """How arms are compared.

  Attributes:
    confidence: of intervals, above 0 and below 1; a verdict needs p_holm < 1 − confidence.
    paired_seeds: compare models of the same seed, see `statistics`; leaves out seeds that only one arm has.
    resamples: draws of the bootstrap over items, used where both arms have one seed.
    seed: of these draws.
    baselines: methods that every arm is compared with, and each other once.
  """

  confidence: float = 0.95
  paired_seeds: bool = False
  resamples: int = 10_000
  seed: int = 0
  baselines: tuple[str, ...] = BASELINES


def arms(runs: Runs) -> list[Arm]:
  """(method, target_mix) of the runs, each once, in order."""
  return list(dict.fromkeys((run['method'], run['target_mix']) for run in runs))


def rows(runs: Runs, arm: Arm) -> list[int]:
  """Row numbers of the arm's runs."""
  return [i for i, run in enumerate(runs) if (run['method'], run['target_mix']) == arm]


def compare(
  values_RI: np.ndarray, runs: Runs, documents_I: np.ndarray | None, options: Options, **labels: Any
) -> list[dict[str, Any]]:
  """A row for each pair of arms, with p-values adjusted by Holm's rule over all of them.

  Args:
    values_RI: higher is better; a row per run.
    runs: `method`, `target_mix` and `seed` of each row, and the name of its `selection` where it is known.
    documents_I: see `statistics.crossed_difference`.
    options: see `Options`.
    labels: further entries of each row: task, split, metric.
  """
  compared = [
    _comparison(values_RI, runs, *pair, documents_I, options, labels) for pair in _pairs(runs, options.baselines)
  ]
  return judged(compared, options.confidence)


def judged(compared: Sequence[Mapping[str, Any]], confidence: float) -> list[dict[str, Any]]:
  """Comparisons with `p_holm` and `verdict`, by Holm's rule over these and no others."""
  result = []
  for comparison, p_holm in zip(compared, statistics.holm([c['p_value'] for c in compared]), strict=True):
    few = min(comparison['seeds']) < FEWEST_SEEDS  # these say too little about how seeds vary
    direction = BETTER if comparison['difference'] > 0 else WORSE
    verdict = NEITHER if few or p_holm >= 1 - confidence else direction
    result.append({**comparison, 'p_holm': float(p_holm), 'verdict': verdict})
  return result


def turned(comparison: Mapping[str, Any], target_mix: str) -> dict[str, Any]:
  """The same comparison seen from its baseline, which is for `target_mix`, before a verdict."""
  own = {key: -comparison[of] for key, of in (('difference', 'difference'), ('low', 'high'), ('high', 'low'))}
  names = {'method': comparison['baseline'], 'baseline': comparison['method'], 'seeds': comparison['seeds'][::-1]}
  return {**comparison, **own, **names, 'target_mix': target_mix}


def _pairs(runs: Runs, baselines: Sequence[str]) -> Iterator[tuple[Arm, Arm]]:
  """Arms to compare: all against each baseline, the baselines with each other once, then EXTRA.

  Arms that share a model are not compared: the model's noise would cancel.
  """
  known = arms(runs)
  seen = set()
  candidates = [(arm, name) for name in baselines for arm in known]
  candidates += [(arm, other) for method, other in EXTRA for arm in known if arm[0] == method]
  for arm, name in candidates:
    baseline = baseline_arm(known, name, arm[1])
    if baseline is None or arm[0] == name or (baseline, arm) in seen or _models(runs, arm) & _models(runs, baseline):
      continue
    seen.add((arm, baseline))
    yield arm, baseline


def baseline_arm(known: Sequence[Arm], name: str, target: str) -> Arm | None:
  """The arm `name` for `target`, or else its first arm, which ignores targets."""
  named = [arm for arm in known if arm[0] == name]
  if not named:
    return None
  return (name, target) if (name, target) in named else named[0]


def _models(runs: Runs, arm: Arm) -> set[tuple[str, int]]:
  """(selection, seed) of the arm's models whose selection is known."""
  return {(runs[r]['selection'], runs[r]['seed']) for r in rows(runs, arm) if runs[r].get('selection') is not None}


def selected_once(runs: Runs, arm: Arm) -> bool:
  """Whether all models of the arm were trained on one selection, so that nothing is known about other selections."""
  names = [runs[r].get('selection') for r in rows(runs, arm)]
  return None in names or len(set(names)) < 2


def _comparison(
  values_RI: np.ndarray,
  runs: Runs,
  method: Arm,
  baseline: Arm,
  documents_I: np.ndarray | None,
  options: Options,
  labels: Mapping[str, Any],
) -> dict[str, Any]:
  method_rows, baseline_rows = rows(runs, method), rows(runs, baseline)
  # A checkpoint from outside the run shares no initialisation with an arm.
  paired = options.paired_seeds and all(runs[r].get('selection', '') is not None for r in method_rows + baseline_rows)
  if paired:
    common = {runs[r]['seed'] for r in method_rows} & {runs[r]['seed'] for r in baseline_rows}
    if not common:
      raise UserError(
        f'arms {method[0]} and {baseline[0]} have no seed in common; set --config.evaluation.paired_seeds=False'
      )
    method_rows, baseline_rows = (
      sorted((r for r in own if runs[r]['seed'] in common), key=lambda r: runs[r]['seed'])
      for own in (method_rows, baseline_rows)
    )
  method_SI, baseline_SI = values_RI[method_rows], values_RI[baseline_rows]
  if len(method_SI) == len(baseline_SI) == 1:
    names = (*method, *baseline, *map(str, labels.values()))
    rng = prng.numpy_stream(options.seed, 'bootstrap', *names)
    difference_I = method_SI[0] - baseline_SI[0]
    interval = guarded(
      labels, statistics.bootstrap_difference, difference_I, rng, options.confidence, documents_I, options.resamples
    )
  else:
    interval = guarded(
      labels, statistics.crossed_difference, method_SI, baseline_SI, paired, options.confidence, documents_I
    )
  if labels.get('metric') == 'accuracy':
    interval = interval.within(-1.0, 1.0)
  keys, degrees = ('difference', 'low', 'high', 'p_value', 'basis'), interval.degrees_of_freedom
  return {
    'method': method[0],
    'target_mix': method[1],
    'baseline': baseline[0],
    **labels,
    **{key: getattr(interval, key) for key in keys},
    'paired_seeds': paired,
    'seeds': [len(method_SI), len(baseline_SI)],
    'conditional': selected_once(runs, method) or selected_once(runs, baseline),
    'degrees_of_freedom': degrees if math.isfinite(degrees) else None,
  }


def guarded(
  labels: Mapping[str, Any], function: Callable[..., statistics.Interval], *arguments: Any
) -> statistics.Interval:
  """Calls a function of `statistics`; turns its ValueError into a UserError that names the task."""
  try:
    return function(*arguments)
  except ValueError as error:
    raise UserError(
      f'evaluation of task {labels["task"]}, split {labels["split"]}: {error}; give the task more items '
      '(targets.max_examples, or a larger file), or look for a run that diverged'
    ) from error

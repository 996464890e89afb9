"""What the bank found, as JSON records and as tables to read.

`python -m dsdm_jax.validation.table FOLDER` prints the tables of the `lds.json` and `monotone.json` in a folder.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core import artifacts
from dsdm_jax.validation import agreement
from dsdm_jax.validation.subsets import FAMILIES, Subsets

NO_SCORE = '·'


def records(
  setting: str,
  scores: Mapping[str, np.ndarray],
  truth_RST: np.ndarray,
  subsets: Subsets,
  resamples: Mapping[str, agreement.Resamples],
  reference: str,
  by_seed: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
  """One record for each predictor and family.

  Args:
    setting: name of the learning algorithm.
    scores: predictor → score_NT.
    truth_RST: outputs, by seed, subset and target.
    subsets: S of them.
    resamples: of each family.
    reference: predictor that gains are over.
    by_seed: predictors that differ by seed, as the oracle does: score_RNT, held to the truth of their own seed.
  """
  found = []
  for family in FAMILIES:
    places = subsets.of(family)
    if len(places) < 3:
      continue
    weight_SN = subsets.weight_SN[places].astype(np.float32)
    truth_ST, drawn = truth_RST[:, places].mean(0), resamples[family]
    base_ST = weight_SN @ scores[reference]
    top = agreement.ceiling(truth_RST[:, places])
    for name, score_NT in scores.items():
      predicted_ST = weight_SN @ score_NT
      fit = agreement.lds(predicted_ST, truth_ST, drawn)
      gain = agreement.gain(predicted_ST, base_ST, truth_ST, drawn)
      single = np.mean([agreement.lds(predicted_ST, truth_RST[r, places], drawn).lds for r in range(len(truth_RST))])
      found.append(_record(setting, name, family, fit, gain, float(single), top, len(places)))
    for name, score_RNT in (by_seed or {}).items():
      own = [agreement.lds(weight_SN @ s, truth_RST[r, places], drawn) for r, s in enumerate(score_RNT)]
      fit = agreement.Agreement(*(float(np.mean([getattr(a, end) for a in own])) for end in ('lds', 'low', 'high')))
      found.append(_record(setting, name, family, fit, None, fit.lds, None, len(places)))
  return found


def _record(
  setting: str,
  name: str,
  family: str,
  fit: agreement.Agreement,
  gain: agreement.Agreement | None,
  single: float,
  top: float | None,
  size: int,
) -> dict[str, Any]:
  return {
    'setting': setting, 'predictor': name, 'family': family, 'subsets': size,
    'lds': fit.lds, 'low': fit.low, 'high': fit.high, 'lds_single_seed': single, 'ceiling': top,
    'gain': None if gain is None else {'over_reference': gain.lds, 'low': gain.low, 'high': gain.high},
  }  # fmt: skip


def page(
  by_example: Sequence[Mapping[str, Any]], by_task: Sequence[Mapping[str, Any]], monotone: Mapping[str, Any]
) -> str:
  """Markdown: a table for each setting and level, and the losses after training on deciles."""
  parts = []
  for setting in dict.fromkeys(r['setting'] for r in by_example):
    for level, records in (('each target example', by_example), ('mean of each task', by_task)):
      parts.append(f'### {setting}, {level}\n\n' + markdown(r for r in records if r['setting'] == setting))
  lines = ['| task | seed | decile 1 | decile 5 | decile 10 | ordered |', '|---|---|---|---|---|---|']
  for task, runs in sorted(monotone.items()):  # as the file has them
    for seed, run in enumerate(runs):
      losses = ' | '.join(f'{x:.3f}' for x in run['loss'])
      lines.append(f'| {task} | {seed} | {losses} | {"yes" if run["ordered"] else "no"} |')
  return '\n'.join([*parts, '### Loss after training on one decile of scores\n', *lines]) + '\n'


def markdown(found: Iterable[Mapping[str, Any]]) -> str:
  """One row for each predictor, one column for each family; best first by the mean over families."""
  found = list(found)
  families = [f for f in FAMILIES if any(r['family'] == f for r in found)]
  by_name: dict[str, dict[str, Mapping[str, Any]]] = {}
  for record in found:
    by_name.setdefault(record['predictor'], {})[record['family']] = record
  order = sorted(by_name, key=lambda name: -np.mean([r['lds'] for r in by_name[name].values()]))
  lines = ['| predictor | ' + ' | '.join(families) + ' |', '|---|' + '---|' * len(families)]
  tops = {r['family']: r['ceiling'] for r in found if r['ceiling'] is not None}
  lines += [_line(name, [by_name[name].get(f) for f in families]) for name in order]
  lines.append('| *highest that seeds allow* | ' + ' | '.join(_number(tops.get(f)) for f in families) + ' |')
  return '\n'.join(lines) + '\n'


def _line(name: str, cells: Sequence[Mapping[str, Any] | None]) -> str:
  shown = [NO_SCORE if c is None else f'{c["lds"]:.2f} [{c["low"]:.2f}, {c["high"]:.2f}]' for c in cells]
  return f'| {name} | ' + ' | '.join(shown) + ' |'


def _number(value: float | None) -> str:
  return NO_SCORE if value is None else f'{value:.2f}'


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.validation.table', description=__doc__)
  parser.add_argument('folder', type=Path, help='holds lds.json and monotone.json')
  folder = parser.parse_args(argv).folder
  try:
    artifact = artifacts.open_folder(folder)
    folder = folder if artifact is None else artifact.path
    lds, monotone = (json.loads((folder / f'{name}.json').read_text()) for name in ('lds', 'monotone'))
  except (OSError, ValueError) as error:
    sys.stderr.write(f'dsdm_jax: {folder} does not hold a validation ({error}); give its folder\n')
    return 2
  sys.stdout.write(page(lds['by_example'], lds['by_task'], monotone))
  return 0


if __name__ == '__main__':
  sys.exit(main())

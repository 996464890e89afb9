"""Results of the validation as JSON records and Markdown tables.

`python -m dsdm_jax.validation.table FOLDER` prints the tables of the `lds.json` and `monotone.json` in a folder.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.core import artifacts, storage
from dsdm_jax.errors import visible, visible_lines
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
    reference: predictor that gains are relative to.
    by_seed: predictors that differ by seed, such as the oracle: score_RNT, compared with the truth of the same seed.
  """
  records = []
  for family in FAMILIES:
    indices = subsets.of(family)
    if len(indices) < 3:
      continue
    weight_SN = subsets.weight_SN[indices].astype(np.float32)
    truth_ST, drawn = truth_RST[:, indices].mean(0), resamples[family]
    base_ST = weight_SN @ scores[reference]
    top = agreement.ceiling(truth_RST[:, indices])
    for name, score_NT in scores.items():
      predicted_ST = weight_SN @ score_NT
      fit = agreement.lds(predicted_ST, truth_ST, drawn)
      gain = agreement.gain(predicted_ST, base_ST, truth_ST, drawn)
      single = np.mean([agreement.lds(predicted_ST, truth_RST[r, indices], drawn).lds for r in range(len(truth_RST))])
      records.append(_record(setting, name, family, fit, gain, float(single), top, len(indices)))
    for name, score_RNT in (by_seed or {}).items():
      own = [agreement.lds(weight_SN @ s, truth_RST[r, indices], drawn) for r, s in enumerate(score_RNT)]
      fit = agreement.Agreement(*(float(np.mean([getattr(a, end) for a in own])) for end in ('lds', 'low', 'high')))
      records.append(_record(setting, name, family, fit, None, fit.lds, None, len(indices)))
  return records


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
  record: dict[str, Any] = {'setting': setting, 'predictor': name, 'family': family, 'subsets': size}
  record |= {'lds': fit.lds, 'low': fit.low, 'high': fit.high, 'lds_single_seed': single, 'ceiling': top}
  record['gain'] = None if gain is None else {'over_reference': gain.lds, 'low': gain.low, 'high': gain.high}
  return record


def page(
  by_example: Sequence[Mapping[str, Any]], by_task: Sequence[Mapping[str, Any]], monotone: Mapping[str, Any]
) -> str:
  """Markdown: a table for each setting and level, and the losses after training on deciles."""
  parts = []
  for setting in dict.fromkeys(r['setting'] for r in by_example):
    for level, records in (('each target example', by_example), ('mean of each task', by_task)):
      parts.append(f'### {setting}, {level}\n\n' + markdown(r for r in records if r['setting'] == setting))
  lines = ['| task | seed | decile 1 | decile 5 | decile 10 | ordered |', '|---|---|---|---|---|---|']
  for task, runs in sorted(monotone.items()):
    for seed, run in enumerate(runs):
      losses = ' | '.join(f'{x:.3f}' for x in run['loss'])
      lines.append(f'| {task} | {seed} | {losses} | {"yes" if run["ordered"] else "no"} |')
  return '\n'.join([*parts, '### Loss after training on one decile of scores\n', *lines]) + '\n'


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
  """A row for each predictor and a column for each family; best first by the mean over families."""
  records = list(records)
  families = [f for f in FAMILIES if any(r['family'] == f for r in records)]
  by_name: dict[str, dict[str, Mapping[str, Any]]] = {}
  for record in records:
    by_name.setdefault(record['predictor'], {})[record['family']] = record
  order = sorted(by_name, key=lambda name: -np.mean([r['lds'] for r in by_name[name].values()]))
  lines = ['| predictor | ' + ' | '.join(families) + ' |', '|---|' + '---|' * len(families)]
  tops = {r['family']: r['ceiling'] for r in records if r['ceiling'] is not None}
  for name in order:
    cells = [by_name[name].get(family) for family in families]
    shown = [NO_SCORE if c is None else f'{c["lds"]:.2f} [{c["low"]:.2f}, {c["high"]:.2f}]' for c in cells]
    lines.append(f'| {name} | ' + ' | '.join(shown) + ' |')
  top = [f'{tops[family]:.2f}' if family in tops else NO_SCORE for family in families]
  lines.append('| *highest that seeds allow* | ' + ' | '.join(top) + ' |')
  return '\n'.join(lines) + '\n'


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.validation.table', description=__doc__)
  parser.add_argument('folder', type=storage.locate, help='with lds.json and monotone.json')
  folder = parser.parse_args(argv).folder
  try:
    artifact = artifacts.open_folder(folder)
    if artifact is not None:
      artifact.verify()
      folder = artifact.path
    lds, monotone = (storage.read_json(folder / f'{name}.json', dict) for name in ('lds', 'monotone'))
  except (OSError, ValueError) as error:
    message = f'{folder} has no results of a validation ({error}); give the folder of that stage'
    sys.stderr.write(f'dsdm_jax: {visible(message)}\n')
    return 2
  sys.stdout.write(visible_lines(page(lds['by_example'], lds['by_task'], monotone)))
  return 0


if __name__ == '__main__':
  sys.exit(main())

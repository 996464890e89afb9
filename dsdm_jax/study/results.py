"""Makes tables and figures of a study from the files of its finished arms; no workdir is needed.

Writes `tables.md`, `study.csv`, and two figures: `effect.svg` (differences from random data) and `multiplier.svg`
(results read as compute).
"""

import argparse
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdm_jax import configs
from dsdm_jax.config.methods import STAGES, label
from dsdm_jax.core import storage
from dsdm_jax.core.progress import counted
from dsdm_jax.errors import UserError, visible
from dsdm_jax.evaluation.results import MEAN, UNTARGETED
from dsdm_jax.evaluation.suite import BENCHMARK, HOLDOUT
from dsdm_jax.report import figures, formatting
from dsdm_jax.study import arm_file, study
from dsdm_jax.study.arm_file import ArmFile

_NONE = '·'
_LADDER = (
  '*Gross* and *net* are given in FLOP, then in seconds. *Pays from* is the number of final models that must share a '
  'selection for its net multiplier in FLOP to exceed 1.'
)
_UNITS = ('', '_seconds')  # endings of the keys of `multiplier.json` in FLOP, and in seconds
_RANDOM = 'random'
_ON_LADDER = (_RANDOM, 'dsdm', 'dsdm/cheap')  # the figure has room for these


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--files', required=True, help="glob of arm files, such as 'docs/results/*.json'")
  parser.add_argument('--config', default='', help="the study's config, for its primary comparisons")
  parser.add_argument('--out', required=True, help='output folder')


def run(flags: argparse.Namespace) -> None:
  """Reads the arms and writes the files; see the module.

  Raises:
    UserError: no file matches, a file cannot be read, or the arms cannot be compared.
  """
  out = storage.check_folder(flags.out, '--out')
  arms = [arm_file.read(Path(path)) for path in sorted(glob.glob(flags.files))]
  if not arms:
    raise UserError(f'--files={flags.files} matches no file; give a glob of files that `dsdm_jax.study run` wrote')
  arms.sort(key=lambda arm: arm.name != study.BASE)
  pairs = study.primary_pairs(configs.load(flags.config, 'configs/study.py')) if flags.config else []
  comparison = study.compare(arms)
  comparison['primary'] = study.primary(comparison, pairs)
  storage.write_text(out / 'study.csv', study.as_csv(comparison))
  storage.write_text(out / 'tables.md', tables(comparison, arms, flags.files))
  for name, drawing in drawings(comparison).items():
    drawing.save(out / f'{name}.svg')
  print(visible(f'results: {out / "tables.md"}'))


def tables(comparison: Mapping[str, Any], arms: Sequence[ArmFile], files: str) -> str:
  """All tables as Markdown."""
  percent = f'{100 * comparison["confidence"]:g} %'
  first = study.headline_task(comparison)
  compared = [c for c in [*comparison['means']['comparisons'], *comparison['comparisons']] if c['metric'] == 'logprob']
  held_out, benchmarks = ([c for c in compared if c['split'] == split] for split in (HOLDOUT, BENCHMARK))
  columns = [first, *(c for c in dict.fromkeys(c['task'] for c in held_out) if c not in (first, MEAN))]
  base = next(arm for arm in arms if arm.name == study.BASE)
  random = f'random data of {base.config["selection.epochs"]:g} epochs'
  parts = [
    f'Made by `python -m dsdm_jax.study results --files {files!r} --out FOLDER`. Differences are in nats per token, '
    f'with {percent} intervals over crossed seeds and items; bold means significant after Holm over the comparisons '
    'of the column. `method/x` belongs to arm `x` of the study; the last table lists what that arm changes. The random '
    'data is that of the arm `base`, also for arms that change the epochs.',
    *_primary(comparison['primary']),
    f'## Held-out items of the targets, against {random}',
    _differences(held_out, columns, _RANDOM),
  ]
  if any(c['baseline'] == 'dsdm' for c in held_out):
    parts += ['## The same against DsDm of the arm `base`', _differences(held_out, columns, 'dsdm')]
  if comparison['lines']:
    heading = '## Reference lines: log-probability above the best of them, in nats per token'
    parts += [heading, _lines(comparison), 'In the other tables, † marks a comparison with an arm below n-grams.']
  if benchmarks:
    columns = list(dict.fromkeys(c['task'] for c in benchmarks))
    parts += [f'## Benchmarks that were not targeted, against {random}', _differences(benchmarks, columns, _RANDOM)]
  if comparison['multiplier'] is not None:
    read = comparison['multiplier']
    parts += [f'## Compute multiplier on {_task(first)}', _multiplier(read, first), ' '.join([_LADDER, *read['notes']])]
  parts += ['## Sources of the selected rows, %', _sources(arms), '## Arms', _arms(arms, base)]
  return '\n\n'.join(parts) + '\n'


def _primary(compared: Sequence[Mapping[str, Any]]) -> list[str]:
  rows = [
    [
      f'{_arm(c["method"], UNTARGETED)} − {c["baseline"]}',
      f'{formatting.signed(c["difference"])} {formatting.interval(c["low"], c["high"])}',
      formatting.p_value(c['p_holm']),
      c['verdict'],
    ]
    for c in compared
  ]
  if not rows:
    return []
  heading = f'## Primary comparisons, on {_task(compared[0]["task"])}, after Holm over these alone'
  return [heading, markdown(['comparison', 'difference', 'p', 'verdict'], rows)]


def _differences(compared: Sequence[Mapping[str, Any]], columns: Sequence[str], baseline: str) -> str:
  cells = {(c['method'], c['target_mix'], c['task']): c for c in compared if c['baseline'] == baseline}
  seeds = {(method, target): str(c['seeds'][0]) for (method, target, _), c in reversed(cells.items())}

  def effect(arm: tuple[str, str]) -> float:
    return cells[*arm, columns[0]]['difference'] if (*arm, columns[0]) in cells else -math.inf

  def cell(c: Mapping[str, Any] | None) -> str:
    if c is None:
      return _NONE
    text = f'{formatting.signed(c["difference"])} {formatting.interval(c["low"], c["high"])}'
    if c.get('below_ngrams'):
      return f'{text} †'
    return text if c['verdict'] == 'no evidence' else f'**{text}**'

  order = sorted(dict.fromkeys((method, target) for method, target, _ in cells), key=lambda arm: -effect(arm))
  rows = [[_arm(*arm), seeds[arm], *(cell(cells.get((*arm, task))) for task in columns)] for arm in order]
  return markdown(['arm', 'seeds', *map(_task, columns)], rows)


def _lines(comparison: Mapping[str, Any]) -> str:
  """A row per task: the arm `random` of the arm `base`, and how many arms are below n-grams."""
  rows = []
  shown = [row for row in comparison['summary'] if row['best_line'] is not None]
  for task, split in dict.fromkeys((row['task'], row['split']) for row in shown):
    of_task = [row for row in shown if (row['task'], row['split']) == (task, split)]
    below = sum(row['below_ngrams'] for row in of_task)
    row = next((row for row in of_task if row['method'] == _RANDOM), of_task[0])
    over = f'{formatting.signed(row["over_line"])} {formatting.interval(row["over_line_low"], row["over_line_high"])}'
    rows.append([_task(task), split, row['best_line'], over, f'{below} of {len(of_task)}'])
  return markdown(['task', 'split', 'best line of random', 'random above it', 'arms below n-grams'], rows)


def _multiplier(multiplier: Mapping[str, Any], task: str) -> str:
  """Gross multiplier, cost of the selection, net multiplier, and the number of final models from which it pays."""
  rows = [row for row in multiplier['arms'] if (row['task'], row['split']) == (task, HOLDOUT)]
  lines = [
    [
      _arm(row['method'], row['target_mix']),
      formatting.signed(row['value']),
      *(_reading(row[f'gross{unit}']) for unit in _UNITS),
      f'{row["flop_selection"] / row["flop_final"]:.2f}',
      f'{row["seconds_selection"] / row["seconds_final"]:.2f}',
      *(_reading(row[f'net{unit}']) for unit in _UNITS),
      _pays_from(row),
    ]
    for row in sorted(rows, key=lambda row: -row['value'])
  ]
  net = f'net, shared by {multiplier["uses"]}'
  header = ['arm', 'log-probability']
  for name in ('gross', 'C_selection / C_final', net):
    header += [name, f'{name}, in seconds']
  return markdown([*header, 'pays from'], lines)


def _reading(reading: Mapping[str, Any] | None) -> str:
  return _NONE if reading is None else reading['text']


def _pays_from(row: Mapping[str, Any]) -> str:
  """Final models that must share the selection for the estimate of net to exceed 1."""
  needed = row['needs_flop_selection_below']
  if not row['flop_selection'] or needed is None:
    return _NONE
  gained = needed / row['uses']
  if gained <= 0:
    return 'never'
  return counted(math.floor(row['flop_selection'] / gained) + 1, 'model')


def _sources(arms: Sequence[ArmFile]) -> str:
  names = list(arms[0].pool['sources'])
  rows = [['pool', *(f'{100 * arms[0].pool["sources"][name]:.0f}' for name in names)]]
  shares = {}
  for arm in arms:
    for card in arm.cards:
      method = card['method'] if arm.name == study.BASE else f'{card["method"]}/{arm.name}'
      shares[_arm(method, card['target'])] = card['sources']
  rows += [[label, *(f'{100 * share[name]:.0f}' for name in names)] for label, share in shares.items()]
  return markdown(['arm', *(name.replace('_', ' ') for name in names)], rows)


def _arms(arms: Sequence[ArmFile], base: ArmFile) -> str:
  def changed(arm: ArmFile) -> str:
    keys = sorted(key for key in arm.config if key not in base.config or arm.config[key] != base.config[key])
    return ', '.join(f'`{key}={arm.config[key]}`' for key in keys) or _NONE

  rows = [
    [
      arm.name,
      str(len(arm.runs)),
      formatting.duration(sum(spent['seconds'] for spent in arm.cost.values())),
      formatting.scientific(sum(arm.cost[stage]['flop'] for stage in STAGES if stage in arm.cost)),
      formatting.scientific(arm.final['flop']),
      changed(arm),
    ]
    for arm in arms
  ]
  return markdown(['arm', 'models', 'time of its stages', 'FLOP of selection', 'FLOP of one model', 'changes'], rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table. Cells must not contain line breaks; bars in them are escaped."""

  def line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'

  return '\n'.join([line(header), '|---' * len(header) + '|', *map(line, rows)])


def _task(name: str) -> str:
  return formatting.task_name(name.replace('+', ' + '))


def _arm(method: str, target: str) -> str:
  return method if target == UNTARGETED else f'{method} for {target.replace("+", " + ")}'


def drawings(comparison: Mapping[str, Any]) -> dict[str, figures.Drawing]:
  """Name → figure. Arms for another target than the headline task are in the tables only."""
  first = study.headline_task(comparison)
  targets = study.headline_targets(comparison)
  place = (first, _RANDOM, 'logprob', HOLDOUT)
  compared = [
    {**c, 'target_mix': UNTARGETED}
    for c in (*comparison['means']['comparisons'], *comparison['comparisons'])
    if (c['task'], c['baseline'], c['metric'], c['split']) == place and c['target_mix'] in targets
  ]
  methods = [c['method'].partition('/')[0] for c in compared]

  def labelled(c: Mapping[str, Any]) -> str:
    method, _, arm = c['method'].partition('/')
    return label(method) + (f', {arm}' if arm and methods.count(method) > 1 else '')

  best = [{**c, 'method': labelled(c)} for c in sorted(compared, key=lambda c: -c['difference'])]
  result = {'effect': next(iter(figures.forest(best).values()))} if best else {}
  if comparison['multiplier'] is not None:
    curves, arms = (
      [row for row in comparison['multiplier'][kind] if (row['task'], row['split']) == (first, HOLDOUT)]
      for kind in ('curves', 'arms')
    )
    shown = [row for row in arms if row['method'] in _ON_LADDER and row['target_mix'] in targets]
    result['multiplier'] = figures.multiplier(curves[0], shown, several=False)
  return result

"""Tables and figures of a study from the small files of its arms: no workdir is needed.

Leaves `tables.md`, `study.csv`, and figures as SVG: `effect.svg` (differences from random data) and `multiplier.svg`
(results read as compute).
"""

import argparse
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdm_jax.config.methods import label
from dsdm_jax.core import storage
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.results import MEAN, UNTARGETED
from dsdm_jax.evaluation.suite import BENCHMARK, HOLDOUT
from dsdm_jax.report import figures, formatting
from dsdm_jax.study import arm_file, study
from dsdm_jax.study.arm_file import ArmFile

_NONE = '·'
_RANDOM = 'random'
_ON_LADDER = (_RANDOM, 'dsdm', 'dsdm/cheap')  # what has room in the picture


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--files', required=True, help="pattern of arms' files, such as 'docs/results/*.json'")
  parser.add_argument('--out', required=True, help='folder to write into')


def run(flags: argparse.Namespace) -> None:
  arms = [arm_file.read(Path(path)) for path in sorted(glob.glob(flags.files))]
  if not arms:
    raise UserError(f'--files={flags.files} matches no file; give a pattern of files that bench study left')
  arms.sort(key=lambda arm: arm.name != study.BASE)
  out = Path(flags.out)
  out.mkdir(parents=True, exist_ok=True)
  found = study.compare(arms)
  storage.write_text(out / 'study.csv', study.as_csv(found))
  storage.write_text(out / 'tables.md', tables(found, arms, flags.files))
  for name, drawing in pictures(found).items():
    drawing.save(out / f'{name}.svg')
  print(f'results: {out / "tables.md"}')


def headline_task(found: Mapping[str, Any]) -> str:
  """What stands first: the mix that arms were chosen for, where one is of some of the tasks, else the mean over all."""
  mixes = [row['task'] for row in found['means']['summary'] if '+' in row['task']]
  return mixes[0] if mixes else MEAN


def tables(found: Mapping[str, Any], arms: Sequence[ArmFile], files: str) -> str:
  """Markdown."""
  percent = f'{100 * found["confidence"]:g} %'
  first = headline_task(found)
  means = found['means']['comparisons']
  held_out = [c for c in [*means, *found['comparisons']] if c['split'] == HOLDOUT and c['metric'] == 'logprob']
  elsewhere = [c for c in [*means, *found['comparisons']] if c['split'] == BENCHMARK and c['metric'] == 'logprob']
  columns = [first, *(c for c in dict.fromkeys(c['task'] for c in held_out) if c not in (first, MEAN))]
  random = f'random data of {next(arm for arm in arms if arm.name == study.BASE).config["selection.epochs"]:g} epochs'
  parts = [
    f'Made by `python -m dsdm_jax.bench results --files {files!r} --out FOLDER`. Differences are in nats per token, '
    f'with {percent} intervals over seeds and items crossed; bold where the verdict stands after Holm over the '
    "comparisons of the column. An arm `method/x` is of the study's arm `x`; the last table has what that changes. "
    'The random data is that of the arm `base`, for arms that change the epochs too.',
    f'## Held-out items of the targets, against {random}',
    _differences(held_out, columns, _RANDOM),
    '## The same against DsDm of the arm `base`',
    _differences(held_out, columns, 'dsdm'),
  ]  # fmt: skip
  if elsewhere:
    columns = list(dict.fromkeys(c['task'] for c in elsewhere))
    parts += [f'## Benchmarks that were not targeted, against {random}',
              _differences(elsewhere, columns, _RANDOM)]  # fmt: skip
  if found['multiplier'] is not None:
    parts += [f'## Compute multiplier on {_task(first)}', _multiplier(found['multiplier'], first)]
  parts += ['## Sources of what was selected, % of rows', _sources(arms), '## Arms', _arms(arms)]
  return '\n\n'.join(parts) + '\n'


def _differences(compared: Sequence[Mapping[str, Any]], columns: Sequence[str], baseline: str) -> str:
  cells = {(c['method'], c['target_mix'], c['task']): c for c in compared if c['baseline'] == baseline}
  order = dict.fromkeys((method, target) for method, target, _ in cells)
  rank = {arm: cells[*arm, columns[0]]['difference'] if (*arm, columns[0]) in cells else -math.inf for arm in order}
  return markdown(
    ['arm', 'seeds', *map(_task, columns)],
    [
      [_arm(*arm), next(str(c['seeds'][0]) for (*of, _), c in cells.items() if tuple(of) == arm),
       *(_cell(cells.get((*arm, task))) for task in columns)]
      for arm in sorted(order, key=lambda arm: -rank[arm])
    ],
  )  # fmt: skip


def _cell(comparison: Mapping[str, Any] | None) -> str:
  if comparison is None:
    return _NONE
  text = f'{formatting.signed(comparison["difference"])} {formatting.interval(comparison["low"], comparison["high"])}'
  return text if comparison['verdict'] == 'no evidence' else f'**{text}**'


def _multiplier(read: Mapping[str, Any], task: str) -> str:
  """Gross, what choosing cost, net for one model, and how many must share the choice for net to be above 1."""

  def lines() -> Iterable[list[str]]:
    rows = [row for row in read['arms'] if (row['task'], row['split']) == (task, HOLDOUT)]
    for row in sorted(rows, key=lambda row: -row['value']):
      spent = row['flop_selection'] / row['flop_final']
      yield [
        _arm(row['method'], row['target_mix']), formatting.signed(row['value']), row['gross']['text'], f'{spent:.2f}',
        row['net']['text'], _pays_from(row),
      ]  # fmt: skip

  return markdown(
    ['arm', 'log-probability', 'gross', 'C_selection / C_final', f'net, choice shared by {read["uses"]}', 'pays from'],
    list(lines()),
  )


def _pays_from(row: Mapping[str, Any]) -> str:
  """Final models that must share the choice for the estimate of net to exceed 1."""
  gained = row['needs_flop_selection_below'] / row['uses']
  if not row['flop_selection']:
    return _NONE
  if gained <= 0:
    return 'never'
  models = math.floor(row['flop_selection'] / gained) + 1
  return '1 model' if models == 1 else f'{models} models'


def _sources(arms: Sequence[ArmFile]) -> str:
  names = list(arms[0].pool['sources'])
  rows = [['pool', *(f'{100 * arms[0].pool["sources"][name]:.0f}' for name in names)]]
  rows += [[label, *(f'{100 * share[name]:.0f}' for name in names)] for label, share in _shares(arms).items()]
  return markdown(['arm', *(name.replace('_', ' ') for name in names)], rows)


def _shares(arms: Sequence[ArmFile]) -> dict[str, Mapping[str, float]]:
  """Label → share of each source, of each arm's selection, of its first seed where it draws."""
  return {
    _arm(card['method'] if arm.name == study.BASE else f'{card["method"]}/{arm.name}', card['target']): card['sources']
    for arm in arms for card in arm.cards
  }  # fmt: skip


def _arms(arms: Sequence[ArmFile]) -> str:
  base = next(arm for arm in arms if arm.name == study.BASE)

  def changed(arm: ArmFile) -> str:
    keys = sorted(key for key in arm.config if key not in base.config or arm.config[key] != base.config[key])
    return ', '.join(f'`{key}={arm.config[key]}`' for key in keys) or _NONE

  rows = [
    [arm.name, str(len(arm.runs)), formatting.duration(sum(spent['seconds'] for spent in arm.cost.values())),
     formatting.scientific(sum(arm.cost[stage]['flop'] for stage in ('proxies', 'features', 'datamodel', 'selection'))),
     formatting.scientific(arm.final['flop']), changed(arm)]
    for arm in arms
  ]  # fmt: skip
  return markdown(['arm', 'models', 'time of its stages', 'FLOP of choosing', 'FLOP of one model', 'changes'], rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table; cells hold no line breaks, and bars in them are escaped."""

  def line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'

  return '\n'.join([line(header), '|---' * len(header) + '|', *map(line, rows)])


def _task(name: str) -> str:
  return formatting.task_name(name.replace('+', ' + '))


def _arm(method: str, target: str) -> str:
  return method if target == UNTARGETED else f'{method} for {target.replace("+", " + ")}'


def pictures(found: Mapping[str, Any]) -> dict[str, figures.Drawing]:
  """Name → figure."""
  first = headline_task(found)
  meant = (
    UNTARGETED,
    'mix' if first == MEAN else first,
  )  # arms for another target stand in the tables alone
  compared = [
    {**c, 'target_mix': UNTARGETED} for c in found['means']['comparisons']
    if (c['task'], c['baseline'], c['metric'], c['split']) == (first, _RANDOM, 'logprob', HOLDOUT)
    and c['target_mix'] in meant
  ]  # fmt: skip
  methods = [c['method'].partition('/')[0] for c in compared]

  def labelled(c: Mapping[str, Any]) -> str:
    method, _, arm = c['method'].partition('/')
    return label(method) + (f', {arm}' if arm and methods.count(method) > 1 else '')

  best = [{**c, 'method': labelled(c)} for c in sorted(compared, key=lambda c: -c['difference'])]
  made = {'effect': next(iter(figures.forest(best).values()))} if best else {}
  if found['multiplier'] is not None:
    here = [
      [row for row in found['multiplier'][kind] if (row['task'], row['split']) == (first, HOLDOUT)]
      for kind in ('curves', 'arms')
    ]
    shown = [row for row in here[1] if row['method'] in _ON_LADDER and row['target_mix'] in meant]
    made['multiplier'] = figures.multiplier(here[0][0], shown, several=False)
  return made

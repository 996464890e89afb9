"""Formats a plan as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsdm_jax.core.progress import counted
from dsdm_jax.plan import host, topology
from dsdm_jax.plan.programs import SELECTION


def text(plan: Mapping[str, Any]) -> str:
  """Formats the result of `plan.make`: whether selection pays, the stages, what to change, totals."""
  parts = [_pays(plan['multiplier']), *in_hours(plan), '', _head(plan)]
  if plan['stages']:
    advice = [s['advice'] for s in plan['stages'] if s['advice']]
    parts += [_table(plan), *_communication(plan), *_uncounted(plan['stages']), *advice, _totals(plan)]
  else:
    parts += [_analytic(plan), f'Memory, collectives and times need libtpu: {topology.HOW_TO_GET_LIBTPU}.']
  return '\n'.join([*parts, *host.text(plan['host_work'], plan['hosts'])])


def _pays(multiplier: Mapping[str, float]) -> str:
  selection, final, gross = (multiplier[k] for k in ('selection_flop', 'final_flop', 'gross'))
  verdict = f'so it pays from {multiplier["finals_to_break_even"]:.1f} models that share the selection'
  if multiplier['net'] > 1:
    verdict = 'so it pays at once'
  return (
    f'Selection pays for one model if C_selection < (gross − 1) · C_final: {selection:.2e} against '
    f'{(gross - 1) * final:.2e} FLOP at a gross multiplier of {gross:g}, {verdict} (net for one: '
    f'{multiplier["net"]:.2f}).'
  )


def in_hours(plan: Mapping[str, Any]) -> list[str]:
  """The line about hours beside that about FLOP; none without times, or where a stage does not fit."""
  hours = {s['stage']: s['hours'] for s in plan['stages'] if s['fits']}
  chosen = [stage for stage in SELECTION if stage in plan['flop']]
  if not {*chosen, 'pretraining'} <= set(hours):
    return []
  selection = [sum(hours[stage][end] for stage in chosen) for end in (0, 1)]
  final = [x / plan['final_runs'] for x in hours['pretraining']]
  return [f'In hours: selection {_range(selection)}, one final model {_range(final)}.']


def _head(plan: Mapping[str, Any]) -> str:
  config, mesh = plan['config'], ' × '.join(map(str, plan['mesh'].values()))
  each = config['proxies.checkpoints']
  slices = f'{plan["slices"]} slices of ' if plan['slices'] > 1 else ''
  proxies = counted(config['proxies.count'], 'proxy') + (f' at {each} checkpoints' if each > 1 else '')
  features = 'EK-FAC' if config['features.projection'] == 'ekfac' else f'J = {plan["dimension"]:,}'
  return (
    f'{plan["topology"]}: {counted(plan["chips"], "chip")} ({slices}{plan["accelerator_type"]}), mesh {mesh}; '
    f'{counted(plan["rows"], "row")} of {config["pool.length"]:,} tokens, {features}, {proxies}, '
    f'{counted(plan["final_runs"], "final model")}'
  )


def _table(plan: Mapping[str, Any]) -> str:
  names = 'stage,parameters,rows/chip,HBM GB,of,TFLOP/chip,ms a step,bound by,MFU %,tokens/s,steps,hours'
  rows: list[tuple[str, ...]] = [tuple(names.split(','))]
  for s in plan['stages']:
    memory = f'{s["memory_bytes"] / 1e9:.2f}', f'{s["hbm_bytes_of_chip"] / 1e9:.0f}' + ('' if s['fits'] else ' !')
    seconds, mfu = _range([1e3 * x for x in s['seconds_per_run']]), _range([100 * x for x in s['mfu']])
    tflop = f'{s["flop_per_run"] / plan["chips"] / 1e12:.3g}'
    tokens = '–'.join(_count(x) for x in s['tokens_per_second'] if x) or '–'
    model = s['stage'], _count(s['parameters']), f'{s["batch_per_chip"]:g}'
    rows.append((*model, *memory, tflop, seconds, s['bound'], mfu, tokens, f'{s["runs"]:,}', _range(s['hours'])))
  return _aligned(rows)


def _communication(plan: Mapping[str, Any]) -> list[str]:
  """One line for each stage about the collectives of a step."""
  lines = []
  for s in (s for s in plan['stages'] if s['fits']):
    sent = ', '.join(
      f'{c["count"]} × {c["operation"]} {c["bytes"] / 1e6:.1f} MB{" between slices" if c["between_slices"] else ""}'
      for c in s['collectives']
    )
    lines.append(f'{s["stage"]} communicates per step: {sent or "nothing"}')
  return lines


def _uncounted(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  """One line for each stage with loops of unknown trip count, which are counted once."""
  return [
    f'{s["stage"]} has loops of unknown trip count ({s["unknown_trips"]}), which count once: bytes, HBM time and '
    'communication may be larger'
    for s in stages
    if s['unknown_trips']
  ]


def _analytic(plan: Mapping[str, Any]) -> str:
  rows = [('stage', 'total FLOP')] + [(name, f'{flop:.3e}') for name, flop in plan['flop'].items()]
  return _aligned(rows) + f'\nfeature store: {plan["store_bytes"] / 1e12:.2f} TB'


def _totals(plan: Mapping[str, Any]) -> str:
  totals = plan['totals']
  money = totals['money_usd']
  price = plan['config']['plan.price_per_chip_hour']
  cost = f', {_range(money, True)} USD at {price:g} per chip-hour' if price else ''
  without = f' without {", ".join(totals["without"])}' if totals['without'] else ''
  return (
    f'Total{without}: {_range(totals["hours"])} hours, {_range(totals["chip_hours"], True)} chip-hours{cost}; feature '
    f'store {plan["store_bytes"] / 1e12:.2f} TB. Times are a roofline, from perfect overlap to none.'
  )


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
  widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
  lines = []
  for row in rows:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


def _range(ends: Sequence[float], whole: bool = False) -> str:
  if not ends:
    return '–'
  if whole:
    return '–'.join(f'{x:,.0f}' for x in ends)
  return '–'.join(f'{x:.3g}' if x < 1_000 else f'{x:,.0f}' for x in ends)


def _count(number: float) -> str:
  for unit, name in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if number >= unit:
      return f'{number / unit:.3g}{name}'
  return f'{number:.3g}'

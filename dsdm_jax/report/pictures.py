"""Which figures a report has. Each is made once: the page takes it as SVG, the report's folder as PNG."""

from collections.abc import Iterator

import numpy as np

from dsdm_jax.report import figures, formatting, tables
from dsdm_jax.report.figures import Drawing
from dsdm_jax.report.report_data import Evidence


def make(shown: Evidence) -> dict[str, Drawing]:
  """Name → figure. A name is 'kind' or 'kind-of what', and a file name as it is."""
  found = {f'forest-{task}': drawing for task, drawing in figures.forest(shown.results['comparisons']).items()}
  found |= {f'multiplier-{task}': drawing for task, drawing in _multiplier(shown)}
  found |= {f'losses-{mix}': drawing for mix, drawing in _losses(shown)}
  found['sources'] = figures.composition(tables.sources(shown))
  overlap = tables.overlap(shown)
  found['overlap'] = figures.overlap(overlap.labels, overlap.share_AB, overlap.chance_AB)
  for target in targets(shown):
    found[f'scores-{target}'] = _histogram(shown, target)
  return found


def of_kind(drawings: dict[str, Drawing], kind: str) -> dict[str, Drawing]:
  """What → its figure, of one kind."""
  return {name.removeprefix(f'{kind}-'): d for name, d in drawings.items() if name.startswith(f'{kind}-')}


def targets(shown: Evidence) -> list[str]:
  """Targets that have scores, the mix first."""
  return sorted(shown.scores, key=lambda name: name != 'mix')


def _multiplier(shown: Evidence) -> Iterator[tuple[str, Drawing]]:
  """A ladder for each task, with the arms that were read off it."""
  if shown.multiplier is None:
    return
  several = formatting.several_targets(row['target_mix'] for row in shown.multiplier['arms'])
  for curve in shown.multiplier['curves']:
    same = [a for a in shown.multiplier['arms'] if (a['task'], a['split']) == (curve['task'], curve['split'])]
    yield formatting.asked(curve['task'], curve['split']), figures.multiplier(curve, same, several)


def _losses(shown: Evidence) -> Iterator[tuple[str, Drawing]]:
  """For each target mix its own arms beside those that ignore targets."""
  common = [c for c in shown.curves if c.target_mix == formatting.UNTARGETED]
  targeted = [c for c in shown.curves if c.target_mix != formatting.UNTARGETED]
  for mix in dict.fromkeys(c.target_mix for c in targeted or common):
    yield mix, figures.losses([c for c in targeted if c.target_mix == mix] + common)


def _histogram(shown: Evidence, target: str) -> Drawing:
  chosen = {}
  for method in ('dsdm', 'bottom'):
    found = shown.selections(method, target) or shown.selections(method, 'mix')
    chosen[method] = np.unique(found[0].rows) if found else None
  return figures.histogram(figures.standardised(shown.scores[target]), chosen['dsdm'], chosen['bottom'])

"""One self-contained HTML page that shows what came out and how far it can be trusted."""

import collections
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dsdm_jax.report import figures, words
from dsdm_jax.report.evidence import Evidence

# Stages that random data do without.
SELECTING = ('proxies', 'features', 'datamodel')
# What the page may load and run: nothing but its own styles and images that it holds itself.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(shown: Evidence, examples: int) -> str:
  """The page as HTML.

  Args:
    shown: what was read from the artifacts. Text from it is escaped wherever it is set.
    examples: best and worst rows shown for each target.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('dsdm_jax.report'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters.update(
    signed=words.signed, plain=words.plain, count=words.count, duration=words.duration,
    scientific=words.scientific, p=words.p_value, task=words.task_name, method=words.method_name,
    json=json.dumps, heading=words.heading,
  )  # fmt: skip
  results = shown.results
  several = words.several_targets(row['target_mix'] for row in results['summary'])
  return environment.get_template('report.html').render(
    policy=POLICY,
    title=words.verdict_word(results),
    headlines=words.headlines(results),
    results=results,
    config=shown.config,
    versions=shown.versions,
    percent=f'{100 * results["confidence"]:g} %',
    several=several,
    arm=lambda row: words.arm_name(row['method'], row['target_mix'], several),
    facts=_facts(shown),
    forest=_marked(figures.forest(results['comparisons'], 'forest')),
    means=_means(results, several),
    curves=_curves(shown, several),
    sources=_sources(shown),
    targets=list(_targets(shown, examples)),
    guard=_guard(shown),
    cost=_cost(shown),
    colours=figures.COLOURS,
  )


def _marked(panels: Mapping[str, str]) -> dict[str, Markup]:
  """SVG that this package drew; labels inside it were escaped by matplotlib."""
  return {name: Markup(svg) for name, svg in panels.items()}


def _facts(shown: Evidence) -> list[tuple[str, str]]:
  """The few numbers that say how large the experiment is."""
  results = shown.results
  seeds = [s['seeds'] for s in results['summary']]
  items = {r['task']: r['n_items'] for r in results['summary'] if r['split'] == 'holdout'}
  seconds = sum(spent['seconds'] for spent in shown.cost.values())
  return [
    ('rows in the candidate pool', words.count(len(shown.source_N))),
    ('tokens each model was trained on', words.count(shown.tokens)),
    (
      'models for each arm',
      str(min(seeds)) if min(seeds) == max(seeds) else f'{min(seeds)}–{max(seeds)}',
    ),
    ('held-out items, all tasks', words.count(sum(items.values()))),
    ('for the whole run', words.duration(seconds)),
  ]


def _means(results: Mapping[str, Any], several: bool) -> dict[str, Any]:
  """Rows of the table of means: arm × task on the held-out split."""
  rows = [row for row in results['summary'] if row['split'] == 'holdout']
  tasks = list(dict.fromkeys(row['task'] for row in rows))
  arms: dict[tuple[str, str], dict[str, Any]] = {}
  for row in rows:
    arms.setdefault((row['method'], row['target_mix']), {})[row['task']] = row
  best = {task: max(cells[task]['logprob'] for cells in arms.values()) for task in tasks}
  return {
    'tasks': tasks,
    'best': best,
    'arms': [
      {'name': words.arm_name(method, target, several), 'method': method, 'cells': cells}
      for (method, target), cells in arms.items()
    ],
  }


def _curves(shown: Evidence, several: bool) -> list[tuple[str, Markup]]:
  """(heading, SVG) for each target mix: its own arms beside those that ignore targets."""
  common = [c for c in shown.curves if c.target_mix == words.UNTARGETED]
  targeted = [c for c in shown.curves if c.target_mix != words.UNTARGETED]
  panels = []
  for i, mix in enumerate(dict.fromkeys(c.target_mix for c in targeted or common)):
    lines = [c for c in targeted if c.target_mix == mix] + common
    heading = words.task_name(mix) if several else ''
    panels.append((heading, Markup(figures.losses(lines, f'loss-{i}'))))
  return panels


def _sources(shown: Evidence) -> dict[str, Any]:
  """Shares of each source in the pool and in what each arm selected (mean over seeds)."""
  count = len(shown.sources)
  arms = list(dict.fromkeys((s.method, s.target_mix) for s in shown.selected))
  several = words.several_targets(target for _, target in arms)
  shares = {'whole pool': _shares(shown.source_N, count)}
  for method, target in arms:
    label = words.arm_name(method, target, several)
    by_seed = [_shares(shown.source_N[s.rows], count) for s in shown.selections(method, target)]
    shares[label] = np.mean(by_seed, axis=0)
  return {
    'names': shown.sources,
    'colours': [f'var(--{figures.SOURCE_COLOURS[i % len(figures.SOURCE_COLOURS)]})' for i in range(count)],
    'shares': shares,
    'svg': Markup(figures.composition(shares, 'sources')),
  }  # fmt: skip


def _shares(source_K: np.ndarray, count: int) -> np.ndarray:
  return np.bincount(source_K, minlength=count) / max(1, len(source_K))


def _targets(shown: Evidence, examples: int) -> Iterator[dict[str, Any]]:
  """For each target, the mix first, its histogram, and its best and worst rows as text."""
  names = sorted(shown.scores, key=lambda name: name != 'mix')
  for i, target in enumerate(names):
    z_N = figures.standardised(shown.scores[target])
    order_N = np.argsort(-z_N, kind='stable')
    chosen = {}
    for method in ('dsdm', 'bottom'):
      found = shown.selections(method, target) or shown.selections(method, 'mix')
      chosen[method] = np.unique(found[0].rows) if found else None
    svg = figures.histogram(z_N, chosen['dsdm'], chosen['bottom'], f'scores-{i}')
    yield {
      'name': target,
      'svg': Markup(svg),
      'best': [_example(shown, int(n), z_N) for n in order_N[:examples]],
      'worst': [_example(shown, int(n), z_N) for n in order_N[::-1][:examples]],
    }


def _example(shown: Evidence, row: int, z_N: np.ndarray) -> dict[str, Any]:
  return {
    'row': row,
    'score': float(z_N[row]),
    'source': shown.sources[shown.source_N[row]],
    'document': shown.documents[shown.document_N[row]]['id'],
    'planted': bool(shown.planted_N[row] >= 0),
    'text': shown.text(row),
  }


def _guard(shown: Evidence, most: int = 8) -> dict[str, Any]:
  """What the leakage guard dropped: counts by task, and a few cases."""
  by_task = collections.Counter(str(d['task']) for d in shown.dropped)
  return {
    'on': shown.config['pool.leakage_guard'],
    'total': len(shown.dropped),
    'kept': len(shown.documents),
    'by_task': sorted(by_task.items()),
    'cases': list(itertools.islice(shown.dropped, most)),
  }


def _cost(shown: Evidence) -> dict[str, Any]:
  """Rows of the table of stages, and what selecting cost in trainings of one final model (None if not counted)."""
  total = sum(spent['seconds'] for spent in shown.cost.values()) or 1.0
  rows = [{'stage': stage, **spent, 'share': spent['seconds'] / total} for stage, spent in shown.cost.items()]
  selecting = sum(shown.cost[stage]['flop'] for stage in SELECTING)
  one_model = shown.cost['pretraining']['flop'] / max(1, len(shown.selected))
  return {'rows': rows, 'selecting': selecting, 'ratio': selecting / one_model if selecting and one_model else None}

"""One self-contained HTML page: the results, and how far to trust them."""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dsdm_jax.config import methods
from dsdm_jax.evaluation.results import UNTARGETED, prompt_row, shortened
from dsdm_jax.report import figures, formatting, tables
from dsdm_jax.report.explorer import Packed
from dsdm_jax.report.figures import Drawing
from dsdm_jax.report.report_data import Evidence

# Stages that random data do not need.
SELECTING = ('proxies', 'features', 'target_features', 'datamodel', 'selection')
_TEMPLATES = Path(__file__).parent / 'templates'


def policy(script: str) -> str:
  """The content security policy: nothing is loaded, and only `script` runs."""
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  return (
    f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
  )


def render(shown: Evidence, drawings: dict[str, Drawing], packed: Packed, examples: int) -> str:
  """The page as HTML.

  Args:
    shown: what was read from the artifacts. All its text is escaped.
    drawings: see `report_figures`.
    packed: the explorer's data.
    examples: number of best and worst rows of each target that are shown without scripts.
  """
  loader, strict = jinja2.FileSystemLoader(_TEMPLATES), jinja2.StrictUndefined
  environment = jinja2.Environment(
    loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True
  )
  names = 'below signed plain count duration size scientific heading task_heading percent'.split()
  environment.filters.update({name: getattr(formatting, name) for name in names})
  environment.filters.update(p=formatting.p_value, task=formatting.task_name, row_task=formatting.row_task_name)
  environment.filters.update(method=methods.label, json=json.dumps)
  results = shown.results
  several = formatting.several_targets(row['target_mix'] for row in results['summary'])
  script = (_TEMPLATES / 'explorer.js').read_text('utf-8')
  cost, by_task = _cost(shown), formatting.by_task(results)
  svg = {name: Markup(drawing.svg(f'f{i}')) for i, (name, drawing) in enumerate(drawings.items())}

  def of_kind(kind: str) -> dict[str, Markup]:
    return {name.removeprefix(f'{kind}-'): drawn for name, drawn in svg.items() if name.startswith(f'{kind}-')}

  return environment.get_template('report.html').render(
    policy=policy(script),
    script=Markup(script),
    packed=packed,
    title=formatting.title(results),
    headlines=[*formatting.headlines(results), *filter(None, [shortened(results)])],
    price=_price(shown, cost),
    main=[(c, formatting.right_answers(results, c)) for of_task in by_task.values() for c in of_task],
    few=formatting.too_few_seeds,
    interval=formatting.interval,
    scaled=_scaled,
    steps=next_steps(shown),
    download=_download(shown, packed),
    prompts=[(formatting.task_name(task['task']), task['split'], *prompt_row(task)) for task in results['tasks']],
    results=results,
    config=shown.config,
    versions=shown.versions,
    environment=shown.environment,
    level=f'{100 * results["confidence"]:g}\u00a0%',
    several=several,
    below={c['task'] for c in results['comparisons'] if c.get('below_ngrams')},
    arm=lambda row: formatting.arm_name(row['method'], row['target_mix'], several),
    facts=_facts(shown),
    svg=svg,
    forest=of_kind('forest'),
    right_figures=of_kind('right'),
    multiplier=_multiplier(shown.multiplier),
    ladders=of_kind('multiplier'),
    curves=of_kind('losses'),
    compared=_compared(results),
    means=_means(results, several, 'holdout'),
    benchmarks=_means(results, several, 'benchmark'),
    lines=_lines(results, several),
    line_figures=of_kind('lines'),
    sources=_sources(shown),
    overlap=tables.overlap(shown),
    targets=list(_targets(shown, examples)),
    unscored=int(np.isnan(shown.scores['mix']).sum()),
    lds=_lds(shown.lds),
    guard=_guard(shown),
    cost=cost,
    colours=figures.COLOURS,
  )


def report_figures(shown: Evidence) -> dict[str, Drawing]:
  """Name → figure: all figures of the report. A name is 'kind' or 'kind-of what', and also a file name."""
  results = shown.results
  drawings = {f'forest-{task}': drawing for task, drawing in figures.forest(results['comparisons']).items()}
  choices = figures.in_points(formatting.of_choices(results, results['accuracy_comparisons']))
  drawings |= {f'right-{task}': drawing for task, drawing in figures.forest(choices, figures.POINTS).items()}
  for (task, split), (summary, lines) in _by_task(results).items():
    drawings[f'lines-{formatting.task_key(task, split)}'] = figures.reference_lines(summary, lines)
  if shown.multiplier is not None:
    arms = shown.multiplier['arms']
    several = formatting.several_targets(row['target_mix'] for row in arms)
    for curve in shown.multiplier['curves']:
      task, split = curve['task'], curve['split']
      same = [row for row in arms if (row['task'], row['split']) == (task, split)]
      drawings[f'multiplier-{formatting.task_key(task, split)}'] = figures.multiplier(curve, same, several)
  # Each target mix gets a figure with its own arms and the arms that ignore targets.
  common = [c for c in shown.curves if c.target_mix == UNTARGETED]
  targeted = [c for c in shown.curves if c.target_mix != UNTARGETED]
  for mix in dict.fromkeys(c.target_mix for c in targeted or common):
    drawings[f'losses-{mix}'] = figures.losses([c for c in targeted if c.target_mix == mix] + common)
  groups = tables.groups(shown, len(figures.SOURCE_COLOURS))
  shares = {label: groups.summed(share_S) for label, share_S in tables.sources(shown).items()}
  drawings['sources'] = figures.composition(groups.names, shares)
  shared = tables.overlap(shown)
  drawings['overlap'] = figures.overlap(shared.labels, shared.share_AB, shared.chance_AB)
  for target in tables.targets(shown):
    rows = {}
    for method in ('dsdm', 'bottom'):
      selected = shown.selected_for(method, target)
      rows[method] = None if selected is None else np.unique(selected.rows)
    z_N = figures.standardised(shown.scores[target])
    drawings[f'scores-{target}'] = figures.histogram(z_N, rows['dsdm'], rows['bottom'])
  return drawings


def _price(shown: Evidence, cost: Mapping[str, Any]) -> str:
  """What choosing cost, in a sentence; nothing where no arm was chosen by proxies."""
  if not cost['ratio']:
    return ''
  seconds = sum(shown.cost[stage]['seconds'] for stage in SELECTING)
  return (
    f'Choosing cost {formatting.duration(seconds)} and as much computing as {cost["ratio"]:.1f} trainings of the final '
    'model, which random data do not need.'
  )


def next_steps(shown: Evidence) -> list[tuple[str, str, str]]:
  """(heading, why, command line) of what a reader can do next; CONFIG and RUN are those of this run."""
  config, results = shown.config, shown.results
  run = 'dsdm run --config=CONFIG'
  rows = formatting.main_comparisons(results)
  steps = []
  if rows and formatting.too_few_seeds(rows):
    command = f'{run} --workdir=RUN --rerun --config.pretraining.seeds=3'
    steps.append(
      ('Get a verdict', 'It takes three models of each arm. Finished stages and models are used again.', command)
    )
  entry = next(((s.method, s.target_mix) for s in shown.selected if s.method == formatting.subject(results)), None)
  if entry:
    arm = '--'.join(entry)
    command = f'dsdm export --workdir RUN --arm {shlex.quote(arm)} --format parquet --out selection\n'
    command += f'dsdm export model --workdir RUN --arm {shlex.quote(arm)} --seed 0 --out model'
    why = 'The rows with their text and scores (also as jsonl, datasets or tfds), and a trained model for transformers.'
    steps.append(('Export the selection and a model', why, command))
  tasks = (*config['targets.tasks'], 'my_task.jsonl')
  why = (
    'A file with one {"context": …, "answer": …} a line is a target. Put yours in the place of my_task. Pool, proxies, '
    "the pool's features and the models of other arms are used again."
  )
  if again := len({(s.method, s.seed) for s in shown.selected if s.target_mix == 'mix'}):
    why += f' The arms for all targets together are for this one too, so their {again} models are trained again.'
  else:
    why += ' Without the last option no model is trained: the datamodel scores all rows, and the models answer it.'
  command = (
    f'{run} --workdir=RUN --rerun {_flag("targets.tasks", tasks)} '
    f'{_flag("selection.targets", (*config["selection.targets"], "my_task"))}'
  )
  steps.append(('Choose for another target', why, command))
  if config['pool.max_bytes']:
    limit, chosen = formatting.size(config['pool.max_bytes']), config['selection.examples']
    why = (
      f'This pool stops at {limit}; without that limit it has all text of its sources. An arm trains on as many rows '
      f'as selection.examples says ({formatting.count(chosen)} now). A new folder keeps this run.'
    )
    command = f'{run} --workdir=RUN-whole --config.pool.max_bytes=0 --config.selection.examples={10 * chosen}'
  else:
    why = (
      'A scorer that is fitted to the scores of this pool reads only text, so it is fast enough for far larger pools.'
    )
    command = 'python -m dsdm_jax.selection.distilled --workdir RUN --pool OTHER_RUN/pool --out scores.npy'
  steps.append(('Use the whole pool' if config['pool.max_bytes'] else 'Score a larger pool', why, command))
  return steps


def _flag(key: str, value: object) -> str:
  """`--config.KEY=VALUE` for a shell."""
  text = repr(value)
  return f'--config.{key}="{text}"' if not set(text) & set('"$`\\!') else shlex.quote(f'--config.{key}={text}')


def _download(shown: Evidence, packed: Packed) -> dict[str, Any] | None:
  """The arm whose rows the page offers as a file, and whether it holds all of them with their text."""
  method = formatting.subject(shown.results) or 'dsdm'
  arms = tables.arms(shown)
  arm = next((arm for arm in arms if arm[0] == method), None)
  if arm is None:
    return None
  rows = np.unique(np.concatenate(tables.draws(shown, arm)))
  whole = packed.characters is None and bool(np.isin(rows, packed.row_N).all())
  return {'name': arms[arm], 'number': list(arms).index(arm), 'rows': len(rows), 'whole': whole, 'arm': '--'.join(arm)}


def _scaled(low: float | None, high: float | None) -> str:
  """An interval of shares in per cent; nothing where nothing varied, as if no model answers anything right."""
  if low is None or high is None or low == high:
    return ''
  return formatting.interval(100 * low, 100 * high, 1)


def _facts(shown: Evidence) -> list[tuple[str, str]]:
  """The size of the experiment."""
  results = shown.results
  seeds = [s['seeds'] for s in results['summary']]
  items = {r['task']: r['n_items'] for r in results['summary'] if r['split'] == 'holdout'}
  seconds = sum(spent['seconds'] for spent in shown.cost.values())
  return [
    ('rows in the candidate pool', formatting.count(len(shown.source_N))),
    ('tokens each model was trained on', formatting.count(shown.tokens)),
    ('models for each arm', str(min(seeds)) if min(seeds) == max(seeds) else f'{min(seeds)}–{max(seeds)}'),
    ('held-out items, all tasks', formatting.count(sum(items.values()))),
    ('for the whole run', formatting.duration(seconds)),
  ]


def _compared(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
  """All comparisons by measure, those of means over tasks last."""
  means = results['means']['comparisons']
  return {
    'Log-probability, nats per token': results['comparisons'] + [c for c in means if c['metric'] == 'logprob'],
    'Accuracy, percentage points': results['accuracy_comparisons'] + [c for c in means if c['metric'] == 'accuracy'],
  }


def _means(results: Mapping[str, Any], several: bool, split: str) -> dict[str, Any]:
  """A table of means: arm × task of a split, means over tasks last."""
  rows = [row for row in [*results['summary'], *results['means']['summary']] if row['split'] == split]
  tasks = list(dict.fromkeys(row['task'] for row in rows))
  arms: dict[tuple[str, str], dict[str, Any]] = {}
  for row in rows:
    arms.setdefault((row['method'], row['target_mix']), {})[row['task']] = row
  best = {task: max(row['logprob'] for row in rows if row['task'] == task) for task in tasks}
  return {
    'tasks': {task: formatting.task_name(formatting.task_key(task, split)) for task in tasks},
    'chance': {t['task']: t.get('chance') for t in results['tasks'] if t['split'] == split},
    'best': best,
    'arms': [
      {'name': formatting.arm_name(method, target, several), 'method': method, 'cells': cells}
      for (method, target), cells in arms.items()
    ],
  }


def _by_task(results: Mapping[str, Any]) -> dict[tuple[str, str], list[list[Mapping[str, Any]]]]:
  """(task, split) → its rows of `summary` and of `lines`, where it has lines."""
  tasks = dict.fromkeys((row['task'], row['split']) for row in results.get('lines', ()))
  return {
    task: [[row for row in results[kind] if (row['task'], row['split']) == task] for kind in ('summary', 'lines')]
    for task in tasks
  }


def _lines(results: Mapping[str, Any], several: bool) -> dict[str, Any]:
  """The table of reference lines: a row per task and arm, a column per line."""
  rows = []
  for summary, lines in _by_task(results).values():
    for row in summary:
      own = {x['line']: x for x in lines if (x['method'], x['target_mix']) == (row['method'], row['target_mix'])}
      rows.append({**row, 'name': formatting.arm_name(row['method'], row['target_mix'], several), 'own': own})
  return {'names': list(dict.fromkeys(x['line'] for x in results.get('lines', ()))), 'rows': rows}


def _multiplier(multiplier: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """The table of compute multipliers; None without a ladder."""
  if multiplier is None:
    return None
  several = formatting.several_targets(row['target_mix'] for row in multiplier['arms'])
  rows = []
  for row in multiplier['arms']:
    task = formatting.task_name(formatting.task_key(row['task'], row['split']))
    rows.append({**row, 'name': formatting.arm_name(row['method'], row['target_mix'], several), 'task': task})
  return {**multiplier, 'rows': rows}


def _sources(shown: Evidence) -> dict[str, Any]:
  """Shares of each source in the pool and in what each arm selected."""
  groups = tables.groups(shown, len(figures.SOURCE_COLOURS))
  shares = {label: groups.summed(share_S) for label, share_S in tables.sources(shown).items()}
  return {'names': groups.names, 'all': len(shown.sources), 'shares': shares}


def _targets(shown: Evidence, examples: int) -> Iterator[dict[str, Any]]:
  """The best and worst rows of each target as text, the mix first."""
  for target in tables.targets(shown):
    z_N = figures.standardised(shown.scores[target])
    order_N = np.argsort(-z_N, kind='stable')
    order_N = order_N[: len(order_N) - np.isnan(z_N).sum()]
    yield {
      'name': target,
      'best': [_example(shown, int(n), z_N) for n in order_N[:examples]],
      'worst': [_example(shown, int(n), z_N) for n in order_N[::-1][:examples]],
    }


def _lds(validation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """A table for each setting and level of the validation: predictors, best first, by families of subsets."""
  lds_tables = []
  for level, heading in (('by_example', 'each target example'), ('by_task', 'the mean of each task')):
    records = validation[level] if validation else []
    for setting in dict.fromkeys(r['setting'] for r in records):
      rows: dict[str, dict[str, Mapping[str, Any]]] = {}
      for r in (r for r in records if r['setting'] == setting):
        rows.setdefault(r['predictor'], {})[r['family']] = r
      order = sorted(rows, key=lambda name: -float(np.mean([r['lds'] for r in rows[name].values()])))
      lds_tables.append(
        {
          'heading': f'{formatting.heading(setting)} setting, {heading}',
          'families': list(dict.fromkeys(r['family'] for r in records if r['setting'] == setting)),
          'rows': {name: rows[name] for name in order},
        }
      )
  return lds_tables


def _example(shown: Evidence, row: int, z_N: np.ndarray) -> dict[str, Any]:
  return {
    'row': row,
    'score': float(z_N[row]),
    'source': shown.sources[shown.source_N[row]],
    'document': shown.documents[shown.document_N[row]]['id'],
    'planted': bool(shown.planted_N[row] >= 0),
    'text': shown.text(row),
  }


def _guard(shown: Evidence, most: int = 20) -> dict[str, Any]:
  """Documents with text of targets: counts by task, some with their passages, and the rows that proxies trained on."""
  found = shown.leakage
  return {
    'on': bool(found['guarded']),
    'masked': found['masked'],
    'documents': found['documents'],
    'rows': found['rows'],
    'all_rows': len(shown.source_N),
    'trained': max(found['trained'], default=0),
    'by_task': sorted(found['by_task'].items()),
    'cases': [
      {'id': d['id'], 'passages': d.get('passages', 1), 'spans': [d, *d.get('more', ())]} for d in shown.leaks[:most]
    ],
  }


def _cost(shown: Evidence) -> dict[str, Any]:
  """The table of stages, and the cost of selecting in trainings of one final model (None if not counted)."""
  total = sum(spent['seconds'] for spent in shown.cost.values()) or 1.0
  rows = [{'stage': stage, **spent, 'share': spent['seconds'] / total} for stage, spent in shown.cost.items()]
  selecting = sum(shown.cost[stage]['flop'] for stage in SELECTING)
  one_model = shown.cost['pretraining']['flop'] / max(1, len(shown.selected))
  return {'rows': rows, 'selecting': selecting, 'ratio': selecting / one_model if selecting and one_model else None}

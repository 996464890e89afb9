"""The figures of the report. A panel is about as wide as a phone, so that a page can set them in rows or in a column.

Equal input gives equal bytes. SVG for the page uses CSS variables for colours, so that it follows the page into dark
mode. PNG and standalone SVG use the colours themselves, on white.
"""

import dataclasses
import io
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from dsdm_jax.config import methods
from dsdm_jax.core import storage
from dsdm_jax.evaluation.results import UNTARGETED
from dsdm_jax.evaluation.suite import BENCHMARK
from dsdm_jax.report import formatting
from dsdm_jax.report.report_data import Curve

# Okabe and Ito's palette, which colour-blind people can tell apart, with its pale colours darkened.
COLOURS = {
  'blue': '#0b6cb0',
  'orange': '#c8560a',
  'green': '#0a8f6c',
  'purple': '#b2598f',
  'sky': '#5fb0e0',
  'yellow': '#d9a300',
  'brown': '#7d5230',
  'olive': '#7f8c1f',
  'ink': '#1d2127',
  'muted': '#6a7280',
  'grid': '#dde1e7',
  'neutral': '#9aa3b0',
  'paper': '#fefefe',
}
METHOD_COLOURS = {
  'dsdm': 'blue',
  'random': 'muted',
  'random_one_epoch': 'neutral',
  'bottom': 'orange',
  'dsdm_greedy': 'sky',
  'dsir': 'green',
  'mixture': 'purple',
}
_FURTHER = ('green', 'purple', 'yellow', 'sky')
SOURCE_COLOURS = ('blue', 'sky', 'green', 'yellow', 'purple', 'orange', 'brown', 'olive')  # largest first
REST_COLOUR = 'neutral'  # of all further sources together
WIDTH = 4.6  # inches; 442 CSS pixels
_STYLE: dict[Any, Any] = {
  'font.size': 9.5,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': COLOURS['neutral'],
  'axes.labelcolor': COLOURS['muted'],
  'axes.linewidth': 0.8,
  'xtick.color': COLOURS['neutral'],
  'ytick.color': COLOURS['neutral'],
  'xtick.labelcolor': COLOURS['muted'],
  'ytick.labelcolor': COLOURS['muted'],
  'text.color': COLOURS['ink'],
  'legend.frameon': False,
  'svg.hashsalt': 'dsdm_jax',
  'text.parse_math': False,  # labels can hold foreign names
  'axes.unicode_minus': True,
}


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A finished figure. A notebook displays it."""

  figure: Figure

  def __post_init__(self) -> None:
    # Lay out once. Another layout for every file would move by rounding errors, and equal figures would differ.
    with matplotlib.rc_context(_STYLE):
      self.figure.draw_without_rendering()
    self.figure.set_layout_engine('none')

  def _repr_png_(self) -> bytes:
    return self.png()

  def save(self, path: str | os.PathLike) -> None:
    """Writes SVG if `path` ends in .svg, else PNG."""
    if Path(path).suffix == '.svg':
      with matplotlib.rc_context(_STYLE | {'svg.fonttype': 'path'}):
        storage.write_text(path, _raw_svg(self.figure))
    else:
      storage.write_bytes(path, self.png())

  def svg(self, name: str) -> str:
    """SVG for HTML: no prologue, ids that begin with `name`, colours as CSS variables, text as text."""
    with matplotlib.rc_context(_STYLE | {'svg.fonttype': 'none'}):
      svg = _raw_svg(self.figure)
    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'<style type="text/css">.*?</style>', '', svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf'\g<1>{name}-', svg)
    for colour, code in COLOURS.items():
      svg = svg.replace(code, f'var(--{colour})')
    return svg

  def png(self) -> bytes:
    """PNG on white, 200 dots per inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
      # Text may reach over the edge of the figure; the page has room for it.
      self.figure.savefig(
        buffer,
        format='png',
        dpi=200,
        facecolor='white',
        bbox_inches='tight',
        pad_inches=0.1,
        metadata={'Software': None},
      )
    return buffer.getvalue()


def method_colour(method: str) -> str:
  """The colour of a method; without one of its own, a colour that depends only on the name."""
  name = METHOD_COLOURS.get(method) or _FURTHER[sum(method.encode()) % len(_FURTHER)]
  return COLOURS[name]


NATS, POINTS = 'nats per token', 'right answers, percentage points'  # what a panel's axis shows


def in_points(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Comparisons of accuracies in percentage points."""
  scaled = ('difference', 'low', 'high')
  return [{**c, **{key: None if c[key] is None else 100 * c[key] for key in scaled}} for c in comparisons]


def forest(comparisons: Sequence[Mapping[str, Any]], unit: str = NATS) -> dict[str, Drawing]:
  """Task → its differences with intervals, one per line; all tasks have the same scale."""
  several = formatting.several_targets(c['target_mix'] for c in comparisons)
  limits = _forest_limits(comparisons)
  panels: dict[str, Drawing] = {}
  for task in dict.fromkeys(c['task'] for c in comparisons):
    lines = _forest_lines([c for c in comparisons if c['task'] == task])
    with matplotlib.rc_context(_STYLE):
      figure, ax = _panel(0.95 + 0.4 * len(lines))
      _forest_rows(ax, lines, several, unit)
      ax.set_xlim(*limits)
      _legend(figure, _forest_legend(), columns=3)
      panels[task] = Drawing(figure)
  return panels


def forest_standalone(
  comparisons: Sequence[Mapping[str, Any]],
  confidence: float,
  baseline: str,
  accuracies: Sequence[Mapping[str, Any]] = (),
) -> str:
  """One SVG with a panel per task, and one more for right answers where it has choices: the result, for a README.

  Shows the comparisons with `baseline`, or all if there are none; only arms for all targets, if there are any.

  Args:
    comparisons: of log-probabilities.
    confidence: of the intervals.
    baseline: a method.
    accuracies: comparisons of accuracies on tasks with choices.
  """

  def shown(every: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    of_baseline = [c for c in every if c['baseline'] == baseline] or every
    mixed = [c for c in of_baseline if c['target_mix'] in ('mix', UNTARGETED)]
    return mixed if 'mix' in {c['target_mix'] for c in of_baseline} else of_baseline

  by_unit = {POINTS: shown(in_points(accuracies)), NATS: shown(comparisons)}
  several = formatting.several_targets(c['target_mix'] for c in by_unit[NATS])
  panels = [
    (unit, own)
    for task in dict.fromkeys(c['task'] for c in by_unit[NATS])
    for unit, every in by_unit.items()
    if (own := [c for c in every if c['task'] == task])
  ]
  benchmarks = any(c['split'] == BENCHMARK for c in by_unit[NATS])
  items = 'held-out items and benchmarks' if benchmarks else 'held-out items'
  with matplotlib.rc_context(_STYLE | {'svg.fonttype': 'path'}):
    height = 1.65 + 0.4 * max((len(_forest_lines(own)) for _, own in panels), default=0)
    figure = Figure(figsize=(0.4 + 3.3 * max(1, len(panels)), height), facecolor='white')
    figure.set_layout_engine('constrained', w_pad=0.14, h_pad=0.08, wspace=0.06)
    measures = (
      'right answers, and log-probability of the right answer'
      if accuracies
      else ('log-probability of the right answer')
    )
    figure.suptitle(
      f'How much better than random data: {measures}, on {items}, {100 * confidence:g} % intervals',
      x=0.015,
      ha='left',
      fontsize=10,
      color=COLOURS['muted'],
    )
    if not panels:
      figure.text(0.015, 0.3, 'No two arms are compared.', fontsize=11)
      return _raw_svg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (unit, own) in zip(axes, panels, strict=True):
      _forest_rows(ax, _forest_lines(own), several, unit)
      ax.set_title(formatting.row_task_name(own[0]), loc='left', fontsize=11, fontweight='bold')
      if any(c.get('below_ngrams') for c in own):
        ax.set_title('below n-grams', loc='right', fontsize=8.8, color=COLOURS['muted'])
      ax.set_xlim(*_forest_limits(by_unit[unit]))
    _legend(figure, _forest_legend(), columns=3)
    return _raw_svg(figure)


def _forest_legend() -> list[tuple[Artist, str]]:
  return [
    (_mark('-o', COLOURS[colour], lw=2.8, ms=6.8, mec=COLOURS['paper']), name)
    for colour, name in (('blue', 'better'), ('orange', 'worse'), ('muted', 'no verdict'))
  ]


def _mark(form: str, colour: str, **options: Any) -> Line2D:
  """A line and marker for a legend; `form` as in `plot`."""
  marker = form.lstrip('-:')
  return Line2D([], [], color=colour, marker=marker or None, ls=form.removesuffix(marker) or 'none', **options)


def _forest_limits(comparisons: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  ends = [_end(c, end) for c in comparisons for end in ('low', 'difference', 'high')]
  low, high = min([0.0, *ends]), max([0.0, *ends])
  margin = 0.06 * (high - low or 1.0)
  return low - margin, high + margin


def _end(comparison: Mapping[str, Any], end: str) -> float:
  """An end of the interval; the difference itself if there is no interval."""
  return comparison['difference'] if comparison[end] is None else comparison[end]


def _forest_lines(comparisons: Sequence[Mapping[str, Any]]) -> list[str | Mapping[str, Any]]:
  """Comparisons grouped by baseline, each group after the baseline's name."""
  lines: list[str | Mapping[str, Any]] = []
  for baseline in dict.fromkeys(c['baseline'] for c in comparisons):
    lines += [baseline, *(c for c in comparisons if c['baseline'] == baseline)]
  return lines


def _forest_rows(ax: Axes, lines: Sequence[str | Mapping[str, Any]], several: bool, unit: str) -> None:
  """Draws lines from the top down. A comparison's label is above its interval, so it needs no margin."""
  across, digits = ax.get_yaxis_transform(), 1 if unit == POINTS else 2
  ax.set_xlabel(unit)
  y = 0.0
  for line in lines:
    if isinstance(line, str):
      y += 0.12
      label = f'against {methods.label(line)}'
      ax.text(0, y, label, transform=across, fontsize=8.8, va='center', color=COLOURS['muted'])
      ax.plot([0, 1], [y + 0.26] * 2, transform=across, color=COLOURS['grid'], lw=0.8)
      y += 0.62
      continue
    # Only verdicts above n-grams are coloured. An interval that excludes zero may have none: Holm's rule, three seeds.
    verdict = '' if line.get('below_ngrams') else line['verdict']
    colour = COLOURS[{'better': 'blue', 'worse': 'orange'}.get(verdict, 'muted')]
    ax.text(
      0,
      y,
      formatting.arm_name(line['method'], line['target_mix'], several),
      transform=across,
      fontsize=9.2,
      va='center',
    )
    value = formatting.signed(line['difference'], digits)
    if line['low'] is not None:
      value += f'  {formatting.interval(line["low"], line["high"], digits)}'
    ax.text(1, y, value, transform=across, fontsize=9.2, va='center', ha='right', color=colour)
    y += 0.42
    # Zero is marked beside each interval only, so that the mark does not cross the labels.
    ax.plot([0, 0], [y - 0.2, y + 0.2], color=COLOURS['neutral'], lw=1, zorder=1)
    ax.plot([_end(line, 'low'), _end(line, 'high')], [y, y], color=colour, lw=2.8, solid_capstyle='round')
    ax.plot(line['difference'], y, 'o', ms=6.8, color=colour, mec=COLOURS['paper'], mew=1.3)
    y += 0.62
  ax.set_ylim(y - 0.3, -0.25)
  ax.set_yticks([])
  ax.spines['left'].set_visible(False)


def reference_lines(summary: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> Drawing:
  """Each arm's log-probability on one task as a dot, and its reference lines as ticks, the best one named.

  Args:
    summary: of `results.json`, the rows of the task.
    lines: of `results.json`, the rows of the task.
  """
  several = formatting.several_targets(row['target_mix'] for row in summary)
  with matplotlib.rc_context(_STYLE):
    figure, ax = _panel(1.05 + 0.62 * len(summary))
    for y, row in enumerate(summary):
      own = [x for x in lines if (x['method'], x['target_mix']) == (row['method'], row['target_mix'])]
      best = max(own, key=lambda x: x['logprob'])
      value = row['logprob']
      colour = method_colour(row['method'])
      ax.plot(
        [min(value, best['logprob']), max(value, best['logprob'])],
        [y, y],
        color=COLOURS['grid'],
        lw=5,
        solid_capstyle='butt',
      )
      for x in own:
        is_best = x is best
        ink, width, tall = (COLOURS['ink'], 2.0, 0.17) if is_best else (COLOURS['neutral'], 1.0, 0.11)
        ax.plot([x['logprob']] * 2, [y - tall, y + tall], color=ink, lw=width)
      face = COLOURS['paper'] if row['over_line'] <= 0 else colour
      ax.plot(value, y, 'o', ms=7.5, color=face, mec=colour, mew=1.8)
      across = ax.get_yaxis_transform()
      name = formatting.arm_name(row['method'], row['target_mix'], several)
      ax.text(0, y - 0.38, name, transform=across, fontsize=9.2, va='center')
      gain = f'{formatting.signed(row["over_line"])} against {row["best_line"]}'
      ax.text(1, y - 0.38, gain, transform=across, fontsize=9.2, va='center', ha='right', color=COLOURS['muted'])
    ax.set_ylim(len(summary) - 0.65, -0.7)
    ax.set_yticks([])
    ax.spines['left'].set_visible(False)
    ax.set_xlabel('log-probability of the right answer, nats per token')
    ink, muted, paper = (COLOURS[name] for name in ('ink', 'muted', 'paper'))
    marks = [
      (_mark('o', muted, ms=7.5, mew=1.8), 'model above all lines'),
      (_mark('o', muted, ms=7.5, mew=1.8, mfc=paper), 'model below a line'),
      (_mark('|', ink, ms=11, mew=2.0), 'best reference line'),
      (_mark('|', COLOURS['neutral'], ms=8, mew=1.0), 'other reference lines'),
    ]
    _legend(figure, marks)
    return Drawing(figure)


def losses(curves: Sequence[Curve]) -> Drawing:
  """Training loss, the mean over seeds with a band from the lowest to the highest seed."""
  with matplotlib.rc_context(_STYLE):
    figure, ax = _panel(3.1)
    labels = []
    for curve in curves:
      if not len(curve.step_P):
        continue
      step_P, loss_SP = _thinned(curve)
      colour = method_colour(curve.method)
      mean_P = loss_SP.mean(axis=0)
      dashes = (0, (4, 2)) if curve.method == 'random_one_epoch' else '-'
      ax.fill_between(step_P, loss_SP.min(0), loss_SP.max(0), color=colour, alpha=0.18, lw=0)
      ax.plot(step_P, mean_P, color=colour, lw=1.8, ls=dashes, marker='o' if len(step_P) < 3 else None)
      labels.append((float(mean_P[-1]), methods.label(curve.method), colour))
    _direct_labels(ax, labels)
    _grid(ax)
    ax.set_xlabel('training step')
    ax.set_title('training loss, nats per token', **_title())
    muted = COLOURS['muted']
    _legend(figure, [(_mark('-', muted, lw=1.8), 'mean over seeds'), (Patch(color=muted, alpha=0.18), 'all seeds')])
    return Drawing(figure)


def _thinned(curve: Curve, most: int = 160) -> tuple[np.ndarray, np.ndarray]:
  """At most `most` points, each the mean of a block of logged steps."""
  block = -(-len(curve.step_P) // most)
  starts = np.arange(0, len(curve.step_P), block)
  sizes = np.diff(np.append(starts, len(curve.step_P)))
  step = np.add.reduceat(curve.step_P, starts) / sizes
  return step, np.add.reduceat(curve.loss_SP, starts, axis=1) / sizes


def _direct_labels(ax: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
  """Names at the right end of the lines, pushed apart until they do not touch."""
  low, high = ax.get_ylim()
  gap = 0.075 * (high - low)
  placed: list[float] = []
  for y, text, colour in sorted(labels):
    placed.append(y if not placed else max(y, placed[-1] + gap))
    ax.annotate(
      text,
      (1.0, placed[-1]),
      xycoords=('axes fraction', 'data'),
      xytext=(5, 0),
      textcoords='offset points',
      color=colour,
      va='center',
      fontsize=9,
      annotation_clip=False,
    )


def multiplier(curve: Mapping[str, Any], arms: Sequence[Mapping[str, Any]], several: bool) -> Drawing:
  """The ladder of random runs, log-probability against compute, and each arm at the compute of one of its trainings.

  A line leads from an arm to the compute that random data would need, with its interval. An arrow marks an interval
  that continues beyond the ladder.

  Args:
    curve: a curve of `multiplier.json`.
    arms: the arms of the same file and task.
    several: whether names include the target.
  """
  with matplotlib.rc_context(_STYLE):
    figure, ax = _panel(3.5)
    points = curve['points']
    flop = [point['flop'] for point in points]
    low_P, high_P = ([_end(p | {'difference': p['value']}, end) for p in points] for end in ('low', 'high'))
    ax.fill_between(flop, low_P, high_P, color=COLOURS['neutral'], alpha=0.25, lw=0)
    ax.plot(flop, [p['value'] for p in points], color=COLOURS['muted'], lw=1.6, marker='o', ms=4)
    ax.set_xscale('log')
    apart = -(-len(flop) // 4)  # there is room for four labels
    ax.set_xticks(flop, [formatting.scientific(x) if i % apart == 0 else '' for i, x in enumerate(flop)], fontsize=8)
    ax.minorticks_off()
    labels = [(points[-1]['value'], 'ladder of random data', COLOURS['muted'])]
    for row in arms:
      colour, read = method_colour(row['method']), row['equivalent']
      start, value = row['flop_final'], row['value']
      low, high = read['low'] or flop[0], read['high'] or flop[-1]
      reached = read['estimate'] or (flop[-1] if read['text'].startswith('>') else flop[0])
      ax.plot([start, reached], [value, value], color=colour, lw=1, ls=':')
      ax.plot([low, high], [value, value], color=colour, lw=2.6, alpha=0.6, solid_capstyle='butt')
      if read['high'] is None:
        ax.plot(high, value, '>', color=colour, ms=6, clip_on=False)
      ax.plot(start, value, 's', color=colour, ms=5.5, mec=COLOURS['paper'])
      if read['estimate'] is not None:
        ax.plot(reached, value, 'o', color=colour, ms=6, mec=COLOURS['paper'])
      labels.append((value, formatting.arm_name(row['method'], row['target_mix'], several), colour))
    _direct_labels(ax, labels)
    _grid(ax)
    ax.set_xlabel('operations of one training')
    ax.set_title('log-probability of the right answer, nats', **_title())
    muted = COLOURS['muted']
    marks = [
      (_mark('s', muted, ms=5.5), 'one training of an arm'),
      (_mark('o', muted, ms=6), 'random data that equal it'),
      (_mark('-', muted, lw=2.6, alpha=0.6), 'interval'),
      (_mark('-o', muted, lw=1.6, ms=4), 'ladder of random data'),
    ]
    _legend(figure, marks)
    return Drawing(figure)


def composition(names: Sequence[str], shares: Mapping[str, np.ndarray]) -> Drawing:
  """A stacked bar for each label of `shares`, from the top down.

  Args:
    names: of the parts, largest first, such as `tables.Groups.names`.
    shares: label → share of each part, summing to 1.
  """
  colours = [COLOURS[name] for name in source_colours(len(names))]
  with matplotlib.rc_context(_STYLE):
    lines = -(-len(names) // 3)
    figure, ax = _panel(0.75 + 0.5 * len(shares) + 0.2 * lines)
    for i, (label, share_S) in enumerate(shares.items()):
      left = 0.0
      for share, colour in zip(share_S, colours, strict=True):
        ax.barh(i, share, left=left, height=0.44, color=colour, ec=COLOURS['paper'], lw=1)
        if share >= 0.08:
          ax.text(
            left + share / 2,
            i,
            f'{100 * share:.0f}',
            ha='center',
            va='center',
            fontsize=8.5,
            color=COLOURS['paper'],
            fontweight='bold',
          )
        left += share
      ax.text(0, i - 0.37, label, fontsize=8.8, va='center')
    ax.set_ylim(len(shares) - 0.6, -0.7)
    ax.set_xlim(0, 1)
    ax.set_yticks([])
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ['0', '25', '50', '75', '100 %'])
    ax.spines[['left', 'bottom']].set_visible(False)
    ax.tick_params(length=0)
    _legend(figure, [(Patch(color=colour), name) for colour, name in zip(colours, names, strict=True)], columns=3)
    return Drawing(figure)


def source_colours(count: int) -> list[str]:
  """Names of the colours of `count` parts: one each for the largest eight, grey for the rest."""
  return [*SOURCE_COLOURS, REST_COLOUR][:count]


def overlap(labels: Sequence[str], share_AB: np.ndarray, chance_AB: np.ndarray) -> Drawing:
  """The share of each arm's rows (line) that each arm (column) also selected; below it, the share by chance."""
  count = len(labels)
  with matplotlib.rc_context(_STYLE):
    figure, ax = _panel(1.1 + 0.5 * count)
    for a in range(count):
      for b in range(count):
        share, chance = share_AB[a, b], chance_AB[a, b]
        if np.isnan(share):
          ax.text(b, a, '–', ha='center', va='center', color=COLOURS['muted'])
          continue
        ax.add_patch(Rectangle((b - 0.47, a - 0.47), 0.94, 0.94, color=COLOURS['blue'], alpha=0.75 * share, lw=0))
        ax.text(b, a - 0.1, f'{100 * share:.0f} %', ha='center', va='center', fontsize=9)
        ax.text(b, a + 0.25, f'{100 * chance:.0f} %', ha='center', va='center', fontsize=7.5, color=COLOURS['muted'])
    ax.set_xlim(-0.5, count - 0.5)
    ax.set_ylim(count - 0.5, -0.5)
    ax.set_yticks(range(count), [_wrapped(label) for label in labels])
    ax.set_xticks(range(count), [_wrapped(label) for label in labels], rotation=30, ha='right', rotation_mode='anchor')
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return Drawing(figure)


def _wrapped(label: str) -> str:
  return textwrap.fill(label, 18)


def histogram(z_N: np.ndarray, top_k: np.ndarray | None, bottom_k: np.ndarray | None) -> Drawing:
  """Standardised scores of all rows; the rows that an arm selected (indices, or None for no such arm) are coloured.

  The outermost bins also count all scores beyond the axis. Rows whose score is NaN are left out.
  """
  reach = float(np.clip(np.nanquantile(np.abs(z_N), 0.995), 2.0, 6.0))
  edges = np.linspace(-reach, reach, 61)
  with matplotlib.rc_context(_STYLE):
    figure, ax = _panel(2.3)
    layers = [(z_N, 'grid', 'pool')]
    layers += [
      (z_N[rows], colour, label)
      for rows, colour, label in ((bottom_k, 'orange', methods.label('bottom')), (top_k, 'blue', 'chosen by DsDm'))
      if rows is not None
    ]
    for values, colour, label in layers:
      counts = np.histogram(np.clip(values, -reach, reach), edges)[0]
      ax.stairs(counts, edges, fill=True, color=COLOURS[colour], label=label, alpha=0.85)
    ax.axvline(0, color=COLOURS['neutral'], lw=0.8)
    ax.legend(loc='upper left', fontsize=8.8, handlelength=1, handleheight=0.9, borderaxespad=0)
    ax.set_xlabel('score, standard deviations from the mean')
    ax.set_title('rows of the pool', **_title())
    ax.set_xlim(-reach, reach)
    return Drawing(figure)


def standardised(score_N: np.ndarray) -> np.ndarray:
  """Scores in standard deviations from their mean, float64; zeros if all are equal. NaN stays."""
  score_N = np.asarray(score_N, np.float64)
  scored_M = score_N[~np.isnan(score_N)]
  deviation = scored_M.std()
  return (score_N - scored_M.mean()) / deviation if deviation > 0 else np.where(np.isnan(score_N), np.nan, 0.0)


def _legend(figure: Figure, entries: Sequence[tuple[Artist, str]], columns: int = 2) -> None:
  """A legend below the axes; names of the user are shortened to fit."""
  names = [name if len(name) <= 22 else name[:21] + '…' for _, name in entries]
  figure.legend(
    [artist for artist, _ in entries],
    names,
    loc='outside lower left',
    ncols=columns,
    fontsize=8.8,
    handlelength=1.2,
    handleheight=0.9,
    columnspacing=1.2,
    labelcolor=COLOURS['muted'],
  )


def _title() -> dict[str, Any]:
  return {'loc': 'left', 'fontsize': 9.5, 'color': COLOURS['muted']}


def _grid(ax: Axes) -> None:
  ax.grid(axis='y', color=COLOURS['grid'], lw=0.8)
  ax.set_axisbelow(True)


def _panel(height: float) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(WIDTH, height), layout='constrained', facecolor='none')
  ax = figure.add_subplot(facecolor='none')
  return figure, ax


def _raw_svg(figure: Figure) -> str:
  buffer = io.StringIO()
  figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
  svg = buffer.getvalue()
  return re.sub(r'\s*<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)

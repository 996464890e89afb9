"""Opens a run in a notebook: pool, scores, selections, results and models as objects with tables and plots.

Objects read finished stages, each on its first use, and print a summary of themselves. Nothing here writes.
"""

import collections
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsdm_jax.attribution.score_arrays import ScoreArrays
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.storage import Location, Named
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.pool import pool as pool_lib
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.results import shortened
from dsdm_jax.report import figures, formatting, report_data, tables
from dsdm_jax.report.figures import Drawing
from dsdm_jax.report.notebook import View, frame

if TYPE_CHECKING:
  import pandas as pd

  from dsdm_jax.attribution.tokens import TokenScores
  from dsdm_jax.training.trained import RunModel

_SCORES = 8  # arrays that a view keeps in memory
# Stages that a run opens; validation and report are optional.
_STAGES = (*report_data.STAGES, 'validation', 'report')


def load(workdir: Named, verify: bool = True, functions: Collection[str] = ()) -> 'Run':
  """Opens the finished stages of a workdir.

  Args:
    workdir: the `--workdir` of the run, a folder or an address (gs://, s3://).
    verify: check the files of each stage against their checksums on its first use.
    functions: 'module:function' names of your own models and outputs, which `model` and `scores.tokens` may import.

  Raises:
    UserError: no stage is finished.

  Example:
    >>> import dsdm_jax
    >>> run = dsdm_jax.load('runs/quickstart')
    >>> run.scores.top('next_code', 5)  # the five rows that help most, with their text
    >>> run.results.comparisons.query("verdict == 'better'")
    >>> run.results.plot('next_code')  # .save('next_code.png') writes it
    >>> run.model('dsdm', seed=0).logits(run.pool.tokens([0, 1]))
  """
  folder = storage.absolute(storage.locate(workdir))
  stages = tuple(stage for stage in _STAGES if storage.is_file(folder / stage / artifacts.MANIFEST))
  if not stages:
    raise UserError(f'{workdir} has no finished stage; give the --workdir of a run')
  return Run(folder, stages, verify, functions)


class Run(View):
  """A run. Attributes: `workdir`, its folder; `stages`, names of its finished stages."""

  def __init__(self, workdir: Location, stages: Sequence[str], verify: bool, functions: Collection[str]):
    self.workdir, self.stages, self._verify, self.functions = workdir, tuple(stages), verify, functions
    self._opened: dict[str, Artifact] = {}

  def facts(self) -> Iterator[tuple[str, str]]:
    yield 'workdir', str(self.workdir)
    yield 'finished', ', '.join(self.stages)
    selection, arm = artifacts.open_stage(self.workdir, 'selection'), 'dsdm'
    if selection is not None and arm not in selection.settings['selection.methods']:
      arm = selection.settings['selection.methods'][0]
    needs = {
      'pool': ('pool',),
      'scores': ('pool', 'datamodel'),
      'selections': ('pool', 'selection'),
      f"model('{arm}')": ('pool', 'selection', 'pretraining'),
      'model(proxy=0)': ('pool', 'proxies'),
      'leakage': ('leakage',),
      'results': ('evaluation',),
      'report': ('report',),
    }
    shown = [name for name, stages in needs.items() if {*stages} <= {*self.stages}]
    yield 'open', ', '.join(f'run.{name}' for name in [*shown, 'cost', 'config'])

  def artifact(self, stage: str) -> Artifact:
    """A finished stage: `.path`, and `.manifest` with settings, semantics, cost and versions.

    Raises a `UserError` if the stage is not finished, if one of its files is missing or damaged, or if it was computed
    from another input than the one in the workdir.
    """
    if stage not in self._opened:
      if stage not in self.stages:
        way_out = 'run --stage=validation' if stage == 'validation' else 'resume the run'  # which leaves it out
        raise UserError(f'{self.workdir} has no finished {stage}, only {", ".join(self.stages)}; {way_out}')
      self._opened |= artifacts.read(self.workdir, stage, known=self._opened, verify=self._verify)
    return self._opened[stage]

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """Flat config key → value, from all finished stages."""
    merged: dict[str, Any] = {}
    for stage in self.stages:
      merged |= self.artifact(stage).config
    return dict(sorted(merged.items()))

  @functools.cached_property
  def pool(self) -> 'PoolView':
    return PoolView(self.artifact('pool'))

  @functools.cached_property
  def scores(self) -> 'ScoresView':
    return ScoresView(self.artifact('datamodel'), self.pool, self)

  @functools.cached_property
  def selections(self) -> 'SelectionsView':
    return SelectionsView(self.artifact('selection'), self.pool)

  @functools.cached_property
  def results(self) -> 'ResultsView':
    return ResultsView(self.artifact('evaluation'), self)

  @functools.cached_property
  def leakage(self) -> 'LeakageView':
    return LeakageView(report_data.leaks(self.artifact('leakage')))

  @functools.cached_property
  def report(self) -> 'ReportView':
    return ReportView(self.artifact('report'))

  @functools.cached_property
  def _models(self) -> dict[tuple[str, int, int | None], 'RunModel']:
    return {}

  def model(self, arm: str = '', seed: int = 0, proxy: int | None = None) -> 'RunModel':
    """A trained model: that of an arm and seed, such as `model('dsdm', seed=0)`, or a proxy, `model(proxy=0)`.

    `.logits(tokens_BL)` computes, and `.module` is the Flax NNX module.

    Raises:
      UserError: the run has no such model, or it is a custom one that `load(…, functions=…)` does not name.
    """
    from dsdm_jax.training import trained

    if (proxy is None) == (not arm):
      raise UserError("name one model: model('dsdm', seed=0) for an arm, or model(proxy=0) for a proxy")
    if (arm, seed, proxy) not in self._models:
      opened = {stage: self.artifact(stage) for stage in trained.stages(arm, proxy)}
      model = trained.RunModel(opened, self.pool, arm, seed, proxy)
      name = f'functions=({model.config.factory!r},)'
      model.refuse_foreign(self.functions, f'; if you trust its module, name it: dsdm_jax.load(..., {name})')
      self._models[arm, seed, proxy] = model
    return self._models[arm, seed, proxy]

  @property
  def cost(self) -> 'pd.DataFrame':
    """Seconds, floating-point operations and bytes on disk of each finished stage."""
    manifests = [self.artifact(stage).manifest for stage in self.stages]
    rows = [m['cost'] | {'bytes': sum(file['bytes'] for file in m['files'].values())} for m in manifests]
    return frame(rows, list(self.stages), 'stage')


class PoolView(View, pool_lib.Pool):
  """The candidate pool: `dsdm_jax.data.pool.pool.Pool` with a table of its rows."""

  @functools.cached_property
  def table(self) -> 'pd.DataFrame':
    """One line per row of the pool: `source`, `document`, `offset` (in tokens of the document), `planted`."""
    sources = np.array(self.sources, dtype=object)
    documents = np.array([str(document['id']) for document in self.documents], dtype=object)
    columns = {'source': sources[self.source_N], 'document': documents[self.document_N], 'offset': self.offset_N}
    return frame(columns | {'planted': self.planted_N >= 0}, index_name='row')

  def show(self, rows: Sequence[int] | np.ndarray, **columns: Any) -> 'pd.DataFrame':
    """Lines of `table` for some rows, with their text; after `columns` of your own, if any."""
    row_B = np.asarray(rows, np.int64)
    origin = {name: np.asarray(self.table[name])[row_B] for name in self.table.columns}
    return frame({**columns, **origin, 'text': [self.text(int(n)) for n in row_B]}, row_B, 'row')

  def facts(self) -> Iterator[tuple[str, str]]:
    yield 'rows', f'{self.num_rows:,} of {self.length} tokens'
    yield 'documents', f'{self.card["documents"]:,}, {formatting.size(self.card["bytes"])} of text'
    yield 'vocabulary', f'{self.vocab_size:,} pieces'
    counts = collections.Counter({name: of['rows'] for name, of in self.card['sources'].items()})
    shares = [f'{name} {count / self.num_rows:.0%}' for name, count in counts.most_common(8)]
    yield 'sources', ', '.join([*shares, *([f'{len(counts) - 8} more'] if len(counts) > 8 else [])])
    yield 'open', "run.pool.table, .show(rows), .text(row), .tokens(rows), .encoder.encode('text')"


class ScoresView(View, Mapping[str, np.ndarray]):
  """Scores of the datamodel: target → float32 [N]. Training on a row with a higher score helps the target more.

  `scores['docs']` is for one task, `scores['mix']` for all targets together. Rows that a prefilter left out have NaN.
  """

  def __init__(self, artifact: Artifact, pool: PoolView, run: Run):
    arrays = ScoreArrays(artifact.path, artifact.manifest['files'])
    self.arrays: Mapping[str, np.ndarray] = arrays
    self._read = functools.lru_cache(maxsize=_SCORES)(lambda name: arrays.of_pool(arrays[name]))
    self._artifact = artifact
    self.semantics = artifact.semantics
    self.tasks: tuple[str, ...] = tuple(artifact.semantics['tasks'])
    self._pool, self._run = pool, run
    self._token_scores: dict[int, TokenScores] = {}

  def __getitem__(self, target: str) -> np.ndarray:
    if target not in (*self.tasks, 'mix'):
      raise KeyError(f'no scores for {target!r}, only for {", ".join(self)}')
    return self._read(f'score_{target}_N')

  def __iter__(self) -> Iterator[str]:
    return iter((*self.tasks, 'mix'))

  def __len__(self) -> int:
    return len(self.tasks) + 1

  @functools.cached_property
  def table(self) -> 'pd.DataFrame':
    """One line per row of the pool, one column per target."""
    return frame({target: self[target] for target in self}, index_name='row')

  def facts(self) -> Iterator[tuple[str, str]]:
    for target in self:
      score_N = self[target]
      best, worst = np.nanargmax(score_N), np.nanargmin(score_N)
      yield target, f'best {score_N[best]:+.3g} (row {best:,}), worst {score_N[worst]:+.3g} (row {worst:,})'
    yield (
      'open',
      "run.scores['mix'], .table, .documents(), .top('mix', 5), .bottom(…), .interval(…), .tokens(…), .plot(…)",
    )

  def interval(self, target: str) -> 'pd.DataFrame':
    """`low`, `score` and `high` of each row: an interval over the target's documents, at `datamodel.confidence`.

    Raises a `UserError` if the run has no resamples, or mixes tasks by rank.
    """
    from dsdm_jax.attribution.scores import Scores

    low_N, high_N = Scores(self._artifact).interval_2N(target)
    return frame({'low': low_N, 'score': self[target], 'high': high_N}, index_name='row')

  def documents(
    self, targets: Sequence[str] = (), arms: Sequence[str] | None = None, by: Literal['rows', 'tokens'] = 'rows'
  ) -> 'pd.DataFrame':
    """One line per record of the sources, with the ids of the sources: status, place, and score for each target.

    Columns, and scores `by` rows or tokens: `dsdm_jax.selection.documents`, which also writes them to files.

    Args:
      targets: tasks, 'mix', or tasks joined by '+'; () for all.
      arms: selections whose share of each document is added; None for all of the run.
    """
    from dsdm_jax.selection import export
    from dsdm_jax.selection.documents import DocumentScores

    stages = ['pool', 'datamodel', *(('proxies', 'features') if by == 'tokens' else ())]
    stages += [stage for stage in ('leakage', 'selection') if stage in self._run.stages]
    inputs = {stage: self._run.artifact(stage) for stage in stages}
    inputs |= export.validation_of(self._run.workdir, inputs)
    scores = DocumentScores(inputs, targets, arms, by, self._run.functions)
    columns = [table.to_pydict() for table in scores.tables()]
    table = frame({name: [x for part in columns for x in part[name]] for name in scores.schema.names})
    table.attrs = scores.metadata
    return table

  @functools.cached_property
  def scale(self) -> dict[str, Any]:
    """Sign and scale of the scores; with a finished validation, what a score is worth in nats per token."""
    from dsdm_jax.selection import export

    opened = {'pool': self._run.artifact('pool'), 'datamodel': self._artifact}
    return export.metadata(self._artifact, export.validation_of(self._run.workdir, opened).get('validation'))

  def top(self, target: str = 'mix', count: int = 10) -> 'pd.DataFrame':
    """The rows with the highest scores, best first, with source, document and text."""
    return self._ranked(target, np.argsort(-self[target], kind='stable')[:count])

  def bottom(self, target: str = 'mix', count: int = 10) -> 'pd.DataFrame':
    """The rows with the lowest scores, worst first."""
    return self._ranked(target, np.argsort(self[target], kind='stable')[:count])

  def tokens(self, target: str, rows: Sequence[int] | np.ndarray, batch_size: int = 8) -> np.ndarray:
    """The contribution of each token of some rows to their scores, float32 [rows, L]; 0 for the first token.

    Contributions of a row sum to its score, up to the rounding of stored features; NaN for rows that a prefilter left
    out. This runs the proxies on all devices of this machine.

    Args:
      target: one task; the score of a mix is not a sum over tokens.
      rows: rows of the pool. Columns of the result match `run.pool.tokens(rows)`.
      batch_size: rows per step.

    Raises:
      UserError: settings of the run do not allow it, see `attribution.tokens`.
    """
    from dsdm_jax.attribution.tokens import TokenScores

    if target not in self.tasks:
      raise KeyError(f'no scores of tokens for {target!r}, only for {", ".join(self.tasks)}')
    if batch_size not in self._token_scores:
      inputs = {stage: self._run.artifact(stage) for stage in ('pool', 'proxies', 'features', 'datamodel')}
      self._token_scores = {batch_size: TokenScores(inputs, batch_size, self._run.functions)}
    return self._token_scores[batch_size](target, rows)

  def _ranked(self, target: str, row_B: np.ndarray) -> 'pd.DataFrame':
    return self._pool.show(row_B, score=self[target][row_B])

  def plot(self, target: str = 'mix') -> Drawing:
    """Histogram of the scores, with the rows of the DsDm and bottom-ranked arms if the run has them."""
    entries = self._run.selections.entries if 'selection' in self._run.stages else []

    def rows_of(method: str) -> np.ndarray | None:
      by_target = {s.target_mix: np.unique(s.rows) for s in reversed(entries) if s.method == method}
      return by_target.get(target, by_target.get('mix'))

    return figures.histogram(figures.standardised(self[target]), rows_of('dsdm'), rows_of('bottom'))


class SelectionsView(View, Mapping[str, selection_lib.Selection]):
  """The selections of all arms: name → `Selection` with `rows`, `weights` and `provenance`."""

  def __init__(self, artifact: Artifact, pool: PoolView):
    self._path, self._pool = artifact.path, pool
    self._index: list[dict[str, Any]] = storage.read_json(self._path / 'index.json', list)
    self._names = tuple(dict.fromkeys(entry['selection'] for entry in self._index))

  def __getitem__(self, name: str) -> selection_lib.Selection:
    if name not in self._names:
      raise KeyError(f'no selection {name!r}, only {", ".join(self._names)}')
    return selection_lib.Selection.load(self._path, name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)

  @property
  def table(self) -> 'pd.DataFrame':
    """One line per final model: `name`, `selection`, `method`, `target`, `seed`, `examples`, `epochs`."""
    return frame(self._index)

  def facts(self) -> Iterator[tuple[str, str]]:
    models = collections.Counter(entry['selection'] for entry in self._index)
    entries = {entry['selection']: entry for entry in self._index}
    for name in self:
      shared = f', {models[name]} models' if models[name] > 1 else ''
      yield name, f'{entries[name]["examples"]:,} rows × {entries[name]["epochs"]:g}{shared}'
    yield 'open', "run.selections['…'].rows, .table, .sources(), .overlap(), .plot_sources(), .plot_overlap()"

  @functools.cached_property
  def entries(self) -> list[report_data.Selected]:
    """One entry per final model; models may share a selection."""
    return [
      report_data.Selected(e['method'], e['target'], e['seed'], self[e['selection']].rows, e['epochs'], e['selection'])
      for e in self._index
    ]

  @property
  def _chosen(self) -> '_Chosen':
    return _Chosen(tuple(self._pool.sources), self._pool.source_N, self.entries)

  def sources(self) -> 'pd.DataFrame':
    """Share of each source (columns) in the pool and in the selections of each arm (lines)."""
    shares = tables.sources(self._chosen)
    share_AS = np.stack(list(shares.values()))
    return frame(dict(zip(self._pool.sources, share_AS.T, strict=True)), list(shares), 'rows')

  def overlap(self) -> 'pd.DataFrame':
    """The share of the rows of one arm (line) that another arm (column) selected too."""
    overlap = tables.overlap(self._chosen)
    return frame(dict(zip(overlap.labels, overlap.share_AB.T, strict=True)), list(overlap.labels), 'of')

  def plot_sources(self) -> Drawing:
    groups = tables.groups(self._chosen, len(figures.SOURCE_COLOURS))
    shares = {label: groups.summed(share_S) for label, share_S in tables.sources(self._chosen).items()}
    return figures.composition(groups.names, shares)

  def plot_overlap(self) -> Drawing:
    overlap = tables.overlap(self._chosen)
    return figures.overlap(overlap.labels, overlap.share_AB, overlap.chance_AB)


@dataclasses.dataclass(frozen=True)
class _Chosen:
  sources: tuple[str, ...]
  source_N: np.ndarray
  selected: list[report_data.Selected]


class ResultsView(View):
  """Results of the evaluation: `raw` is `results.json`, and `docs/evaluation.md` explains all columns.

  `multiplier`, `ladder` and `plot_multiplier` raise a `UserError` if the run has no ladder.
  """

  def __init__(self, artifact: Artifact, run: Run):
    self.raw: dict[str, Any] = storage.read_json(artifact.path / 'results.json', dict)
    self._run = run

  def facts(self) -> Iterator[tuple[str, str]]:
    yield 'result', self.headline
    for c in (c for of_task in formatting.by_task(self.raw).values() for c in of_task):
      verdict = '' if formatting.too_few_seeds([c]) else f', {c["verdict"]}'
      value = f'{formatting.signed(c["difference"])} {formatting.interval(c["low"], c["high"])}'.replace('\u00a0', ' ')
      yield f'{c["task"]}, {c["method"]} − {c["baseline"]}', f'{value.rstrip()} nats per token{verdict}'
    yield 'open', "run.results.comparisons, .summary, .arms, .losses, .plot('…'), .plot_losses(), .raw"

  @property
  def arms(self) -> 'pd.DataFrame':
    """One line per model, task and split."""
    return frame(self.raw['arms'])

  @property
  def summary(self) -> 'pd.DataFrame':
    """Means over seeds, with intervals."""
    return frame(self.raw['summary'])

  @property
  def comparisons(self) -> 'pd.DataFrame':
    """Differences between arms in log-probability, with intervals and verdicts."""
    return frame(self.raw['comparisons'])

  @property
  def multiplier(self) -> 'pd.DataFrame':
    """Compute on random data that equals each arm, `gross …` and `net …`; one line per arm, task and split."""
    return frame(tables.multipliers(self._multiplier))

  @property
  def ladder(self) -> 'pd.DataFrame':
    """The random models behind `multiplier`: compute and log-probability of each rung, task and split."""
    return frame(tables.ladder(self._multiplier))

  @property
  def _multiplier(self) -> dict[str, Any]:
    if self.raw['multiplier'] is None:
      raise UserError('the run has no ladder; set ladder.rungs and run again')
    return self.raw['multiplier']

  def plot_multiplier(self, task: str = 'mean', split: str = 'holdout') -> Drawing:
    """The ladder on one task, or on the mean of all tasks, with the multiplier of each arm."""
    curves, arms = self._multiplier['curves'], self._multiplier['arms']
    curve = next((c for c in curves if (c['task'], c['split']) == (task, split)), None)
    if curve is None:
      raise KeyError(f'no ladder on {task!r}, only on {", ".join(c["task"] for c in curves)}')
    same = [a for a in arms if (a['task'], a['split']) == (task, split)]
    return figures.multiplier(curve, same, formatting.several_targets(a['target_mix'] for a in arms))

  @property
  def headline(self) -> str:
    """The result in words: the first sentences of the report."""
    sentences = [f'{formatting.title(self.raw)}.', *shortened(self.raw), *formatting.headlines(self.raw)]
    return ' '.join(sentences).replace('\u00a0', ' ')

  def plot(self, task: str) -> Drawing:
    """Differences on one task, with their intervals."""
    plots = figures.forest(self.raw['comparisons'])
    if task not in plots:
      raise KeyError(f'no comparisons on {task!r}, only on {", ".join(plots)}')
    return plots[task]

  @functools.cached_property
  def _curves(self) -> list[report_data.Curve]:
    index = storage.read_json(self._run.artifact('selection').path / 'index.json', list)
    return report_data.curves(self._run.artifact('pretraining').path, index)[0]

  @property
  def losses(self) -> 'pd.DataFrame':
    """Training loss in nats per token: one line per arm, seed and logged step."""
    return frame(
      [
        {'method': c.method, 'target_mix': c.target_mix, 'seed': seed, 'step': int(step), 'loss': float(loss)}
        for c in self._curves
        for seed, loss_P in enumerate(c.loss_SP)
        for step, loss in zip(c.step_P, loss_P, strict=True)
      ]
    )

  def plot_losses(self) -> Drawing:
    return figures.losses(self._curves)


class LeakageView(View):
  """Text of targets and benchmarks that documents of the pool contain: `raw` has a record for each document."""

  def __init__(self, found: Mapping[str, list[Mapping[str, Any]]]):
    self.raw = found

  @property
  def table(self) -> 'pd.DataFrame':
    """One line per passage: `document`, what became of it, `task` and `item` that it is from, its `words`."""
    return frame(
      [
        {'document': leak['id'], 'status': status, **{key: span[key] for key in ('task', 'item', 'words')}}
        for status, found in self.raw.items()
        for leak in found
        for span in (leak, *leak['more'])
      ]
    )

  def facts(self) -> Iterator[tuple[str, str]]:
    for status, found in self.raw.items():
      by_task = collections.Counter(str(leak['task']) for leak in found)
      named = ', '.join(f'{task} {count:,}' for task, count in sorted(by_task.items()))
      yield status, f'{len(found):,} documents' + (f': {named}' if named else '')
    yield 'open', 'run.leakage.table, .raw'


class ReportView(View):
  """The report: `path` of the page, and `data`, name → path of its tables as CSV."""

  def __init__(self, artifact: Artifact):
    self.path = artifact.path / artifact.semantics['page']
    tables = storage.children(artifact.path / 'data')
    self.data = {path.stem: path for path in tables if path.suffix == '.csv'}

  def facts(self) -> Iterator[tuple[str, str]]:
    yield 'page', storage.uri(self.path)
    yield 'data', ', '.join(self.data)

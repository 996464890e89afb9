"""Opens a run in a notebook: pool, scores, selections and results as objects with pandas tables and plots.

Objects read finished stages, each on its first use. Nothing here writes.
"""

import dataclasses
import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.pool import pool as pool_lib
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.results import shortened
from dsdm_jax.report import figures, formatting, report_data, tables
from dsdm_jax.report.figures import Drawing

if TYPE_CHECKING:
  import pandas as pd

  from dsdm_jax.attribution.tokens import TokenScores


def load(workdir: str | os.PathLike, verify: bool = True, functions: Collection[str] = ()) -> 'Run':
  """Opens the finished stages of a workdir.

  Args:
    workdir: the `--workdir` of the run.
    verify: check the files of each stage against their checksums on its first use.
    functions: 'module:function' names of your own models and outputs, which `scores.tokens` may import.

  Raises:
    UserError: no stage is finished.

  Example:
    >>> import dsdm_jax
    >>> run = dsdm_jax.load('runs/quickstart')
    >>> run.scores.top('docs', 5)  # the five rows that help most, with their text
    >>> run.results.comparisons.query("verdict == 'better'")
    >>> run.results.plot('docs')  # .save('docs.png') writes it
  """
  workdir = Path(workdir).absolute()
  stages = tuple(stage for stage in report_data.STAGES if (workdir / stage / artifacts.MANIFEST).is_file())
  if not stages:
    raise UserError(f'{workdir} has no finished stage; give the --workdir of a run')
  return Run(workdir, stages, verify, functions)


class Run:
  """A run. Attributes: `workdir`, its folder; `stages`, names of its finished stages."""

  def __init__(self, workdir: Path, stages: Sequence[str], verify: bool, functions: Collection[str]):
    self.workdir, self.stages, self._verify, self.functions = workdir, tuple(stages), verify, functions
    self._opened: dict[str, Artifact] = {}

  def __repr__(self) -> str:
    return f'Run({str(self.workdir)!r}, stages={self.stages})'

  def artifact(self, stage: str) -> Artifact:
    """A finished stage: `.path`, and `.manifest` with settings, semantics, cost and versions.

    Raises a `UserError` if the stage is not finished, if one of its files is missing or damaged, or if it was computed
    from another input than the one in the workdir.
    """
    if stage not in self._opened:
      if not (self.workdir / stage / artifacts.MANIFEST).is_file():
        raise UserError(f'{self.workdir} has no finished {stage}, only {", ".join(self.stages)}; resume the run')
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

  @property
  def cost(self) -> 'pd.DataFrame':
    """Seconds, floating-point operations and bytes on disk of each finished stage."""
    manifests = [self.artifact(stage).manifest for stage in self.stages]
    rows = [m['cost'] | {'bytes': sum(file['bytes'] for file in m['files'].values())} for m in manifests]
    return _frame(rows, index=list(self.stages)).rename_axis('stage')


class PoolView(pool_lib.Pool):
  """The candidate pool: `dsdm_jax.data.pool.pool.Pool` with a table of its rows."""

  @functools.cached_property
  def table(self) -> 'pd.DataFrame':
    """One line per row of the pool: `source`, `document`, `offset` (in tokens of the document), `planted`."""
    sources = np.array(self.sources, dtype=object)
    documents = np.array([str(document['id']) for document in self.documents], dtype=object)
    columns = {'source': sources[self.source_N], 'document': documents[self.document_N], 'offset': self.offset_N}
    return _frame(columns | {'planted': self.planted_N >= 0}).rename_axis('row')

  def show(self, rows: Sequence[int] | np.ndarray) -> 'pd.DataFrame':
    """Lines of `table` for some rows, with their text."""
    row_B = np.asarray(rows, np.int64)
    return self.table.loc[row_B].assign(text=[self.text(int(n)) for n in row_B])


class ScoresView(Mapping[str, np.ndarray]):
  """Scores of the datamodel: target → float32 [N]. Training on a row with a higher score helps the target more.

  `scores['docs']` is for one task, `scores['mix']` for all targets together.
  """

  def __init__(self, artifact: Artifact, pool: PoolView, run: Run):
    with storage.load(artifact.path / 'scores.npz') as arrays:
      self.arrays: dict[str, np.ndarray] = dict(arrays)
    self._artifact = artifact
    self.semantics = artifact.semantics
    self.tasks: tuple[str, ...] = tuple(artifact.semantics['tasks'])
    self._pool, self._run = pool, run
    self._token_scores: dict[int, TokenScores] = {}

  def __getitem__(self, target: str) -> np.ndarray:
    if target not in (*self.tasks, 'mix'):
      raise KeyError(f'no scores for {target!r}, only for {", ".join(self)}')
    return self.arrays[f'score_{target}_N']

  def __iter__(self) -> Iterator[str]:
    return iter((*self.tasks, 'mix'))

  def __len__(self) -> int:
    return len(self.tasks) + 1

  @functools.cached_property
  def table(self) -> 'pd.DataFrame':
    """One line per row of the pool, one column per target."""
    return _frame({target: self[target] for target in self}).rename_axis('row')

  def interval(self, target: str) -> 'pd.DataFrame':
    """`low`, `score` and `high` of each row: an interval over the target's documents, at `datamodel.confidence`.

    Raises a `UserError` if the run has no resamples, or mixes tasks by rank.
    """
    from dsdm_jax.attribution.scores import Scores

    low_N, high_N = Scores(self._artifact).interval_2N(target)
    return _frame({'low': low_N, 'score': self[target], 'high': high_N}).rename_axis('row')

  def documents(
    self, targets: Sequence[str] = (), arms: Sequence[str] | None = None, by: Literal['rows', 'tokens'] = 'rows'
  ) -> 'pd.DataFrame':
    """One line per record of the sources, with the ids of the sources: status, place, and score for each target.

    Columns, and scores `by` rows or tokens: `dsdm_jax.selection.documents`, which also writes them to files.

    Args:
      targets: tasks, 'mix', or tasks joined by '+'; () for all.
      arms: selections whose share of each document is added; None for all of the run.
    """
    from dsdm_jax.selection.documents import DocumentScores

    stages = ['pool', 'datamodel', *(('proxies', 'features') if by == 'tokens' else ())]
    stages += [stage for stage in ('selection', 'validation') if artifacts.open_stage(self._run.workdir, stage)]
    inputs = {stage: self._run.artifact(stage) for stage in stages}
    scores = DocumentScores(inputs, targets, arms, by, self._run.functions)
    columns = [table.to_pydict() for table in scores.tables()]
    frame = _frame({name: [x for part in columns for x in part[name]] for name in scores.schema.names})
    frame.attrs = scores.metadata
    return frame

  def top(self, target: str = 'mix', count: int = 10) -> 'pd.DataFrame':
    """The rows with the highest scores, best first, with source, document and text."""
    return self._ranked(target, np.argsort(-self[target], kind='stable')[:count])

  def bottom(self, target: str = 'mix', count: int = 10) -> 'pd.DataFrame':
    """The rows with the lowest scores, worst first."""
    return self._ranked(target, np.argsort(self[target], kind='stable')[:count])

  def tokens(self, target: str, rows: Sequence[int] | np.ndarray, batch_size: int = 8) -> np.ndarray:
    """The contribution of each token of some rows to their scores, float32 [rows, L]; 0 for the first token.

    Contributions of a row sum to its score, up to the rounding of stored features. This runs the proxies on all
    devices of this machine.

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
    table = self._pool.show(row_B)
    table.insert(0, 'score', self[target][row_B])
    return table

  def plot(self, target: str = 'mix') -> Drawing:
    """Histogram of the scores, with the rows of the DsDm and bottom-ranked arms if the run has them."""
    entries = self._run.selections.entries if 'selection' in self._run.stages else []

    def rows_of(method: str) -> np.ndarray | None:
      by_target = {s.target_mix: np.unique(s.rows) for s in reversed(entries) if s.method == method}
      return by_target.get(target, by_target.get('mix'))

    return figures.histogram(figures.standardised(self[target]), rows_of('dsdm'), rows_of('bottom'))


class SelectionsView(Mapping[str, selection_lib.Selection]):
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
    return _frame(self._index)

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
    return _frame(tables.sources(self._chosen), index=list(self._pool.sources)).T

  def overlap(self) -> 'pd.DataFrame':
    """The share of the rows of one arm (line) that another arm (column) selected too."""
    overlap = tables.overlap(self._chosen)
    return _frame(overlap.share_AB, index=list(overlap.labels), columns=list(overlap.labels))

  def plot_sources(self) -> Drawing:
    return figures.composition(tables.sources(self._chosen))

  def plot_overlap(self) -> Drawing:
    overlap = tables.overlap(self._chosen)
    return figures.overlap(overlap.labels, overlap.share_AB, overlap.chance_AB)


@dataclasses.dataclass(frozen=True)
class _Chosen:
  sources: tuple[str, ...]
  source_N: np.ndarray
  selected: list[report_data.Selected]


class ResultsView:
  """Results of the evaluation: `raw` is `results.json`, and `docs/evaluation.md` explains all columns.

  `multiplier`, `ladder` and `plot_multiplier` raise a `UserError` if the run has no ladder.
  """

  def __init__(self, artifact: Artifact, run: Run):
    self.raw: dict[str, Any] = storage.read_json(artifact.path / 'results.json', dict)
    self._run = run

  @property
  def arms(self) -> 'pd.DataFrame':
    """One line per model, task and split."""
    return _frame(self.raw['arms'])

  @property
  def summary(self) -> 'pd.DataFrame':
    """Means over seeds, with intervals."""
    return _frame(self.raw['summary'])

  @property
  def comparisons(self) -> 'pd.DataFrame':
    """Differences between arms in log-probability, with intervals and verdicts."""
    return _frame(self.raw['comparisons'])

  @property
  def multiplier(self) -> 'pd.DataFrame':
    """Compute on random data that equals each arm, `gross …` and `net …`; one line per arm, task and split."""
    return _frame(tables.multipliers(self._multiplier))

  @property
  def ladder(self) -> 'pd.DataFrame':
    """The random models behind `multiplier`: compute and log-probability of each rung, task and split."""
    return _frame(tables.ladder(self._multiplier))

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
    return ' '.join([*shortened(self.raw), *formatting.headlines(self.raw)]).replace('\u00a0', ' ')

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
    return _frame(
      {'method': c.method, 'target_mix': c.target_mix, 'seed': seed, 'step': int(step), 'loss': float(loss)}
      for c in self._curves
      for seed, loss_P in enumerate(c.loss_SP)
      for step, loss in zip(c.step_P, loss_P, strict=True)
    )

  def plot_losses(self) -> Drawing:
    return figures.losses(self._curves)


def _frame(data: Any, **options: Any) -> 'pd.DataFrame':
  try:
    import pandas
  except ImportError as error:
    raise UserError('tables need pandas; install it with: pip install pandas') from error
  return pandas.DataFrame(data, **options)

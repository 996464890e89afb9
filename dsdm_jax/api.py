"""A run, opened for notebooks: pool, scores, selections and results as objects with pandas tables and plots.

Everything is read when it is first asked for, and only from stages that are finished. Nothing here writes.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdm_jax.core import artifacts
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.pool import pool as pool_lib
from dsdm_jax.errors import UserError
from dsdm_jax.report import figures, formatting, report_data, tables
from dsdm_jax.report.figures import Drawing

if TYPE_CHECKING:
  import pandas as pd

  from dsdm_jax.attribution.tokens import TokenScores


def load(workdir: str | os.PathLike, verify: bool = True) -> 'Run':
  """Opens a workdir, finished or not.

  Args:
    workdir: folder of the run, as given to `--workdir`.
    verify: read each stage's files back against their checksums when it is first used.

  Raises:
    UserError: no stage is finished there.

  Example:
    >>> import dsdm_jax
    >>> run = dsdm_jax.load('runs/quickstart')
    >>> run.scores.top('docs', 5)  # the five rows that help most, with their text
    >>> run.results.comparisons.query("verdict == 'better'")
    >>> run.results.plot('docs')  # shows itself in a notebook; .save('docs.png') writes it
  """
  workdir = Path(workdir).absolute()
  stages = tuple(stage for stage in report_data.STAGES if (workdir / stage / artifacts.MANIFEST).is_file())
  if not stages:
    raise UserError(f'{workdir} holds no finished stage; give the folder that a run was started with as --workdir')
  return Run(workdir, stages, verify)


class Run:
  """A workdir.

  Attributes:
    workdir: its folder.
    stages: names of the stages that are finished.
  """

  def __init__(self, workdir: Path, stages: Sequence[str], verify: bool):
    self.workdir, self.stages, self._verify = workdir, tuple(stages), verify
    self._opened: dict[str, Artifact] = {}

  def __repr__(self) -> str:
    return f'Run({str(self.workdir)!r}, stages={self.stages})'

  def artifact(self, stage: str) -> Artifact:
    """A finished stage: `.path`, and its `.manifest` with settings, semantics, cost and versions.

    Raises:
      UserError: it is not finished, or a file of it is missing or damaged.
    """
    if stage not in self._opened:
      found = artifacts.open_stage(self.workdir, stage)
      if found is None:
        raise UserError(
          f'{self.workdir} has no finished {stage}; finished are {", ".join(self.stages)}: let the run go on'
        )
      if self._verify:
        found.verify()
      self._opened[stage] = found
    return self._opened[stage]

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """Flat config key → value, of all finished stages together."""
    merged: dict[str, Any] = {}
    for stage in self.stages:
      merged |= self.artifact(stage).settings
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
    rows = []
    for stage in self.stages:
      found = self.artifact(stage)
      size = sum(entry['bytes'] for entry in found.manifest['files'].values())
      rows.append({'stage': stage, **found.manifest['cost'], 'bytes': size})
    return _frame(rows).set_index('stage')


class PoolView(pool_lib.Pool):
  """The candidate pool: `dsdm_jax.data.pool.pool.Pool`, and a table of its rows."""

  @functools.cached_property
  def table(self) -> 'pd.DataFrame':
    """A line for each row of the pool: `source`, `document`, `offset` (tokens into the document), `planted`."""
    names = np.array([str(d['id']) for d in self.documents], dtype=object)
    return _frame(
      {
        'source': np.array(self.sources, dtype=object)[self.source_N],
        'document': names[self.document_N],
        'offset': self.offset_N,
        'planted': self.planted_N >= 0,
      },
      index_name='row',
    )

  def show(self, rows: Sequence[int] | np.ndarray) -> 'pd.DataFrame':
    """`table` of some rows, with their text."""
    row_B = np.asarray(rows, np.int64)
    return self.table.loc[row_B].assign(text=[self.text(int(n)) for n in row_B])


class ScoresView(Mapping[str, np.ndarray]):
  """Scores of the datamodel: target → float32 [N]; higher is predicted to help the target more.

  `scores['docs']` is a task's, `scores['mix']` that of all targets together.
  """

  def __init__(self, artifact: Artifact, pool: PoolView, run: Run):
    with np.load(artifact.path / 'scores.npz', allow_pickle=False) as arrays:
      self.arrays: dict[str, np.ndarray] = dict(arrays)
    self._artifact = artifact
    self.semantics = artifact.semantics
    self.tasks: tuple[str, ...] = tuple(artifact.semantics['tasks'])
    self._pool, self._run = pool, run
    self._token_scores: dict[int, TokenScores] = {}

  def __getitem__(self, target: str) -> np.ndarray:
    if target not in (*self.tasks, 'mix'):
      raise KeyError(f'no scores for {target!r}; there are {", ".join(self)}')
    return self.arrays[f'score_{target}_N']

  def __iter__(self) -> Iterator[str]:
    return iter((*self.tasks, 'mix'))

  def __len__(self) -> int:
    return len(self.tasks) + 1

  @functools.cached_property
  def table(self) -> 'pd.DataFrame':
    """A line for each row of the pool and a column for each target."""
    return _frame({target: self[target] for target in self}, index_name='row')

  def interval(self, target: str) -> 'pd.DataFrame':
    """`low`, `score` and `high` of each row for a target; over its tasks' documents, at `datamodel.confidence`.

    Raises:
      UserError: the run made no resamples, or mixes tasks by rank.
    """
    from dsdm_jax.attribution.scores import Scores

    low_N, high_N = Scores(self._artifact).interval_2N(target)
    return _frame({'low': low_N, 'score': self[target], 'high': high_N}, index_name='row')

  def top(self, target: str = 'mix', count: int = 10) -> 'pd.DataFrame':
    """The rows of the highest scores, best first, with source, document and text."""
    return self._ranked(target, np.argsort(-self[target], kind='stable')[:count])

  def bottom(self, target: str = 'mix', count: int = 10) -> 'pd.DataFrame':
    """The rows of the lowest scores, worst first."""
    return self._ranked(target, np.argsort(self[target], kind='stable')[:count])

  def tokens(self, target: str, rows: Sequence[int] | np.ndarray, batch_size: int = 8) -> np.ndarray:
    """What each token of some rows adds to their scores for a task, float32 [rows, L]; the first adds nothing.

    They sum up to the rows' scores, but for how a store rounds features. The proxies pass over the rows for it,
    `batch_size` at a time, on whatever devices there are.

    Args:
      target: one task; the mix of several is no sum over tokens.
      rows: as `run.pool.tokens` takes them; its columns are those of the result.
      batch_size: rows at a time.

    Raises:
      UserError: the run does not tell it, see `attribution.tokens`.
    """
    if target not in self.tasks:
      raise KeyError(f'no scores of tokens for {target!r}; there are {", ".join(self.tasks)}')
    if batch_size not in self._token_scores:
      from dsdm_jax.attribution.tokens import TokenScores

      inputs = {stage: self._run.artifact(stage) for stage in ('pool', 'proxies', 'features', 'datamodel')}
      self._token_scores = {batch_size: TokenScores(inputs, batch_size)}
    return self._token_scores[batch_size](target, rows)

  def _ranked(self, target: str, row_B: np.ndarray) -> 'pd.DataFrame':
    found = self._pool.show(row_B)
    found.insert(0, 'score', self[target][row_B])
    return found

  def plot(self, target: str = 'mix') -> Drawing:
    """How the scores are spread, with what the DsDm and bottom-ranked arms took where these are there."""
    chosen: dict[str, np.ndarray | None] = {'dsdm': None, 'bottom': None}
    if 'selection' in self._run.stages:
      for method in chosen:
        found = [s for s in self._run.selections.entries if s.method == method and s.target_mix in (target, 'mix')]
        found.sort(key=lambda s: s.target_mix != target)
        chosen[method] = np.unique(found[0].rows) if found else None
    return figures.histogram(figures.standardised(self[target]), chosen['dsdm'], chosen['bottom'])


class SelectionsView(Mapping[str, selection_lib.Selection]):
  """What each arm trains on: name → `Selection` with `rows`, `weights` and `provenance`."""

  def __init__(self, artifact: Artifact, pool: PoolView):
    self._path, self._pool = artifact.path, pool
    self._index: list[dict[str, Any]] = json.loads((self._path / 'index.json').read_bytes())
    self._names = tuple(dict.fromkeys(entry['selection'] for entry in self._index))

  def __getitem__(self, name: str) -> selection_lib.Selection:
    if name not in self._names:
      raise KeyError(f'no selection {name!r}; there are {", ".join(self._names)}')
    return selection_lib.Selection.load(self._path, name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)

  @property
  def table(self) -> 'pd.DataFrame':
    """A line for each model to train: `name`, `selection`, `method`, `target`, `seed`, `examples`, `epochs`."""
    return _frame(self._index)

  @functools.cached_property
  def entries(self) -> list[report_data.Selected]:
    """What every model trains on; models may share a selection."""
    return [
      report_data.Selected(e['method'], e['target'], e['seed'], self[e['selection']].rows, e['epochs'], e['selection'])
      for e in self._index
    ]

  @functools.cached_property
  def _chosen(self) -> '_Chosen':
    return _Chosen(tuple(self._pool.sources), self._pool.source_N, self.entries)

  def sources(self) -> 'pd.DataFrame':
    """Share of each source (columns) in the pool and in each arm's selections (lines)."""
    return _frame(tables.sources(self._chosen), index=list(self._pool.sources)).T

  def overlap(self) -> 'pd.DataFrame':
    """Of what the arm of a line selected, the share that the arm of a column selected too."""
    found = tables.overlap(self._chosen)
    return _frame(found.share_AB, index=list(found.labels), columns=list(found.labels))

  def plot_sources(self) -> Drawing:
    return figures.composition(tables.sources(self._chosen))

  def plot_overlap(self) -> Drawing:
    found = tables.overlap(self._chosen)
    return figures.overlap(found.labels, found.share_AB, found.chance_AB)


@dataclasses.dataclass(frozen=True)
class _Chosen:
  sources: tuple[str, ...]
  source_N: np.ndarray
  selected: list[report_data.Selected]


class ResultsView:
  """What the evaluation found; `docs/evaluation.md` says what each column is.

  Attributes:
    raw: the content of `results.json`.
  """

  def __init__(self, artifact: Artifact, run: Run):
    self.raw: dict[str, Any] = json.loads((artifact.path / 'results.json').read_bytes())
    self._run = run

  @property
  def arms(self) -> 'pd.DataFrame':
    """A line for each model, task and split."""
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
    """What each arm is worth in compute on random data: a line for each arm, task and split, `gross …` and `net …`.

    Raises:
      UserError: the run has no ladder.
    """
    return _frame(tables.multipliers(self._multiplier))

  @property
  def ladder(self) -> 'pd.DataFrame':
    """The random models that multipliers are read off: compute and log-probability of each rung, task and split.

    Raises:
      UserError: the run has no ladder.
    """
    return _frame(tables.ladder(self._multiplier))

  @property
  def _multiplier(self) -> dict[str, Any]:
    if self.raw['multiplier'] is None:
      raise UserError('the run has no ladder to read compute off; set ladder.rungs and run again')
    return self.raw['multiplier']

  def plot_multiplier(self, task: str = 'mean', split: str = 'holdout') -> Drawing:
    """The ladder on one task, or on their mean, with the arms that were read off it."""
    found = self._multiplier
    curves = [c for c in found['curves'] if (c['task'], c['split']) == (task, split)]
    if not curves:
      raise KeyError(f'no ladder on {task!r}; there are {", ".join(c["task"] for c in found["curves"])}')
    same = [a for a in found['arms'] if (a['task'], a['split']) == (task, split)]
    return figures.multiplier(curves[0], same, formatting.several_targets(a['target_mix'] for a in found['arms']))

  @property
  def headline(self) -> str:
    """The result in words, as the report begins."""
    return ' '.join(formatting.headlines(self.raw)).replace('\u00a0', ' ')

  def plot(self, task: str) -> Drawing:
    """The differences on one task, with their intervals."""
    found = figures.forest(self.raw['comparisons'])
    if task not in found:
      raise KeyError(f'no comparisons on {task!r}; there are {", ".join(found)}')
    return found[task]

  @functools.cached_property
  def _curves(self) -> list[report_data.Curve]:
    index = json.loads((self._run.artifact('selection').path / 'index.json').read_bytes())
    return report_data.curves(self._run.artifact('pretraining').path, index)[0]

  @property
  def losses(self) -> 'pd.DataFrame':
    """Training loss in nats per token: a line for each arm, seed and logged step."""
    return _frame([
      {'method': c.method, 'target_mix': c.target_mix, 'seed': seed, 'step': int(step), 'loss': float(loss)}
      for c in self._curves
      for seed, loss_P in enumerate(c.loss_SP)
      for step, loss in zip(c.step_P, loss_P, strict=True)
    ])  # fmt: skip

  def plot_losses(self) -> Drawing:
    return figures.losses(self._curves)


def _frame(data: Any, index_name: str = '', **options: Any) -> 'pd.DataFrame':
  try:
    import pandas
  except ImportError as error:
    raise UserError('tables need pandas, which is not installed; pip install pandas, then try again') from error
  frame = pandas.DataFrame(data, **options)
  if index_name:
    frame.index.name = index_name
  return frame

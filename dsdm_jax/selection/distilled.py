"""A cheap replacement of the datamodel: a linear scorer of hashed n-grams, fitted to the scores of a sample.

It only reads text, so it can score pools a hundred times larger than one whose features are computed:

    python -m dsdm_jax.selection.distilled --workdir RUN --pool OTHER_RUN/pool --out scores.npy

fits it to a finished run, reports how well it predicts the scores of held-out rows, and scores every row of another
pool, or of the run's own pool. The selector `imported` reads the file.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import scipy.stats

from dsdm_jax.attribution.scores import Scores
from dsdm_jax.core import artifacts, prng, storage
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError, visible_lines
from dsdm_jax.selection import ngrams, ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target
from dsdm_jax.selection.classifier import shares
from dsdm_jax.selection.export import read_vocabulary

_HELD_OUT = 0.2  # of the sample
_RIDGE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # λ relative to the mean square of a row of features


@dataclasses.dataclass(frozen=True)
class DistilledScorer:
  """score(n) = bias + mean over the row's n-grams of the weight of their bucket.

  Attributes:
    correlation: Spearman's correlation with the datamodel's scores, over rows that neither weights nor ridge were
      fitted to.
    fitted, held_out: number of rows.
  """

  weight: np.ndarray
  bias: float
  ridge: float
  correlation: float
  fitted: int
  held_out: int

  def score(self, grams: ngrams.PoolGrams) -> np.ndarray:
    """The score of every row: float32 [N]."""
    return grams.sums(self.weight, mean=True) + np.float32(self.bias)


def dsdm_distilled(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest scores by a scorer that is fitted to the scores of `selection.distill_rows` rows.

  In a run with a prefilter, rows with a score of the datamodel keep it, and the scorer predicts the others.
  """
  del seed
  grams, measured_N = ngrams.of_pool(pool, ngrams.FITTED), pool.scores.score_N(target.name)
  scorer = fit(grams, measured_N, pool.options.distill_rows)
  correlation = round(scorer.correlation, 4)
  provenance = {'held_out_spearman': correlation, 'fitted_rows': scorer.fitted, 'ridge': scorer.ridge}
  score_N = scorer.score(grams)
  if pool.unscored_N.any():
    score_N = np.where(pool.unscored_N, score_N, measured_N)
  return ranking.ranked(score_N, pool, budget.examples, **provenance)


def fit(grams: ngrams.PoolGrams, score_N: np.ndarray, sample: int) -> DistilledScorer:
  """Fits ridge regression to the scores of a random sample of rows.

  A fifth of the sample is held out: half of it to choose the ridge and half to measure the correlation. Rows whose
  score is NaN, which a prefilter left out, are in no sample.

  Raises:
    UserError: fewer than 50 rows have scores.
  """
  scored = np.flatnonzero(~np.isnan(score_N))
  if len(scored) < 50:
    raise UserError(f'a scorer cannot be fitted to {len(scored)} rows with scores; it needs at least 50')
  order = scored[prng.numpy_stream(0, 'selection', 'distilled').permutation(len(scored))[:sample]]
  held = max(10, round(_HELD_OUT / 2 * len(order)))
  test, validation, train = np.split(order, [held, 2 * held])
  x_test, x_validation, x_train = (
    scipy.sparse.vstack([*map(shares, grams.each(rows))]) for rows in (test, validation, train)
  )
  y_M = score_N[train].astype(np.float64)
  mean_V = np.asarray(x_train.mean(axis=0)).reshape(-1)
  weights = {ridge: _solve(x_train, mean_V, y_M - y_M.mean(), ridge) for ridge in _RIDGE}
  # The first of equal ridges, which is the smallest.
  ridge = max(_RIDGE, key=lambda ridge: _spearman(x_validation @ weights[ridge], score_N[validation]))
  weight = weights[ridge]
  correlation = _spearman(x_test @ weight, score_N[test])
  bias = float(y_M.mean() - mean_V @ weight)
  return DistilledScorer(weight.astype(np.float32), bias, ridge, correlation, len(train), len(test))


def _solve(x: Any, mean_V: np.ndarray, y_M: np.ndarray, ridge: float) -> np.ndarray:
  """Ridge regression of y on centred columns by LSQR, with an operator: centring would make the matrix dense."""

  def forward(v: np.ndarray) -> np.ndarray:
    return x @ v.reshape(-1) - mean_V @ v.reshape(-1)

  def transposed(u: np.ndarray) -> np.ndarray:
    return x.T @ u.reshape(-1) - mean_V * u.sum()

  operator = scipy.sparse.linalg.LinearOperator(x.shape, forward, rmatvec=transposed, dtype=np.float64)
  scale = float(x.multiply(x).sum() / x.shape[0])
  return scipy.sparse.linalg.lsqr(operator, y_M, damp=(ridge * scale * x.shape[0]) ** 0.5, iter_lim=300)[0]


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
  return 0.0 if np.ptp(a) == 0 else float(scipy.stats.spearmanr(a, b).statistic)


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.selection.distilled', description=__doc__)
  parser.add_argument('--workdir', type=storage.locate, required=True, help='a run whose datamodel is finished')
  parser.add_argument('--target', default='mix', help="a task, 'mix' or tasks joined by '+' (default: mix)")
  parser.add_argument('--pool', type=storage.locate, help='folder of a finished pool stage; default: that of the run')
  parser.add_argument('--out', type=storage.locate, required=True, help='.npy: one float32 per row of the pool')
  parser.add_argument('--rows', type=int, default=20_000, help='rows of the run that are fitted to and held out')
  parser.add_argument('--ngrams', choices=('words', 'tokens'), default='words')
  parser.add_argument('--buckets', type=int, default=ngrams.FITTED)
  flags = parser.parse_args(argv)
  try:
    sys.stdout.write(visible_lines(_run(flags)) + '\n')
  except UserError as error:
    sys.stderr.write(f'dsdm_jax: {error}\n')
    return 2
  return 0


def _run(flags: argparse.Namespace) -> str:
  own_pool, datamodel = artifacts.read(flags.workdir, 'pool', 'datamodel').values()
  scores = Scores(datamodel)
  unknown = set(flags.target.split('+')) - {*scores.tasks, 'mix'}
  if unknown:
    raise UserError(f'--target={flags.target}: {flags.workdir} has scores for {", ".join(scores.tasks)} and mix')
  if flags.out.suffix != '.npy':
    raise UserError(f'--out={flags.out} must end in .npy')
  pool = Pool(own_pool)
  grams = other = ngrams.PoolGrams(pool, flags.ngrams, flags.buckets)
  if flags.pool is not None:
    artifact = artifacts.open_folder(flags.pool)
    if artifact is None:
      raise UserError(f'--pool={flags.pool} is not a finished pool folder; give one, such as RUN/pool')
    artifact.verify()
    other = ngrams.PoolGrams(Pool(artifact), flags.ngrams, flags.buckets)
  if flags.ngrams == 'tokens' and read_vocabulary(pool.path) != read_vocabulary(other.pool.path):
    raise UserError(f'{flags.pool} has another vocabulary, so its ids mean other text; use --ngrams=words')
  scorer = fit(grams, scores.score_N(flags.target), flags.rows)
  score_N = scorer.score(other)
  storage.save_npy(flags.out, score_N)
  return (
    f'fitted to {scorer.fitted} rows; Spearman {scorer.correlation:+.3f} with the datamodel on {scorer.held_out} '
    f'others; wrote {len(score_N)} scores to {flags.out}'
  )


if __name__ == '__main__':
  sys.exit(main())

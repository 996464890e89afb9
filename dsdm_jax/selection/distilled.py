"""A cheap scorer in place of the datamodel: hashed n-grams, linear, fitted to the scores of a sample.

What it costs is reading text, so it reaches pools a hundred times larger than the one that was featurized:

    python -m dsdm_jax.selection.distilled --workdir RUN --pool OTHER_RUN/pool --out scores.npy

fits it to a finished run, tells how well it predicts the scores of rows that it was not fitted to, and scores every
row of another pool (or of the run's own). The selector `imported` takes the file.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import scipy.stats

from dsdm_jax.attribution.scores import Scores
from dsdm_jax.core import artifacts, prng, storage
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.selection import ngrams, ranking, vocabularies
from dsdm_jax.selection.candidates import Candidates, Target
from dsdm_jax.selection.classifier import shares
from dsdm_jax.selection.registry import Budget, selector

_HELD_OUT = 0.2  # of the sample
_RIDGE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # λ relative to the mean square of a row of features


@dataclasses.dataclass(frozen=True)
class Scorer:
  """score(n) = bias + mean over the row's n-grams of the weight of their bucket.

  Attributes:
    correlation: Spearman's with the datamodel's scores over rows that neither weights nor ridge were fitted to.
    fitted, held_out: rows.
  """

  weight: np.ndarray
  bias: float
  ridge: float
  correlation: float
  fitted: int
  held_out: int

  def score(self, grams: ngrams.PoolGrams) -> np.ndarray:
    """Of every row: float32 [N]."""
    return grams.sums(self.weight, mean=True) + np.float32(self.bias)


@selector('dsdm_distilled', targeted=True, seeded=False)
def dsdm_distilled(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows of highest score by a scorer fitted to the datamodel's scores of `selection.distill_rows` rows."""
  del seed
  grams = ngrams.of_pool(pool)
  scorer = fit(grams, pool.scores.score_N(target.name), pool.options.distill_rows)
  return ranking.ranked(
    scorer.score(grams), pool, budget.examples,
    held_out_spearman=round(scorer.correlation, 4), fitted_rows=scorer.fitted, ridge=scorer.ridge,
  )  # fmt: skip


def fit(grams: ngrams.PoolGrams, score_N: np.ndarray, sample: int) -> Scorer:
  """Fits ridge regression to the scores of a random sample of rows.

  A fifth of the sample is held out, half of it to choose the ridge and half to tell the correlation.

  Raises:
    UserError: the pool has fewer than 50 rows.
  """
  if len(score_N) < 50:
    raise UserError(f'a scorer cannot be fitted to {len(score_N)} rows; give it a pool of at least 50')
  order = prng.numpy_stream(0, 'selection', 'distilled').permutation(len(score_N))[:sample]
  held = max(10, round(_HELD_OUT / 2 * len(order)))
  tell, choose, learn = np.split(order, [held, 2 * held])
  sides = {'tell': tell, 'choose': choose, 'learn': learn}
  x = {name: scipy.sparse.vstack([*map(shares, grams.each(rows))]) for name, rows in sides.items()}
  y_M = score_N[learn].astype(np.float64)
  mean_V = np.asarray(x['learn'].mean(axis=0)).reshape(-1)
  best: tuple[float, float, np.ndarray] | None = None
  for ridge in _RIDGE:
    weight = _solve(x['learn'], mean_V, y_M - y_M.mean(), ridge)
    agrees = _spearman(x['choose'] @ weight, score_N[choose])
    if best is None or agrees > best[0]:
      best = agrees, ridge, weight
  assert best is not None
  _, ridge, weight = best
  told = _spearman(x['tell'] @ weight, score_N[tell])
  bias = float(y_M.mean() - mean_V @ weight)
  return Scorer(weight.astype(np.float32), bias, ridge, told, len(learn), len(tell))


def _solve(x: Any, mean_V: np.ndarray, y_M: np.ndarray, ridge: float) -> np.ndarray:
  """Ridge regression of y on centred columns, by LSQR: centring would fill the matrix, so it is an operator."""
  operator = scipy.sparse.linalg.LinearOperator(
    x.shape, lambda v: x @ v.reshape(-1) - mean_V @ v.reshape(-1),
    rmatvec=lambda u: x.T @ u.reshape(-1) - mean_V * u.sum(), dtype=np.float64,
  )  # fmt: skip
  scale = float(x.multiply(x).sum() / x.shape[0])
  return scipy.sparse.linalg.lsqr(operator, y_M, damp=(ridge * scale * x.shape[0]) ** 0.5, iter_lim=300)[0]


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
  return 0.0 if np.ptp(a) == 0 else float(scipy.stats.spearmanr(a, b).statistic)


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(prog='python -m dsdm_jax.selection.distilled', description=__doc__)
  parser.add_argument('--workdir', type=Path, required=True, help='a run whose datamodel is finished')
  parser.add_argument('--target', default='mix', help="a task, 'mix' or tasks joined by '+' (default: mix)")
  parser.add_argument('--pool', type=Path, help='folder of a finished pool stage; default: that of the run')
  parser.add_argument('--out', type=Path, required=True, help='.npy: one float32 a row of the pool')
  parser.add_argument('--rows', type=int, default=20_000, help='rows of the run that are fitted and told by')
  parser.add_argument('--ngrams', choices=('words', 'tokens'), default='words')
  parser.add_argument('--buckets', type=int, default=65_536)
  given = parser.parse_args(argv)
  try:
    sys.stdout.write(_run(given) + '\n')
  except UserError as error:
    sys.stderr.write(f'dsdm_jax: {error}\n')
    return 2
  return 0


def _run(given: argparse.Namespace) -> str:
  own, datamodel = (artifacts.open_stage(given.workdir, stage) for stage in ('pool', 'datamodel'))
  if own is None or datamodel is None:
    raise UserError(f'{given.workdir} has no finished pool and datamodel; run these stages first')
  scores = Scores(datamodel)
  unknown = set(given.target.split('+')) - {*scores.tasks, 'mix'}
  if unknown:
    raise UserError(f'--target={given.target}: {given.workdir} has scores for {", ".join(scores.tasks)} and mix')
  if given.out.suffix != '.npy':
    raise UserError(f'--out={given.out} must end in .npy')
  pool = Pool(own)
  grams = ngrams.PoolGrams(pool, given.ngrams, given.buckets)
  other = grams if given.pool is None else ngrams.PoolGrams(_open(given.pool), given.ngrams, given.buckets)
  if given.ngrams == 'tokens' and vocabularies.read(pool.path) != vocabularies.read(other.pool.path):
    raise UserError(f'{given.pool} has a vocabulary of its own, so its ids mean other text; take --ngrams=words')
  scorer = fit(grams, scores.score_N(given.target), given.rows)
  score_N = scorer.score(other)
  storage.save_npy(given.out, score_N)
  return (
    f'fitted to {scorer.fitted} rows; Spearman {scorer.correlation:+.3f} with the datamodel on {scorer.held_out} '
    f'others; wrote {len(score_N)} scores to {given.out}'
  )


def _open(folder: Path) -> Pool:
  artifact = artifacts.open_folder(folder)
  if artifact is None:
    raise UserError(f'--pool={folder} is no finished pool folder; give one, such as RUN/pool')
  return Pool(artifact)


if __name__ == '__main__':
  sys.exit(main())

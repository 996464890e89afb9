"""A classifier of target text against text of the pool (GPT-3, arXiv 2005.14165, appendix A; DCLM, arXiv 2406.11794).

scikit-learn's logistic regression on the shares of hashed uni- and bigrams: target examples against a sample of rows.
All tasks have the same weight (breadth its own), and so have both sides: score(n) = w · x(n) + b,
p(n) = 1 / (1 + exp(−score(n))). The strength of the regularization is chosen by target examples that the classifier did
not learn from.
"""

import numpy as np
import scipy.sparse

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ngrams, ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target, choose

_STRENGTHS = (1.0, 0.1, 10.0)  # C of scikit-learn, whose default is first
_CHOOSE_ROWS = 2_000  # rows of the pool by which it is chosen, at most
_PARETO = 9.0  # GPT-3's α: most of the selected rows score high


def classifier(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows most similar to target text."""
  del seed
  logit_N = pool.once(('classifier', target.name), lambda: _logits(pool, target))
  return ranking.ranked(logit_N, pool, budget.examples)


def classifier_pareto(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest p + Pareto(9) noise. GPT-3 keeps all rows above 1 instead of the best k."""
  logit_N = pool.once(('classifier', target.name), lambda: _logits(pool, target))
  probability_N = 1 / (1 + np.exp(-logit_N.astype(np.float64)))
  noise_N = prng.numpy_stream(seed, 'selection', 'classifier_pareto').pareto(_PARETO, len(logit_N))
  return ranking.ranked(probability_N + noise_N, pool, budget.examples)


def _logits(pool: Candidates, target: Target) -> np.ndarray:
  from sklearn.linear_model import LogisticRegression

  grams = ngrams.of_pool(pool, ngrams.FITTED)
  rng = prng.numpy_stream(0, 'selection', 'classifier')
  rows = np.sort(rng.choice(pool.num_rows, min(pool.options.classifier_rows, pool.num_rows), replace=False))
  pool_x = scipy.sparse.vstack([shares(block) for block in grams.each(rows)]).tocsr()

  def fit(strength: float, of: Target, negatives: scipy.sparse.csr_array) -> LogisticRegression:
    tasks = [shares(grams.examples(of, task)) for task in of.tasks]
    features = scipy.sparse.vstack([*tasks, negatives])
    sizes = [*(task.shape[0] for task in tasks), negatives.shape[0]]
    share = [*(0.5 * of.weight_T / of.weight_T.sum()), 0.5]
    weight = np.repeat(np.array(share) / sizes, sizes)
    label = np.repeat([1, 0], [sum(sizes[:-1]), negatives.shape[0]])
    # scikit-learn's C = 1 suits rows of length one. Dividing by the mean square of a row makes it suit these.
    scale = float(features.multiply(features).sum()) / features.shape[0] or 1.0
    return LogisticRegression(C=strength / scale, max_iter=300).fit(features, label, sample_weight=weight * len(label))

  order = rng.permutation(len(rows))[:_CHOOSE_ROWS]
  by, fitted = np.split(order, [max(1, len(order) // 4)])

  def loss(strength: float, learnt: Target, held: Target) -> float:
    model = fit(strength, learnt, pool_x[fitted])
    positive = [np.logaddexp(0, -model.decision_function(shares(grams.examples(held, t)))).mean() for t in held.tasks]
    return float(
      np.average(positive, weights=held.weights or None) + np.logaddexp(0, model.decision_function(pool_x[by])).mean()
    )

  strength = choose(target, _STRENGTHS, loss) if len(fitted) else _STRENGTHS[0]
  model = fit(strength, target, pool_x)
  return grams.sums(model.coef_[0], mean=True) + np.float32(model.intercept_[0])


def shares(grams: ngrams.Grams) -> scipy.sparse.csr_array:
  """Counts of n-grams divided by their number in the text, sparse [B, buckets]."""
  return scipy.sparse.csr_array(scipy.sparse.diags_array(1.0 / np.maximum(grams.size_B, 1)) @ grams.matrix())

"""fastText's classifier of target text against text of the pool, as DCLM filters (arXiv 1607.01759, 2406.11794).

A text is the mean of the embeddings of its hashed words and bigrams and of an end mark, h = mean_i E[i], and
p = σ(2 w · h): for two classes fastText's softmax has opposite rows ±w. Stochastic gradient descent, one text at a time
with a rate that falls to zero, in fastText's order of updates. Its defaults: 100 dimensions, 2,000,000 buckets, 5
passes, rate 0.1; bigrams as in DCLM. DCLM's positives are 200,000 texts of a reference (instructions of OpenHermes 2.5
and answers of ELI5), its negatives as many random texts of the pool, and it keeps the texts of highest score. Here the
reference is the target's examples. Both sides have the same number of texts, so the target's are repeated, each task
equally often. Buckets that training did not see score 0, where fastText has random numbers.

Training takes some 60 µs a text and pass, of at most 400,000 texts; scores are a sum of one weight for each word and
bigram. Memory: the n-grams of the texts, and the embeddings of the buckets seen, at most 0.8 GB.
"""

import numpy as np
import scipy.sparse

from dsdm_jax.core import prng
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.selection import ngrams, ranking
from dsdm_jax.selection.candidates import Budget, Candidates, Target

_BUCKETS, _DIMENSIONS, _PASSES, _RATE = 2_000_000, 100, 5, 0.1
_ROWS = 200_000  # of the pool, at most, and as many target texts


def fasttext(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
  """The k rows with the highest log-odds of target text."""
  del seed
  grams = ngrams.of_pool(pool, _BUCKETS)
  rng = prng.numpy_stream(0, 'selection', 'fasttext')
  rows = np.sort(rng.choice(pool.num_rows, min(_ROWS, pool.num_rows), replace=False))
  tasks = [grams.examples(target, task).matrix() for task in target.tasks]
  each = np.ceil(len(rows) * target.weight_T / target.weight_T.sum()).astype(int)
  places = [np.resize(np.arange(task.shape[0]), count) for task, count in zip(tasks, each, strict=True)]
  first = np.cumsum([0, *(task.shape[0] for task in tasks)])
  positive = np.concatenate([at + start for at, start in zip(places, first, strict=False)])
  texts = scipy.sparse.vstack([*tasks, *(block.matrix() for block in grams.each(rows))]).tocsr()
  order = np.concatenate([positive, first[-1] + np.arange(len(rows))])
  weight, end = train(texts, order, order < first[-1], rng)
  grams_of_pass = np.diff(texts.indptr)[order].sum() + len(order)
  pool.add_flop(4.0 * _DIMENSIONS * _PASSES * float(grams_of_pass))  # of the mean and of its update
  logit_N = grams.scores(lambda block: (block.sums(weight) + end) / (block.size_B + 1))
  return ranking.ranked(logit_N, pool, budget.examples)


def train(
  texts: scipy.sparse.csr_matrix, order: np.ndarray, positive: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
  """Weights by which a text's log-odds are the mean over its n-grams and the end mark.

  Args:
    texts: counts of n-grams, sparse [B, buckets].
    order: the texts of one pass, int [M]; a text may occur often.
    positive: whether each is target text.
    rng: orders and starting embeddings.

  Returns:
    (weight of each bucket, float32; weight of the end mark).
  """
  seen, column = np.unique(texts.indices, return_inverse=True)
  size_B = np.asarray(texts.sum(axis=1)).reshape(-1) + 1
  bound = 1 / _DIMENSIONS
  e_VD = rng.uniform(-bound, bound, (len(seen) + 1, _DIMENSIONS)).astype(np.float32)  # the end mark is last
  w_D = np.zeros(_DIMENSIONS, np.float32)
  ids = [np.append(part, len(seen)) for part in np.split(column, texts.indptr[1:-1])]
  shares = [
    np.append(part, np.float32(1)) / np.float32(size)
    for part, size in zip(np.split(texts.data.astype(np.float32), texts.indptr[1:-1]), size_B, strict=True)
  ]
  done, total = 0, _PASSES * len(order)
  for _ in range(_PASSES):
    for place in rng.permutation(len(order)):
      text, rate = order[place], _RATE * (1 - done / total)
      id_M, share_M = ids[text], shares[text]
      x_MD = e_VD[id_M]
      h_D = share_M @ x_MD
      step = np.float32(rate * (positive[place] - 1 / (1 + np.exp(-2 * float(w_D @ h_D)))))
      x_MD += np.outer(share_M, 2 * step * w_D)
      e_VD[id_M] = x_MD
      w_D += step * h_D
      done += 1
  weight = np.zeros(texts.shape[1], np.float32)
  weight[seen] = e_VD[:-1] @ (2 * w_D)
  return weight, float(e_VD[-1] @ (2 * w_D))

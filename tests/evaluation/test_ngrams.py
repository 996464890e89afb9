"""Count models against a plain implementation with dicts, and a case worked out by hand."""

import collections

import numpy as np
import pytest

from dsdm_jax.evaluation.ngrams import NGrams, discounts, histories

EOS = 1


def _flat(rows):
  return np.concatenate(rows), np.cumsum([0, *map(len, rows)])[:-1]


class _Oracle:
  """Interpolated modified Kneser-Ney of one order, n-gram by n-gram."""

  def __init__(self, rows, vocab, order):
    self.vocab, self.order = vocab, order
    plain = [collections.Counter() for _ in range(order + 1)]
    left = [collections.defaultdict(set) for _ in range(order + 1)]
    for row in rows:
      row = tuple(int(token) for token in row)
      for end in range(1, len(row) + 1):
        for k in range(1, min(order, end) + 1):
          gram = row[end - k : end]
          if EOS in gram[1:-1]:
            break
          plain[k][gram] += 1
          left[k][gram].add(row[end - k - 1] if end > k else 'edge')
    self.count = {}
    for k in range(1, order + 1):
      for gram, times in plain[k].items():
        whole = k == order or (k > 1 and gram[0] == EOS)
        self.count[gram] = times if whole else len(left[k][gram])
    self.discount = {}
    for k in range(1, order + 1):
      n = collections.Counter(c for gram, c in self.count.items() if len(gram) == k)
      found = None
      if all(n[j] for j in (1, 2, 3, 4)):
        y = n[1] / (n[1] + 2 * n[2])
        found = [1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
      self.discount[k] = [0.0, *(found if found and min(found) > 0 else (0.5, 1.0, 1.5))]

  def p(self, token, history):
    k = len(history) + 1
    lower = self.p(token, history[1:]) if history else 1 / self.vocab
    follow = [c for gram, c in self.count.items() if len(gram) == k and gram[:-1] == history]
    if not follow:
      return lower
    discount = self.discount[k]
    own = self.count.get((*history, token), 0)
    free = sum(discount[min(c, 3)] for c in follow)
    return (own - discount[min(own, 3)] + free * lower) / sum(follow)


@pytest.mark.parametrize(('vocab', 'rows', 'length'), [(7, 60, 20), (12, 3, 9), (5, 400, 6)])
def test_equals_an_oracle_and_sums_to_one(vocab, rows, length):
  g = np.random.default_rng(vocab)
  weights = np.arange(1, vocab) ** -1.5  # token 0 never occurs
  corpus = [g.choice(np.arange(1, vocab), length, p=weights / weights.sum()) for _ in range(rows)]
  corpus[0][:3] = EOS  # two empty texts
  model = NGrams(*_flat(corpus), vocab, [EOS], 4)
  questions = [np.array(q) for q in ([EOS, 2, 3, 2, 3], [EOS, 0, 2, 4, 2], [2, 2, EOS, 2, EOS, EOS, 3], [4])]
  questions += [g.integers(0, vocab, 6) for _ in range(4)]
  p_KT = model.probabilities(*_flat(questions))
  for order in (2, 3, 4):
    oracle = _Oracle(corpus, vocab, order)
    expected = []
    for question in questions:
      for place in range(len(question)):
        before = [int(token) for token in question[max(0, place - order + 1) : place]]
        if EOS in before:
          before = before[len(before) - 1 - before[::-1].index(EOS) :]
        expected.append(oracle.p(int(question[place]), tuple(before)))
    np.testing.assert_allclose(p_KT[order - 1], expected, rtol=1e-12)
  # After seen and unseen histories, the probabilities of all tokens sum to one.
  for question in questions:
    ends = [np.append(question, token) for token in range(vocab)]
    last = np.cumsum([len(end) for end in ends]) - 1
    np.testing.assert_allclose(model.probabilities(*_flat(ends))[:, last].sum(axis=1), 1, rtol=1e-12)


def test_by_hand():
  # Counts of a bigram model: (2,3) twice, (3,2), (3,4). Their discounts are the usual ones: nothing is seen 3 times.
  model = NGrams(np.array([2, 3, 2, 3, 4]), np.array([0]), 5, [EOS], 2)
  # Left neighbours: 2 follows 3 and the edge, 3 follows 2, 4 follows 3. Unigrams: 4 in all, free mass 1 + 0.5 + 0.5.
  unigram = {2: (2 - 1 + 2 / 5) / 4, 3: (1 - 0.5 + 2 / 5) / 4, 4: (1 - 0.5 + 2 / 5) / 4}
  expected = [(2 - 1 + 1 * unigram[3]) / 2, (1 - 0.5 + 1 * unigram[4]) / 2, unigram[2]]
  p_KT = model.probabilities(np.array([2, 3, 3, 4, 4, 2]), np.array([0, 2, 4]))
  np.testing.assert_allclose(p_KT[1, [1, 3, 5]], expected, rtol=1e-15)  # after 4, nothing was seen
  np.testing.assert_allclose(
    p_KT[0, 0], (2 - 1 + 2.5 / 5) / 5, rtol=1e-15
  )  # the unigram model has plain counts 2, 2, 1


def test_histories_end_at_end_marks_and_rows():
  tokens_T = np.array([4, 5, EOS, 6, 7, 8, 2, 3])
  assert histories(tokens_T, np.array([0, 6]), [EOS], 2).tolist() == [0, 1, 2, 1, 2, 2, 0, 1]


def test_discounts():
  counts = [1] * 8 + [2] * 4 + [3] * 2 + [4]
  np.testing.assert_allclose(discounts(np.array(counts)), [0, 1 - 0.5, 2 - 3 * 0.5 * 0.5, 3 - 4 * 0.5 * 0.5])
  assert discounts(np.array([1, 1, 2])).tolist() == [0, 0.5, 1, 1.5]

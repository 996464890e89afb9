"""Reference lines: what counting n-grams of an arm's own rows, or the targets' answers, achieves on every task.

A model that does not beat them has learnt less than a table of counts. The lines are interpolated modified Kneser-Ney
models of orders 2 to 5 (Chen and Goodman 1998, equations 22 to 26), with the vocabulary's uniform distribution below
unigrams, and unigrams of the target split's answers. They count each distinct row once, however often the model saw it:
repetition would scale all counts, and the discounts come from how many n-grams are seen once, twice and three times.

A history begins at the last begin or end mark or at the first token of the row, so it never crosses a text's boundary.
An n-gram that begins there has no token to its left; as usual, one that begins with a mark keeps its plain count in
lower orders. The edge of a row counts as one more left neighbour, because what precedes it is unknown.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.core import prng, storage
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order import selection as selection_lib
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Targets, text_mask
from dsdm_jax.evaluation import scoring
from dsdm_jax.evaluation.comparisons import BASELINES
from dsdm_jax.evaluation.results import COMPARED_SPLITS
from dsdm_jax.evaluation.suite import Suite

ORDER = 5
NAMES = ('bigram', 'trigram', '4-gram', '5-gram')
ANSWERS = 'answer unigrams'
_USUAL = (0.5, 1.0, 1.5)  # discounts where a corpus is too small to estimate them, as in KenLM


def histories(tokens_T: np.ndarray, starts: np.ndarray, marks: Sequence[int], most: int) -> np.ndarray:
  """Tokens of the history of each token: int64 [T], at most `most`.

  Args:
    tokens_T: sequences, one after the other.
    starts: place of the first token of each sequence.
    marks: the begin and end marks; a history may begin with one and does not reach beyond it.
    most: maximum.
  """
  place_T = np.arange(len(tokens_T))
  begins_T = np.isin(tokens_T, marks)
  begins_T[starts] = True
  last_T = np.maximum.accumulate(np.where(begins_T, place_T, 0))
  history_T = np.zeros_like(place_T)
  history_T[1:] = np.minimum(place_T[1:] - last_T[:-1], most)
  history_T[starts] = 0
  return history_T


def discounts(count_G: np.ndarray) -> np.ndarray:
  """What is taken from n-grams that are counted 0, 1, 2, and 3 or more times: float64 [4]."""
  n = np.bincount(np.minimum(count_G, 5), minlength=6).astype(np.float64)
  if n[1:5].all():
    y = n[1] / (n[1] + 2 * n[2])
    discount = [times - (times + 1) * y * n[times + 1] / n[times] for times in (1, 2, 3)]
    if min(discount) > 0:
      return np.array([0.0, *discount])
  return np.array([0.0, *_USUAL])


class NGrams:
  """Interpolated modified Kneser-Ney models of all orders up to `order` on the same sequences.

  N-grams of order k are numbered by sorting (number of the first k - 1 tokens) * V + last token. This is exact, needs
  no hash, and puts the n-grams of one history side by side. Kept are 16 bytes for each distinct n-gram.

  Args:
    tokens_T: int, the sequences, one after the other.
    starts: place of the first token of each.
    vocab: V.
    marks: the begin and end marks.
    order: highest order, at least 1.

  Attributes:
    keys: for each order int64 [G], sorted.
    plain: for each order int32 [G], how often each n-gram occurs.
    continued: for each order but the last int32 [G], the count that lower orders use: of distinct left neighbours.
  """

  def __init__(self, tokens_T: np.ndarray, starts: np.ndarray, vocab: int, marks: Sequence[int], order: int = ORDER):
    self.vocab, self.marks, self.order = vocab, marks, order
    token_T = np.asarray(tokens_T, np.int64)
    history_T = histories(token_T, starts, marks, order - 1)
    self.keys: list[np.ndarray] = [np.arange(vocab)]
    self.plain: list[np.ndarray] = [np.bincount(token_T, minlength=vocab).astype(np.int32)]
    self.continued: list[np.ndarray] = []
    id_T = token_T
    for k in range(1, order):
      # N-grams of the next order, each with the place of one occurrence.
      place = np.flatnonzero(history_T >= k)
      key = id_T[place - 1] * vocab + token_T[place]
      by_key = np.argsort(key)
      key, place = key[by_key], place[by_key]
      first = np.flatnonzero(np.diff(key, prepend=-1))
      size = len(self.plain[-1])
      count_G = np.bincount(id_T[place[first]], minlength=size)
      edge = np.flatnonzero(history_T == k - 1)
      edge_G = np.bincount(id_T[edge], minlength=size)
      after_mark = edge if k == 1 else edge[~np.isin(token_T[edge - k + 1], marks)]
      edge_G[id_T[after_mark]] = 1
      self.continued.append((count_G + edge_G).astype(np.int32))
      self.keys.append(key[first])
      self.plain.append(np.diff(first, append=len(key)).astype(np.int32))
      id_T = np.zeros_like(token_T)
      id_T[place] = np.repeat(np.arange(len(first)), self.plain[-1])

  @property
  def bytes(self) -> int:
    """Memory of the counts."""
    return sum(x.nbytes for x in self.keys + self.plain + self.continued)

  def probabilities(self, tokens_T: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """p(token | history) by the models of orders 1 to `order`: float64 [order, T].

    Args:
      tokens_T: sequences, one after the other.
      starts: place of the first token of each.
    """
    token_T = np.asarray(tokens_T, np.int64)
    history_T = histories(token_T, starts, self.marks, self.order - 1)
    lower_T = np.full(len(token_T), 1.0 / self.vocab)
    before_T, id_T, by_order = np.zeros_like(token_T), token_T, []  # unigrams have one history, number 0
    for k, key_G in enumerate(self.keys):
      if k:
        before_T = np.append(-1, id_T[:-1])
        before_T[history_T < k] = -1
      key_T = before_T * self.vocab + token_T
      id_T = np.searchsorted(key_G, key_T)
      seen_T = (before_T >= 0) & (np.append(key_G, -1)[id_T] == key_T)
      id_T = np.where(seen_T, id_T, -1)
      by_order.append(self._interpolated(k, self.plain[k], id_T, before_T, lower_T))
      if k + 1 < self.order:
        lower_T = self._interpolated(k, self.continued[k], id_T, before_T, lower_T)
    return np.stack(by_order)

  def _interpolated(
    self, k: int, count_G: np.ndarray, id_T: np.ndarray, before_T: np.ndarray, lower_T: np.ndarray
  ) -> np.ndarray:
    """(count - discount + free mass * p of the lower order) / total; the lower order where the history is unseen."""
    discount = discounts(count_G)
    before_H, place_T = np.unique(before_T, return_inverse=True)
    ends = np.searchsorted(self.keys[k], np.stack([before_H, before_H + 1], axis=1) * self.vocab)
    some_H = (before_H >= 0) & (ends[:, 0] < ends[:, 1])

    def summed(value_G: np.ndarray) -> np.ndarray:
      sum_H = np.zeros(len(before_H), value_G.dtype)
      if some_H.any():
        sum_H[some_H] = np.add.reduceat(np.append(value_G, value_G.dtype.type(0)), ends[some_H].reshape(-1))[::2]
      return sum_H

    total_T = summed(count_G.astype(np.int64))[place_T]
    free_T = summed(discount[np.minimum(count_G, 3)])[place_T]
    count_T = np.where(id_T >= 0, np.append(count_G, 0)[id_T], 0)
    mixed_T = (count_T - discount[np.minimum(count_T, 3)] + free_T * lower_T) / np.maximum(total_T, 1)
    return np.where(total_T > 0, mixed_T, lower_T)


@dataclasses.dataclass(frozen=True)
class _Questions:
  """The answers of one task and split: what is needed of `suite.Request` or of `targets.Examples`."""

  key: tuple[str, str]
  ids_P: Sequence[np.ndarray]
  count_P: np.ndarray
  choice: Mapping[str, np.ndarray] | None  # `item_P`, `gold_I` and `characters_P` where a model chooses

  def values(self, total_P: np.ndarray) -> dict[str, np.ndarray]:
    """metric → float64 [items] for the log-probabilities of the answers, by the rules for neural models."""
    answers = scoring.Answers(total_P, np.zeros(len(total_P), bool), self.count_P)
    if self.choice is None:
      return {'logprob': answers.mean_P}
    return scoring.lowest_cross_entropy(answers, **self.choice)


def _questions(suite: Suite) -> list[_Questions]:
  asked = []
  for key, examples in suite.examples.items():
    size_T = text_mask(examples.weights_TL).sum(axis=1)
    ids_T = [tokens_L[:size] for tokens_L, size in zip(examples.tokens_TL, size_T, strict=True)]
    asked.append(_Questions(key, ids_T, (examples.weights_TL > 0).sum(axis=1), None))
  for request in suite.requests:
    facts = {name: getattr(request, name) for name in ('item_P', 'gold_I', 'characters_P')}
    asked.append(_Questions(request.key, request.ids_P, request.count_P, facts if request.is_choice else None))
  return [question for question in asked if question.key[1] in COMPARED_SPLITS]


def _totals(model: NGrams, asked: Sequence[_Questions]) -> list[list[np.ndarray]]:
  """For each of `asked` the summed log-probability of every answer, by each order of `model`."""
  # Only the history within reach of the model matters.
  ids_P = [ids for question in asked for ids in question.ids_P]
  count_P = np.concatenate([question.count_P for question in asked])
  parts = [ids[-(count + model.order - 1) :] for ids, count in zip(ids_P, count_P.tolist(), strict=True)]
  size_P = np.array([len(part) for part in parts])
  end_P = np.cumsum(size_P)
  logprob_KT = np.log(model.probabilities(np.concatenate(parts), end_P - size_P))
  places = np.stack([end_P - count_P, end_P], axis=1).reshape(-1)
  total_KP = np.add.reduceat(np.pad(logprob_KT, ((0, 0), (0, 1))), places, axis=1)[:, ::2]
  bounds = np.cumsum([len(question.ids_P) for question in asked])[:-1]
  return [list(total_KQ) for total_KQ in np.split(total_KP, bounds, axis=1)]


def lines(context: Context, suite: Suite, entries: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """`<line>__<metric>__<task>__<split>` → float32 [entries, items], on held-out items and benchmarks.

  The lines of an entry count the rows that its model was trained on. A checkpoint from outside the run, whose rows are
  not known, gets the lines of the first random model, or else of the first model. Tasks without choices have no
  accuracy. `ANSWERS` are those of the task's own target split, and for a benchmark those of all targets.

  Args:
    context: of the stage.
    suite: what models are evaluated on.
    entries: see `evaluate.models`.
  """
  pool, asked = Pool(context.inputs['pool']), _questions(suite)
  vocab, marks = pool.vocab_size, (pool.encoder.begin, pool.encoder.eos)
  by_line: dict[str, list[np.ndarray]] = {}

  def add(name: str, totals: Sequence[np.ndarray]) -> None:
    for question, total_P in zip(asked, totals, strict=True):
      for metric, value_I in question.values(total_P).items():
        by_line.setdefault('__'.join((name, metric, *question.key)), []).append(value_I.astype(np.float32))

  targets = Targets(context.inputs['targets'])
  answers = {}
  for task in targets.tasks:
    of_task = targets.examples(task, 'target')
    answers[task] = of_task.tokens_TL[of_task.weights_TL > 0]
  everything = np.concatenate(list(answers.values()))
  by_task = []
  for question in asked:
    tokens = answers.get(question.key[0], everything)
    by_task.append(_totals(NGrams(tokens, np.zeros(1, np.int64), vocab, marks, 1), [question])[0][0])

  trained = {entry['name']: entry for entry in storage.read_json(context.inputs['selection'].path / 'index.json', list)}
  first = next((e for name in BASELINES for e in trained.values() if e['method'] == name), next(iter(trained.values())))
  most = max(1, context.config.evaluation.ngram_tokens // pool.length)
  totals_of: dict[bytes, list[list[np.ndarray]]] = {}
  for entry in entries:
    row_N = _rows(context, trained.get(entry['name'], first))
    if len(row_N) > most:  # evenly, of rows whose order in the pool is random
      row_N = row_N[np.linspace(0, len(row_N) - 1, most).astype(np.int64)]
    same = row_N.tobytes()
    if same not in totals_of:
      texts = pool.texts(row_N)
      starts = np.cumsum([0, *(len(text) for text in texts[:-1])])
      totals_of[same] = _totals(NGrams(np.concatenate(texts), starts, vocab, marks), asked)
    for k, name in enumerate(NAMES, 1):
      add(name, [by_order[k] for by_order in totals_of[same]])
    add(ANSWERS, by_task)
  return {name: np.stack(values) for name, values in by_line.items()}


def _rows(context: Context, entry: Mapping[str, Any]) -> np.ndarray:
  """The distinct rows that a model was trained on with a weight above zero: int64, rising."""
  pretraining, budget = context.config.pretraining, context.inputs['selection'].semantics['budget_examples']
  length = budget // pretraining.train.batch_size * pretraining.train.batch_size
  order = prng.derive(context.config.seed, 'order', entry['seed'])
  schedule = selection_lib.schedule(context.inputs['selection'].path, entry, length, order, pretraining.max_epochs)
  _, row_B, weight_B = schedule.at(np.arange(length))
  return np.unique(row_B[weight_B > 0])

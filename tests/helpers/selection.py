"""Candidates in memory, with scores, features and targets of a test's choice, for selectors without other stages."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.base import get_config
from dsdm_jax.attribution.sources import RowSource
from dsdm_jax.data.targets.targets import Examples
from dsdm_jax.selection.candidates import Budget, Candidates, CostAccounting, Target, find


class Scores:
  def __init__(self, score_N):
    self._score_N = np.asarray(score_N, np.float32)

  def score_N(self, target: str) -> np.ndarray:
    del target
    return self._score_N


class Rows:
  """The parts of a pool that selectors use."""

  def __init__(self, tokens_NL: np.ndarray, source_N=None, document_N=None, texts: Sequence[str] | None = None):
    self.tokens_NL, self.num_rows, self.length = tokens_NL, *tokens_NL.shape
    self.source_N = np.zeros(self.num_rows, np.int8) if source_N is None else np.asarray(source_N, np.int8)
    self.document_N = np.arange(self.num_rows) if document_N is None else np.asarray(document_N)
    self.sources = [f'source{i}' for i in range(int(self.source_N.max(initial=0)) + 1)]
    self.encoder = self
    self._texts = texts

  counts_some, packed = False, True

  @functools.cached_property
  def counted_N(self) -> np.ndarray:
    return np.ones(self.num_rows, bool)

  def sizes(self, rows) -> np.ndarray:
    return np.full(len(rows), self.length)

  def weights(self, rows) -> np.ndarray:
    return np.broadcast_to(np.arange(self.length) > 0, (len(rows), self.length)).astype(np.float32)

  def tokens(self, rows) -> np.ndarray:
    return self.tokens_NL[np.asarray(rows, np.int64)]

  def decode_batch(self, tokens_BL) -> list[str]:
    return [self.decode(tokens_L) for tokens_L in tokens_BL]

  def decode(self, tokens_L) -> str:
    """The text with the number of the row's first token, or a word for each token."""
    return ' '.join(f'w{t}' for t in tokens_L) if self._texts is None else self._texts[int(tokens_L[0])]


class Features(RowSource):
  def __init__(self, phi_NJ: np.ndarray, target_TJ: np.ndarray | None = None):
    self.phi_NJ, self._target_TJ = phi_NJ.astype(np.float32), target_TJ
    self.dimension, self.checkpoints, self.semantics = phi_NJ.shape[1], 1, {'mode': 'store'}

  def pool(self, checkpoint: int) -> Any:
    del checkpoint
    return self

  rows = property(lambda self: len(self.phi_NJ))

  def from_row(self, row):
    for start in range(row, len(self.phi_NJ), 7):
      yield start, min(start + 7, len(self.phi_NJ)), self.phi_NJ[start : start + 7]

  def target(self, task: str, checkpoint: int) -> np.ndarray:
    del task, checkpoint
    return self._target_TJ


class ArrayCandidates(Candidates):
  """Candidates of arrays; `options` change those of configs/base.py."""

  def __init__(self, score_N=None, rows: Rows | None = None, features: Features | None = None, proxies=None, **options):
    self.options = get_config().selection
    self.options.update(options)
    self.costs = CostAccounting()
    self.__dict__['pool'] = rows if rows is not None else Rows(np.zeros((len(score_N), 8), np.int32))
    scores = None if score_N is None else Scores(score_N)
    self.__dict__['masked_N'] = np.zeros(self.pool.num_rows, np.bool_)
    self.__dict__['unscored_N'] = np.zeros(self.pool.num_rows, np.bool_)
    for name, value in (('scores', scores), ('features', features), ('proxies', proxies)):
      if value is not None:
        self.__dict__[name] = value

  def add_flop(self, flop: float) -> None:
    del flop


def target(texts: Sequence[str] = (), sequences: Sequence[Sequence[int]] = ()) -> Target:
  """A task of examples with these texts, token ids, or both."""
  size = max(len(texts), len(sequences))
  length = max([8, *map(len, sequences)])
  tokens_TL, weights_TL = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
  for i, sequence in enumerate(sequences):
    tokens_TL[i, : len(sequence)] = sequence
    weights_TL[i, 1 : len(sequence)] = 1
  records = tuple({'id': str(i), 'context': '', 'answer': t, 'document': str(i)} for i, t in enumerate(texts))
  return Target('docs', ('docs',), lambda task: Examples(tokens_TL, weights_TL, records), 'zscore')


NO_TARGET = Target('mix', ('docs',), None, 'zscore')


def selected(method: str, pool: Candidates, examples: int = 10, epochs: int = 3, seed: int = 0, target=NO_TARGET):
  return find(method).select(pool, target, Budget(examples, epochs, pool.options.repeat_cap), seed)

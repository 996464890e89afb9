"""What a selector is given: the pool with all that was measured on it, and the target. Opened when first asked for."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.attribution.scores import Scores, mix
from dsdm_jax.attribution.store import Features
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Examples, Targets, text_mask
from dsdm_jax.selection.cost_accounting import Ledger
from dsdm_jax.selection.proxy_signals import Proxies

BLOCK = 4_096  # rows that are read together
_T = TypeVar('_T')


class Candidates:
  """The pool and the artifacts of the stages before; only what a selector asks for is read.

  Args:
    context: of the selection stage.

  Attributes:
    options: the `selection` part of the config.
    ledger: of what selections cost.
  """

  def __init__(self, context: Context):
    self._context = context
    self.options: ConfigDict = context.config.selection
    self.ledger = Ledger(lambda: context.cost.flop)

  @property
  def _inputs(self) -> Mapping[str, Artifact]:
    return self._context.inputs

  @functools.cached_property
  def pool(self) -> Pool:
    return Pool(self._inputs['pool'])

  @property
  def num_rows(self) -> int:
    """N."""
    return self.pool.num_rows

  @property
  def source_N(self) -> np.ndarray:
    """Index into `pool.sources`."""
    return self.pool.source_N

  @property
  def document_N(self) -> np.ndarray:
    """Index into `pool.documents` of the document that holds the row's first token."""
    return self.pool.document_N

  @functools.cached_property
  def scores(self) -> Scores:
    """The datamodel's: `scores.score_N(target.name)`."""
    return Scores(self._inputs['datamodel'])

  @functools.cached_property
  def features(self) -> Features:
    """Projected gradients of rows and target examples, by proxy."""
    return Features(self._inputs['features'], self._context)

  @functools.cached_property
  def proxies(self) -> Proxies:
    """The proxy models: log-likelihoods and embeddings."""
    return Proxies(self._context, self.pool)

  def target(self, name: str) -> 'Target':
    """The target that an entry of `selection.targets` names."""
    found = Targets(self._inputs['targets'])
    tasks = tuple(found.tasks) if name == 'mix' else tuple(name.split('+'))
    return Target(name, tasks, lambda task: found.examples(task, 'target'), self._context.config.datamodel.mix)

  def once(self, key: Any, make: Callable[[], _T]) -> _T:
    """`make()`, kept: what does not depend on the seed is made once for all arms, and charged to each that asks."""
    return self.ledger.once(key, make)


@dataclasses.dataclass(frozen=True)
class Target:
  """What a selection is for.

  Attributes:
    name: a task, 'mix' (all tasks), or tasks joined by '+'.
    tasks: the tasks it is made of.
    examples: task → its target examples; the holdout is out of reach.
    rule: how scores of several tasks become one (`datamodel.mix`).
  """

  name: str
  tasks: tuple[str, ...]
  examples: Callable[[str], Examples]
  rule: str

  def texts(self, task: str) -> list[str]:
    """Context and answer of each target example."""
    return [f'{r["context"].rstrip()} {r["answer"].strip()}'.strip() for r in self.examples(task).records]

  def sequences(self, task: str) -> list[np.ndarray]:
    """Token ids of each target example, int32, from its end mark to the last token of the answer."""
    made = self.examples(task)
    return [tokens_L[here_L] for tokens_L, here_L in zip(made.tokens_TL, text_mask(made.weights_TL), strict=True)]

  def mixed(self, score: Callable[[str], np.ndarray]) -> np.ndarray:
    """One score a row, float32: `score(task)` of the one task, or of all of them mixed as the datamodel's are."""
    if len(self.tasks) == 1:
      return np.asarray(score(self.tasks[0]), np.float32)
    return mix(np.stack([score(task) for task in self.tasks]), self.rule)

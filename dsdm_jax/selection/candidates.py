"""What a selector is, and what it is given: the pool with all that was measured on it, the target and the budget.

A custom selector is one function in a file,

    def shortest(pool: Candidates, target: Target, budget: Budget, seed: int) -> Selection:
      ...
      return Selection.of(rows, why='short')

Rows with text of a target (`pool.masked_N`) are left out of what it returns. It needs one line of config:
`selection.methods = ('dsdm', 'random', 'my_package.my_file:shortest')`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.attribution.scores import Scores, mix
from dsdm_jax.attribution.store import Features
from dsdm_jax.config.methods import METHODS, method_name
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import prng
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool, prefiltered_rows
from dsdm_jax.data.targets.masked import masked_rows
from dsdm_jax.data.targets.targets import Examples, Targets, text_mask
from dsdm_jax.data.targets.tasks import RawItem, RawTask, group_documents, split_documents
from dsdm_jax.errors import UserError
from dsdm_jax.selection.proxy_signals import Proxies

BLOCK = 4_096  # rows that are read together
_CHOOSE_BY = 0.25  # share of the target examples that settings are chosen by
_SPLITS = 16  # splits that are tried, for targets of few documents
_T = TypeVar('_T')


class Candidates:
  """The pool and the artifacts of earlier stages. Each is opened when a selector first uses it.

  Args:
    context: of the selection stage.

  Attributes:
    options: the `selection` part of the config.
    costs: what each selection costs.
  """

  def __init__(self, context: Context):
    self._context = context
    self.options: ConfigDict = context.config.selection
    self.costs = CostAccounting(lambda: context.cost.flop)

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

  @functools.cached_property
  def masked_N(self) -> np.ndarray:
    """Rows with text of a target or benchmark, bool [N]: no selection takes them."""
    return masked_rows(self._inputs['leakage'])

  @functools.cached_property
  def mask_digest(self) -> str:
    """SHA-256 of the mask."""
    return hashlib.sha256(np.ascontiguousarray(self.masked_N).data).hexdigest()

  @functools.cached_property
  def unscored_N(self) -> np.ndarray:
    """Rows without scores, bool [N]: those that a prefilter left out."""
    unscored_N, kept = np.zeros(self.num_rows, bool), prefiltered_rows(self._inputs.get('prefilter'))
    if kept is not None:
      unscored_N[:] = True
      unscored_N[kept] = False
    return unscored_N

  @property
  def source_N(self) -> np.ndarray:
    """Index into `pool.sources`."""
    return self.pool.source_N

  @property
  def document_N(self) -> np.ndarray:
    """Index into `pool.documents` of the document that has the row's first token."""
    return self.pool.document_N

  @functools.cached_property
  def scores(self) -> Scores:
    """The datamodel's scores: `scores.score_N(target.name)`, NaN for rows that a prefilter left out."""
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
    targets = Targets(self._inputs['targets'])
    tasks = tuple(targets.tasks) if name == 'mix' else tuple(name.split('+'))
    rule, weights = self._context.config.datamodel.mix, tuple(map(targets.weight, tasks))
    return Target(name, tasks, lambda task: targets.examples(task, 'target'), rule, weights)

  def add_flop(self, flop: float) -> None:
    """Adds floating-point operations to the stage's cost, for methods that do many without a model."""
    self._context.add_flop(flop)

  def once(self, key: Any, compute: Callable[[], _T]) -> _T:
    """`compute()`, computed once for all arms, and charged to each that uses it; for results that need no seed."""
    return self.costs.once(key, compute)


@dataclasses.dataclass(frozen=True)
class Target:
  """What a selection is for.

  Attributes:
    name: a task, 'mix' (all tasks), or tasks joined by '+'.
    tasks: its tasks.
    examples: task → its target examples. The holdout is not available here.
    rule: how scores of several tasks are mixed (`datamodel.mix`).
    weights: of each task in a mix; () where all are one.
  """

  name: str
  tasks: tuple[str, ...]
  examples: Callable[[str], Examples]
  rule: str
  weights: tuple[float, ...] = ()

  @property
  def weight_T(self) -> np.ndarray:
    """The weights, float64 [tasks]."""
    return np.array(self.weights or (1.0,) * len(self.tasks))

  def texts(self, task: str) -> list[str]:
    """Context and answer of each target example."""
    return [(r['context'] + r['answer']).strip() for r in self.examples(task).records]

  def sequences(self, task: str) -> list[np.ndarray]:
    """Token ids of each target example, int32, from the mark before it to the last token of the answer."""
    examples = self.examples(task)
    masks = text_mask(examples.weights_TL)
    return [tokens_L[mask_L] for tokens_L, mask_L in zip(examples.tokens_TL, masks, strict=True)]

  def mixed(self, score: Callable[[str], np.ndarray]) -> np.ndarray:
    """One score per row, float32: `score(task)` of the only task, or of all tasks, mixed like the datamodel's."""
    if len(self.tasks) == 1:
      return np.asarray(score(self.tasks[0]), np.float32)
    return mix([score(task) for task in self.tasks], self.rule, self.weights)

  def nested(self) -> tuple['Target', 'Target'] | None:
    """Two parts of the target examples, three quarters to fit and a quarter to choose settings by.

    Documents of one group (`tasks.group_documents`) are in one part. None if no split leaves both parts examples of
    every task.
    """
    records = {task: self.examples(task).records for task in self.tasks}
    items = [
      RawTask(task, tuple(RawItem(r['id'], r['context'], r['answer'], r['document']) for r in of_task))
      for task, of_task in records.items()
    ]
    group_of = group_documents(items)
    for seed in range(_SPLITS):
      side = split_documents(items, _CHOOSE_BY, seed, group_of)
      sides = {task: np.array([side[r['document']] == 'holdout' for r in of_task]) for task, of_task in records.items()}
      if all(0 < held_T.sum() < len(held_T) for held_T in sides.values()):
        return self._part({task: ~held_T for task, held_T in sides.items()}), self._part(sides)
    return None

  def _part(self, mask: Mapping[str, np.ndarray]) -> 'Target':
    def examples(task: str) -> Examples:
      whole, places = self.examples(task), np.flatnonzero(mask[task])
      return Examples(
        whole.tokens_TL[places], whole.weights_TL[places], tuple(whole.records[place] for place in places)
      )

    return dataclasses.replace(self, examples=examples)


def choose(target: Target, settings: Sequence[_T], loss: Callable[[_T, Target, Target], float]) -> _T:
  """The setting of a method for which `loss(setting, fitted, held)` is least, over a nested split of the target.

  The only way in which a method chooses its settings by the target: the holdout, which results are reported on, is not
  here. The first setting is the default, which ties and targets that cannot be split keep.
  """
  parts = target.nested()
  if parts is None:
    return settings[0]
  losses = [loss(setting, *parts) for setting in settings]
  return settings[int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))]


@dataclasses.dataclass(frozen=True)
class Budget:
  """How much an arm may train on.

  Attributes:
    examples: rows of a targeted selection.
    epochs: passes over them.
    repeat_cap: maximum number of visits of one row in a whole training.
  """

  examples: int
  epochs: int
  repeat_cap: int

  @property
  def total(self) -> int:
    """Examples that every arm trains on, including repeats."""
    return self.examples * self.epochs


Select = Callable[[Candidates, Target, Budget, int], Selection]
_F = TypeVar('_F', bound=Select)


@dataclasses.dataclass(frozen=True)
class Selector:
  """A way to select rows.

  Attributes:
    select: (pool, target, budget, seed) → Selection, a pure function of its arguments.
    targeted: whether it depends on the target.
    seeded: whether it draws, so that each seed has its own rows.
  """

  select: Select
  targeted: bool = True
  seeded: bool = True


def selector(*, targeted: bool = True, seeded: bool = True) -> Callable[[_F], _F]:
  """Marks a custom selector that ignores targets or does not draw, so that it runs once for all of them."""

  def mark(select: _F) -> _F:
    select.__dict__['selector'] = Selector(select, targeted, seeded)
    return select

  return mark


def find(method: str) -> Selector:
  """The selector of an entry of `selection.methods`: a name of the table of methods, or 'package.module:function'.

  Raises:
    UserError: there is no such function.
  """
  by_path = {known.path: known for known in METHODS.values()}
  known = METHODS.get(method) or by_path.get(method)
  function = load_callable(method if known is None else known.path, 'selection.methods')
  if known is not None:
    return Selector(function, known.targeted, known.seeded)
  return getattr(function, 'selector', Selector(function))


def select(pool: Candidates, method: str, target: str, budget: Budget, root: int, seed: int) -> Selection:
  """The rows that `method` selects, with a name and provenance, checked.

  Masked rows that a custom selector returns are left out, and counted in `masked` of the provenance.

  Args:
    pool: the candidates.
    method: entry of `selection.methods`.
    target: entry of `selection.targets`, or 'any' for a method that ignores targets.
    budget: how much the arm may train on.
    root: seed of the run.
    seed: of the models that train on the rows.

  Raises:
    UserError: a custom selector returned something else, or a row would be visited more often than the cap allows.
  """
  wanted = pool.target('mix' if target == 'any' else target)
  result = find(method).select(pool, wanted, budget, prng.derive(root, 'selection', seed))
  if not isinstance(result, Selection):
    raise UserError(f'selector {method} returned a {type(result).__name__}; return Selection.of(rows)')
  taken = pool.masked_N[np.clip(result.rows, 0, pool.num_rows - 1)]
  if taken.any():  # by a selector of the user's
    keep = np.flatnonzero(~taken)
    scores = None if result.scores is None else result.scores[keep]
    facts = {**result.provenance, 'masked': int(taken.sum())}
    result = Selection('', result.rows[keep], result.weights[keep], facts, scores)
  if pool.options.unit == 'document' and result.documents is None:
    from dsdm_jax.selection import whole  # which needs this module

    result = whole.of_rows(result, pool)
  name, epochs = method_name(method), budget.total / max(result.size, 1)
  provenance = {'method': name, 'target': target, 'seed': seed, 'examples': result.size, 'epochs': epochs}
  selection = dataclasses.replace(
    result, name=f'{name}--{target}--{seed}', provenance={**provenance, **result.provenance}
  )
  visits = math.ceil(epochs)
  if visits > budget.repeat_cap:
    raise UserError(
      f'{selection.name} has {selection.size} rows, and {budget.total} examples of them are {visits} visits of a row '
      f'where selection.repeat_cap allows {budget.repeat_cap}; raise it, or lower selection.epochs'
    )
  try:
    selection.check(pool.num_rows, budget.repeat_cap // visits)
  except ValueError as error:
    raise UserError(f'selector {method}: {error}; correct its result, or raise selection.repeat_cap') from error
  return selection


@dataclasses.dataclass
class Account:
  """Seconds and FLOP of a piece of work, without shared results, and the keys of the shared results that it uses."""

  seconds: float = 0.0
  flop: float = 0.0
  uses: set[Any] = dataclasses.field(default_factory=set)


def total(accounts: Mapping[Any, Account]) -> dict[str, float]:
  """The sums of 'seconds' and 'flop'."""
  return {key: sum(getattr(account, key) for account in accounts.values()) for key in ('seconds', 'flop')}


class CostAccounting:
  """Computes shared results once, and charges each selection for all that it uses, as if it had run alone.

  Args:
    flop: returns the number of operations so far.
  """

  def __init__(self, flop: Callable[[], float] = lambda: 0.0):
    self._flop = flop
    self._values: dict[Any, Any] = {}
    self._shared: dict[Any, Account] = {}
    self._open: list[Account] = []

  def once(self, key: Any, compute: Callable[[], _T]) -> _T:
    """`compute()`, cached by `key`."""
    if key not in self._values:
      with self._account() as account:
        self._values[key] = compute()
      self._shared[key] = account
    if self._open:
      self._open[-1].uses |= {key, *self._shared[key].uses}
    return self._values[key]

  def measured(self, work: Callable[[], _T]) -> tuple[_T, dict[Any, Account]]:
    """(`work()`, the account of each shared result that it uses, by key, and under None its own)."""
    with self._account() as own:
      result = work()
    return result, {None: own} | {key: self._shared[key] for key in own.uses}

  def charged(self, work: Callable[[], _T]) -> tuple[_T, dict[str, float]]:
    """(`work()`, its 'seconds' and 'flop', including every shared result that it uses)."""
    result, accounts = self.measured(work)
    return result, total(accounts)

  @contextlib.contextmanager
  def _account(self) -> Iterator[Account]:
    account, began, before = Account(), time.monotonic(), self._flop()
    self._open.append(account)
    try:
      yield account
    finally:
      self._open.pop()
    seconds, flop = time.monotonic() - began, self._flop() - before
    account.seconds += seconds
    account.flop += flop
    if self._open:  # charged here, so not to the enclosing account
      self._open[-1].seconds -= seconds
      self._open[-1].flop -= flop

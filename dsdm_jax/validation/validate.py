"""Stage `validation`: tests how well scores predict the outcome of training on a subset. Runs only when it is named."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.attribution.calibration import Bank
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import flops, storage
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.masked import masked_rows
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.errors import UserError
from dsdm_jax.training.differentiable import Metagradient, TargetOutputs
from dsdm_jax.validation import agreement, cheap, subsets, table
from dsdm_jax.validation.variants import BEST, REFERENCE, USUAL, VARIANTS, ProxyPool, Scorer

PLAIN, METASMOOTH = 'plain', 'metasmooth'
ORACLE = 'oracle (metagradient)'
# Variants that are compared with the oracle in the metasmooth setting.
_SMOOTH_VARIANTS = (
  'reference', 'no curvature', '4 proxies', 'three checkpoints', 'early checkpoint', 'half the epochs',
  'twice the epochs', 'damping × 10', 'Gram by layers', 'Gram by layers, damping × 10', 'Gram by layers, J = 8,192',
  'Gram by layers, 4 proxies', 'Gram by layers, three checkpoints', BEST, 'EK-FAC', 'EK-FAC, 1 proxy',
  'EK-FAC, 4 proxies', 'EK-FAC, three checkpoints', 'EK-FAC, early checkpoint', 'EK-FAC, damping × 10',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Examples:
  """Rows of the pool, and target examples.

  Attributes:
    row_N: place of each row in the pool.
    tokens_NL, weights_NL, size_N, source_N: of the rows; weights None if all tokens count, sizes without padding.
    tokens_TL, weights_TL, task_T, document_T: of the target examples.
    tasks: names.
    vocab_size: V.
  """

  row_N: np.ndarray
  tokens_NL: np.ndarray
  weights_NL: np.ndarray | None
  size_N: np.ndarray
  source_N: np.ndarray
  tokens_TL: np.ndarray
  weights_TL: np.ndarray
  task_T: np.ndarray
  document_T: list[str]
  tasks: tuple[str, ...]
  vocab_size: int

  @property
  def filled_NL(self) -> np.ndarray:
    """False for padding."""
    return np.arange(self.tokens_NL.shape[1]) < self.size_N[:, None]

  @property
  def member_KT(self) -> np.ndarray:
    return np.stack([self.task_T == task for task in self.tasks])


def run(context: Context) -> dict:
  """Writes `lds.json`, `lds.md`, `monotone.json`, `bank.npz` and the outputs of models; see `docs/validation.md`."""
  config = context.config
  masked_N = masked_rows(context.inputs['leakage'])
  examples = examples_of(config.validation, Pool(context.inputs['pool']), Targets(context.inputs['targets']), masked_N)
  by_example: list[dict[str, Any]] = []
  by_task: list[dict[str, Any]] = []
  monotone: dict[str, Any] = {}
  for name in (PLAIN, METASMOOTH):
    setting = Setting(context, name, train_config(config, name), examples)
    example_level, task_level = setting.table()
    by_example += example_level
    by_task += task_level
    if name == PLAIN:
      monotone, bank = setting.monotone(), setting.bank()
      bank.save(context.out)
  storage.write_json(context.out / 'lds.json', {'by_example': by_example, 'by_task': by_task})
  storage.write_json(context.out / 'monotone.json', monotone)
  text = table.page(by_example, by_task, monotone)
  storage.write_text(context.out / 'lds.md', text)
  context.log.describe(f'{len(examples.tokens_NL):,} rows; lds.md has the tables')
  context.log.say(text)
  return {'rows': len(examples.tokens_NL), 'targets': list(examples.tasks), 'settings': [PLAIN, METASMOOTH]}


class Setting:
  """The bank under one learning algorithm: its proxies, subsets, truth, oracle and table."""

  def __init__(self, context: Context, name: str, train: ConfigDict, examples: Examples):
    self._context, self._name, self._examples = context, name, examples
    self._options = context.config.validation
    config = ConfigDict(context.config.to_dict())
    config.proxies.train = train
    self._config = config
    self._folder = context.out / name
    self._proxies = ProxyPool(config, examples.vocab_size, examples.tokens_NL, examples.weights_NL)
    self._training = self._proxies.training(USUAL)
    function = load_callable(config.features.output_fn)
    self._outputs = TargetOutputs(self._training, function, examples.tokens_TL, examples.weights_TL)
    self._scorer = Scorer(
      config,
      self._proxies,
      examples.vocab_size,
      examples.tokens_NL,
      examples.tokens_TL,
      examples.weights_TL,
      examples.weights_NL,
      examples.filled_NL,
    )

  def table(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records for single target examples, and for the mean of each task, where the oracle is included."""
    scores = self._scores()
    truth_RST = self._truth[0]
    member_KT = self._examples.member_KT
    mean_TK = (member_KT / member_KT.sum(axis=1, keepdims=True)).T
    seed, count, confidence = self._config.seed, self._options.resamples, self._config.datamodel.confidence

    def resamples(documents: list[str]) -> dict[str, agreement.Resamples]:
      sizes = {family: len(self._subsets.of(family)) for family in subsets.FAMILIES}
      return {f: agreement.Resamples(seed, s, documents, count, confidence) for f, s in sizes.items() if s}

    by_example = table.records(
      self._name, scores, truth_RST, self._subsets, resamples(self._examples.document_T), REFERENCE.name
    )
    by_task = table.records(
      self._name,
      {name: s @ mean_TK for name, s in scores.items()},
      truth_RST @ mean_TK,
      self._subsets,
      resamples(list(self._examples.tasks)),
      REFERENCE.name,
      {ORACLE: self._oracle().transpose(0, 2, 1)} if self._options.oracle else None,
    )
    return by_example, by_task

  def bank(self) -> Bank:
    """Subsets and log-likelihoods, for the scale of scores."""
    member_KT = self._examples.member_KT
    mean_TK = (member_KT / member_KT.sum(axis=1, keepdims=True)).T
    family_S = np.array(self._subsets.family)
    truth_SK = self._truth[1].mean(axis=0) @ mean_TK
    return Bank(self._examples.row_N, family_S, self._subsets.weight_SN, truth_SK, self._examples.tasks)

  def monotone(self) -> dict[str, Any]:
    """Task → for each seed the loss of models trained on deciles 1, 5 and 10 of its scores, and whether it rises."""
    loss_RST, result = -self._truth[1], {}
    for task, member_T in zip(self._examples.tasks, self._examples.member_KT, strict=True):
      deciles = [self._subsets.name.index(f'{task}: decile {d}') for d in (1, 5, 10)]
      losses = [[float(loss_ST[index][member_T].mean()) for index in deciles] for loss_ST in loss_RST]
      result[task] = [{'loss': row, 'ordered': row[0] < row[1] < row[2]} for row in losses]
    return result

  @functools.cached_property
  def _subsets(self) -> subsets.Subsets:
    score_NT = self._score_of(REFERENCE.name, lambda: self._scorer(REFERENCE))
    sorted_by = {t: score_NT[:, m].mean(1) for t, m in zip(self._examples.tasks, self._examples.member_KT, strict=True)}
    o, smooth = self._options, self._name == METASMOOTH
    halves, stratified = (o.halves // 4, 0) if smooth else (o.halves, o.stratified)
    seed, source_N = self._config.seed, self._examples.source_N
    return subsets.make(seed, source_N, sorted_by, halves, stratified, o.drops, deciles=not smooth)

  @functools.cached_property
  def _truth(self) -> tuple[np.ndarray, np.ndarray]:
    weight_SN, seeds = self._subsets.weight_SN, self._options.seeds
    with self._context.log.bar(total=seeds * len(weight_SN), desc=f'{self._name} bank', unit='model') as bar:
      at_once = self._options.models_at_once

      def saved(models: int) -> None:
        bar.update(models)
        self._context.cost.save()

      truth = subsets.truth(self._folder, self._training, self._outputs, weight_SN, seeds, at_once, saved)
    training = self._training
    state = jax.eval_shape(lambda: training.trainer.init(jax.random.key(0)))  # noqa: TID251  only its shape is used
    tokens_BL = jax.ShapeDtypeStruct((training.batch_size, self._examples.tokens_NL.shape[1]), jnp.int32)
    weight_B = jax.ShapeDtypeStruct((training.batch_size,), jnp.float32)
    flop = flops.count(training.trainer.apply, state, tokens_BL, weight_B, jnp.int32(1)) * training.steps
    self._context.add_flop(flop * seeds * len(weight_SN))
    if not np.isfinite(truth[0]).all():
      raise UserError(f'a model of the {self._name} bank diverged; lower proxies.train.learning_rate')
    return truth

  def _oracle(self) -> np.ndarray:
    """derivative_RKN of each seed."""
    compute = Metagradient(self._training, self._outputs, self._examples.member_KT)
    weight_N, derivatives = np.ones(self._training.rows), []
    with self._context.log.bar(range(self._options.seeds), desc=f'{self._name} oracle', unit='seed') as seeds:
      for seed in seeds:
        file = self._folder / f'oracle-{seed}.npy'
        self._context.add_flop(compute.flop(seed))
        if not storage.is_marked(file):
          storage.save_npy(file, compute(seed, weight_N)[1])
          storage.mark(file)
          self._context.cost.save()
        derivatives.append(storage.load(file))
    return np.stack(derivatives)

  def _scores(self) -> dict[str, np.ndarray]:
    """Predictor → score_NT."""
    e = self._examples
    variants = [v for v in VARIANTS if v.proxies <= self._options.proxies]
    makers: dict[str, Callable[[], np.ndarray]] = {
      v.name: functools.partial(self._scorer, v) for v in variants if self._name == PLAIN or v.name in _SMOOTH_VARIANTS
    }
    makers |= cheap.predictors(
      e.tokens_NL,
      e.filled_NL,
      e.tokens_TL,
      e.weights_TL,
      e.task_T,
      e.vocab_size,
      lambda: self._scorer.loss(self._proxies(USUAL, 0)),
      lambda: self._scorer.embeddings(self._proxies(USUAL, 0)),
    )
    pattern = re.compile(self._options.variants)
    makers = {name: make for name, make in makers.items() if name == REFERENCE.name or pattern.search(name)}
    with self._context.log.bar(makers.items(), desc=f'{self._name} scores', unit='variant') as bar:
      return {name: self._score_of(name, make) for name, make in bar}

  def _score_of(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    file = self._folder / f'score-{re.sub("[^A-Za-z0-9]+", "-", name)}.npy'
    if not storage.is_marked(file):
      storage.save_npy(file, make().astype(np.float32))
      storage.mark(file)
      self._context.cost.save()
    return storage.load(file)


def train_config(config: ConfigDict, name: str) -> ConfigDict:
  """The training config of one setting."""
  train, options = ConfigDict(config.proxies.train.to_dict()), config.validation
  train.adam_eps_root = max(train.adam_eps_root, options.least_eps_root)
  if name == METASMOOTH:
    train.adam_eps_root, train.batch_size = options.smooth_eps_root, options.smooth_batch_size
  return train


def examples_of(options: ConfigDict, pool: Pool, targets: Targets, masked_N: np.ndarray) -> Examples:
  """The first `validation.rows` of the pool that are not masked, and `validation.target_examples` of each task.

  Raises:
    UserError: the pool has fewer rows.
  """
  rows = np.flatnonzero(~masked_N)[: options.rows]  # their order in the pool is random
  if len(rows) < options.rows:
    raise UserError(
      f'validation.rows = {options.rows} and the pool has {len(rows)} rows; lower it, or raise pool.max_bytes'
    )
  tokens, weights, tasks, documents = [], [], [], []
  for task in targets.tasks:
    examples = targets.examples(task, 'target')
    size = min(len(examples), options.target_examples)
    tokens.append(examples.tokens_TL[:size])
    weights.append(examples.weights_TL[:size])
    tasks += [task] * size
    documents += [f'{task}: {record["document"]}' for record in examples.records[:size]]
  return Examples(
    row_N=rows,
    tokens_NL=pool.tokens(rows),
    weights_NL=pool.weights(rows) if pool.counts_some else None,
    size_N=pool.sizes(rows),
    source_N=pool.source_N[rows],
    tokens_TL=np.concatenate(tokens),
    weights_TL=np.concatenate(weights),
    task_T=np.array(tasks),
    document_T=documents,
    tasks=tuple(targets.tasks),
    vocab_size=pool.vocab_size,
  )

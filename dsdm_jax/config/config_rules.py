"""What `configs/base.py` asks of values in words, as rules: `RULES` look at one key, `RELATIONS` at several."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath

from dsdm_jax.config.pool_rules import JSONL, POOL_RULES, weights_differ
from dsdm_jax.config.rule import NAME as _NAME
from dsdm_jax.config.rule import Rule, are_arguments
from dsdm_jax.config.rule import above as _above
from dsdm_jax.config.rule import at_least as _at_least
from dsdm_jax.config.rule import either as _either
from dsdm_jax.config.rule import one_of as _one_of
from dsdm_jax.config.rule import within as _within
from dsdm_jax.config.selection_rules import SELECTION_RULES, part_key

MIX = 'mix'

# Layers, width and heads of the paper's models.
SIZES: Mapping[str, tuple[int, int, int]] = {
  '125M': (12, 768, 12), '356M': (24, 1_024, 16), '760M': (24, 1_536, 12), '1.3B': (24, 2_048, 16),
}  # fmt: skip
MODELS = ('model', 'proxies.model')
TRAINS = ('proxies.train', 'pretraining.train')
# Of batches that devices share evenly. That of features is made up to a multiple of them.
BATCHES = (*(f'{train}.batch_size' for train in TRAINS), 'evaluation.batch_size')


def _is_regex(value: str) -> bool:
  try:
    re.compile(value)
  except (re.error, OverflowError, RecursionError):  # the latter of 'a{9999999999}' and of brackets in brackets
    return False
  return True


def _is_address(value: str) -> bool:
  found = re.fullmatch(r'[^\s/]+:([1-9]\d{0,4})', value)
  return found is not None and int(found[1]) < 2**16


def _are_rungs(values: tuple[str, ...]) -> bool:
  plain = [float(x) for x in values if re.fullmatch(r'\d{0,9}\.?\d*', x) and re.search(r'[1-9]', x)]
  return len(values) != 1 and len(set(plain)) == len(values) and all(0 < x <= _RUNG for x in plain)


_RUNG = 1_000_000  # of a training's compute
_POSITIVE = _at_least(1)
_COUNT = _at_least(0)
_ARGUMENTS = Rule(are_arguments, "must be keyword arguments with plain values, such as 'b1=0.9, nesterov=True'")
_REGEX = Rule(_is_regex, 'must be a regular expression')
_MODEL_RULES = {
  'factory': _NAME,
  'size': _one_of('', *SIZES),
  'layers': _POSITIVE,
  'width': _POSITIVE,
  'heads': _POSITIVE,
  'kv_heads': _POSITIVE,
  'mlp_width': _POSITIVE,
  'positions': _one_of('learned', 'rope'),
  'norm': _one_of('layernorm', 'rmsnorm'),
  'mlp': _one_of('gelu', 'gelu_exact', 'swiglu'),
  'rotary_share': _within(0, 1, '(]'),
  'rotary_base': _above(1),
  'weights': Rule(lambda v: v == v.strip(), 'must be a folder, or empty'),
  'init_std': _above(0),
  'attention': _one_of('xla', 'fused'),
  'compute_dtype': _one_of('float32', 'bfloat16'),
}

_TRAIN_RULES = {
  'batch_size': _POSITIVE,
  'learning_rate': _above(0),
  'schedule': _one_of('cosine', 'linear', 'wsd', 'constant'),
  'decay_share': _within(0, 1, '(]'),
  'optimizer': _either(
    Rule(lambda v: bool(re.fullmatch(r'[a-z]\w*(\.[a-z]\w*)*', v)), 'must name one of optax'), _NAME
  ),
  'optimizer_arguments': _ARGUMENTS,
  'mu_dtype': _one_of('float32', 'bfloat16'),
  'nu_dtype': _one_of('float32', 'bfloat16'),
  'z_loss': _COUNT,
  'microbatches': _POSITIVE,
  'final_learning_rate': _within(0, 1),
  'warmup_steps': _COUNT,
  'weight_decay': _COUNT,
  'adam_b1': _within(0, 1, '[)'),
  'adam_b2': _within(0, 1, '[)'),
  'adam_eps': _above(0),
  'adam_eps_root': _COUNT,
  'gradient_clip': _COUNT,
  'save_every_steps': _COUNT,
  'save_every_minutes': _COUNT,
  'keep_checkpoints': _POSITIVE,
  'keep_every_steps': _COUNT,
  'keep_every_hours': _COUNT,
  'evaluate_every_steps': _COUNT,
  'evaluate_rows': _POSITIVE,
  'profile_steps': _COUNT,
  'log_every_steps': _POSITIVE,
}

# Every key of configs/base.py but those that are true or false (a test holds that).
RULES: Mapping[str, Rule] = {
  'seed': _COUNT,
  'mesh.data': Rule(lambda v: v == -1 or v >= 1, 'must be at least 1, or -1 for all devices that mesh.model leaves'),
  'mesh.model': _POSITIVE,
  'distributed.coordinator': Rule(
    lambda v: v in ('', 'auto') or _is_address(v),
    "must be 'host:port' of process 0 (a port is at most 65,535), auto, or '' for one process",
  ),
  'distributed.processes': _POSITIVE,
  'distributed.process': _COUNT,
  'distributed.heartbeat_seconds': _at_least(5),
  'distributed.start_seconds': _POSITIVE,
  **POOL_RULES,
  **{f'{model}.{key}': rule for model in MODELS for key, rule in _MODEL_RULES.items()},
  **{f'{train}.{key}': rule for train in TRAINS for key, rule in _TRAIN_RULES.items()},
  'proxies.seed': _COUNT,
  'proxies.count': _POSITIVE,
  'proxies.checkpoints': _POSITIVE,
  'proxies.subset_share': _within(0, 1, '(]'),
  'proxies.epochs': _COUNT,
  'features.output_fn': _NAME,
  'features.projection': _one_of('two_sided', 'dense'),
  'features.dimension': _POSITIVE,
  'features.layers': _REGEX,
  'features.basis': _one_of('random', 'eigenvectors'),
  'features.basis_rows': _POSITIVE,
  'features.mode': _one_of('store', 'stream', 'jvp'),
  'features.gram_rows': _COUNT,
  'features.precondition': _one_of('none', 'adam'),
  'features.microbatch': _COUNT,
  'features.batch_size': _POSITIVE,
  'features.shard_rows': _POSITIVE,
  'features.jobs': _POSITIVE,
  'features.job': _COUNT,
  'features.store_dtype': _one_of('float32', 'bfloat16', 'int8'),
  'datamodel.damping': _above(0),
  'datamodel.damping_rule': _one_of('fixed', 'auto'),
  'datamodel.gram': _one_of('auto', 'full', 'layers', 'joint'),
  'datamodel.target_share': _within(0, 1, '[)'),
  'datamodel.average': _one_of('auto', 'all', 'unseen'),
  'datamodel.groups': _POSITIVE,
  'datamodel.examples': _COUNT,
  'datamodel.bootstrap': Rule(lambda v: v == 0 or v >= 2, 'must be 0 for none, or at least 2'),
  'datamodel.confidence': _within(0, 1, '()'),
  'datamodel.mix': _one_of('mean', 'zscore', 'rank'),
  'validation.rows': _at_least(20),
  'validation.target_examples': _POSITIVE,
  'validation.epochs': _above(0),
  'validation.seeds': _POSITIVE,
  'validation.halves': _COUNT,
  'validation.stratified': _COUNT,
  'validation.drops': Rule(lambda v: all(0 < x < 0.5 for x in v), 'must be shares above 0 and below 0.5'),
  'validation.proxies': _at_least(2),
  'validation.models_at_once': _POSITIVE,
  'validation.variants': _REGEX,
  'validation.least_eps_root': _COUNT,
  'validation.smooth_eps_root': _above(0),
  'validation.smooth_batch_size': _POSITIVE,
  'validation.resamples': _at_least(20),
  **SELECTION_RULES,
  'selection.targets': Rule(lambda v: 0 < len(v) == len(set(v)), 'must name at least one target, each once'),
  'selection.examples': _POSITIVE,
  'selection.epochs': _POSITIVE,
  'pretraining.seeds': _POSITIVE,
  'pretraining.max_epochs': Rule(lambda v: v == 0 or v >= 1, 'must be 0 for any number, or at least 1'),
  'pretraining.models_at_once': _POSITIVE,
  'ladder.rungs': Rule(
    _are_rungs,
    f'must be empty, or two or more different numbers above 0 and at most {_RUNG:,} as texts',
  ),
  'ladder.seeds': _POSITIVE,
  'evaluation.selection_uses': _POSITIVE,
  'evaluation.tasks': Rule(lambda v: 0 < len(v) == len(set(v)), 'must name at least one task, each once'),
  'evaluation.max_items': Rule(lambda v: v == 0 or v >= 2, 'must be 0 for all, or at least 2'),
  'evaluation.file_shots': _COUNT,
  'evaluation.file_delimiter': Rule(lambda v: v != '', 'must hold something, such as a space'),
  'evaluation.generate_tokens': _POSITIVE,
  'evaluation.checkpoints': Rule(
    lambda v: all(re.fullmatch(r'[\w.-]+=.+', spec) for spec in v) and len({s.split('=')[0] for s in v}) == len(v),
    "must be texts 'name=folder', each name once, of letters, digits, '.', '-' and '_'",
  ),
  'evaluation.bootstrap': _at_least(100),
  'evaluation.batch_size': _POSITIVE,
  'evaluation.confidence': _within(0, 1, '()'),
  'report.examples': _POSITIVE,
  'report.explorer_rows': _at_least(100),
  'report.explorer_bytes': _at_least(10_000),
  'plan.topology': Rule(
    lambda v: bool(re.fullmatch(r'\w+:\d{1,4}(x\d{1,4}){1,2}', v)),
    'must be CHIP:AxB or CHIP:AxBxC, with numbers of at most four digits',
  ),
  'plan.rows': _COUNT,
  'plan.price_per_chip_hour': _COUNT,
  'plan.multiplier': _above(0),
  'plan.calibration': _above(0),
}


@dataclasses.dataclass(frozen=True)
class Relation:
  """What several keys must be together.

  Attributes:
    keys: what `holds` is given the values of; a finding is said of the first.
    text: the rule; '{0}' is the first value, '{1}' the second and so on.
    way_out: what to do, filled in likewise.
  """

  keys: tuple[str, ...]
  holds: Callable[..., bool]
  text: str
  way_out: str


def model_relations(model: str) -> Iterator[Relation]:
  width, heads, kv_heads = (f'{model}.{key}' for key in ('width', 'heads', 'kv_heads'))
  yield Relation(
    (heads, width),
    lambda h, w: w % h == 0,
    f'must divide {width} = {{1}}',
    f'set --config.{width} to a multiple of {{0}}, or change --config.{heads}',
  )
  yield Relation(
    (kv_heads, heads),
    lambda k, h: h % k == 0,
    f'must divide {heads} = {{1}}',
    f'set --config.{kv_heads} to a divisor of {{1}}, for example 1',
  )
  yield Relation(
    (f'{model}.positions', width, heads, f'{model}.rotary_share'),
    lambda p, w, h, share: p != 'rope' or (int(w // h * share) >= 2 and int(w // h * share) % 2 == 0),
    f'turns an even head size, and {model}.rotary_share = {{3}} of {width} = {{1}} over {heads} = {{2}} is not',
    f'set --config.{width} to a multiple of 2·{{2}}, or --config.{model}.positions=learned',
  )


def _train_relations(train: str) -> Iterator[Relation]:
  yield Relation(
    (f'{train}.microbatches', f'{train}.batch_size', 'mesh.data'),
    lambda parts, batch, data: batch % (parts * max(data, 1)) == 0,
    f'must divide {train}.batch_size = {{1}} into parts that are multiples of mesh.data = {{2}}',
    f'set --config.{train}.microbatches=1 to take whole batches',
  )
  yield Relation(
    (f'{train}.evaluate_every_steps', f'{train}.log_every_steps'),
    lambda evaluate, log: evaluate % log == 0,
    f'must be a multiple of {train}.log_every_steps = {{1}}, as it is told in the logged lines',
    f'set --config.{train}.evaluate_every_steps to a multiple of {{1}}, or 0',
  )
  yield Relation(
    (f'{train}.optimizer_arguments', f'{train}.optimizer'),
    lambda arguments, name: name != 'adamw' or not arguments.strip(),
    f'are for other optimizers, and {train}.optimizer is adamw, which the adam_ keys describe',
    f"set --config.{train}.optimizer_arguments='' and the adam_ keys",
  )


def _batch_relation(key: str) -> Relation:
  return Relation(
    (key, 'mesh.data'),
    lambda batch, data: data == -1 or batch % data == 0,
    'must be a multiple of mesh.data = {1}',
    f'set --config.{key} to a multiple of {{1}}',
  )


def _tasks_named_apart(tasks: Iterable[str]) -> bool:
  names = [task_name(task) for task in tasks]
  plain = all(re.fullmatch(r'[\w.-]+', name) and '__' not in name and name != MIX for name in names)
  return plain and len(names) == len(set(names))


def _targets_known(targets: Iterable[str], tasks: Iterable[str]) -> bool:
  names = {*tasks, *(task_name(task) for task in tasks)}
  return all(
    target == MIX or (0 < len(parts) == len(set(parts)) and names.issuperset(parts))
    for target in targets
    for parts in [target.split('+')]
  )


RELATIONS: tuple[Relation, ...] = (
  Relation(
    ('pretraining.models_at_once', 'pretraining.train.evaluate_every_steps'),
    lambda models, every: models == 1 or every == 0,
    'trains models side by side, which have no rows in common to be evaluated on: needs '
    'pretraining.train.evaluate_every_steps = 0, and it is {1}',
    'set --config.pretraining.models_at_once=1',
  ),
  Relation(
    ('proxies.epochs', 'proxies.model.weights', 'proxies.count', 'proxies.checkpoints'),
    lambda epochs, weights, count, checkpoints: epochs > 0 or (weights != '' and count == checkpoints == 1),
    'trains nothing: needs proxies.model.weights (it is {1!r}), proxies.count = 1 ({2}) and proxies.checkpoints = 1 '
    '({3})',
    'set --config.proxies.model.weights to a folder, --config.proxies.count=1 and --config.proxies.checkpoints=1, or '
    '--config.proxies.epochs=2',
  ),
  Relation(
    ('distributed.process', 'distributed.processes'),
    lambda process, processes: process < processes,
    'must be less than distributed.processes = {1}: they count from 0',
    'give each process a number of its own below {1}',
  ),
  Relation(
    ('distributed.processes', 'distributed.coordinator'),
    lambda processes, coordinator: processes == 1 or coordinator != '',
    "needs distributed.coordinator, the 'host:port' of process 0, for the processes to find each other",
    'set --config.distributed.coordinator, or --config.distributed.processes=1',
  ),
  Relation(
    ('features.mode', 'features.projection'),
    lambda mode, projection: mode != 'jvp' or projection == 'dense',
    'scores in the dense projection, and features.projection = {1}',
    'set --config.features.projection=dense, or --config.features.mode=stream',
  ),
  Relation(
    (
      'features.mode',
      'datamodel.bootstrap',
      'datamodel.groups',
      'datamodel.examples',
      'datamodel.unit_norm',
      'datamodel.gram',
    ),
    lambda mode, bootstrap, groups, examples, unit, gram: (
      mode != 'jvp' or (bootstrap == examples == 0 and groups == 1 and not unit and gram in ('auto', 'full'))
    ),
    'pays for each direction and has no features to scale or join: needs datamodel.bootstrap = 0 (it is {1}), '
    'datamodel.groups = 1 ({2}), datamodel.examples = 0 ({3}), datamodel.unit_norm = False ({4}) and datamodel.gram = '
    "'auto' ({5!r})",
    'set --config.datamodel.bootstrap=0, --config.datamodel.groups=1 and --config.datamodel.examples=0, or '
    '--config.features.mode=stream',
  ),
  Relation(
    ('features.microbatch', 'features.batch_size'),
    lambda rows, batch: rows <= batch,
    'must be at most features.batch_size = {1}',
    'set --config.features.microbatch=0 to take whole batches',
  ),
  Relation(
    ('features.basis', 'features.projection'),
    lambda basis, projection: basis == 'random' or projection == 'two_sided',
    "needs features.projection = 'two_sided', and it is {1!r}",
    'set --config.features.basis=random, or --config.features.projection=two_sided',
  ),
  Relation(
    ('features.job', 'features.jobs'),
    lambda job, jobs: job < jobs,
    'must be below features.jobs = {1}, as jobs count from 0',
    'set --config.features.job to a number from 0 to features.jobs - 1',
  ),
  Relation(
    ('pool.max_document_bytes', 'pool.max_bytes'),
    lambda document, pool: not pool or document <= pool,
    'must be at most pool.max_bytes = {1}',
    'set --config.pool.max_bytes to at least {0}',
  ),
  Relation(
    ('pool.sources', 'pool.max_bytes'),
    lambda lines, pool: pool > 0 or not weights_differ(lines),
    'has a weight, which is a share of pool.max_bytes, and that is 0 and takes all',
    "set --config.pool.max_bytes to the bytes wanted, or leave 'weight=' out",
  ),
  Relation(
    ('pool.plant_targets', 'targets.max_examples'),
    lambda planted, examples: planted <= examples,
    'must be at most targets.max_examples = {1}',
    'set --config.pool.plant_targets to {1} or less',
  ),
  Relation(
    ('targets.tasks',),
    _tasks_named_apart,
    "must have names that differ, hold letters, digits, '.', '-' and single '_' alone, and are not 'mix'",
    'rename the file whose name is taken: a path goes by its last part without .jsonl',
  ),
  Relation(
    ('selection.targets', 'targets.tasks'),
    _targets_known,
    "each must be 'mix', a task of targets.tasks = {1}, or several of them joined by '+'",
    'set --config.selection.targets="(\'mix\',)", or add the task to --config.targets.tasks',
  ),
  Relation(
    ('mixture.parts', 'targets.tasks'),
    lambda parts, tasks: _targets_known([part_key(text)[1] for text in parts], tasks),
    "each target after '@' must be 'mix', a task of targets.tasks = {1}, or several of them joined by '+'",
    'mend the target, or add the task to --config.targets.tasks',
  ),
  Relation(
    ('selection.imported', 'selection.methods', 'mixture.parts'),
    lambda file, methods, parts: bool(file) or 'imported' not in (*methods, *(part_key(text)[0] for text in parts)),
    "must be a file where selection.methods or mixture.parts have 'imported'",
    'set --config.selection.imported=scores.npy',
  ),
  Relation(
    ('selection.repeat_cap', 'selection.epochs'),
    lambda cap, epochs: cap >= epochs,
    'must be at least selection.epochs = {1}',
    'set --config.selection.repeat_cap={1}',
  ),
  Relation(
    ('selection.examples', 'selection.epochs', 'pretraining.train.batch_size'),
    lambda examples, epochs, batch: examples * epochs >= batch,
    'times selection.epochs = {1} must be at least pretraining.train.batch_size = {2}, one step of training',
    'set more --config.selection.examples or a smaller --config.pretraining.train.batch_size',
  ),
  Relation(
    ('datamodel.gram', 'features.projection'),
    lambda gram, projection: gram != 'layers' or projection == 'two_sided',
    "needs features.projection = 'two_sided', and it is {1!r}, whose columns belong to no layer",
    'set --config.datamodel.gram=auto, or --config.features.projection=two_sided',
  ),
  Relation(
    ('datamodel.average', 'datamodel.gram'),
    lambda average, gram: average != 'unseen' or gram != 'joint',
    "needs scores of each proxy, and datamodel.gram = 'joint' has none",
    'set --config.datamodel.average=auto, or --config.datamodel.gram=auto',
  ),
  Relation(
    ('datamodel.damping_rule', 'datamodel.gram', 'proxies.count'),
    lambda rule, gram, count: rule != 'auto' or (gram != 'joint' and count >= 3),
    'needs a proxy that predicts how two others differ; proxies.count = {2}, datamodel.gram = {1!r}',
    'set --config.datamodel.damping_rule=fixed, or --config.proxies.count=3 with a gram that is not joint',
  ),
  *(_batch_relation(key) for key in BATCHES),
  *(relation for train in TRAINS for relation in _train_relations(train)),
)


def task_name(task: str) -> str:
  """The name that a task of `targets.tasks` goes by: a path's stem, any other as it is."""
  return PurePath(task).stem if JSONL.holds(task) else task

"""What several keys must be together. Each key is valid by itself when these rules are checked."""

from collections.abc import Iterator

from dsdm_jax.config.methods import METHODS, method_name
from dsdm_jax.config.schema import Config, Model
from dsdm_jax.config.values import BREADTH, LONGEST_NAME, MixturePart, are_targets, brief, task_name, weights_differ

OUR_FACTORY = Model().factory
MODELS = ('model', 'proxies.model')
TRAINS = ('proxies.train', 'pretraining.train')
# Batches that the devices must share evenly. Those of features are rounded up instead.
BATCHES = (*(f'{train}.batch_size' for train in TRAINS), 'evaluation.batch_size')


def broken(c: Config) -> Iterator[tuple[str, str, str]]:
  """(key, the rule that its value breaks, what to do) for every broken relation."""
  f, d, s, p = c.features, c.datamodel, c.selection, c.proxies
  if c.pretraining.models_at_once > 1 and c.pretraining.train.evaluate_every_steps:
    yield (
      'pretraining.models_at_once',
      'trains models side by side, which have no common rows to be evaluated on: needs pretraining.train.'
      f'evaluate_every_steps = 0, and it is {c.pretraining.train.evaluate_every_steps}',
      'set --config.pretraining.models_at_once=1',
    )
  if not p.epochs and not (p.model.weights and p.count == p.checkpoints == 1):
    yield (
      'proxies.epochs',
      f'trains nothing: needs proxies.model.weights (it is {brief(p.model.weights)}), proxies.count = 1 ({p.count}) '
      f'and proxies.checkpoints = 1 ({p.checkpoints})',
      'set --config.proxies.model.weights to a folder, --config.proxies.count=1 and --config.proxies.checkpoints=1, or '
      '--config.proxies.epochs=2',
    )
  if c.distributed.process >= c.distributed.processes:
    rule = f'must be less than distributed.processes = {c.distributed.processes}: they count from 0'
    yield 'distributed.process', rule, 'give each process its own number below that'
  if c.distributed.processes > 1 and not c.distributed.coordinator:
    rule = "needs distributed.coordinator, the 'host:port' of process 0, so that the processes can connect"
    yield 'distributed.processes', rule, 'set --config.distributed.coordinator, or --config.distributed.processes=1'
  if f.mode == 'stream' and f.projection == 'ekfac':
    rule = 'recomputes features, and features.projection = ekfac makes none'
    yield 'features.mode', rule, 'set --config.features.mode=store, or --config.features.projection=two_sided'
  if f.mode == 'jvp' and f.projection == 'two_sided':
    rule = f'scores along directions of all parameters, and features.projection = {f.projection}'
    yield 'features.mode', rule, 'set --config.features.projection=dense or ekfac, or --config.features.mode=stream'
  if f.projection == 'ekfac':
    wanted = {
      'features.precondition': 'none', 'datamodel.gram': 'auto', 'datamodel.unit_norm': False,
      'datamodel.damping_rule': 'fixed', 'datamodel.target_share': 0.0, 'datamodel.recentre': False,
    }  # fmt: skip
    for at, value in wanted.items():
      section, name = at.split('.')
      if getattr(getattr(c, section), name) != value:
        rule = 'must be {value!r} with features.projection = ekfac, which makes no features and no Gram matrix'
        yield at, rule.format(value=value), f'set --config.{at}={value}, or --config.features.projection=two_sided'
  if (
    f.mode == 'jvp'
    and f.projection == 'dense'
    and (d.bootstrap or d.examples or d.groups > 1 or d.unit_norm or d.gram not in ('auto', 'full'))
  ):
    yield (
      'features.mode',
      'pays for each direction and has no features to scale or join: needs datamodel.bootstrap = 0 (it is '
      f'{d.bootstrap}), datamodel.groups = 1 ({d.groups}), datamodel.examples = 0 ({d.examples}), datamodel.unit_norm '
      f"= False ({d.unit_norm}) and datamodel.gram = 'auto' ({d.gram!r})",
      'set --config.datamodel.bootstrap=0, --config.datamodel.groups=1 and --config.datamodel.examples=0, or '
      '--config.features.mode=stream',
    )
  if f.microbatch > f.batch_size:
    rule = f'must be at most features.batch_size = {f.batch_size}'
    yield 'features.microbatch', rule, 'set --config.features.microbatch=0, or raise features.batch_size'
  if f.basis != 'random' and f.projection != 'two_sided':
    rule = f"needs features.projection = 'two_sided', and it is {f.projection!r}"
    yield 'features.basis', rule, 'set --config.features.basis=random, or --config.features.projection=two_sided'
  if f.job >= f.jobs:
    rule = f'must be below features.jobs = {f.jobs}, as jobs count from 0'
    yield 'features.job', rule, 'set --config.features.job to a number from 0 to features.jobs - 1'
  if 0 < c.pool.max_bytes < c.pool.max_document_bytes:
    rule = f'must be at most pool.max_bytes = {c.pool.max_bytes}'
    yield 'pool.max_document_bytes', rule, f'set --config.pool.max_bytes to at least {c.pool.max_document_bytes}'
  if not c.pool.max_bytes and weights_differ(c.pool.sources):
    rule = 'has a weight, which is a share of pool.max_bytes, and that is 0 and takes all'
    yield 'pool.sources', rule, "set --config.pool.max_bytes to the size of the pool, or leave 'weight=' out"
  if c.pool.plant_targets > (most := c.targets.max_examples):
    rule = f'must be at most targets.max_examples = {most}'
    yield 'pool.plant_targets', rule, f'set --config.pool.plant_targets to {most} or less'
  parts = [part for part in map(MixturePart.parse, c.mixture.parts) if part is not None]
  named = [METHODS[m] for m in (*s.methods, *(part.method for part in parts)) if m in METHODS]
  if not p.epochs and (without := [m.label for m in named if {'moments', 'training'} & set(m.needs)]):
    rule = f'have methods that need a proxy in training ({", ".join(without)}), and proxies.epochs = 0 trains none'
    yield 'selection.methods', rule, 'set --config.proxies.epochs=2, or leave them out'
  rows_needed = {'feature_rows', 'first_features'} | (set() if f.projection == 'dense' else {'features'})
  unstored = 'features.projection = ekfac' if f.projection == 'ekfac' else 'features.mode = jvp'
  if (f.mode == 'jvp' or f.projection == 'ekfac') and (
    without := [m.label for m in named if rows_needed & set(m.needs)]
  ):
    rule = f'have methods that need stored features ({", ".join(without)}), and {unstored} stores none'
    way_out = 'set --config.features.projection=two_sided and --config.features.mode=store, or leave them out'
    yield 'selection.methods', rule, way_out
  if s.prefilter and (without := [m.label for m in named if {'features', *rows_needed} & set(m.needs)]):
    yield (
      'selection.prefilter',
      f'leaves rows without features, and selection.methods or mixture.parts have methods that need those of all rows '
      f'({", ".join(without)})',
      "set --config.selection.prefilter='', or leave them out",
    )
  if s.prefilter and (s.unit == 'document' or d.damping_rule == 'auto'):
    yield (
      'selection.prefilter',
      "leaves rows without scores: needs selection.unit = 'row' and datamodel.damping_rule = 'fixed'",
      "set --config.selection.prefilter='', or these keys",
    )
  named_tasks = tuple(map(task_name, c.targets.tasks)) + ((BREADTH,) if c.targets.breadth else ())
  if len(set(named_tasks)) < len(named_tasks):
    rule = f'adds a task named {BREADTH}, and targets.tasks has one of this name'
    yield 'targets.breadth', rule, 'rename that file, or set --config.targets.breadth=0'
  tasks = brief(named_tasks)
  known = f"must be 'mix', the name of a task of targets.tasks = {tasks}, or several of them joined by '+'"
  if not are_targets(s.targets, named_tasks):
    way_out = 'set --config.selection.targets="(\'mix\',)", or add the task to --config.targets.tasks'
    yield 'selection.targets', f'each {known}', way_out
  if not are_targets([part.target for part in parts], named_tasks):
    way_out = 'correct the target, or add the task to --config.targets.tasks'
    yield 'mixture.parts', f"each target after '@' {known}", way_out
  joined = s.targets or ('+'.join(named_tasks),)  # as `resolve` makes it
  arms = [f'{method_name(method)}--{target}' for method in s.methods for target in joined]
  if len((longest := max(arms, key=lambda arm: len(arm.encode()))).encode()) > LONGEST_NAME:
    rule = f'makes an arm of {len(longest.encode())} bytes, {brief(longest)}, and files are named after it'
    yield 'selection.targets', rule, f'rename tasks or functions, so that it has at most {LONGEST_NAME}'
  if not s.imported and 'imported' in (*s.methods, *(part.method for part in parts)):
    rule = "must be a file where selection.methods or mixture.parts have 'imported'"
    yield 'selection.imported', rule, 'set --config.selection.imported=scores.npy'
  if s.unit == 'document' and s.document_cap:
    rule = 'limits the rows of a document, and selection.unit = document selects whole ones'
    yield 'selection.document_cap', rule, 'set --config.selection.document_cap=0, or --config.selection.unit=row'
  if s.repeat_cap < s.epochs:
    rule = f'must be at least selection.epochs = {s.epochs}'
    yield 'selection.repeat_cap', rule, f'set --config.selection.repeat_cap={s.epochs}'
  if s.examples * s.epochs < (batch := c.pretraining.train.batch_size):
    yield (
      'selection.examples',
      f'times selection.epochs = {s.epochs} must be at least pretraining.train.batch_size = {batch}, one step',
      'set more --config.selection.examples or a smaller --config.pretraining.train.batch_size',
    )
  if d.gram == 'layers' and f.projection != 'two_sided':
    rule = f"needs features.projection = 'two_sided', and it is {f.projection!r}, whose columns belong to no layer"
    yield 'datamodel.gram', rule, 'set --config.datamodel.gram=auto, or --config.features.projection=two_sided'
  if d.average == 'unseen' and d.gram == 'joint':
    rule = "needs scores of each proxy, and datamodel.gram = 'joint' has none"
    yield 'datamodel.average', rule, 'set --config.datamodel.average=auto, or --config.datamodel.gram=auto'
  if d.damping_rule == 'auto' and (d.gram == 'joint' or p.count < 3):
    yield (
      'datamodel.damping_rule',
      f'needs a proxy that predicts how two others differ; proxies.count = {p.count}, datamodel.gram = {d.gram!r}',
      'set --config.datamodel.damping_rule=fixed, or --config.proxies.count=3 with a gram that is not joint',
    )
  data = c.mesh.data * max(c.mesh.replicas, 1)
  shares = f'mesh.data = {c.mesh.data}' + (f' times mesh.replicas = {c.mesh.replicas}' if c.mesh.replicas > 1 else '')
  trains = tuple(zip(TRAINS, (p.train, c.pretraining.train), strict=True))
  for at, batch in zip(BATCHES, (*(t.batch_size for _, t in trains), c.evaluation.batch_size), strict=True):
    if batch % data:
      yield at, f'must be a multiple of {shares}', f'set --config.{at} to a multiple of {data}'
  for at, t in trains:
    if t.microbatches and t.batch_size % (t.microbatches * max(data, 1)):
      rule = f'must divide {at}.batch_size = {t.batch_size} into parts that are multiples of {shares}'
      yield f'{at}.microbatches', rule, f'set --config.{at}.microbatches=1 to take whole batches'
    if t.evaluate_every_steps % t.log_every_steps:
      rule = f'must be a multiple of {at}.log_every_steps = {t.log_every_steps}, as it is part of the logged lines'
      way_out = f'set --config.{at}.evaluate_every_steps to a multiple of {t.log_every_steps}, or 0'
      yield f'{at}.evaluate_every_steps', rule, way_out
    if t.optimizer == 'adamw' and t.optimizer_arguments.strip():
      rule = f'are for other optimizers, and {at}.optimizer is adamw, which the adam_ keys describe'
      yield f'{at}.optimizer_arguments', rule, f"set --config.{at}.optimizer_arguments='' and the adam_ keys"
  for at, m in zip(MODELS, (c.model, p.model), strict=True):
    if m.factory != OUR_FACTORY:
      continue
    if not m.head_size and m.width % m.heads:
      way_out = f'set --config.{at}.width to a multiple of {m.heads}, or change --config.{at}.heads or {at}.head_size'
      yield f'{at}.heads', f'must divide {at}.width = {m.width}', way_out
    if m.heads % m.kv_heads:
      way_out = f'set --config.{at}.kv_heads to a divisor of {m.heads}, for example 1'
      yield f'{at}.kv_heads', f'must divide {at}.heads = {m.heads}', way_out
    rotated = int((m.head_size or m.width // m.heads) * m.rotary_share)
    if m.positions == 'rope' and (rotated < 2 or rotated % 2):
      yield (
        f'{at}.positions',
        f'needs an even head size, and {at}.rotary_share = {m.rotary_share} of {at}.width = {m.width} over {at}.heads '
        f'= {m.heads} is not',
        f'set --config.{at}.head_size to an even number, or --config.{at}.positions=learned',
      )
    if m.rotary_global_every > 1 and m.scan_layers:
      rule = 'makes layers differ, and scan_layers compiles one for all'
      yield f'{at}.rotary_global_every', rule, f'set --config.{at}.scan_layers=False'
    if m.parallel_residual and m.norm_place == 'post':
      rule = 'reads norms before attention and MLP, and norm_place = post has none'
      yield f'{at}.parallel_residual', rule, f'set --config.{at}.norm_place=pre'
    if m.attention_cap and m.attention == 'fused':
      rule = 'needs scores, and no fused kernel gives them'
      yield f'{at}.attention_cap', rule, f'set --config.{at}.attention=xla, or --config.{at}.attention_cap=0'

"""The table of contents: all stages in order, with what each reads, what it depends on and where its code is.

`core/runner.py` decides which stages run, resume or are reused.
"""

import logging
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.config.relations import OUR_FACTORY
from dsdm_jax.config.validate import check_devices, flatten, resolve, validate
from dsdm_jax.core import artifacts, processes, stopping, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.progress import display
from dsdm_jax.core.runner import Runner, load, locked
from dsdm_jax.core.stage import Stage, existing
from dsdm_jax.core.storage import Location, Named
from dsdm_jax.data import hub
from dsdm_jax.data.pool import vocabulary
from dsdm_jax.data.targets import tasks
from dsdm_jax.errors import UserError, visible, visible_lines
from dsdm_jax.evaluation import suite
from dsdm_jax.lm import hugging_face

_PREFILTERED = (('selection.prefilter', ('prefilter',)),)
STAGES = (
  # Documents → tokens → a TFDS dataset. It depends on targets only where their examples are planted in it.
  Stage(
    'pool',
    reads=(),
    keys=('seed', 'pool'),
    code='data.pool.build:run',
    format=9,
  ),
  # Text of the pool × targets and benchmarks → a mask of rows that no selection takes.
  Stage(
    'leakage',
    reads=('pool',),
    keys=('leakage', 'targets.tasks', 'targets.folder', 'targets.seed'),
    code='data.targets.masked:run',
    format=2,
    where_set=(('targets.breadth', ()),),
  ),
  # Tasks → examples that the datamodel sees, and a holdout split that it never sees.
  Stage(
    'targets',
    reads=('pool',),
    keys=('targets',),
    code='data.targets.targets:run',
    format=8,
    where_set=(('targets.breadth', ('leakage',)),),
  ),
  # Text of targets and pool → the rows that are scored; without it, all of them.
  Stage(
    'prefilter',
    reads=('pool', 'leakage', 'targets'),
    keys=(
      *('seed', 'datamodel.mix', 'selection.prefilter', 'selection.targets', 'selection.examples'),
      *('selection.ngrams', 'selection.ngram_buckets', 'selection.classifier_rows'),
    ),
    code='selection.prefilter:run',
    only_with='selection.prefilter',
  ),
  # Small models on random subsets.
  Stage(
    'proxies',
    reads=('pool',),
    keys=('seed', 'proxies'),
    code='training.proxies:run',
    format=2,
    everywhere=True,
    batches=('proxies.train.batch_size',),
  ),
  # Projected per-example gradients of the pool.
  Stage(
    'features',
    reads=('pool', 'proxies'),
    keys=('seed', 'features', 'proxies'),
    code='attribution.features:run',
    format=5,
    everywhere=True,
    repairable=True,
    where_set=_PREFILTERED,
  ),
  # Projected per-example gradients of the targets, task by task.
  Stage(
    'target_features',
    reads=('pool', 'targets', 'proxies', 'features'),
    keys=('seed', 'features', 'proxies'),
    code='attribution.target_features:run',
    everywhere=True,
    repairable=True,
  ),
  # Features → one score per row and target, in closed form.
  Stage(
    'datamodel',
    reads=('pool', 'targets', 'proxies', 'features', 'target_features'),
    keys=('seed', 'datamodel', 'features', 'proxies'),
    code='attribution.scores:run',
    format=6,
    everywhere=True,
    where_set=_PREFILTERED,
  ),
  # Models trained on many subsets of the pool: do scores predict what training does?
  Stage(
    'validation',
    reads=('pool', 'leakage', 'targets'),
    keys=('seed', 'validation', 'proxies', 'features', 'datamodel'),
    code='validation.validate:run',
    format=4,
    on_request=True,
  ),
  # Scores → rows for each arm. Only the inputs that a method needs are opened.
  Stage(
    'selection',
    reads=('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features', 'datamodel'),
    keys=('seed', 'selection', 'mixture', 'pretraining.seeds'),
    code='selection.select:run',
    format=8,
    everywhere=True,
    where_set=_PREFILTERED,
  ),
  # One model per arm and seed, on a seqio mixture of its rows.
  Stage(
    'pretraining',
    reads=('pool', 'selection'),
    keys=('seed', 'model', 'pretraining'),
    code='training.pretraining:run',
    everywhere=True,
    batches=('pretraining.train.batch_size',),
  ),
  # Models on random rows at several amounts of compute: the scale on which results are read as compute.
  Stage(
    'ladder',
    reads=('pool', 'leakage'),
    keys=('seed', 'ladder', 'model', 'pretraining.train', 'selection.examples', 'selection.epochs'),
    code='training.ladder:run',
    format=2,
    everywhere=True,
    batches=('pretraining.train.batch_size',),
  ),
  # Every model on every task; differences with intervals, and the compute multiplier.
  Stage(
    'evaluation',
    reads=(
      *('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features'),
      *('datamodel', 'selection', 'pretraining', 'ladder'),
    ),
    keys=('evaluation', 'model', 'pretraining', 'targets.seed', 'targets.folder'),
    code='evaluation.evaluate:run',
    format=11,
    everywhere=True,
    batches=('evaluation.batch_size',),
    where_set=_PREFILTERED,
  ),
  # One page that shows it all.
  Stage(
    'report',
    reads=(
      *('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features'),
      *('datamodel', 'selection', 'pretraining', 'ladder', 'evaluation'),
    ),
    keys=('report',),
    code='report.report:run',
    format=3,
    optional=('validation',),
    where_set=_PREFILTERED,
  ),
)
NAMES = tuple(stage.name for stage in STAGES if not (stage.on_request or stage.only_with))  # of every run
CHECK = 'check'  # looks at everything that can be known, and makes nothing
ON_REQUEST = tuple(stage.name for stage in STAGES if stage.on_request)


def run(config: ConfigDict, workdir: Named, only: str | None = None, rerun: bool = False) -> None:
  """Runs all stages, or `only` one, and skips those that are finished.

  Args:
    config: a whole config, see `configs/base.py`.
    workdir: folder of the run, created when missing, or an address in an object store (gs://, s3://).
    only: name of a stage; the stages that it reads must be finished. 'check' looks at all and makes nothing.
    rerun: replace stages with other settings instead of raising an error.

  Raises:
    UserError: the config or the workdir is wrong, or another run uses the workdir. Errors that can be known beforehand
      are raised before anything is written.
  """
  location = storage.check_location(workdir, '--workdir')
  storage.kvstore(location)  # before anything is computed
  validate(config)
  stages = [stage.name for stage in existing(STAGES, flatten(config))]
  if only not in (None, CHECK, *stages):
    known = next((stage for stage in STAGES if stage.name == only), None)
    if known is not None:
      raise UserError(f'--stage={only} is a stage of runs with config key {known.only_with}, which is not set')
    raise UserError(f'--stage={only} is not a stage; stages are {", ".join(stages)}')
  if config.features.jobs > 1 and (only != 'features' or rerun):
    raise UserError(
      f'config key features.jobs = {config.features.jobs} shares one stage among processes; start each with '
      '--stage=features and without --rerun, after the stages before it are finished, and delete an old features '
      'folder by hand'
    )
  config = runner_config(config)
  validate(config)
  with processes.running(config, flatten(config)):
    run_connected(config, location, only, rerun)


def runner_config(config: ConfigDict) -> ConfigDict:
  """`config` with derived values filled in, such as the shape of a named model; hub ids become local paths."""
  return resolve(hub.localized(config), hugging_face.model_keys)


def needed(name: str, settings: Mapping[str, Any] | None = None) -> list[str]:
  """The stages that `name` reads, directly or not, and itself, in order; with these settings, or in every run."""
  stages = list(STAGES) if settings is None else existing(STAGES, settings)
  reads = next(stage.reads for stage in stages if stage.name == name)
  names = {name}.union(*(needed(read, settings) for read in reads))
  return [stage.name for stage in stages if stage.name in names]


def run_connected(config: ConfigDict, workdir: Location, only: str | None = None, rerun: bool = False) -> None:
  """`run` for a resolved config, in a process that is connected to the other processes of the run."""
  stopping.say_where(display.where)
  logging.getLogger('absl').setLevel(logging.DEBUG if config.log.level == 'debug' else logging.ERROR)
  guarded = config.leakage.benchmarks if config.leakage.guard else ()
  tasks.check_files(config.targets, config.pool.vocabulary, guarded)
  suite.check(config.evaluation, config.targets, config.pool)
  processes.decide(lambda: _check_imported(config, workdir))
  if only == CHECK and not rerun:
    processes.decide(lambda: Runner(STAGES, config, workdir).compare())
  wanted = processes.decide(lambda: _unfinished(config, workdir, only, rerun))
  if wanted:
    processes.before_devices()
    import jax

    if not rerun:  # else the runner alone knows what runs
      check_devices(config, jax.device_count(), [key for s in STAGES if s.name in wanted for key in s.batches])
  found: dict[str, Any] = {'lines': [], 'warnings': [], 'seconds': {}}
  if wanted or only == CHECK:
    found = processes.decide(lambda: load('plan.preflight:run')(config, workdir, wanted, only == CHECK))
  shown = [name for name in _names(config) if name != 'ladder' or config.ladder.rungs]
  display.begin(shown, found['seconds'], config.log.level)
  if processes.is_first():
    for line in found['lines']:
      display.write(visible(line), sys.stdout, 'warning' if only == CHECK else 'info')
    for warning in found['warnings']:
      text = textwrap.fill(f'warning: {visible(warning)}', 79, subsequent_indent='  ', break_on_hyphens=False)
      display.write(text, sys.stdout, 'warning')
  if only == CHECK:
    return
  with locked(workdir, config.features.job if config.features.jobs > 1 else None) as created:
    # Which prompts cannot be asked is known as soon as there is a vocabulary, long before they are.
    checks = {'pool': lambda pool: suite.check_prompts(config, pool)} if 'evaluation' in wanted else {}
    done = Runner(STAGES, config, workdir, checks).run(only, rerun, created)
    if processes.is_first() and 'evaluation' in done and only in (None, 'evaluation'):
      _publish(workdir, config, done)
    for name in ('report', 'validation'):
      if processes.is_first() and name in done and only in (None, name):
        artifacts.publish(done[name])
    if processes.is_first() and 'report' in done and only in (None, 'report'):
      print(visible(f'report: {workdir / "report" / "index.html"}'), flush=True)


def _names(config: ConfigDict) -> list[str]:
  """The stages of a run with this config, in order."""
  return [stage.name for stage in existing(STAGES, flatten(config)) if not stage.on_request]


def _unfinished(config: ConfigDict, workdir: Location, only: str | None, rerun: bool) -> list[str]:
  """The stages that this run makes, as far as their manifests show; their settings are compared later."""
  wanted = _names(config) if only in (None, CHECK) else [only]
  return [name for name in wanted if rerun or artifacts.open_stage(workdir, name) is None]


def _check_imported(config: ConfigDict, workdir: Location) -> None:
  """Reads weights and scores that others made before the pool is built; what uses them later checks them again."""
  if artifacts.open_stage(workdir, 'pool') is not None:
    return
  loaded = [m for m in (config.model, config.proxies.model) if m.weights and m.factory == OUR_FACTORY]
  pool = config.pool
  if loaded:
    size = pool.vocab_size if pool.vocabulary == 'train' else vocabulary.size_of(pool.vocabulary, pool.end_piece)
    for model in loaded:
      hugging_face.check(model.weights, model, pool.length, size)
  if config.selection.imported:
    from dsdm_jax.attribution import score_files  # imports SciPy

    score_files.read(config.selection.imported)


def _publish(workdir: Location, config: ConfigDict, done: Mapping[str, Artifact]) -> None:
  """Writes `results.json` and `results.md` in the workdir and prints the main comparison."""
  from dsdm_jax.evaluation.results import main_table, text_tables

  results = storage.read_json(done['evaluation'].path / 'results.json', dict)
  # The same whichever stage was asked for: the report, which comes later, may be finished too.
  stages = {name: done.get(name) or artifacts.open_stage(workdir, name) for name in _names(config)}
  results['cost'] = {name: artifact.manifest['cost'] for name, artifact in stages.items() if artifact is not None}
  results['versions'] = done['evaluation'].manifest['versions']
  results['config'] = flatten(config)
  storage.write_json(workdir / 'results.json', results)
  storage.write_text(workdir / 'results.md', f'# Results\n\n```text\n{visible_lines(text_tables(results))}```\n')
  print(visible_lines(main_table(results)))
  print(visible(f'all arms and tasks: {workdir / "results.md"}'))

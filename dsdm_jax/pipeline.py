"""The stages in order, each with what it reads, what it depends on and where its code is: the table of contents."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dsdm_jax.config.validate import check_callables, check_devices, flatten, resolve, select, validate
from dsdm_jax.core import artifacts, lock, memory, processes, storage
from dsdm_jax.core.artifacts import Artifact, Identity
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool import sources
from dsdm_jax.data.targets import benchmarks, tasks
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import suite
from dsdm_jax.lm import hugging_face


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step from the pool to the report.

  Attributes:
    reads: stages whose artifacts it opens.
    keys: prefixes of the config keys that it depends on.
    code: 'module:function' below `dsdm_jax`.
    format: version of what it writes.
    everywhere: whether all processes run it together; process 0 alone runs the others.
    on_request: runs only where it is asked for by name.
    also: stages whose artifacts it takes up where they stand; when that changes it is made anew without being asked.
    mends: whether a damaged artifact is mended: started where files are missing, it makes these and nothing else.
    batches: keys of batches that it shares evenly among devices, since what it makes depends on their size.
  """

  name: str
  reads: tuple[str, ...]
  keys: tuple[str, ...]
  code: str
  format: int = 1
  everywhere: bool = False
  on_request: bool = False
  also: tuple[str, ...] = ()
  mends: bool = False
  batches: tuple[str, ...] = ()


STAGES = (
  # Documents → tokens → a TFDS dataset, without documents that hold target text.
  Stage(
    'pool', (), ('seed', 'pool', 'targets.tasks', 'targets.folder', 'targets.seed'), 'data.pool.build:run', format=2
  ),
  # Tasks → examples that the datamodel sees, and a holdout that it never does.
  Stage('targets', ('pool',), ('targets',), 'data.targets.targets:run', format=2),
  # Small models on random subsets.
  Stage(
    'proxies', ('pool',), ('seed', 'proxies'), 'training.proxies:run', everywhere=True,
    batches=('proxies.train.batch_size',),
  ),
  # Projected per-example gradients, of the pool and of the targets.
  Stage(
    'features', ('pool', 'targets', 'proxies'), ('seed', 'features', 'proxies'), 'attribution.features:run', 2,
    everywhere=True, mends=True,
  ),
  # Features → one score per row and target, in closed form.
  Stage(
    'datamodel', ('pool', 'targets', 'proxies', 'features'),
    ('seed', 'datamodel', 'features', 'proxies'), 'attribution.scores:run', format=2, everywhere=True,
  ),
  # Models trained on many subsets of the pool: do scores foretell what training does?
  Stage(
    'validation', ('pool', 'targets'),
    ('seed', 'validation', 'proxies', 'features', 'datamodel'), 'validation.validate:run', on_request=True,
  ),
  # Scores → rows for each arm. What a method does not need is not opened.
  Stage(
    'selection', ('pool', 'targets', 'proxies', 'features', 'datamodel'),
    ('seed', 'selection', 'mixture', 'pretraining.seeds'), 'selection.select:run', format=2, everywhere=True,
  ),
  # One model per arm and seed, on a seqio mixture of its rows.
  Stage(
    'pretraining', ('pool', 'selection'), ('seed', 'model', 'pretraining'), 'training.pretraining:run',
    everywhere=True, batches=('pretraining.train.batch_size',),
  ),
  # Models on random rows at several sizes: the scale on which results are read as compute.
  Stage(
    'ladder', ('pool',),
    ('seed', 'ladder', 'model', 'pretraining.train', 'selection.examples', 'selection.epochs'),
    'training.ladder:run', everywhere=True, batches=('pretraining.train.batch_size',),
  ),
  # Every model on every task; differences with intervals, and the compute multiplier.
  Stage(
    'evaluation', ('pool', 'targets', 'proxies', 'features', 'datamodel', 'selection', 'pretraining', 'ladder'),
    ('evaluation', 'model', 'pretraining', 'targets.seed', 'targets.folder'), 'evaluation.evaluate:run', 4,
    everywhere=True, batches=('evaluation.batch_size',),
  ),
  # One page that shows it all.
  Stage(
    'report',
    ('pool', 'targets', 'proxies', 'features', 'datamodel', 'selection', 'pretraining', 'ladder', 'evaluation'),
    ('report',), 'report.report:run', 2, also=('validation',),
  ),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES if not stage.on_request)
ON_REQUEST = tuple(stage.name for stage in STAGES if stage.on_request)
# Keys that came after artifacts without them: what was made before stands where they have these values.
_LATER = {'pool.drop_leaks': True, 'proxies.checkpoints': 1}


def run(config: ConfigDict, workdir: str | os.PathLike, only: str | None = None, rerun: bool = False) -> None:
  """Runs all stages, or `only` one, and skips what is finished.

  Args:
    config: a whole config, see `configs/base.py`.
    workdir: folder of the run; made when missing.
    only: name of a stage; the stages it reads must be finished.
    rerun: replace stages that were made with other settings instead of refusing.

  Raises:
    UserError: bad config or state, or another run has the workdir. Nothing was written if that can be told beforehand.
  """
  validate(config)
  if only not in (None, *NAMES, *ON_REQUEST):
    raise UserError(f'--stage={only} is no stage; stages are {", ".join((*NAMES, *ON_REQUEST))}')
  if config.features.jobs > 1 and (only != 'features' or rerun):
    raise UserError(
      f'config key features.jobs = {config.features.jobs} shares one stage among processes, each started with '
      '--stage=features and without --rerun; finish the stages before it first, delete an old features folder by hand'
    )
  config = resolve(config, hugging_face.model_keys)
  validate(config)
  settings = flatten(config)
  with processes.running(config, settings):
    _run(config, settings, Path(workdir).absolute(), only, rerun)


def _run(config: ConfigDict, settings: Mapping, workdir: Path, only: str | None, rerun: bool) -> None:
  tasks.check_files(config.targets, config.pool.leakage_benchmarks if config.pool.leakage_guard else ())
  suite.check(config.evaluation, config.targets.folder, config.pool.length)
  with _held(workdir, config.features.job if config.features.jobs > 1 else None) as fresh:
    settings = {**settings, **processes.decide(lambda: _source_files(settings, workdir))}
    _run_in(workdir, fresh, config, settings, only, rerun)


def _source_files(settings: Mapping, workdir: Path) -> dict[str, str]:
  """The state of the pool's source files, as settings of its stage; where they are gone, that of the finished pool."""
  pool = artifacts.open_stage(workdir, 'pool')
  known = pool.settings if pool is not None else {}
  found = {f'pool.files of {source}': state for source, state in sources.states(settings['pool.sources']).items()}
  return {key: state or known.get(key, '') for key, state in found.items()}


@contextlib.contextmanager
def _held(workdir: Path, job: int | None) -> Iterator[bool]:
  """The workdir for all processes, by the lock that process 0 has; yields whether it was made."""
  with contextlib.ExitStack() as stack:
    yield processes.decide(lambda: stack.enter_context(lock.hold(workdir, job)))


def _run_in(workdir: Path, fresh: bool, config: ConfigDict, settings: Mapping, only: str | None, rerun: bool) -> None:
  """`run` in a workdir that nobody else has; where nothing was begun in a fresh one, nothing is left there."""
  if config.features.jobs == 1:
    processes.decide(lambda: artifacts.sweep(workdir))
  done = _opened(workdir, processes.decide(lambda: list(_finished(workdir, settings, only, rerun))))
  wanted = [s for s in STAGES if s.name not in done and (s.name == only or (only is None and not s.on_request))]
  for stage in STAGES:
    if stage.name in done and only in (None, stage.name):
      _tell(f'{stage.name}: reused from {done[stage.name].path}')
  if wanted:
    _start_jax(config, workdir, [key for stage in wanted for key in stage.batches])
  try:
    for stage in wanted:
      if processes.decide(lambda: _stands(stage, settings, workdir, done)):  # noqa: B023  called at once
        done |= _opened(workdir, [stage.name])
        continue
      if not rerun:
        processes.decide(lambda: artifacts.check_versions(workdir, identity(stage, settings, workdir, done)))  # noqa: B023
      made = _run_stage(stage, config, settings, workdir, done)
      if made is not None:
        done[stage.name] = made
  except UserError:
    left = any(artifacts.part_folder(workdir, name).exists() for name in (*NAMES, *ON_REQUEST))
    if processes.is_first() and fresh and not done and not left:
      _clear(workdir)
    raise
  if 'evaluation' in done and only in (None, 'evaluation') and processes.is_first():
    _publish(workdir, settings, done)
  if 'report' in done and only in (None, 'report'):
    _tell(f'report: {done["report"].path / "index.html"}')


def _clear(workdir: Path) -> None:
  for path in workdir.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    elif path.name != lock.LOCK:
      path.unlink()


def _tell(text: str) -> None:
  if processes.is_first():
    print(text, flush=True)


def _opened(workdir: Path, names: Iterable[str]) -> dict[str, Artifact]:
  found = {name: artifacts.open_stage(workdir, name) for name in names}
  return {name: artifact for name, artifact in found.items() if artifact is not None}


def _stands(stage: Stage, settings: Mapping, workdir: Path, done: Mapping[str, Artifact]) -> bool:
  """Whether a stage whose inputs had to be made anew stands, because they came out the same."""
  found = artifacts.open_stage(workdir, stage.name)
  if found is None or found.identity != _identity(stage, settings, _digests(stage, workdir, done)).as_json():
    return False
  if not _whole(stage, found, settings, workdir):
    return False
  print(f'{stage.name}: reused from {found.path}')
  return True


def _whole(stage: Stage, found: Artifact, settings: Mapping, workdir: Path) -> bool:
  """Whether all files of a finished stage are as they were written; a stage that mends itself is opened anew if not.

  Raises:
    UserError: they are not, and nothing can be mended, as by one of several jobs, which do not know of each other.
  """
  if not stage.mends or settings['features.jobs'] > 1:
    found.verify()
    return True
  damage = artifacts.reopen(workdir, found)
  for said in damage:
    print(f'{stage.name}: {said}; it is made anew, and what is whole stays')
  return not damage


def _identity(stage: Stage, settings: Mapping, inputs: Mapping[str, str]) -> Identity:
  """What `stage` is to be made from; `inputs` are the digests of what it reads."""
  chosen = {
    key: value
    for key, value in select(settings, stage.keys).items()
    if key not in artifacts.HOW and not (key in _LATER and value == _LATER[key])
  }
  if 'targets.folder' in chosen:  # what the files hold counts, and not where they lie
    for task, held in tasks.places_of(chosen).items():
      if benchmarks.in_tfds(held):
        chosen[f'TFDS of {task}'] = held
      else:
        chosen[f'SHA-256 of {task}'] = hashlib.sha256(epath.Path(held).read_bytes()).hexdigest()
    chosen['targets.folder'] = ''
  for key in [key for key in chosen if key.endswith('model.weights') and chosen[key]]:
    chosen[f'SHA-256 of {key}'] = hugging_face.digest(chosen[key])
  if chosen.get('selection.imported'):  # likewise
    file = Path(chosen['selection.imported'])
    if not file.is_file():
      raise UserError(f'selection.imported = {str(file)!r} is no file; give a file of one score a row')
    with open(file, 'rb') as opened:
      chosen[f'SHA-256 of {file}'] = hashlib.file_digest(opened, 'sha256').hexdigest()
  if chosen.get('pool.plant_targets'):  # planted are examples of the target split
    chosen |= select(settings, ('targets.holdout_share', 'targets.max_examples'))
  return Identity(stage.name, stage.format, chosen, inputs)


def _inputs(stage: Stage, workdir: Path, done: Mapping[str, Artifact]) -> dict[str, Artifact]:
  """What `stage` reads, and what it takes up if that was made from the same."""
  inputs = {name: done[name] for name in stage.reads}
  for other in (s for s in STAGES if s.name in stage.also):
    found = artifacts.open_stage(workdir, other.name)
    if found is not None and found.identity['inputs'] == {name: done[name].digest for name in other.reads}:
      inputs[other.name] = found
  return inputs


def _digests(stage: Stage, workdir: Path, done: Mapping[str, Artifact]) -> dict[str, str]:
  return {name: artifact.digest for name, artifact in _inputs(stage, workdir, done).items()}


def _but_for(stage: Stage, identity: Mapping[str, Any]) -> dict[str, Any]:
  """An identity without what the stage only takes up."""
  inputs = {name: digest for name, digest in identity['inputs'].items() if name not in stage.also}
  return {**identity, 'inputs': inputs}


def _finished(workdir: Path, settings: Mapping, only: str | None, rerun: bool) -> dict[str, Artifact]:
  """Stages that stand as these settings want them; refuses a workdir in which something else stands in their place."""
  done: dict[str, Artifact] = {}
  for stage in STAGES:
    if only is None:
      needed = not stage.on_request
    else:
      needed = stage.name == only or stage.name in _upstream(only)
    if not needed:
      continue
    missing = [name for name in stage.reads if name not in done]
    found = artifacts.open_stage(workdir, stage.name)
    unfinished = artifacts.begun(workdir, stage.name)
    if not missing:
      identity = _identity(stage, settings, _digests(stage, workdir, done))
      if found is None and artifacts.pending_commit(workdir, identity):
        found = artifacts.finish_commit(workdir, stage.name)
      if found is not None and found.identity == identity.as_json():
        if _whole(stage, found, settings, workdir):
          done[stage.name] = found
          continue
        found, unfinished = None, artifacts.begun(workdir, stage.name)
      if found is None and not rerun:
        artifacts.check_versions(workdir, identity)
      if stage.name == only and found is None and unfinished in (None, identity.as_json()):
        continue
      wanted = identity.as_json()
    else:
      # What it reads is not there, so whatever stands here was made from something else; only settings can be compared.
      known = (found.identity if found else unfinished) or {'inputs': {}}
      wanted = _identity(stage, settings, known['inputs']).as_json()
    stale = found.identity if found is not None else unfinished
    if stale is not None and not rerun:
      phrases = artifacts.differences(_but_for(stage, stale), _but_for(stage, wanted))
      # Where only what it read is gone, it is made anew after that, or stands if that comes out the same.
      if phrases:
        _refuse(workdir, stage, phrases)
    if only is not None and stage.name != only:
      raise UserError(
        f'--stage={only} reads {stage.name}, which is not finished in {workdir} with these settings; '
        f'run --stage={stage.name} first, or leave --stage out to run what is missing'
      )
  return done


def _upstream(name: str) -> set[str]:
  reads = next(stage.reads for stage in STAGES if stage.name == name)
  return set(reads).union(*(_upstream(read) for read in reads))


def _refuse(workdir: Path, stage: Stage, phrases: list[str]) -> None:
  shown = '; '.join(phrases[:3]) + (f'; and {len(phrases) - 3} more' if len(phrases) > 3 else '')
  affected = [s.name for s in STAGES if s.name == stage.name or (stage.name in _upstream(s.name) and not s.on_request)]
  raise UserError(
    f'{workdir} holds {stage.name} made with other settings: {shown}. Add --rerun to make {", ".join(affected)} '
    'anew there, take another --workdir, or set the keys back'
  )


def identity(stage: Stage, settings: Mapping, workdir: Path, done: Mapping[str, Artifact]) -> Identity:
  """What `stage` is to be made from in `workdir`, where `done` holds all that it reads."""
  return _identity(stage, settings, _digests(stage, workdir, done))


def settings_of(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """What `identity` wants to know of a config: its keys, those that stand for others put in, and its source files."""
  settings = flatten(resolve(config, hugging_face.model_keys))
  return {**settings, **_source_files(settings, workdir)}


def needed(name: str) -> list[str]:
  """Stages that `name` stands on, and itself, in order."""
  return [stage.name for stage in STAGES if stage.name == name or stage.name in _upstream(name)]


def _run_stage(
  stage: Stage, config: ConfigDict, settings: Mapping, workdir: Path, done: Mapping[str, Artifact]
) -> Artifact | None:
  """The finished stage; None where the job has done its part and others have not."""
  identity = _identity(stage, settings, _digests(stage, workdir, done))
  first = processes.is_first()
  resumed = processes.decide(lambda: artifacts.goes_on(workdir, identity))
  out = Path(processes.decide(lambda: str(artifacts.begin(workdir, identity))))
  log, cost = Log(workdir, stage.name, enabled=first), artifacts.Cost(out, config.features.job, enabled=first)
  log.event('begin', resumed=resumed)
  _tell(f'{stage.name}: {"goes on where it stopped" if resumed else "runs"}')
  began = time.monotonic()
  module, function = stage.code.split(':')
  try:
    inputs = _inputs(stage, workdir, done)
    run_stage = getattr(importlib.import_module(f'dsdm_jax.{module}'), function)
    context = Context(config, out, inputs, log, cost, first)
    semantics = run_stage(context) if stage.everywhere else processes.decide(lambda: run_stage(context))
    processes.wait()
  except UserError:
    # An empty attempt is taken away: other settings need not be told apart from these.
    if first and config.features.jobs == 1 and not artifacts.holds_work(out):
      shutil.rmtree(out)
    raise
  finally:
    log.close()
    if first and out.is_dir():
      cost.add(seconds=time.monotonic() - began)
  if semantics is None:
    log.event('shared', job=config.features.job, seconds=cost.seconds, flop=cost.flop)
    _tell(f'{stage.name}: this job has done its part; the last one to end, or a run without jobs, finishes the stage')
    return None
  processes.decide(lambda: _commit(workdir, identity, semantics, cost).digest)
  artifact = _opened(workdir, [stage.name])[stage.name]
  log.event('end', seconds=artifact.manifest['cost']['seconds'], flop=artifact.manifest['cost']['flop'])
  _tell(f'{stage.name}: done in {time.monotonic() - began:.1f} s')
  return artifact


def _commit(workdir: Path, identity: Identity, semantics: Mapping, cost: artifacts.Cost) -> Artifact:
  try:
    return artifacts.commit(workdir, identity, semantics, cost)
  except FileNotFoundError:
    # Two jobs may both see that nothing is missing; what the faster one put in place is the same.
    found = artifacts.open_stage(workdir, identity.stage)
    if found is None or found.identity != identity.as_json():
      raise
    return found


def _publish(workdir: Path, settings: Mapping, done: Mapping[str, Artifact]) -> None:
  """Writes `results.json` in the workdir and prints the table."""
  from dsdm_jax.evaluation import results

  found = json.loads((done['evaluation'].path / 'results.json').read_text())
  found['cost'] = {name: done[name].manifest['cost'] for name in NAMES if name in done}
  found['versions'] = done['evaluation'].manifest['versions']
  found['config'] = dict(settings)
  storage.write_json(workdir / 'results.json', found)
  print(results.text_tables(found))
  print(f'results: {workdir / "results.json"}')


def _start_jax(config: ConfigDict, workdir: Path, batches: Sequence[str]) -> None:
  """Settings that hold for the whole process, before the first array; then what can only be checked with devices."""
  import jax

  simulated = jax.config.values['jax_num_cpu_devices'] > 1 or 'host_platform_device_count' in os.environ.get(
    'XLA_FLAGS', ''
  )
  if simulated or processes.count() > 1:
    # A collective waits on a thread for each device. XLA's pool has no more threads than devices or cores, so one that
    # anything else holds, as a copy or a second program, leaves the others waiting for ever.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    os.environ.setdefault('PJRT_NPROC', '128')
  processes.check_devices_are_ours()
  check_devices(config, jax.device_count(), batches)
  check_callables(config)
  processes.decide(lambda: workdir.mkdir(parents=True, exist_ok=True))
  processes.check_shared(workdir)
  if jax.default_backend() == 'cpu':
    memory.keep_freed_memory()
  if jax.config.values['jax_compilation_cache_dir'] is None:
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'xla_cache'))

"""Runs the stages of a workdir: which are reused, resumed, refused, repaired or run again."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.config.validate import check_callables, check_devices, flatten, select
from dsdm_jax.core import artifacts, compile_cache, lock, processes, storage
from dsdm_jax.core.artifacts import Artifact, Identity
from dsdm_jax.core.progress import Log, display
from dsdm_jax.core.stage import Context, Stage, existing
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import UserError, visible

# Puts digests in the place of the paths in settings. Named as stages are, because it belongs to a higher layer.
_BY_CONTENT = 'data.inputs:by_content'
# Keys that say how a stage is computed and not what it computes; no identity contains them.
_EXECUTION = ('features.job', 'features.jobs', 'features.batch_size', 'features.microbatch')


@contextlib.contextmanager
def locked(workdir: Location, job: int | None = None) -> Iterator[bool]:
  """Locks the workdir on process 0, for all processes; yields whether this created it. See `lock.hold`."""
  with contextlib.ExitStack() as stack:
    yield processes.decide(lambda: stack.enter_context(lock.hold(workdir, job)))


class Runner:
  """Runs the stages of one workdir.

  Args:
    stages: in order; each reads only stages before it. Those that the config does not have are left out.
    config: the whole config, validated and resolved.
    workdir: absolute folder or address, locked by the caller (not needed for `identity`).
    checks: stage → a function of its artifact that raises UserError if what comes later cannot work. It is called on
      process 0 when the stage is finished and others follow.

  Attributes:
    done: stage name → artifact, of the stages that are finished with these settings.
  """

  def __init__(
    self,
    stages: Sequence[Stage],
    config: ConfigDict,
    workdir: Location,
    checks: Mapping[str, Callable[[Artifact], None]] | None = None,
  ):
    self._checks = checks or {}
    self.config, self.settings, self.workdir = config, flatten(config), workdir
    self.stages = {stage.name: stage for stage in existing(stages, self.settings)}
    self.shared = config.features.jobs > 1  # several jobs work on one stage, and none has the workdir for itself
    self.done: dict[str, Artifact] = {}
    self._selected: dict[str, dict[str, Any]] = {}
    self._given: dict[str, dict[str, Any]] = {}
    self._cache: Path | None = None  # of compiled programs

  def run(self, only: str | None = None, rerun: bool = False, created: bool = False) -> dict[str, Artifact]:
    """Runs all stages, or `only` one, and skips those that are finished.

    Args:
      only: name of a stage; the stages that it reads must be finished.
      rerun: replace stages with other settings instead of raising an error.
      created: whether this run created the workdir; after an error before any work, it is emptied.

    Returns:
      `done`.

    Raises:
      UserError: the workdir holds other settings or damaged files, or a stage raised it.
    """
    if not self.shared:
      processes.decide(lambda: artifacts.sweep(self.workdir, self.stages))
    self._open(processes.decide(lambda: self._find_finished(only, rerun)))
    if not self.shared:
      processes.decide(lambda: artifacts.discard_others(self.workdir, self.done))
    wanted = [
      stage
      for name, stage in self.stages.items()
      if name not in self.done and (name == only or (only is None and not stage.on_request))
    ]
    if not wanted:
      _print(f'nothing to do: {only or "each stage"} is finished in {self.workdir}')
    try:
      if wanted:
        self._start_jax([key for stage in wanted for key in stage.batches])
        self._check(self.done)
      for stage in wanted:
        if processes.decide(lambda: self._reuse(stage)):  # noqa: B023  called at once
          self._open([stage.name])
          continue
        if not rerun:
          processes.decide(lambda: artifacts.check_versions(self.workdir, self.identity(stage)))  # noqa: B023
        if processes.count() == 1:  # several would get out of step
          storage.retried(lambda: self.run_stage(stage))  # noqa: B023  called at once; it resumes
        else:
          self.run_stage(stage)
        self._check([stage.name])
    except UserError:
      unfinished = any(artifacts.unfinished(self.workdir, name) for name in self.stages)
      if processes.is_first() and created and not self.done and not unfinished:
        for name in (*self.stages, *Log.FILES):
          storage.delete(self.workdir / name)
      raise
    return self.done

  def compare(self) -> None:
    """Raises UserError if a run would find a stage with other settings or inputs; its files are not looked at."""
    digests: dict[str, str] = {}  # of the stages that stand
    for name, stage in self.stages.items():
      artifact = artifacts.open_stage(self.workdir, name)
      existing = artifact.identity if artifact is not None else artifacts.begun(self.workdir, name)
      if existing is None or stage.on_request:
        continue
      inputs = {read: digests[read] for read in stage.reads if read in digests}
      wanted = self.identity(stage, {**existing['inputs'], **(inputs if len(inputs) == len(stage.reads) else {})})
      self._check_same(stage, existing, wanted.as_json())
      if artifact is not None:
        digests[name] = artifact.digest

  def _check(self, names: Iterable[str]) -> None:
    for name in names:
      if name in self._checks and name in self.done:
        processes.decide(lambda: self._checks[name](self.done[name]))  # noqa: B023  called at once

  def identity(self, stage: Stage, inputs: Mapping[str, str] | None = None) -> Identity:
    """What `stage` is computed from.

    Args:
      inputs: digests of the artifacts that it reads; by default of those in `done`.
    """
    if stage.name not in self._selected:
      selected = {k: v for k, v in select(self.settings, stage.keys).items() if k not in _EXECUTION}
      finished = artifacts.open_stage(self.workdir, stage.name)
      self._selected[stage.name], self._given[stage.name] = load(_BY_CONTENT)(selected, self.settings, finished)
    if inputs is None:
      inputs = {name: artifact.digest for name, artifact in self._inputs(stage).items()}
    return Identity(stage.name, stage.format, self._selected[stage.name], inputs)

  def _current(self, stage: Stage, inputs: Mapping[str, str] | None = None) -> Identity:
    """`identity` with files as they are now: earlier stages may have taken days."""
    self._selected.pop(stage.name, None)
    return self.identity(stage, inputs)

  def _check_unchanged(self, stage: Stage, identity: Identity) -> None:
    phrases = artifacts.differences(identity.as_json(), self._current(stage, identity.inputs).as_json())
    if phrases:
      raise UserError(f'a file changed while {stage.name} read it: {phrases[0]}; start again with --rerun')

  def upstream(self, name: str) -> set[str]:
    """The stages that `name` reads, directly or not."""
    reads = self.stages[name].reads
    return set(reads).union(*(self.upstream(read) for read in reads))

  def _open(self, names: Iterable[str]) -> None:
    for name in names:
      artifact = artifacts.open_stage(self.workdir, name)
      if artifact is not None:
        self.done[name] = artifact

  def _inputs(self, stage: Stage) -> dict[str, Artifact]:
    """The artifacts that `stage` reads, and the optional ones that were computed from the same inputs."""
    inputs = {name: self.done[name] for name in stage.reads}
    for name in stage.optional:
      artifact = artifacts.open_stage(self.workdir, name)
      reads = {read: self.done[read].digest for read in self.stages[name].reads}
      if artifact is not None and artifact.identity['inputs'] == reads:
        artifact.verify()
        inputs[name] = artifact
    return inputs

  def _verify_inputs(self, stage: Stage) -> None:
    # Damage since they were written or verified; a file that has not changed is not read again.
    for artifact in self._inputs(stage).values():
      artifact.verify()

  def _find_finished(self, only: str | None, rerun: bool) -> list[str]:
    """Names of the stages that are finished with these settings, which are also in `done`.

    Raises:
      UserError: the workdir holds work with other settings, unless `rerun`; or `only` reads a stage that is missing.
    """
    for name, stage in self.stages.items():
      if stage.on_request if only is None else name not in {only, *self.upstream(only)}:
        continue
      artifact = artifacts.open_stage(self.workdir, name)
      unfinished = artifacts.begun(self.workdir, name)
      if all(read in self.done for read in stage.reads):
        identity = self.identity(stage)
        if artifact is not None and artifact.identity == identity.as_json():
          if self._intact(stage, artifact):
            self.done[name] = artifact
            continue
          artifact, unfinished = None, artifacts.begun(self.workdir, name)
        if artifact is None and not rerun:
          artifacts.check_versions(self.workdir, identity)
        if name == only and artifact is None and unfinished in (None, identity.as_json()):
          continue
        wanted = identity.as_json()
      else:
        # An input is missing, so only settings can be compared. If it comes out the same, this stage is reused.
        known = (artifact.identity if artifact else unfinished) or {'inputs': {}}
        wanted = self.identity(stage, known['inputs']).as_json()
      existing = artifact.identity if artifact is not None else unfinished
      if existing is not None and not rerun:
        self._check_same(stage, existing, wanted)
      if only is not None and name != only:
        phrases = artifacts.differences(existing, wanted)[:1] if existing is not None else []
        advice = f'run --stage={name} first, or leave --stage out to run what is missing'
        if self.stages[only].on_request:  # a run without --stage leaves it out
          lacking = [
            f'--stage={read}'
            for read in self.stages
            if read == name
            or (read in self.upstream(only) - {*self.done} and artifacts.open_stage(self.workdir, read) is None)
          ]
          advice = f'run {lacking[0]} first'
          if len(lacking) > 1:
            advice = f'run {", ".join(lacking[:-1])} and {lacking[-1]} first, in this order'
        raise UserError(
          f'--stage={only} reads {name}, which is not finished in {self.workdir} with these settings'
          f'{f" ({phrases[0]})" if phrases else ""}; {advice}'
        )
    return list(self.done)

  def _check_same(self, stage: Stage, existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError if two identities differ in more than optional inputs."""
    compared = [
      {**identity, 'inputs': {k: v for k, v in identity['inputs'].items() if k not in stage.optional}}
      for identity in (existing, wanted)
    ]
    phrases = artifacts.differences(*compared)
    if phrases:
      shown = '; '.join(phrases[:3]) + (f'; and {len(phrases) - 3} more' if len(phrases) > 3 else '')
      affected = [
        s.name
        for s in self.stages.values()
        if s.name == stage.name or (stage.name in self.upstream(s.name) and not s.on_request)
      ]
      raise UserError(
        f'{self.workdir} holds {stage.name} with other settings: {shown}. Add --rerun to run {", ".join(affected)} '
        'again there, use another --workdir, or set the keys back'
      )

  def _reuse(self, stage: Stage) -> bool:
    """Whether a stage is still valid after its inputs were computed again, because they came out the same."""
    artifact = artifacts.open_stage(self.workdir, stage.name)
    return (
      artifact is not None and artifact.identity == self.identity(stage).as_json() and self._intact(stage, artifact)
    )

  def _intact(self, stage: Stage, artifact: Artifact) -> bool:
    """Whether all files of a finished stage are as they were written; a repairable stage is reopened if not.

    Raises:
      UserError: a file is damaged, and the stage is not repairable or is shared by several jobs.
    """
    if not stage.repairable or self.shared:
      artifact.verify()
      return True
    damage = artifacts.reopen(artifact)
    for phrase in damage:
      _print(f'{stage.name}: {phrase}; only this file is computed again')
    return not damage

  def run_stage(self, stage: Stage) -> None:
    """Runs one stage and adds it to `done`; not if this job has finished its share and other jobs have not."""
    first, job = processes.is_first(), self.config.features.job
    processes.decide(lambda: self._verify_inputs(stage))
    # Process 0 alone computes the identity, which may read large files.
    identity = Identity(**processes.decide(lambda: self._current(stage).as_json()))
    resumed = processes.decide(lambda: artifacts.resumable(self.workdir, identity))
    out = storage.locate(processes.decide(lambda: str(artifacts.begin(self.workdir, identity, self.shared))))
    loggers = self.config.log.to
    log, cost = Log(self.workdir, stage.name, first, loggers), artifacts.Cost(out, job, enabled=first)
    log.event('begin', resumed=resumed)
    with display.stage(stage.name, first) as ended:
      context = Context(self.config, out, self._inputs(stage), log, cost, first, self._previous(stage))
      semantics = self._work(stage, context)
      if semantics is None:
        cost.save()
        log.event('shared', job=job, seconds=cost.seconds)
        ended('this job has finished its share; the last one ends the stage')
        return
      processes.decide(lambda: self._check_unchanged(stage, identity))
      if given := self._given.get(stage.name):
        semantics = {**semantics, 'given': given}
      processes.decide(
        lambda: artifacts.commit(self.workdir, identity, semantics, cost, context.units.as_json()).digest
      )
      if first and self._cache is not None:
        compile_cache.note(self._cache)
      self._open([stage.name])
      spent, units = self.done[stage.name].manifest['cost'], context.units
      log.event('end', seconds=spent['seconds'], flop=spent['flop'], made=units.made, taken=sorted(units.taken))
      ended()

  def _work(self, stage: Stage, context: Context) -> dict[str, Any] | None:
    """Calls the code of a stage; returns what its files mean, or None if other jobs have not finished."""
    try:
      function = load(stage.code)
      semantics = function(context) if stage.everywhere else processes.decide(lambda: function(context))
      processes.wait()
    except UserError:
      # An attempt without work is deleted, so that the next run may have other settings.
      if context.first and not self.shared and not artifacts.holds_work(context.out):
        artifacts.discard(context.out)
      raise
    finally:
      context.log.close()
    return semantics

  def _previous(self, stage: Stage) -> Artifact | None:
    """The finished stage whose units a rerun may take over: of the same format and packages."""
    artifact = None if self.shared else artifacts.open_stage(self.workdir, stage.name)
    if artifact is None or artifact.identity['format'] != stage.format or not artifacts.same_packages(artifact):
      return None
    return artifact

  def _start_jax(self, batches: Sequence[str]) -> None:
    """Applies settings of the whole process before the first array, then checks what needs devices."""
    import jax

    processes.before_devices()
    processes.check_devices_are_ours()
    check_devices(self.config, jax.device_count(), batches)
    check_callables(self.config)
    processes.decide(lambda: storage.make_folder(self.workdir))
    processes.check_shared(self.workdir)
    if jax.default_backend() == 'cpu':
      processes.keep_freed_memory()
    if jax.config.values['jax_compilation_cache_dir'] is None:
      self._cache, line = compile_cache.start(alone=processes.count() == 1)
      jax.config.update('jax_compilation_cache_dir', None if self._cache is None else str(self._cache))
      if line:
        _print(line)


def load(name: str) -> Callable[..., Any]:
  """The function that 'module:function' names, below `dsdm_jax`: of stages, and of what belongs to a higher layer."""
  module, _, function = name.partition(':')
  return getattr(importlib.import_module(f'dsdm_jax.{module}'), function)


def _print(text: str) -> None:
  if processes.is_first():
    display.write(visible(text), sys.stdout, 'warning')

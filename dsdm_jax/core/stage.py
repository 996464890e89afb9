"""A stage of the pipeline: what it declares, and what its code receives."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.storage import Location
from dsdm_jax.core.units import Units


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step from the pool to the report.

  Attributes:
    reads: stages whose artifacts it opens.
    keys: prefixes of the config keys that it depends on.
    code: 'module:function' below `dsdm_jax`, called as `function(context) -> semantics`.
    format: version of what it writes.
    everywhere: whether all processes run it together. Otherwise process 0 runs it alone.
    on_request: whether it runs only when `--stage` names it.
    optional: stages whose artifacts it uses if they exist. When one changes, the stage runs again without `--rerun`.
    repairable: whether it recomputes only the missing files when it starts in a folder that lacks some.
    batches: keys of the batch sizes that must divide evenly among devices, since results depend on them.
    only_with: config key without which there is no such stage; '' for a stage of every run.
    where_set: pairs of a config key and stages; where the key is set, this stage depends on it and reads these too.
  """

  name: str
  reads: tuple[str, ...]
  keys: tuple[str, ...]
  code: str
  format: int = 1
  everywhere: bool = False
  on_request: bool = False
  optional: tuple[str, ...] = ()
  repairable: bool = False
  batches: tuple[str, ...] = ()
  only_with: str = ''
  where_set: tuple[tuple[str, tuple[str, ...]], ...] = ()


def existing(stages: Iterable[Stage], settings: Mapping[str, Any]) -> list[Stage]:
  """The stages of a run with these settings (dotted key → value), with the `keys` and `reads` that they have there."""
  found = []
  for stage in stages:
    if stage.only_with and not settings[stage.only_with]:
      continue
    for key, reads in stage.where_set:
      if settings[key]:
        stage = dataclasses.replace(stage, reads=(*stage.reads, *reads), keys=(*stage.keys, key))
    found.append(stage)
  return found


@dataclasses.dataclass(frozen=True)
class Context:
  """What a stage function receives.

  Attributes:
    config: the whole config, validated. The stage may read only the keys that `pipeline.STAGES` declares for it.
    out: folder to write in, and nowhere else. It may hold the files of a killed attempt with the same settings.
    inputs: stage name → artifact, for the stages that it declares to read.
    log: progress bars, events and scalars.
    cost: of the work in `out`; call `save` on it when work is on disk.
    first: whether this process writes the files that all processes share. A stage that runs on all processes must look
      at files through `processes.decide`, so that all of them take the same branch.
    previous: the finished stage that this rerun replaces; None if there is none.
  """

  config: ConfigDict
  out: Location
  inputs: Mapping[str, Artifact]
  log: Log
  cost: Cost
  first: bool = True
  previous: Artifact | None = None

  @functools.cached_property
  def units(self) -> Units:
    """Parts of the work that a rerun takes over from `previous`."""
    return Units(self.out, self.previous, self.cost)

  def add_flop(self, flop: float) -> None:
    """Adds floating-point operations to the stage's cost (a multiply-add counts as two), also of work done earlier."""
    self.cost.flop += flop

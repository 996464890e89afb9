"""What a stage is given."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.progress import Log


@dataclasses.dataclass(frozen=True)
class Context:
  """A stage is a function `run(context) -> semantics`, called in a process of its own or after other stages.

  Attributes:
    config: the whole config, validated. The stage may read only the keys that `pipeline.STAGES` declares for it.
    out: folder to write in, and nowhere else. It may hold what a killed attempt with the same settings left.
    inputs: the committed artifacts that the stage declared to read, by name of their stage.
    log: bars, events and scalars.
    cost: what the attempts at this stage have spent; the pipeline adds the seconds.
    first: whether this process is the one that writes what all processes have alike. A stage that all of them run must
      look at files through `distributed.decide`, so that all go the same way.
  """

  config: ConfigDict
  out: Path
  inputs: Mapping[str, Artifact]
  log: Log
  cost: Cost
  first: bool = True

  def add_flop(self, flop: float) -> None:
    """Adds floating-point operations to the stage's cost (a multiply-add is two)."""
    self.cost.add(flop=flop)

"""Where scalars go beside `events.jsonl`: TensorBoard and Weights & Biases, both through CLU's writers."""

import contextlib
import hashlib
import importlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdm_jax.core import tensorflow_start
from dsdm_jax.core.storage import Location


class WeightsAndBiases:
  """A run of Weights & Biases as a writer of CLU.

  A resumed training continues the curve. Without a login it writes to the folder alone (`wandb sync`).

  Args:
    workdir: its name is that of the project.
    folder: its folder `wandb` has the files.
    run: name of the run.
  """

  def __init__(self, workdir: Location, folder: Path, run: str):
    wandb: Any = importlib.import_module('wandb')
    online = 'WANDB_MODE' in os.environ or wandb.login(prompt=False)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces each run
      self._run: Any = wandb.init(
        project=workdir.name,
        name=run,
        id=hashlib.sha256(f'{workdir} {run}'.encode()).hexdigest()[:16],
        dir=str(folder),
        mode=None if online else 'offline',
        resume='allow',
        reinit='create_new',
      )

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    self._run.log(dict(scalars), step=step)

  def flush(self) -> None:
    """It sends in the background."""

  def close(self) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
      self._run.finish()


def writer(names: Sequence[str], workdir: Location, folder: Path, run: str) -> Any:
  """The writer of one run for all of `names`, with files in `folder`; it takes scalars alone."""
  tensorflow_start.start()
  from clu import metric_writers

  os.environ.setdefault('WANDB_SILENT', 'true')
  return metric_writers.MultiWriter(
    [
      metric_writers.SummaryWriter(str(folder / 'tensorboard' / run))
      if name == 'tensorboard'
      else WeightsAndBiases(workdir, folder, run)
      for name in names
    ]
  )

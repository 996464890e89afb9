"""Where scalars go beside `events.jsonl`: TensorBoard, Weights & Biases, trackio, all through CLU's writers."""

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


class Tracker:
  """A run of Weights & Biases or trackio, which have the same functions, as a writer of CLU.

  A resumed training continues the curve. Without a login, Weights & Biases writes to the folder alone (`wandb sync`).

  Args:
    module: wandb or trackio.
    workdir: its name is that of the project.
    folder: its folder of the module's name has the files.
    run: name of the run.
  """

  def __init__(self, module: str, workdir: Location, folder: Path, run: str):
    package: Any = importlib.import_module(module)
    more: dict[str, Any] = {}
    if module == 'wandb':
      online = 'WANDB_MODE' in os.environ or package.login(prompt=False)
      identity = hashlib.sha256(f'{workdir} {run}'.encode()).hexdigest()[:16]
      more = {'dir': str(folder), 'id': identity, 'reinit': 'create_new', 'mode': None if online else 'offline'}
    with contextlib.redirect_stdout(io.StringIO()):  # it announces each run
      self._run: Any = package.init(project=workdir.name, name=run, resume='allow', **more)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    self._run.log(dict(scalars), step=step)

  def flush(self) -> None:
    """Both send in the background."""

  def close(self) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
      self._run.finish()


def writer(names: Sequence[str], workdir: Location, folder: Path, run: str) -> Any:
  """The writer of one run for all of `names`, with files in `folder`; it takes scalars alone."""
  tensorflow_start.start()
  from clu import metric_writers

  os.environ.setdefault('TRACKIO_DIR', str(folder / 'trackio'))
  os.environ.setdefault('WANDB_SILENT', 'true')
  return metric_writers.MultiWriter(
    [
      metric_writers.SummaryWriter(str(folder / 'tensorboard' / run))
      if name == 'tensorboard'
      else Tracker(name, workdir, folder, run)
      for name in names
    ]
  )

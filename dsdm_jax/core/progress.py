"""Progress of a run: bars for people, JSON lines for programs, TensorBoard for curves."""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tqdm

from dsdm_jax.core import tensorflow_start
from dsdm_jax.errors import visible_lines


class Log:
  """Progress of one stage, written on process 0 only.

  Args:
    workdir: folder that holds `events.jsonl` and `tensorboard/`.
    stage: name stamped on each event.
    enabled: False on every process but the first.
  """

  FILES = ('events.jsonl', 'tensorboard')  # what it writes in the workdir

  def __init__(self, workdir: Path, stage: str, enabled: bool = True):
    self._workdir = Path(workdir)
    self._stage = stage
    self._enabled = enabled
    self._writers: dict[str, Any] = {}

  def bar(
    self,
    iterable: Iterable | None = None,
    *,
    total: int | None = None,
    desc: str = '',
    unit: str = 'it',
    initial: int = 0,
  ) -> tqdm.tqdm:
    """A tqdm bar with rate and remaining time; it redraws on a terminal and prints a line now and then elsewhere."""
    interactive = sys.stderr.isatty()
    return tqdm.tqdm(
      iterable, total=total, desc=f'  {desc or self._stage}', unit=unit, initial=initial, disable=not self._enabled,
      unit_scale=True, leave=True, ascii=not interactive, dynamic_ncols=interactive,
      mininterval=0.2 if interactive else 10.0, maxinterval=1.0 if interactive else 30.0,
    )  # fmt: skip

  def say(self, text: str) -> None:
    """Prints lines on stderr."""
    if self._enabled:
      tqdm.tqdm.write(visible_lines(text), file=sys.stderr)

  def event(self, name: str, **fields: Any) -> None:
    """Appends one JSON line to `events.jsonl`."""
    if self._enabled:
      line = json.dumps({'time': round(time.time(), 3), 'stage': self._stage, 'event': name, **fields})
      with open(self._workdir / 'events.jsonl', 'a', encoding='utf-8') as f:
        f.write(line + '\n')

  def curves(self, run: str) -> Path:
    """Folder of `run`'s TensorBoard files."""
    return self._workdir / 'tensorboard' / run

  def scalars(self, step: int, values: Mapping[str, float], run: str) -> None:
    """TensorBoard scalars of `run` at `step`."""
    if not self._enabled:
      return
    if run not in self._writers:
      tensorflow_start.start()
      from clu import metric_writers

      self._writers[run] = metric_writers.SummaryWriter(str(self.curves(run)))
    self._writers[run].write_scalars(step, {k: float(v) for k, v in values.items()})

  def close(self) -> None:
    for writer in self._writers.values():
      writer.close()
    self._writers.clear()

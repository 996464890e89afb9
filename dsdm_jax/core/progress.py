"""Progress of a run: one line for people, JSON lines for programs, curves for TensorBoard and other loggers.

The line of a terminal has at most 80 columns and is redrawn; it becomes one plain line when its stage ends:

    [3/9] proxies  461 of 2,004 steps  loss 4.31  18.4 steps/s  0:23 of 3:40

The times are those of the whole run. Elsewhere, as in the log of a job, a line is printed every minute.
"""

import contextlib
import functools
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdm_jax.core import stopping, storage
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import visible, visible_lines

COLUMNS = 80
LEVELS = ('warning', 'info', 'debug')
_TERMINAL_SECONDS, _PLAIN_SECONDS = 0.25, 60.0  # between two drawings of the line
_SETTLED_SECONDS, _SETTLED_UPDATES = 2.0, 3  # a rate is shown after so much, not counting the first update
_GAP = '  '
_UPLOAD_SECONDS = 600.0  # between two uploads of curves


def clock(seconds: float) -> str:
  """A duration as 0:23, 12:05 or 3:04:05."""
  minutes, rest = divmod(max(0, round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def plural(unit: str) -> str:
  """The plural of a unit: rows, queries."""
  if unit.endswith('s'):
    return unit
  return f'{unit[:-1]}ies' if unit.endswith('y') else f'{unit}s'


def counted(number: int, unit: str) -> str:
  """A number of units: 1 model, 4,007 rows."""
  return f'{number:,} {unit if number == 1 else plural(unit)}'


class Bar:
  """How far a part of a stage is. It counts `n` of `total` units; `total` is None or 0 if unknown."""

  def __init__(
    self, display: 'Display | None', iterable: Iterable | None, total: int | None, unit: str, desc: str = ''
  ):
    self._display, self._iterable, self.total, self.unit, self.desc = display, iterable, total, unit, desc
    self.n, self.facts = 0, {}  # type: int, dict[str, float]
    self._updates, self._first, self._since = 0, 0, 0.0

  def update(self, amount: int = 1) -> None:
    """Counts work that was done now."""
    if not amount:
      return
    self.n, self._updates = self.n + amount, self._updates + 1
    if self._updates == 1:  # it includes compilation and the start of workers
      self._first, self._since = self.n, time.monotonic()

  def skip(self, amount: int) -> None:
    """Counts work that an earlier start has done; it says nothing about the rate."""
    self.n, self._first = self.n + amount, self._first + amount

  def show(self, **facts: float) -> None:
    """Sets numbers that the line shows, such as the loss."""
    self.facts |= facts

  @property
  def rate(self) -> float | None:
    """Units per second; None until it has settled."""
    seconds = time.monotonic() - self._since
    if self._updates <= _SETTLED_UPDATES or seconds < _SETTLED_SECONDS:
      return None
    return (self.n - self._first) / seconds or None

  @property
  def remaining(self) -> float | None:
    """Seconds, by the rate."""
    return (self.total - self.n) / self.rate if self.total and self.rate else None

  def position(self) -> str:
    """Such as '2,048 of 4,007 rows', or '' if nothing is known."""
    shown = ''
    if self.total and self.total > 1:
      shown = f'{min(self.n, self.total):,} of {self.total:,} {plural(self.unit)}'
    elif self.n and not self.total:
      shown = counted(self.n, self.unit)
    return ': '.join(part for part in (self.desc, shown) if part)

  def __enter__(self) -> 'Bar':
    if self._display:
      self._display.bars.append(self)
    return self

  def __exit__(self, *_: object) -> None:
    if self._display and self in self._display.bars:
      self._display.bars.remove(self)
      self._display.facts |= self.facts

  def __iter__(self) -> Iterator[Any]:
    assert self._iterable is not None
    for item in self._iterable:
      yield item
      self.update()


class Display:
  """The line of this process. `begin` is called once a run, `stage` once a stage."""

  def __init__(self) -> None:
    self.bars: list[Bar] = []
    self.facts: dict[str, float] = {}
    self.what = ''
    self.name = ''
    self.level = 1
    self._lock = threading.RLock()
    self._heads: dict[str, str] = {}
    self._seconds: dict[str, float] = {}
    self._began = self._stage_began = self._drawn = time.monotonic()
    self._spent = self._expected = 0.0  # seconds of the stages that ended, and what was expected of them
    self._shown = self._ticks = False

  def begin(self, names: Sequence[str], seconds: Mapping[str, float], level: str) -> None:
    """A run of the stages `seconds`, with their expected durations, out of all `names`."""
    self._heads = {name: f'[{i}/{len(names)}] {name}' for i, name in enumerate(names, 1)}
    self._seconds, self._spent, self._expected = dict(seconds), 0.0, 0.0
    self._began, self.level = time.monotonic(), LEVELS.index(level)

  @contextlib.contextmanager
  def stage(self, name: str, first: bool = True) -> Iterator[Callable[..., None]]:
    """Inside, a stage runs. Yields a function to call when it has ended, whose line stays; text replaces its numbers.

    Args:
      name: of the stage.
      first: whether this is process 0, which prints.
    """
    self.what, self.facts, self.bars, self.name = '', {}, [], name if first else ''
    self._stage_began = self._drawn = time.monotonic()
    if first and not self._ticks:
      self._ticks = True
      threading.Thread(target=self._tick, name='progress', daemon=True).start()

    def ended(text: str = '') -> None:
      seconds = time.monotonic() - self._stage_began
      self._spent, self._expected = self._spent + seconds, self._expected + self._seconds.pop(name, 0.0)
      if first and (text or self.what):  # else it had nothing to do
        parts = [text] if text else [self.what, *self._of(self.facts), clock(seconds)]
        self.write(self._fit([self._head(), *parts]), sys.stdout)

    try:
      yield ended
    finally:
      with self._lock:
        self.clear()
        self.name, self.bars = '', []

  def where(self) -> str:
    """Such as 'in features at row 2,048 of 4,007'."""
    if not self.name:
      return 'between two stages' if self._spent else 'before the first stage'
    bar = self.bars[-1] if self.bars else None
    if bar is None or not bar.total:
      return f'in {self.name}'
    return f'in {self.name} at {bar.unit} {min(bar.n, bar.total):,} of {bar.total:,}'

  def line(self) -> str:
    """The line as it is now, in at most 80 columns."""
    bar = self.bars[-1] if self.bars else None
    position = (bar.position() if bar else '') or self.what
    facts = self._of({**self.facts, **(bar.facts if bar else {})})
    rate = f'{_number(bar.rate)} {plural(bar.unit)}/s' if bar and bar.rate else ''
    return self._fit([self._head(), position, *facts, rate, self._times(bar)])

  def write(self, text: str, stream: Any, level: str = 'info') -> None:
    """Prints lines above the one that is redrawn, if the level of the log is at least `level`."""
    if LEVELS.index(level) > self.level:
      return
    with self._lock:
      self.clear()
      stream.write(f'{visible_lines(text)}\n')
      stream.flush()

  def clear(self) -> None:
    with self._lock:
      if self._shown:
        sys.stderr.write('\r\x1b[K')
        sys.stderr.flush()
        self._shown = False

  def _head(self) -> str:
    return self._heads.get(self.name, self.name)

  @staticmethod
  def _of(facts: Mapping[str, float]) -> list[str]:
    return [f'{name} {value:.2f}' for name, value in facts.items()]

  def _times(self, bar: Bar | None) -> str:
    """Seconds of the run so far, and of the whole run where that can be known."""
    now = time.monotonic()
    expected = self._seconds.get(self.name)
    remaining = bar.remaining if bar else None
    if expected is None and remaining is None:
      return clock(now - self._began)
    left = sum(self._seconds.values())
    # How far expectations were off so far, weighted by how much of the run that is.
    factor = (self._spent + left) / (self._expected + left) if left else 1.0
    rest = max(0.0, factor * (expected or 0.0) - (now - self._stage_began)) if remaining is None else remaining
    later = factor * sum(seconds for name, seconds in self._seconds.items() if name != self.name)
    return f'{clock(now - self._began)} of {clock(now - self._began + rest + later)}'

  @staticmethod
  def _fit(parts: Sequence[str]) -> str:
    """The parts in one line; if it is too long, those that matter least are left out."""
    kept = [visible(part) for part in parts if part]
    while len(kept) > 2 and len(_GAP.join(kept)) >= COLUMNS:
      del kept[-2]
    return _GAP.join(kept)[: COLUMNS - 1]

  def _tick(self) -> None:
    """Draws the line now and then, also while the main thread compiles."""
    terminal = sys.stderr.isatty()
    while True:
      time.sleep(_TERMINAL_SECONDS)
      if not self.name or not self.level or (not terminal and time.monotonic() - self._drawn < _PLAIN_SECONDS):
        continue
      with self._lock:
        if not self.name:
          continue
        self._drawn = time.monotonic()
        try:
          sys.stderr.write(f'\r\x1b[K{visible(self.line())}' if terminal else f'{visible(self.line())}\n')
          sys.stderr.flush()
          self._shown = terminal
        except (OSError, ValueError):  # closed; the run itself reports that, if it must
          return


def _number(value: float) -> str:
  """Three digits at least, no fraction of what is large."""
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


display = Display()


class LogFiles:
  """The folder in which this process writes its logs: the workdir, or one on this machine whose files are uploaded.

  Nothing is appended to an object. So an object store has a file of events for each start, in `events/`.

  Attributes:
    folder: see above.
    events: file of JSON lines.
    writers: run → writer of its scalars.
  """

  def __init__(self, workdir: Location):
    self.writers: dict[str, Any] = {}
    self._uploaded: dict[str, tuple[int, int]] = {}  # name → bytes and time of change
    self._last = time.monotonic()
    self._address = None if isinstance(workdir, Path) else workdir
    if isinstance(workdir, Path):
      self.folder, self.events = workdir, workdir / 'events.jsonl'
      return
    self._stack = contextlib.ExitStack()  # as long as the process
    self.folder = self._stack.enter_context(storage.scratch())
    began = time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())
    self.events = self.folder / 'events' / f'{began}-{uuid.uuid4().hex[:8]}.jsonl'
    self.events.parent.mkdir()
    stopping.when_stopped(self.upload)

  def append(self, line: str) -> None:
    """Adds a line to the events."""
    with open(self.events, 'a', encoding='utf-8') as file:
      file.write(line + '\n')

  def upload(self) -> None:
    """Writes the files that have changed to the workdir, if it is not on a disk."""
    self._last = time.monotonic()
    if self._address is None:
      return
    for writer in list(self.writers.values()):
      writer.flush()
    for name in storage.files(self.folder):
      state = (self.folder / name).stat()
      if self._uploaded.get(name) != (state.st_size, state.st_mtime_ns):
        storage.write_bytes(self._address / name, (self.folder / name).read_bytes())
        self._uploaded[name] = state.st_size, state.st_mtime_ns

  def upload_sometimes(self) -> None:
    """`upload`, if the last one is long ago."""
    if time.monotonic() - self._last > _UPLOAD_SECONDS:
      self.upload()


@functools.cache  # for all stages
def _files_of(workdir: Location) -> LogFiles:
  return LogFiles(workdir)


class Log:
  """Progress of one stage, written on process 0 only.

  In an object store the files are up to date when the stage ends, or when a signal stops the run.

  Args:
    workdir: of `events.jsonl` and the files of the loggers; see `LogFiles`.
    stage: name stamped on each event.
    enabled: False on every process but the first.
    loggers: where scalars go: tensorboard, wandb.
  """

  FILES = ('events.jsonl', 'events', 'tensorboard', 'wandb')  # what it writes in the workdir

  def __init__(self, workdir: Location, stage: str, enabled: bool = True, loggers: Sequence[str] = ('tensorboard',)):
    self._workdir = workdir
    self.stage = stage
    self._enabled = enabled
    self._loggers = loggers
    self._closed = False

  @property
  def _files(self) -> LogFiles:
    return _files_of(self._workdir)

  def bar(
    self, iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str = '', unit: str = 'row'
  ) -> Bar:
    """A bar; the line shows the innermost one that is open. `desc` is for a part of a stage."""
    if hasattr(iterable, '__len__'):
      total = len(iterable)  # type: ignore[arg-type]
    return Bar(display if self._enabled else None, iterable, total, unit, desc)

  def describe(self, what: str) -> None:
    """What the stage does, in a few words: the line that stays when it ends."""
    if self._enabled:
      display.what = what

  def warn(self, text: str) -> None:
    """Prints a line that asks for attention: what it means, and what to do."""
    if self._enabled:
      display.write(text, sys.stderr, 'warning')

  def say(self, text: str) -> None:
    """Prints details on stderr where `log.level` is debug. What matters for the result is in the report too."""
    if self._enabled:
      display.write(text, sys.stderr, 'debug')

  def event(self, name: str, **fields: Any) -> None:
    """Appends one JSON line to the events."""
    if self._enabled:
      self._files.append(json.dumps({'time': round(time.time(), 3), 'stage': self.stage, 'event': name, **fields}))
      if self._closed:
        self._files.upload()

  def curves(self, run: str) -> Path:
    """Folder of `run`'s TensorBoard files, on this machine."""
    return self._files.folder / 'tensorboard' / run

  def scalars(self, step: int, values: Mapping[str, float], run: str) -> None:
    """Scalars of `run` at `step`, for all loggers."""
    if not self._enabled or not self._loggers:
      return
    writers = self._files.writers
    if run not in writers:
      from dsdm_jax.core import loggers  # imports TensorFlow

      writers[run] = loggers.writer(self._loggers, self._workdir, self._files.folder, run)
    writers[run].write_scalars(step, {k: float(v) for k, v in values.items()})
    self._files.upload_sometimes()

  def close(self) -> None:
    """Ends the stage's curves. Later events are those of its end."""
    self._closed = True
    if not self._enabled:
      return
    writers = self._files.writers
    while writers:
      writers.popitem()[1].close()
    self._files.upload()

"""Orbax checkpoints of a pytree with a JSON record, by step."""

import contextlib
import copy
import dataclasses
import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policy

from dsdm_jax.core import artifacts, processes, storage
from dsdm_jax.core.storage import Address, Location
from dsdm_jax.errors import Stopped, StoreError, UserError, as_os_error

# Orbax logs pages about what its threads raise, and the event loops that they leave print more when they are deleted or
# called. The error itself is raised again where it is reported.
logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname or record.levelno < logging.ERROR)


def _without_event_loops(hook: Callable[..., Any], unraisable: Any) -> None:
  deleted = getattr(unraisable.object, '__qualname__', '') == 'BaseEventLoop.__del__'
  if not deleted and str(unraisable.exc_value) != 'Event loop is closed':
    hook(unraisable)


sys.unraisablehook = functools.partial(_without_event_loops, sys.unraisablehook)

_CHECKSUMS = 'checksums.json'  # of the files of the items; Orbax writes its own metadata later
_ITEMS = ('state', 'record', 'shapes')


@dataclasses.dataclass(frozen=True)
class Keep:
  """Which checkpoints are kept: those that any attribute selects.

  Attributes:
    newest: number of the newest checkpoints.
    every_steps: steps that this divides; 0 for none.
    every_hours: one checkpoint for each span of so many hours; 0 for none.
    steps: these steps.
  """

  newest: int = 1
  every_steps: int = 0
  every_hours: float = 0.0
  steps: tuple[int, ...] = ()


class Checkpoints:
  """A folder of checkpoints. They are saved in the background, and each is complete or absent.

  Orbax writes to a disk or to gs:// itself. In other object stores, where it would rename, it writes to a local folder;
  the thread that saves then uploads the files of a step and, last, `checksums.json`, without which there is no step.
  There process 0 saves the whole state, and the others restore from copies of their own.

  Args:
    directory: absolute or relative folder, created when missing, or an address.
    keep: which of them are kept.
  """

  def __init__(self, directory: Location, keep: Keep = Keep()):
    self._location = storage.absolute(directory)
    self._stack = contextlib.ExitStack()
    self._remote: Address | None = None  # where files go from `_directory`
    self._uploaded: set[int] = set()  # steps that this process has put there and not deleted
    self._directory: Any = self._location
    if isinstance(self._location, Address) and self._location.scheme == 'gs':
      self._directory = epath.Path(storage.url(self._location))
    elif isinstance(self._location, Address):
      self._remote = self._location
      self._directory = self._stack.enter_context(storage.scratch()) / self._location.name
    policies: list[Any] = [policy.LatestN(keep.newest)]
    if keep.every_steps:
      policies.append(policy.EveryNSteps(keep.every_steps))
    if keep.every_hours:
      policies.append(policy.EveryNSeconds(max(1, round(keep.every_hours * 3_600))))
    if keep.steps:
      policies.append(policy.CustomSteps(keep.steps))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy.AnyPreservationPolicy(policies),
      create=True,
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options)
    self._whole: set[int] = set()  # steps whose files `restore_part` compared

  @property
  def latest(self) -> int | None:
    return max(self._steps(), default=None)

  def _steps(self) -> list[int]:
    steps = set(self._manager.all_steps())
    if self._remote is not None:
      names = storage.files(self._remote)
      steps |= {int(n.removesuffix(f'/{_CHECKSUMS}')) for n in names if re.fullmatch(rf'\d+/{_CHECKSUMS}', n)}
    return sorted(steps)

  def _bring(self, step: int) -> None:
    """Copies a step from an object store to where Orbax reads it."""
    target = self._directory / f'{step}'
    if self._remote is not None and not target.exists():
      shutil.copytree(storage.local(self._remote / f'{step}'), target)
      self._uploaded.add(step)
      self._manager.reload()

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Copies `state` (pytree of arrays) and `record` (JSON) and returns; a thread writes them.

    Raises:
      OSError: the disk is full, now or while the previous checkpoint was written.
      RuntimeError: there is a checkpoint of this or a later step, see `drop_after`.
    """
    processes.decide(lambda: self._check_space(state))
    if self._remote is not None:
      self._delete_old()
      if processes.count() > 1:  # the disks of the others are not read
        state = multihost_utils.process_allgather(state, tiled=True)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      # A thread writes it later, when a history in it may have more lines.
      record=ocp.args.JsonSave(copy.deepcopy(dict(record))),
      shapes=ocp.args.JsonSave(_shapes(state)),
    )
    try:
      saved = self._manager.save(step, args=args)
    except ValueError as error:
      raise self._found(error) from error
    if not saved:  # Orbax raises nothing
      raise RuntimeError(f'step {step} is not saved in {self._location}, which already holds step {self.latest}')

  def _found(self, error: ValueError) -> Exception:
    """The error of the disk or the store behind one of Orbax; `error` if there is none."""
    found = as_os_error(error, str(self._directory))
    if found is None and isinstance(self._location, Address):
      reason = ' '.join(str(error).split())[:300]
      return StoreError(
        f'{self._location} cannot be written ({reason}); check the network, the credentials and their rights, and '
        'start the same command again: finished work is kept'
      )
    return found or error

  def _check_space(self, state: Any) -> None:
    # Checked beforehand: when a write fails half-way, Orbax prints pages from its threads before it raises.
    needed = 256 * 1024 + sum(x.nbytes for x in jax.tree.leaves(state)) * 5 // 4
    if isinstance(self._directory, Path) and shutil.disk_usage(self._directory).free < needed:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))

  def restore(self, like: Any, only: int | None = None) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint that can be read, with the shapes, dtypes and shardings of `like`; None if there is none.

    Args:
      like: pytree of arrays or of their shapes.
      only: step to restore; None for the newest.

    Raises:
      UserError: there are checkpoints, and none of them fits `like`.
    """
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(jax.tree.map(_abstract, like)), record=ocp.args.JsonRestore()
    )
    failure: Exception | None = None
    for step in reversed(self._steps()):
      if only not in (None, step):
        continue
      try:
        self._bring(step)
        self._check_files(step)
        self._check_shapes(step, like)
        restored = self._manager.restore(step, args=args)
        return restored['state'], restored['record']
      except (ValueError, OSError, KeyError, TypeError) as error:  # what Orbax raises for a damaged checkpoint
        failure = error
    if failure is None:
      return None
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
    raise UserError(
      f'no checkpoint in {self._location} can be restored into this model ({reason}); '
      'it is damaged or belongs to another model: delete that folder and start again'
    ) from failure

  def restore_part(self, like: dict[str, Any], step: int | None) -> dict[str, Any]:
    """Some entries of the state of `step` or, if that is None, of the newest checkpoint, on the first CPU.

    The first call compares the files of the checkpoint with their checksums.

    Args:
      like: name of each entry → pytree of shapes, which may lack leaves.
      step: to restore.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or an array has another shape.
    """
    step = self.latest if step is None else step
    try:
      if step is None:
        raise ValueError('it contains no checkpoint')
      if step not in self._whole:
        self._bring(step)
        self._check_files(step)
        self._whole.add(step)
      stored = self._manager.restore(step, args=ocp.args.Composite(shapes=ocp.args.JsonRestore()))['shapes']
      wanted = _shapes(like)
      if wrong := [name for name in wanted if stored.get(name) != wanted[name]]:
        raise ValueError(f'{wrong[0]} is {wanted[wrong[0]]} in the model and {stored.get(wrong[0])} in the checkpoint')
      cpu = jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0])
      item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu), like)
      options = ocp.checkpoint_utils.construct_restore_args(item)
      args = ocp.args.PyTreeRestore(item=item, restore_args=options, partial_restore=True)
      return ocp.PyTreeCheckpointHandler().restore(self._directory / f'{step}' / 'state', args=args)
    except (ValueError, OSError, KeyError, TypeError) as error:  # what Orbax raises for a damaged checkpoint
      reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
      raise UserError(f'the checkpoint in {self._location} cannot be read ({reason}); name another folder') from error

  def _write_checksums(self) -> None:
    # Orbax calls it in its thread, when a checkpoint is written and its folder does not have its final name yet; at
    # gs:// folders have it from the beginning.
    if not processes.is_first():
      return
    folders: list[Any] = []
    if isinstance(self._directory, Path):
      folders += self._directory.glob('*.orbax-checkpoint-tmp*')
    else:
      folders += [folder for folder in storage.subfolders(self._location) if folder.name.isdecimal()]
    for folder in folders:
      if not storage.is_file(folder / _CHECKSUMS):
        storage.write_json(folder / _CHECKSUMS, {item: artifacts.checksums(folder / item) for item in _ITEMS})
        if self._remote is not None:
          step = int(folder.name.partition('.')[0])
          self._upload(folder, self._remote / f'{step}')
          self._uploaded.add(step)

  def _upload(self, folder: Path, target: Address) -> None:
    last = folder / _CHECKSUMS
    self._delete(target)  # what a kill left of it
    storage.upload({name: folder / name for name in storage.files(folder) if name != _CHECKSUMS}, target)
    storage.copy(last, target / _CHECKSUMS)

  def _delete_old(self) -> None:
    """Deletes there the steps that Orbax has deleted here."""
    if self._remote is not None and processes.is_first():
      for step in self._uploaded - set(self._manager.all_steps()):
        self._delete(self._remote / f'{step}')

  def _delete(self, folder: Address) -> None:
    storage.unlink(folder / _CHECKSUMS)  # without it, the rest is no checkpoint
    storage.delete(folder)
    self._uploaded.discard(int(folder.name))

  def _check_files(self, step: int) -> None:
    # Before Orbax reads: it does not detect a flipped bit, and prints pages about a file that is short or missing.
    folder = self._location if self._remote is None else self._directory
    damage = processes.decide(lambda: self._damage(folder / f'{step}'))
    if damage is not None:
      raise ValueError(damage)

  def _damage(self, folder: Location) -> str | None:
    file = folder / _CHECKSUMS
    try:
      files = json.loads(storage.read(file))
      phrases = (phrase for item in _ITEMS for _, phrase in artifacts.damaged(folder / item, files[item]))
      return next(phrases, None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      return f'{file} is damaged or missing'

  def _check_shapes(self, step: int, like: Any) -> None:
    # Before Orbax reads: when one array has another shape, it abandons the rest with pages from its threads. Orbax
    # would open each array to learn its shape, and TensorStore leaks some kilobytes each time.
    stored = self._manager.restore(step, args=ocp.args.Composite(shapes=ocp.args.JsonRestore()))['shapes']
    wanted = _shapes(like)
    for name in {**wanted, **stored}:
      if stored.get(name) != wanted.get(name):
        here, there = (tuple(shapes[name]) if name in shapes else 'missing' for shapes in (wanted, stored))
        raise ValueError(f'{name} is {here} in the model and {there} in the checkpoint')

  def drop_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps, so that a run which continues from `step` can save them again."""
    for later in [other for other in self._manager.all_steps() if other > step]:
      self._manager.delete(later)
    if self._remote is not None and processes.is_first():
      for later in [other for other in self._steps() if other > step]:
        self._delete(self._remote / f'{later}')

  def close(self) -> None:
    """Waits until all checkpoints are on disk."""
    try:
      self._manager.wait_until_finished()
      self._delete_old()
      self._manager.close()
    except ValueError as error:
      raise self._found(error) from error
    finally:
      self._stack.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
    # A save ends when all processes have written. After a failure the others may be gone; when they agreed to stop, all
    # of them are here.
    if kind is None or issubclass(kind, Stopped) or processes.count() == 1:
      self.close()


def _shapes(state: Any) -> dict[str, list[int]]:
  """Name of each array in Orbax → its global shape."""
  return {'.'.join(path): list(leaf.shape) for path, leaf in ocp.tree.to_flat_dict(state).items()}


def _abstract(x: Any) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None))

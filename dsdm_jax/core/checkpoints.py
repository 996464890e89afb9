"""Orbax checkpoints of a pytree and a JSON record beside it, by step."""

import copy
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policy

from dsdm_jax.core import artifacts, memory, processes, storage
from dsdm_jax.errors import Stopped, UserError, as_os_error

_CHECKSUMS = 'checksums.json'  # of the files of the items; what Orbax notes beside them it writes later
_ITEMS = ('state', 'record', 'shapes')  # checkpoints of before have no shapes


@dataclasses.dataclass(frozen=True)
class Keep:
  """Which checkpoints stay.

  Attributes:
    newest: so many of the newest.
    every_steps: and each step that this divides; 0 for none.
    every_hours: and one for each span of so many hours; 0 for none.
    steps: and these.
  """

  newest: int = 1
  every_steps: int = 0
  every_hours: float = 0.0
  steps: tuple[int, ...] = ()


class Checkpoints:
  """A folder of checkpoints, saved in the background and whole or absent.

  Args:
    directory: absolute or relative folder; made when missing.
    keep: which of them stay.
  """

  def __init__(self, directory: Path, keep: Keep = Keep()):
    memory.avoid_storage_leaks()
    self._directory = Path(directory).absolute()
    policies: list[Any] = [policy.LatestN(keep.newest)]
    if keep.every_steps:
      policies.append(policy.EveryNSteps(keep.every_steps))
    if keep.every_hours:
      policies.append(policy.EveryNSeconds(max(1, round(keep.every_hours * 3_600))))
    if keep.steps:
      policies.append(policy.CustomSteps(keep.steps))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy.AnyPreservationPolicy(policies), create=True, enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._note_checksums),
    )  # fmt: skip
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  @property
  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Copies `state` (pytree of arrays) and `record` (JSON) and returns; writing goes on behind the caller's back.

    Raises:
      OSError: the disk is full, found now or while the save before this one was written.
      RuntimeError: a checkpoint of this or of a later step stands there, see `drop_after`.
    """
    processes.decide(lambda: self._want_room(state))
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      # Written later by a thread, when a history in it may have gained lines.
      record=ocp.args.JsonSave(copy.deepcopy(dict(record))),
      shapes=ocp.args.JsonSave(_shapes(state)),
    )
    try:
      saved = self._manager.save(step, args=args)
    except ValueError as error:
      raise as_os_error(error, self._directory) or error from error
    if not saved:  # Orbax says it by its return value alone
      raise RuntimeError(f'step {step} is not saved in {self._directory}, where step {self.latest} stands already')

  def _want_room(self, state: Any) -> None:
    # Looked up beforehand: a write that fails half-way has Orbax print pages from its threads before it says so.
    needed = 256 * 1024 + sum(x.nbytes for x in jax.tree.leaves(state)) * 5 // 4
    if shutil.disk_usage(self._directory).free < needed:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))

  def restore(self, like: Any, only: int | None = None) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint that can be read, with the shapes, dtypes and shardings of `like`; None if there is none.

    Args:
      like: pytree of arrays or of their shapes.
      only: step of the checkpoint that is wanted and no other.

    Raises:
      UserError: there are checkpoints and none of them fits `like`.
    """
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(jax.tree.map(_abstract, like)), record=ocp.args.JsonRestore()
    )
    failure: Exception | None = None
    for step in sorted(self._manager.all_steps(), reverse=True):
      if only not in (None, step):
        continue
      try:
        self._check_files(step)
        self._check_shapes(step, like)
        found = self._manager.restore(step, args=args)
        return found['state'], found['record']
      except (ValueError, OSError, KeyError, TypeError) as error:  # Orbax's ways to say torn or of another shape
        failure = error
    if failure is None:
      return None
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
    raise UserError(
      f'no checkpoint in {self._directory} can be restored into this model ({reason}); '
      'it is torn or belongs to another model: delete that folder and start again'
    ) from failure

  def _note_checksums(self) -> None:
    # Orbax calls it in its thread, when all of a checkpoint is written and its folder has not yet its name.
    if not processes.is_first():
      return
    for folder in self._directory.glob('*.orbax-checkpoint-tmp*'):
      if not (folder / _CHECKSUMS).exists():
        storage.write_json(folder / _CHECKSUMS, {item: artifacts.checksums(folder / item) for item in _items(folder)})

  def _check_files(self, step: int) -> None:
    # Before Orbax reads: a flipped bit it does not see, and over a file that is cut or missing its threads print pages.
    said = processes.decide(lambda: self._damage(self._directory / f'{step}'))
    if said is not None:
      raise ValueError(said)

  def _damage(self, folder: Path) -> str | None:
    noted = folder / _CHECKSUMS
    if not noted.is_file():  # of before checksums were noted
      return None
    try:
      files = json.loads(noted.read_text())
      found = (said for item in _items(folder) for _, said in artifacts.damaged(folder / item, files[item]))
      return next(found, None)
    except (ValueError, KeyError, TypeError, AttributeError):
      return f'{noted} is damaged'

  def _check_shapes(self, step: int, like: Any) -> None:
    # Before Orbax reads: where one array is of another shape, it gives up the rest with pages from its threads.
    stored, wanted = self._stored_shapes(step), _shapes(like)
    for name in {**wanted, **stored}:
      if stored.get(name) != wanted.get(name):
        here, there = (tuple(shapes[name]) if name in shapes else 'not there' for shapes in (wanted, stored))
        raise ValueError(f'{name} is {here} in the model and {there} in the checkpoint')

  def _stored_shapes(self, step: int) -> dict[str, list[int]]:
    folder = self._directory / f'{step}'
    if 'shapes' in _items(folder):
      return self._manager.restore(step, args=ocp.args.Composite(shapes=ocp.args.JsonRestore()))['shapes']
    # Of before they were noted. Orbax opens each array for it, and each time TensorStore leaks some kilobytes.
    saved = ocp.StandardCheckpointHandler().metadata(epath.Path(folder) / 'state')
    return {leaf.name: list(leaf.shape) for leaf in jax.tree.leaves(saved)}

  def drop_after(self, step: int) -> None:
    """Removes the checkpoints of later steps: the run goes on from `step` and saves those anew."""
    for later in [found for found in self._manager.all_steps() if found > step]:
      self._manager.delete(later)

  def close(self) -> None:
    """Waits until all that was saved is on disk."""
    try:
      self._manager.wait_until_finished()
      self._manager.close()
    except ValueError as error:
      raise as_os_error(error, self._directory) or error from error

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
    # A save in flight ends when all processes have written. After a failure the others may be gone; where they agreed
    # to stop they are all here, and say that the step is saved.
    if kind is None or issubclass(kind, Stopped) or processes.count() == 1:
      self.close()


def _items(folder: Path) -> list[str]:
  return [item for item in _ITEMS if item != 'shapes' or (folder / item).is_dir()]


def _shapes(state: Any) -> dict[str, list[int]]:
  """Name of each array, as Orbax has it → its whole shape."""
  return {'.'.join(path): list(leaf.shape) for path, leaf in ocp.tree.to_flat_dict(state).items()}


def _abstract(x: Any) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None))

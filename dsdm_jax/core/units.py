"""Units of a stage: parts of its work that a rerun with other settings takes over from the finished stage.

A stage that is computed again because one target, arm, seed or benchmark is new computes only that. The manifest has
the digest of what each unit was computed from, its files, and its cost. A unit with the same digest and undamaged files
is the same: its files get a second name in the new attempt, before the stage looks for what an earlier attempt left.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsdm_jax.core import artifacts, processes, storage
from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.storage import Location


class Units:
  """The units of one attempt.

  Args:
    out: folder of the attempt.
    previous: the finished stage that the attempt replaces; None if there is none.
    cost: of the attempt.

  Attributes:
    taken: the units that were taken over.
  """

  def __init__(self, out: Location, previous: Artifact | None, cost: Cost):
    self._out, self.previous, self._cost = out, previous, cost
    self._made: dict[str, tuple[str, Sequence[str]]] = {}
    self.taken: set[str] = set()

  def take(self, wanted: Mapping[str, Any], files: Callable[[str], Sequence[str]] = lambda name: ()) -> frozenset[str]:
    """Declares units, and takes over those that `previous` computed from the same. Call it before any work on them.

    Seconds that `cost.parts` counts under the name of a unit are taken over too, and parts that are named after it, a
    space and a word.

    Args:
      wanted: name of each unit → what it is computed from, as JSON.
      files: name of a unit → its files; 'x/' is all in a folder, 'x*' all that begins so. A unit without files is read
        from `previous`.

    Returns:
      The units that were taken over.
    """
    self._made |= {name: (artifacts.digest_of(of), files(name)) for name, of in wanted.items()}
    taken = frozenset(processes.decide(lambda: self._take(list(wanted))))
    self.taken = (self.taken - wanted.keys()) | taken
    return taken

  def _take(self, names: list[str]) -> list[str]:
    previous = self.previous
    note = self._out / artifacts.PLACING
    # After a kill in the middle of this, the finished stage may be gone, and half of a unit's files must not stay.
    for name in artifacts.read_placing(note):
      for path in _matching(storage.files(self._out), self._made[name][1] if name in self._made else ()):
        storage.delete(self._out / path)
    taken = [] if previous is None else [name for name in names if self._is_same(previous, name)]
    if previous is not None and taken:
      storage.write_bytes(note, artifacts.seal({'units': taken}))
      there = storage.files(previous.path)
      for name in taken:
        unit = previous.manifest['units'][name]
        notes = [mark for file in unit['files'] if (mark := storage.mark_of(file)) in there]
        for file in (*unit['files'], *notes):
          storage.copy(previous.path / file, self._out / file)
        if not unit['parts'].keys() <= self._cost.parts.keys():
          self._cost.parts |= unit['parts']
          self._cost.add(unit['parts'].get(name, 0.0))
      self._cost.save()
    storage.unlink(note)
    return taken

  def _is_same(self, previous: Artifact, name: str) -> bool:
    unit = previous.manifest['units'].get(name)
    if unit is None or unit['of'] != self._made[name][0]:
      return False
    listed = {file: previous.manifest['files'][file] for file in unit['files'] or previous.manifest['files']}
    return not any(True for _ in artifacts.damaged(previous.path, listed))

  @property
  def made(self) -> list[str]:
    """The units that this attempt computes itself."""
    return [name for name in self._made if name not in self.taken]

  def as_json(self) -> dict[str, Any]:
    """For the manifest: name → 'of', 'files' and 'parts' of the cost."""
    there = [name for name in storage.files(self._out) if not storage.is_mark(name)]
    return {
      name: {
        'of': of,
        'files': _matching(there, patterns),
        'parts': {key: x for key, x in self._cost.parts.items() if name in (key, key.rpartition(' ')[0])},
      }
      for name, (of, patterns) in self._made.items()
    }


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
  """Those of `names` that `patterns` describe, see `Units.take`."""
  exact, begin = set(patterns), tuple(p.removesuffix('*') for p in patterns if p.endswith('*'))
  folders = {pattern.removesuffix('/') for pattern in patterns if pattern.endswith('/')}

  def is_in_folder(name: str) -> bool:
    parts = name.split('/')
    return any('/'.join(parts[:depth]) in folders for depth in range(1, len(parts)))

  return [name for name in names if name in exact or is_in_folder(name) or (begin and name.startswith(begin))]

"""An entry of the selection stage's index as the order of training: a schedule of one selection, or of several."""

import os
from collections.abc import Mapping
from typing import Any

from dsdm_jax.data.order.schedule import Part, Schedule
from dsdm_jax.data.order.selection import Selection


def schedule(
  folder: str | os.PathLike, entry: Mapping[str, Any], length: int, seed: int, max_epochs: float = 0.0
) -> Schedule:
  """What the model of `entry` trains on, position by position.

  Args:
    folder: of the finished selection stage.
    entry: of its `index.json`.
    length: examples in all.
    seed: of the order.
    max_epochs: passes over an arm's rows, or over a part's, at most; 0 for any number.

  Raises:
    UserError: a selection is missing, or the parts of a mixture cannot fill `length` (see `Schedule`).
  """
  if 'parts' not in entry:
    chosen = Selection.load(folder, entry['selection'])
    return Schedule.single(entry['name'], chosen.rows, length, seed, chosen.weights, max_epochs or None)
  parts = []
  for part in entry['parts']:
    chosen = Selection.load(folder, part['selection'])
    most = min(part['most'], int(max_epochs * chosen.size)) if max_epochs else part['most']
    parts.append(Part(part['name'], chosen.rows, part['rate'], chosen.weights, most))
  return Schedule(tuple(parts), length, seed, entry['when_empty'])

"""One line of `mixture.parts`: 'dsdm@docs rate=2 epochs=4 cap=8' or 'random epochs=1'."""

import dataclasses
import re

from dsdm_jax.config import bounds

_PART = re.compile(r'(?P<method>[^@\s]+)(@(?P<target>\S+))?(?P<options>( +\S+)*)')
_OPTIONS = {'rate': float, 'epochs': float, 'rows': int, 'cap': int}
_MOST = {name: bounds.KINDS[kind][0] for name, kind in (
  ('rate', 'factor'), ('epochs', 'passes'), ('rows', 'rows'), ('cap', 'passes'),
)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MixturePart:
  """A selection that is trained on at a fixed rate.

  Attributes:
    method: as in `selection.methods`; it need not stand there.
    target: a task, 'mix', or tasks joined by '+'; 'mix' where none is named.
    rate: relative to the other parts.
    epochs: passes over its rows, which sets how many rows it gets; None where `rows` does, or for `selection.epochs`.
    rows: how many it gets; None where `epochs` says.
    cap: passes over its rows at most; None for `selection.repeat_cap`.
  """

  method: str
  target: str
  rate: float
  epochs: float | None
  rows: int | None
  cap: int | None


def parse(text: str) -> MixturePart | None:
  """The part that `text` names; None where it is not of the form, a number is out of range, or a key comes twice."""
  found = _PART.fullmatch(text)
  if found is None:
    return None
  values: dict[str, float | int | None] = dict.fromkeys(_OPTIONS)
  for option in found['options'].split():
    key, _, value = option.partition('=')
    if key not in _OPTIONS or values[key] is not None:
      return None
    try:
      number = _OPTIONS[key](value)
    except ValueError:
      return None
    if not 0 < number <= _MOST[key]:  # nor a NaN
      return None
    values[key] = number
  if values['epochs'] is not None and values['rows'] is not None:
    return None
  rate = values.pop('rate')
  return MixturePart(found['method'], found['target'] or 'mix', 1.0 if rate is None else float(rate), **values)  # type: ignore[arg-type]

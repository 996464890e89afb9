"""The arm `mixture`: several selections at fixed rates, as `mixture.parts` names them, at the budget of every arm."""

import dataclasses
import math
from typing import Any

import numpy as np

from dsdm_jax.config import mixture_parts
from dsdm_jax.config.mixture_parts import MixturePart
from dsdm_jax.config.selection_rules import method_name
from dsdm_jax.core import prng
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.schedule import Part, Schedule
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection import registry
from dsdm_jax.selection.candidates import Candidates
from dsdm_jax.selection.registry import Budget

NAME = 'mixture'


def make(context: Context, pool: Candidates, budget: Budget, seed: int) -> tuple[dict[str, Any], Selection]:
  """Selects the rows of each part and saves them; returns the entry of `index.json`, and all rows together.

  The entry's `parts` are what `selection.schedule` makes the order of training from. All rows together weigh what that
  order visits them: by them a single pass elsewhere is what this training is in expectation.

  Raises:
    UserError: a part names more passes than it may have, or the parts cannot fill the budget (see `Schedule`).
  """
  from dsdm_jax.selection.select import keep

  config = context.config
  named = [part for part in map(mixture_parts.parse, config.mixture.parts) if part is not None]
  total_rate = sum(part.rate for part in named)
  entries: list[dict[str, Any]] = []
  parts: list[Part] = []
  for number, part in enumerate(named):
    cap = part.cap or budget.repeat_cap
    wanted = _part_budget(part, cap, budget, part.rate / total_rate)
    chosen = _chosen(pool, part, wanted, config.seed, seed, number)
    keep(context, chosen)
    name = chosen.name.partition('--')[2]
    # A row that was drawn several times is visited as often in each pass.
    most = chosen.size * (cap // int(np.unique(chosen.rows, return_counts=True)[1].max()))
    entries.append({
      'name': name, 'selection': chosen.name, 'method': method_name(part.method),
      'target': part.target, 'rate': part.rate, 'examples': chosen.size, 'most': most,
    })  # fmt: skip
    parts.append(Part(name, chosen.rows, part.rate, chosen.weights, most))
  schedule = Schedule(tuple(parts), budget.total, prng.derive(config.seed, 'order', seed), config.mixture.when_empty)
  rows, visits, weights = _visits(schedule)
  given = schedule.visits(budget.total).tolist()
  shown = [
    {**{key: entry[key] for key in ('name', 'rate', 'examples', 'most')}, 'visits': n}
    for entry, n in zip(entries, given, strict=True)
  ]
  told = {'method': NAME, 'target': 'any', 'seed': seed, 'examples': len(rows), 'epochs': budget.total / len(rows)}
  provenance = {**told, 'parts': shown, 'most_visits': int(visits.max())}
  every = Selection(f'{NAME}--any--{seed}', rows, weights, provenance)
  keep(context, every)
  entry = {
    'name': every.name, 'selection': every.name, **{k: told[k] for k in ('method', 'target', 'seed', 'examples')},
    'epochs': told['epochs'], 'parts': entries, 'when_empty': config.mixture.when_empty,
  }  # fmt: skip
  return entry, every


def _visits(schedule: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(rows of all parts, ascending, int64; visits of each, int64; the sum of its weights over them, float32)."""
  given = schedule.visits(schedule.length)
  counts = []
  for number, part in enumerate(schedule.parts):
    passes, rest = divmod(int(given[number]), len(part.rows))
    last = schedule.entries(number, np.arange(passes * len(part.rows), passes * len(part.rows) + rest))
    counts.append(passes + np.bincount(last, minlength=len(part.rows)))
  rows, place = np.unique(np.concatenate([part.rows for part in schedule.parts]), return_inverse=True)
  every = np.concatenate(counts)
  weights = np.concatenate(
    [np.ones(len(part.rows)) if part.weights is None else part.weights for part in schedule.parts]
  )
  summed = np.bincount(place, every * weights, len(rows)).astype(np.float32)
  return rows, np.bincount(place, every, len(rows)).astype(np.int64), summed


def _part_budget(part: MixturePart, cap: int, budget: Budget, share: float) -> Budget:
  """Rows of a part, as many as fill its share of the whole in the passes that it names, and how often one may occur.

  The passes multiply what a row occurs in the part: both together stay within `cap` visits.
  """
  if part.rows is not None:
    return Budget(part.rows, 1, cap // min(cap, math.ceil(share * budget.total / part.rows)))
  epochs = part.epochs or float(budget.epochs)
  if epochs > cap:
    raise UserError(f'mixture.parts: {part.method}@{part.target} has epochs={epochs:g} and at most {cap}; raise cap')
  return Budget(max(1, math.ceil(share * budget.total / epochs)), 1, cap // math.ceil(epochs))


def _chosen(pool: Candidates, part: MixturePart, wanted: Budget, root: int, seed: int, number: int) -> Selection:
  from dsdm_jax.selection.select import choose

  drawn = seed if registry.find(part.method).seeded else 0
  target = part.target if registry.find(part.method).targeted else 'any'
  made = choose(pool, part.method, target, wanted, root, drawn)
  # An arm of the same method and target has rows of its own number, so this is another selection of another name.
  return dataclasses.replace(made, name=f'{NAME}{number}--{made.name}')

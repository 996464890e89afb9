"""The arm `mixture`: several selections at fixed rates, as in `mixture.parts`, at the budget of every arm."""

import dataclasses
import math
from typing import Any

import numpy as np

from dsdm_jax.config.methods import method_name
from dsdm_jax.config.values import MixturePart
from dsdm_jax.core import prng
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.schedule import Part, Schedule
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection.candidates import Budget, Candidates, find, select

NAME = 'mixture'


def select_mixture(context: Context, pool: Candidates, budget: Budget, seed: int) -> tuple[dict[str, Any], Selection]:
  """Selects and saves the rows of each part; returns the entry of `index.json`, and the rows of all parts together.

  `order.selection.schedule` reads the entry's `parts` to build the order of training. The rows of all parts together
  have as weights how often this order visits them, so that one weighted pass over them equals the training in
  expectation.

  Raises:
    UserError: a part names more passes than its cap, or the parts cannot fill the budget (see `Schedule`).
  """
  config = context.config
  named = [part for part in map(MixturePart.parse, config.mixture.parts) if part is not None]
  total_rate = sum(part.rate for part in named)
  entries: list[dict[str, Any]] = []
  parts: list[Part] = []
  for number, part in enumerate(named):
    cap, selector = part.cap or budget.repeat_cap, find(part.method)
    target = part.target if selector.targeted else 'any'
    part_budget = _part_budget(part, cap, budget, part.rate / total_rate)
    rows = select(pool, part.method, target, part_budget, config.seed, seed if selector.seeded else 0)
    name = rows.name
    # Another name, since an arm of the same method and target has a different number of rows.
    rows = dataclasses.replace(rows, name=f'{NAME}{number}--{name}')
    if context.first:
      rows.save(context.out)
    # Each pass visits a row as often as it was drawn.
    most = rows.size * (cap // int(np.unique(rows.rows, return_counts=True)[1].max()))
    entries.append(
      {
        'name': name,
        'selection': rows.name,
        'method': method_name(part.method),
        'target': part.target,
        'rate': part.rate,
        'examples': rows.size,
        'most': most,
      }
    )
    parts.append(Part(name, rows.rows, part.rate, rows.weights, most))
  schedule = Schedule(tuple(parts), budget.total, prng.derive(config.seed, 'order', seed), config.mixture.when_empty)
  rows_M, visits_M, weights_M = _visits(schedule)
  summary = [
    {**{key: entry[key] for key in ('name', 'rate', 'examples', 'most')}, 'visits': visits}
    for entry, visits in zip(entries, schedule.visits(budget.total).tolist(), strict=True)
  ]
  facts = {'method': NAME, 'target': 'any', 'seed': seed, 'examples': len(rows_M)}
  epochs = {'epochs': budget.total / len(rows_M)}
  provenance = {**facts, **epochs, 'parts': summary, 'most_visits': int(visits_M.max())}
  together = Selection(f'{NAME}--any--{seed}', rows_M, weights_M, provenance)
  if context.first:
    together.save(context.out)
  names = {'name': together.name, 'selection': together.name}
  return {**names, **facts, **epochs, 'parts': entries, 'when_empty': config.mixture.when_empty}, together


def _visits(schedule: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(rows of all parts, ascending, int64; number of visits of each, int64; sum of its weights over them, float32)."""
  part_visits = schedule.visits(schedule.length)
  counts = []
  for number, part in enumerate(schedule.parts):
    passes, rest = divmod(int(part_visits[number]), len(part.rows))
    last = schedule.entries(number, np.arange(passes * len(part.rows), passes * len(part.rows) + rest))
    counts.append(passes + np.bincount(last, minlength=len(part.rows)))
  rows, place = np.unique(np.concatenate([part.rows for part in schedule.parts]), return_inverse=True)
  visits = np.concatenate(counts)
  weights = np.concatenate([np.ones(len(p.rows)) if p.weights is None else p.weights for p in schedule.parts])
  summed = np.bincount(place, visits * weights, len(rows)).astype(np.float32)
  return rows, np.bincount(place, visits, len(rows)).astype(np.int64), summed


def _part_budget(part: MixturePart, cap: int, budget: Budget, share: float) -> Budget:
  """The rows that fill a part's share of the budget in its number of passes, and how often one row may occur in it.

  A row is visited in each pass as often as it occurs in the part. Both together stay within `cap` visits.
  """
  if part.rows is not None:
    return Budget(part.rows, 1, cap // min(cap, math.ceil(share * budget.total / part.rows)))
  epochs = part.epochs or float(budget.epochs)
  if epochs > cap:
    raise UserError(f'mixture.parts: {part.method}@{part.target} has epochs={epochs:g} and at most {cap}; raise cap')
  return Budget(max(1, math.ceil(share * budget.total / epochs)), 1, cap // math.ceil(epochs))

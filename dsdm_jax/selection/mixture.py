"""The arm `mixture`: several selections at fixed rates, as `mixture.parts` names them, at the budget of every arm."""

import dataclasses
import math
from typing import Any

import numpy as np

from dsdm_jax.core import mixture_parts
from dsdm_jax.core.errors import UserError
from dsdm_jax.core.mixture_parts import MixturePart
from dsdm_jax.core.selection_rules import method_name
from dsdm_jax.core.stage import Context
from dsdm_jax.data.selection import Selection
from dsdm_jax.selection import registry
from dsdm_jax.selection.candidates import Candidates
from dsdm_jax.selection.registry import Budget

NAME = 'mixture'


def make(context: Context, pool: Candidates, budget: Budget, seed: int) -> tuple[dict[str, Any], Selection]:
  """Selects the rows of each part and saves them; returns the entry of `index.json`, and all rows together.

  The entry's `parts` are what `data.arms.schedule` makes the order of training from.
  """
  from dsdm_jax.selection.select import keep

  config = context.config
  parts = [part for part in map(mixture_parts.parse, config.mixture.parts) if part is not None]
  total_rate = sum(part.rate for part in parts)
  entries, rows = [], []
  for number, part in enumerate(parts):
    share = part.rate / total_rate
    wanted = _part_budget(part, budget, share)
    chosen = _chosen(pool, part, wanted, config.seed, seed, number)
    keep(context, chosen)
    rows.append(chosen.rows)
    entries.append({
      'name': chosen.name.partition('--')[2], 'selection': chosen.name, 'method': method_name(part.method),
      'target': part.target, 'rate': part.rate, 'examples': chosen.size,
      'most': chosen.size * (part.cap or budget.repeat_cap),
    })  # fmt: skip
  every = Selection.of(np.unique(np.concatenate(rows)))
  shown = [{key: entry[key] for key in ('name', 'rate', 'examples', 'most')} for entry in entries]
  told = {'method': NAME, 'target': 'any', 'seed': seed, 'examples': every.size, 'epochs': budget.total / every.size}
  every = dataclasses.replace(every, name=f'{NAME}--any--{seed}', provenance={**told, 'parts': shown})
  keep(context, every)
  entry = {
    'name': every.name, 'selection': every.name, **{k: told[k] for k in ('method', 'target', 'seed', 'examples')},
    'epochs': told['epochs'], 'parts': entries, 'when_empty': config.mixture.when_empty,
  }  # fmt: skip
  return entry, every


def _part_budget(part: MixturePart, budget: Budget, share: float) -> Budget:
  """Rows and passes of a part: as many rows as fill its share of the whole in the passes that it names."""
  cap = part.cap or budget.repeat_cap
  if part.rows is not None:
    return Budget(part.rows, 1, cap)
  epochs = part.epochs or float(budget.epochs)
  if epochs > cap:
    raise UserError(f'mixture.parts: {part.method}@{part.target} has epochs={epochs:g} and at most {cap}; raise cap')
  return Budget(max(1, math.ceil(share * budget.total / epochs)), 1, cap)


def _chosen(pool: Candidates, part: MixturePart, wanted: Budget, root: int, seed: int, number: int) -> Selection:
  from dsdm_jax.selection.select import choose

  drawn = seed if registry.find(part.method).seeded else 0
  target = part.target if registry.find(part.method).targeted else 'any'
  made = choose(pool, part.method, target, wanted, root, drawn)
  # An arm of the same method and target has rows of its own number, so this is another selection of another name.
  return dataclasses.replace(made, name=f'{NAME}{number}--{made.name}')

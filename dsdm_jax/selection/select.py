"""Stage `selection`: which rows each arm trains on."""

import dataclasses
import functools
import importlib
import math
import pkgutil

from dsdm_jax import selection as package
from dsdm_jax.config.methods import method_name
from dsdm_jax.core import prng, storage
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.errors import UserError
from dsdm_jax.selection import mixture, registry, summaries
from dsdm_jax.selection.candidates import Candidates
from dsdm_jax.selection.registry import Budget


def load_selectors() -> None:
  """Imports every module here, and so registers every selector."""
  for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f'{package.__name__}.{module.name}')


def run(context: Context) -> dict:
  """Leaves `<method>--<target>--<seed>.npz`, and `index.json` with one entry for each model to train.

  A method that draws has rows of its own for each seed; a deterministic one shares its rows between seeds. All
  processes choose, because proxies and streamed features are read by all together; what process 0 chose is kept.
  Returns what is in the files, and under 'cost' what each selection took by itself.
  """
  config, options = context.config, context.config.selection
  load_selectors()
  pool = Candidates(context)
  budget = Budget(options.examples, options.epochs, options.repeat_cap)
  index, arms, cost = [], [], {}
  for method in options.methods:
    chooser = registry.find(method)
    for target in options.targets if chooser.targeted else ('any',):
      for seed in range(config.pretraining.seeds):
        drawn = seed if chooser.seeded else 0
        if seed == drawn:
          chosen, spent = pool.ledger.charged(
            functools.partial(choose, pool, method, target, budget, config.seed, drawn)
          )
          keep(context, chosen)
          cost[chosen.name] = spent
          if drawn == 0:
            arms.append(chosen)
        index.append({
          'name': f'{method_name(method)}--{target}--{seed}', 'selection': chosen.name, 'method': method_name(method),
          'target': target, 'seed': seed, 'examples': chosen.size, 'epochs': budget.total / chosen.size,
        })  # fmt: skip
  if config.mixture.parts:
    for seed in range(config.pretraining.seeds):
      (entry, chosen), spent = pool.ledger.charged(functools.partial(mixture.make, context, pool, budget, seed))
      index.append(entry)
      cost[chosen.name] = spent
      if seed == 0:
        arms.append(chosen)
  found = summaries.make(arms, pool.pool)
  if context.first:
    storage.write_json(context.out / 'index.json', index)
    storage.write_json(context.out / 'cards.json', found)
    context.log.say(summaries.table(found))
  return {'budget_examples': budget.total, 'selections': found, 'cost': cost}


def keep(context: Context, chosen: Selection) -> None:
  """Saves a selection, on process 0."""
  if context.first:
    chosen.save(context.out)


def choose(pool: Candidates, method: str, target: str, budget: Budget, root: int, seed: int) -> Selection:
  """What `method` selects, named and checked.

  Args:
    root: seed of the run; seed: of the models that train on it.

  Raises:
    UserError: a stranger's selector returned something else, or a row would be visited more than its cap.
  """
  wanted = pool.target('mix' if target == 'any' else target)
  made = registry.find(method).select(pool, wanted, budget, prng.derive(root, 'selection', seed))
  if not isinstance(made, Selection):
    raise UserError(f'selector {method} returned a {type(made).__name__}; return Selection.of(rows)')
  told = {'method': method_name(method), 'target': target, 'seed': seed, 'examples': made.size}
  chosen = dataclasses.replace(
    made, name=f'{method_name(method)}--{target}--{seed}',
    provenance={**told, 'epochs': budget.total / max(made.size, 1), **made.provenance},
  )  # fmt: skip
  visits = math.ceil(budget.total / max(chosen.size, 1))
  if visits > budget.repeat_cap:
    raise UserError(
      f'{chosen.name} has {chosen.size} rows, and {budget.total} examples of them are {visits} visits of a row where '
      f'selection.repeat_cap allows {budget.repeat_cap}; raise it, or lower selection.epochs'
    )
  try:
    chosen.check(pool.num_rows, budget.repeat_cap // visits)
  except ValueError as error:
    raise UserError(f'selector {method}: {error}; mend what it returns, or raise selection.repeat_cap') from error
  return chosen

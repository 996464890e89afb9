"""Stage `selection`: the rows that each arm trains on."""

import functools
import time
from typing import Any

from dsdm_jax.config.methods import FIRST, METHODS, NEEDS, method_name
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.selection import mixture, summaries
from dsdm_jax.selection.candidates import Budget, Candidates, find, select, total

_SHARED = 'shared:'


def run(context: Context) -> dict:
  """Writes `<method>--<target>--<seed>.npz`, and `index.json` with an entry for each model to train.

  A method that draws has its own rows for each seed; the seeds of a deterministic method share their rows. All
  processes select, because they read proxies and streamed features together. Process 0 writes its selections. A
  selection is a unit. Returns the summaries, and under 'cost' the cost of each selection.
  """
  config, options = context.config, context.config.selection
  pool = Candidates(context)
  budget = Budget(options.examples, options.epochs, options.repeat_cap)
  planned = [
    (method, target, seed, find(method))
    for method in options.methods
    for target in (options.targets if find(method).targeted else ('any',))
    for seed in range(config.pretraining.seeds)
  ]
  others = {'selection.methods', 'selection.targets', 'selection.prefilter', 'pretraining.seeds'}
  settings = artifacts.settings_of(context.out, others)
  settings = {key: value for key, value in settings.items() if not key.startswith('mixture.')}
  taken = context.units.take(
    {
      f'{method_name(method)}--{target}--{seed}': [settings, *_depends_on(context, pool, method, target)]
      for method, target, seed, selector in planned
      if seed == 0 or selector.seeded
    },
    lambda name: (f'{name}.npz', f'{name}.json'),
  )
  index, arms, cost, spent = [], [], {}, context.cost.parts
  flop: dict[str, float] = {}  # of each selection alone, and of each shared result once, whoever computed it
  for method, target, seed, selector in planned:
    name = method_name(method)
    if seed == 0 or selector.seeded:
      unit = f'{name}--{target}--{seed}'
      if unit in taken:
        selection = Selection.load(context.out, unit)
      else:
        began = time.monotonic()
        work = functools.partial(select, pool, method, target, budget, config.seed, seed)
        selection, accounts = pool.costs.measured(work)
        spent |= {unit: time.monotonic() - began} | {f'{unit} {key}': x for key, x in total(accounts).items()}
        spent |= {f'{unit} {_part(key)}': account.flop for key, account in accounts.items()}
        if context.first:
          selection.save(context.out)
      cost[unit] = {key: spent[f'{unit} {key}'] for key in ('seconds', 'flop')}
      for part, number in spent.items():
        of, _, word = part.rpartition(' ')
        if of == unit and word.startswith((_part(None), _SHARED)):
          flop[word if word.startswith(_SHARED) else part] = number
      if seed == 0:
        arms.append(selection)
    entry = {'name': f'{name}--{target}--{seed}', 'selection': selection.name, 'method': name, 'target': target}
    index.append({**entry, 'seed': seed, 'examples': selection.size, 'epochs': budget.total / selection.size})
  if config.mixture.parts:
    for seed in range(config.pretraining.seeds):
      mix = functools.partial(mixture.select_mixture, context, pool, budget, seed)
      (entry, selection), accounts = pool.costs.measured(mix)
      cost[name := f'{mixture.NAME}--any--{seed}'] = total(accounts)
      flop |= {_part(key) if key else name: account.flop for key, account in accounts.items()}
      index.append(entry)
      if seed == 0:
        arms.append(selection)
  context.add_flop(sum(flop.values()) - context.cost.flop)
  summary = summaries.summarize(arms, pool.pool)
  if context.first:
    storage.write_json(context.out / 'index.json', index)
    storage.write_json(context.out / 'cards.json', summary)
    context.log.describe(f'{len(index)} models, {budget.total:,} rows each')
    context.log.say(summaries.text_tables(summary))
  return {'budget_examples': budget.total, 'selections': summary, 'cost': cost}


def _part(key: Any) -> str:
  """Names the FLOP of the shared result `key` among the parts of a unit's cost; with None, those of the unit alone."""
  return 'own_flop' if key is None else f'{_SHARED}{artifacts.digest_of(repr(key))[:16]}'


def _depends_on(context: Context, pool: Candidates, method: str, target: str) -> list[Any]:
  """What a selection is computed from, beside settings and seeds: of the targets, only its own."""
  inputs, known = context.inputs, METHODS.get(method)
  facts: list[Any] = [inputs['pool'].digest, pool.mask_digest]
  if known is None:  # a function of the user's may use anything
    return [*facts, method, {name: artifact.digest for name, artifact in inputs.items()}]
  stages = {stage.removesuffix(FIRST) for need in known.needs for stage in NEEDS[need]}
  if 'training' in known.needs:
    stages.add('proxies')
  facts += [inputs[stage].digest for stage in sorted(stages & {'proxies', 'features'})]
  if known.targeted:
    tasks, all_targets = pool.target(target).tasks, Targets(inputs['targets'])
    facts += [target, context.config.datamodel.mix, [[task, all_targets.digest(task)] for task in tasks]]
    facts += [pool.target(target).weights] * (set(pool.target(target).weights) != {1.0})
    if 'scores' in known.needs:
      units = inputs['datamodel'].manifest['units']
      facts.append([units[f'scores of {task}']['of'] for task in tasks])
  if 'training' in known.needs:
    facts.append([context.config.proxies.to_dict(), context.config.features.output_fn])
  return facts

"""Stage `selection`: the rows that each arm trains on."""

import functools

from dsdm_jax.config.methods import method_name
from dsdm_jax.core import storage
from dsdm_jax.core.stage import Context
from dsdm_jax.selection import mixture, summaries
from dsdm_jax.selection.candidates import Budget, Candidates, find, select


def run(context: Context) -> dict:
  """Writes `<method>--<target>--<seed>.npz`, and `index.json` with an entry for each model to train.

  A method that draws has its own rows for each seed; the seeds of a deterministic method share their rows. All
  processes select, because they read proxies and streamed features together. Process 0 writes its selections. Returns
  the summaries, and under 'cost' the cost of each selection.
  """
  config, options = context.config, context.config.selection
  pool = Candidates(context)
  budget = Budget(options.examples, options.epochs, options.repeat_cap)
  index, arms, cost = [], [], {}
  for method in options.methods:
    name, selector = method_name(method), find(method)
    for target in options.targets if selector.targeted else ('any',):
      for seed in range(config.pretraining.seeds):
        if seed == 0 or selector.seeded:
          work = functools.partial(select, pool, method, target, budget, config.seed, seed)
          selection, cost[f'{name}--{target}--{seed}'] = pool.costs.charged(work)
          if context.first:
            selection.save(context.out)
          if seed == 0:
            arms.append(selection)
        entry = {'name': f'{name}--{target}--{seed}', 'selection': selection.name, 'method': name, 'target': target}
        index.append({**entry, 'seed': seed, 'examples': selection.size, 'epochs': budget.total / selection.size})
  if config.mixture.parts:
    for seed in range(config.pretraining.seeds):
      mix = functools.partial(mixture.select_mixture, context, pool, budget, seed)
      (entry, selection), cost[f'{mixture.NAME}--any--{seed}'] = pool.costs.charged(mix)
      index.append(entry)
      if seed == 0:
        arms.append(selection)
  summary = summaries.summarize(arms, pool.pool)
  if context.first:
    storage.write_json(context.out / 'index.json', index)
    storage.write_json(context.out / 'cards.json', summary)
    context.log.describe(f'{len(index)} models, {budget.total:,} rows each')
    context.log.say(summaries.text_tables(summary))
  return {'budget_examples': budget.total, 'selections': summary, 'cost': cost}

"""Stage `selection`: which rows each arm trains on."""

import importlib

import numpy as np

from dsdm_jax.attribution.scores import Scores
from dsdm_jax.core import atomic, prng
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool import Pool
from dsdm_jax.data.selection import Selection
from dsdm_jax.selection.registry import SELECTORS, Request

_MODULES = ('dsdm', 'random', 'controls')


def load_selectors() -> None:
  """Imports every module that registers selectors."""
  for module in _MODULES:
    importlib.import_module(f'dsdm_jax.selection.{module}')


def run(context: Context) -> dict:
  """Leaves `<method>--<target>--<seed>.npz` and `index.json`, one entry for each model to train.

  A method that draws has rows of its own for each seed; a deterministic one shares its rows between seeds.
  """
  config, selection = context.config, context.config.selection
  load_selectors()
  pool, scores = Pool(context.inputs['pool']), Scores(context.inputs['datamodel'])
  index, summary = [], []
  for method in selection.methods:
    chooser = SELECTORS[method]
    for target in selection.targets if chooser.targeted else ('any',):
      for seed in range(config.pretraining.seeds):
        drawn = seed if chooser.seeded else 0
        name = f'{method}--{target}--{drawn}'
        if seed == drawn:
          request = Request(
            pool.num_rows, target, selection.examples, selection.epochs,
            prng.derive(config.seed, 'selection', drawn), scores,
          )  # fmt: skip
          rows = chooser.select(request)
          chosen = Selection(name, rows, np.ones(len(rows), np.float32), {
            'method': method, 'target': target, 'seed': drawn, 'examples': len(rows),
            'epochs': request.budget / len(rows),
          })  # fmt: skip
          chosen.check(pool.num_rows)
          chosen.save(context.out)
          summary.append(_card(chosen, pool))
        index.append({
          'name': f'{method}--{target}--{seed}', 'selection': name, 'method': method, 'target': target, 'seed': seed,
          'examples': len(rows), 'epochs': request.budget / len(rows),
        })  # fmt: skip
  atomic.write_json(context.out / 'index.json', index)
  for card in summary:
    if card['seed'] == 0:
      context.log.say(f'  {card["method"]:>18} for {card["target"]}: {card["examples"]} rows, ' + ', '.join(
        f'{share:.0%} {source}' for source, share in card['sources'].items()))  # fmt: skip
  return {'budget_examples': selection.examples * selection.epochs, 'selections': summary}


def _card(selection: Selection, pool: Pool) -> dict:
  counts = np.bincount(pool.source_N[selection.rows], minlength=len(pool.sources))
  sources = {name: round(float(n) / len(selection.rows), 4) for name, n in zip(pool.sources, counts, strict=True)}
  return {**selection.provenance, 'name': selection.name, 'sources': sources}

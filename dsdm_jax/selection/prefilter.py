"""Stage `prefilter`: the rows that are worth scoring, by a method that needs no model.

`selection.prefilter = 'lsa 3'` keeps, for each entry of `selection.targets`, the best 3 · `selection.examples` rows by
`lsa`. Only these are scored, so a pass over the pool costs less; the others have no score, and methods that read scores
leave them out. Methods that do not read scores still choose from the whole pool. 'random 3' keeps random rows: a sample
from which `dsdm_distilled` learns to score all.
"""

from typing import Any

import numpy as np

from dsdm_jax.config.values import MAX_PASSES, Prefilter
from dsdm_jax.core import prng, storage
from dsdm_jax.core.stage import Context
from dsdm_jax.selection.candidates import Budget, Candidates, find


def run(context: Context) -> dict[str, Any]:
  """Writes `rows.npy`, the rows that are kept, int64, ascending."""
  prefilter = Prefilter.parse(context.config.selection.prefilter)
  assert prefilter is not None
  pool, options = Candidates(context), context.config.selection
  # Caps and whole documents are for arms.
  pool.options = options.copy_and_resolve_references()
  pool.options.update({'unit': 'row', 'document_cap': 0, 'source_cap': 1.0})
  count = min(round(prefilter.factor * options.examples), int((~pool.masked_N).sum()))
  selector, budget = find(prefilter.method), Budget(count, 1, MAX_PASSES)
  kept_N = np.zeros(pool.num_rows, bool)
  for target in options.targets:
    seed = prng.derive(context.config.seed, 'prefilter', target)
    kept_N[selector.select(pool, pool.target(target), budget, seed).rows] = True
  rows = np.flatnonzero(kept_N)
  storage.save_npy(context.out / 'rows.npy', rows)
  context.log.describe(f'{len(rows):,} of {pool.num_rows:,} rows, by {prefilter.method}')
  return {'method': prefilter.method, 'rows': len(rows), 'of': pool.num_rows}

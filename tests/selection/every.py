"""The tiny run with every method and a mixture: --config=tests/selection/every.py."""

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config.methods import METHODS
from dsdm_jax.data.order.selection import Selection
from tests.pipeline import tiny


def shortest(pool, target, budget, seed):
  """A stranger's selector: rows whose text is shortest."""
  del target, seed
  sizes = [len(pool.pool.text(row)) for row in range(pool.num_rows)]
  return Selection.of(np.argsort(sizes, kind='stable')[: budget.examples], why='short')


def repeats(pool, target, budget, seed):
  """A selector that may not do what it does."""
  del pool, target, seed
  return Selection.of(np.zeros(budget.examples, np.int64))


def get_config() -> ConfigDict:
  c = tiny.get_config()
  c.selection.methods = (*(m for m in METHODS if m != 'imported'), 'tests.selection.every:shortest')
  c.selection.targets = ('docs',)
  c.selection.conditional_steps = 2
  c.selection.document_cap = 8
  c.mixture.parts = ('dsdm@docs rate=2', 'dsdm@api_qa rows=3 cap=2', 'random epochs=1')
  return c

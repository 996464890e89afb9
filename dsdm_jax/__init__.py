"""DsDm: dataset selection with datamodels (Engstrom, Feldmann, Madry, ICML 2024) on JAX.

The names in `__all__` are the public API. Each is imported when it is first used, so that `import dsdm_jax` imports
neither JAX nor NumPy. `examples/own_model.py` shows how they work together.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dsdm_jax.api import load
  from dsdm_jax.attribution.datamodel import gram, solve
  from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
  from dsdm_jax.attribution.store import FeatureStore
  from dsdm_jax.data.order.selection import Selection

__version__ = '0.1.0'
__all__ = ['DenseFeatures', 'FeatureStore', 'Selection', 'TwoSidedFeatures', '__version__', 'gram', 'load', 'solve']

_MODULES = {
  'load': 'api',
  'TwoSidedFeatures': 'attribution.gradients',
  'DenseFeatures': 'attribution.gradients',
  'gram': 'attribution.datamodel',
  'solve': 'attribution.datamodel',
  'FeatureStore': 'attribution.store',
  'Selection': 'data.order.selection',
}


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  globals()[name] = value = getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
  return value

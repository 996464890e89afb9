"""DsDm: dataset selection with datamodels (Engstrom, Feldmann, Madry, ICML 2024) on JAX."""

__version__ = '0.1.0'

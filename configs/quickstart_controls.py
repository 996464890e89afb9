"""The long quickstart with controls: scores shifted by one row, scores permuted, and a second random arm.

Run it with:

    bash launch/run.sh --config=configs/quickstart_controls.py

Hardware: two CPU cores.

Result: DsDm beats random data and no control does. docs/quickstart.md has the table.
"""

from dsdm_jax.configs import quickstart_full


def get_config():
  config = quickstart_full.get_config()
  config.selection.methods = ('dsdm', 'random', 'random_again', 'dsdm_shifted', 'dsdm_permuted')
  return config

"""The quickstart with controls: scores shifted by one row, scores permuted, and a second random arm. None may win.

Run it with:

    bash launch/run.sh --config=configs/quickstart_controls.py
"""

from dsdm_jax.configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.selection.methods = ('dsdm', 'random', 'random_again', 'dsdm_shifted', 'dsdm_permuted')
  return config

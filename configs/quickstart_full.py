"""The quickstart with an arm for each single target beside their mix.

Run it with:

    bash launch/run.sh --config=configs/quickstart_full.py
"""

from dsdm_jax.configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.selection.targets = ('mix', 'docs', 'api_qa', 'cs_algorithms')
  return config

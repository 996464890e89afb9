"""The quickstart with one more arm for each single target, beside the arm for their mix.

Run it with:

    bash launch/run.sh --config=configs/quickstart_full.py

Hardware: two CPU cores.

Result: every arm compared with random data, on every task.
"""

from dsdm_jax.configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.selection.targets = ('mix', 'docs', 'api_qa', 'cs_algorithms')
  return config

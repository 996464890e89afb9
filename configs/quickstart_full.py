"""The long quickstart: three other targets, proxies as large as the final models, and four arms.

Run it with:

    bash launch/run.sh --config=configs/quickstart_full.py

Hardware and time: two CPU cores, 4.5 minutes.

Result: models trained on DsDm's selection have a higher log-probability than models trained on random rows, by 0.26
[0.02, 0.50] nats per token on `docs`, 0.34 [0.16, 0.52] on `api_qa` and 0.76 [0.46, 1.07] on `cs_algorithms`, but they
are weaker than simple counting on all three. docs/quickstart.md has the table.
"""

from dsdm_jax.configs import base, quickstart


def get_config():
  config, default = quickstart.get_config(), base.get_config()
  config.targets.tasks = default.targets.tasks
  config.targets.max_examples = 128
  for key in ('count', 'epochs'):
    config.proxies[key] = default.proxies[key]
  for key in ('width', 'mlp_width', 'layers'):
    config.proxies.model[key] = config.model[key]
  config.selection.methods = default.selection.methods
  return config

"""Is the datamodel true? Models of 0.1 million parameters on subsets of 2,048 rows of 64 tokens, by the hundred.

Run it with:

    for stage in pool targets validation; do
      python -m dsdm_jax.main --config=configs/validation.py --workdir=runs/validation --stage=$stage
    done

The table is runs/validation/validation/lds.md; docs/validation.md says what to make of it.
"""

from dsdm_jax.configs import base


def get_config():
  config = base.get_config()
  config.pool.max_bytes = 500_000
  config.pool.length = 64
  config.pool.vocab_size = 512
  config.targets.max_examples = 64
  config.model.width, config.model.mlp_width = 64, 256
  config.model.positions = 'rope'
  config.model.init_std = 0.1
  train = config.proxies.train
  train.batch_size, train.learning_rate, train.warmup_steps = 32, 5e-3, 10
  config.features.batch_size = 64
  config.datamodel.bootstrap = 64
  return config

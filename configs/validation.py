"""Validation of the datamodel: do scores predict what training on a subset does?

Trains models of 0.1 million parameters on hundreds of subsets of a pool of 2,048 rows of 64 tokens. Run it with:

    for stage in pool leakage targets validation; do
      python -m dsdm_jax.main --config=configs/validation.py --workdir=runs/validation --stage=$stage
    done

Hardware and time: two CPU cores, 38 minutes with the pool and targets of docs/validation.md.

Result: a table of linear datamodeling scores (LDS) at runs/validation/validation/lds.md. docs/validation.md explains it
and has the values for that pool and those targets.
"""

from dsdm_jax.configs import base


def get_config():
  config = base.get_config()
  config.pool.max_bytes = 500_000
  config.pool.max_document_bytes = 8_192
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

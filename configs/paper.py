"""The paper's models and training, for a pool that you bring: 125M proxies, 1.3B finals.

Run it with:

    python -m dsdm_jax.main --config=configs/paper.py --workdir=/shared/run --config.pool.sources="('mine:documents',)"

A pod of accelerators; it has not been run as a whole. Dense features of J = 16,384 are what the paper used;
`two_sided` is the cheap way. The paper's own pool, targets and arms are those of `configs/c4_dsdm.py`.
"""

from dsdm_jax.configs import base


def get_config():
  config = base.get_config()
  config.pool.max_bytes = config.pool.max_document_bytes = 0  # all of the pool
  config.pool.length = 1_024
  config.pool.vocab_size = 50_304
  config.model.size = '1.3B'
  config.proxies.model.size = '125M'
  for model in (config.model, config.proxies.model):
    model.scan_layers = model.remat = True
    model.compute_dtype = 'bfloat16'
  for train in (config.proxies.train, config.pretraining.train):
    train.batch_size = 1_024
    train.learning_rate = 6e-4
    train.warmup_steps = 200
    train.weight_decay = 4e-4
    train.save_every_steps = 1_000
    train.save_every_minutes = 30.0
  config.proxies.count = 4
  config.proxies.subset_share = 0.38
  config.proxies.epochs = 1.0
  config.features.projection = 'dense'
  config.features.dimension = 16_384
  config.datamodel.gram = 'full'
  config.datamodel.mix = 'mean'
  config.selection.examples = 6_400_000  # a quarter of the 25,000 steps of 1,024 that a 1.3B model gets
  config.selection.epochs = 4
  config.plan.rows = 216_948_746
  return config


def two_sided(config, batch_size, shard_rows):
  """Features at a fraction of what the paper's dense ones cost, from steps of `batch_size` rows."""
  for model in (config.model, config.proxies.model):
    model.attention = 'fused'
  config.proxies.model.remat = False  # what is kept for these batches fits
  config.features.projection = 'two_sided'
  config.features.batch_size = batch_size
  config.features.shard_rows = shard_rows
  config.features.store_dtype = 'int8'
  return config

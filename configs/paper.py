"""The paper's models and training on your own pool: 125M proxies, 1.3B final models.

Run it with:

    python -m dsdm_jax.main --config=configs/paper.py --workdir=/shared/run --config.pool.sources="('mine:documents',)"

Hardware: a pod of accelerators. It has not been run as a whole. Features are dense with J = 16,384, as in the paper;
`two_sided` is the cheaper choice. `configs/c4_dsdm.py` adds the paper's pool, targets and arms.
"""

from dsdm_jax.configs import base


def get_config():
  config = base.get_config()
  config.pool.max_bytes = 0  # all of the pool
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
  """Two-sided features, at a fraction of the cost of the paper's dense ones; `batch_size` rows a step."""
  for model in (config.model, config.proxies.model):
    model.attention = 'fused'
  config.proxies.model.remat = False  # activations of these batches fit
  config.features.projection = 'two_sided'
  config.features.batch_size = batch_size
  config.features.shard_rows = shard_rows
  config.features.store_dtype = 'int8'
  return config

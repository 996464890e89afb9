"""A pool in which target examples stand: --config=tests/selection/planted.py."""

from ml_collections import ConfigDict

from tests.pipeline import tiny

COUNT = 20


def get_config() -> ConfigDict:
  c = tiny.get_config()
  c.pool.max_bytes, c.pool.max_document_bytes, c.pool.length, c.pool.vocab_size = 150_000, 8_192, 64, 512
  c.pool.plant_targets = c.targets.max_examples = COUNT
  c.model.width, c.model.mlp_width = 32, 64
  c.proxies.epochs = 2.0
  c.proxies.train.batch_size, c.proxies.train.save_every_steps, c.proxies.train.warmup_steps = 32, 0, 10
  c.proxies.train.log_every_steps = 100
  c.features.dimension, c.features.shard_rows = 1_024, 2_048
  return c

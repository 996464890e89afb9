"""The smallest whole run, for tests; it shows nothing but that every part works.

python -m dsdm_jax.main --config=tests/pipeline/tiny.py --workdir=DIR
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  c = base.get_config()
  c.pool.max_bytes = 60_000
  c.pool.max_document_bytes = 2_048
  c.pool.length = 32
  c.pool.vocab_size = 320
  c.targets.max_examples = 12
  c.model.layers, c.model.width, c.model.heads, c.model.kv_heads, c.model.mlp_width = 1, 16, 2, 2, 32
  c.features.projection, c.features.dimension = 'two_sided', 64
  c.features.shard_rows = 256
  c.selection.examples, c.selection.epochs = 32, 2
  c.pretraining.seeds = 2
  for train in (c.proxies.train, c.pretraining.train):
    train.batch_size, train.save_every_steps, train.log_every_steps, train.warmup_steps = 16, 2, 1, 1
  c.proxies.epochs = 0.25
  c.report.examples = 2
  return c

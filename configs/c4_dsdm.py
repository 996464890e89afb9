"""The paper's experiment: 216,948,746 candidates of 1,024 tokens, four 125M proxies, J = 16,384, 1.3B finals.

See what it takes, on any machine with libtpu (requirements-tpu.txt), before it starts:

    python -m dsdm_jax.main --config=configs/c4_dsdm.py --stage=plan

It has not been run as a whole, and the pool is yours to bring: pool.sources is paper.py's. Batches are the paper's and
suit slices of 256 to 1,024 chips; docs/scale.md has the plans. Features are two-sided, which is what makes the scale
affordable; the paper's own are `features.projection=dense`.
"""

from configs import paper


def get_config():
  config = paper.get_config()
  for model in (config.model, config.proxies.model):
    model.attention = 'fused'
  config.proxies.model.remat = False  # 4 rows a chip fit without
  config.features.projection = 'two_sided'
  config.features.batch_size = 4_096
  config.features.shard_rows = 65_536
  config.features.store_dtype = 'int8'
  config.pretraining.seeds = 1
  config.evaluation.batch_size = 1_024
  config.plan.topology = 'v5p:8x8x16'
  config.plan.rows = 216_948_746
  config.plan.price_per_chip_hour = 4.2  # v5p on demand
  return config

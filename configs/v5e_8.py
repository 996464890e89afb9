"""DsDm on one v5e-8: a pool of 4 million rows of 1,024 tokens, two 125M proxies, 125M final models.

Plan it first, on any machine with libtpu (requirements-tpu.txt). Then run it on the TPU VM, or from anywhere with
gcloud (docs/scale.md):

    python -m dsdm_jax.main --config=configs/v5e_8.py --stage=plan
    bash launch/tpu.sh all mine --zone=us-west4-a --type=v5litepod-8 -- --config=configs/v5e_8.py

Bring your own pool (`pool.sources`, docs/pools.md) and targets (`targets.tasks`).

Hardware and time: eight chips of v5e, 4.3 to 7.6 hours (modelled, not measured). It has not been run as a whole.
"""

from dsdm_jax.configs import paper


def get_config():
  config = paper.two_sided(paper.get_config(), batch_size=64, shard_rows=8_192)
  for model in (config.model, config.proxies.model):
    model.size = '125M'
    model.remat = False
  for train in (config.proxies.train, config.pretraining.train):
    train.batch_size = 256
    train.microbatches = 4  # eight rows a chip at a time
  config.proxies.count = 2
  config.proxies.subset_share = 0.25
  config.selection.examples = 600_000  # a quarter of 2.4 million rows, 20 tokens for each parameter
  config.pretraining.seeds = 2
  config.plan.topology = 'v5e:2x4'
  config.plan.rows = 4_000_000
  config.plan.price_per_chip_hour = 1.2  # v5e on demand
  return config

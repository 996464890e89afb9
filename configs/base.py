"""Every key of a run with its default. The other configs change a few of them.

`dsdm_jax/config/schema.py` declares the keys and docs/keys.md lists them, with types, units and bounds. Start from
configs/quickstart.py and override any key on the command line: `--config.datamodel.damping=0.03`.
"""

from dsdm_jax.config import schema


def get_config():
  return schema.config_dict()


def model():
  """The section `model` alone."""
  return schema.config_dict(schema.Model)


def training():
  """The section `pretraining.train` or `proxies.train` alone."""
  return schema.config_dict(schema.Training)

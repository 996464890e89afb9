"""Proxy models of several sizes and training lengths for the validation, each trained when it is first used."""

import dataclasses
import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.core import prng
from dsdm_jax.training.differentiable import ScannedTraining
from dsdm_jax.training.step import TrainState

EARLY, MIDDLE, LATE = range(3)  # indices of the checkpoints of one proxy
STOPS = (1 / 3, 2 / 3, 1.0)


@dataclasses.dataclass(frozen=True)
class Kind:
  """Attributes: width of the model and length of its training, as multiples of the config's."""

  width: float = 1.0
  length: float = 1.0


USUAL = Kind()


@dataclasses.dataclass(frozen=True)
class Proxy:
  """Attributes: training that it belongs to; its state at each of `STOPS`."""

  training: ScannedTraining
  states: tuple[TrainState, ...]


class ProxyPool:
  """Proxies that are trained on random subsets of the rows, with other seeds than the models of the truth.

  Args:
    config: of the run, with `proxies.train` of the setting.
    vocab_size: of the tokens.
    tokens_NL: all rows.
  """

  def __init__(self, config: ConfigDict, vocab_size: int, tokens_NL: np.ndarray):
    self._config, self._vocab_size, self._tokens_NL = config, vocab_size, tokens_NL
    self.training = functools.lru_cache(maxsize=None)(self._make_training)
    self._trained = functools.lru_cache(maxsize=None)(self._train)

  def __call__(self, kind: Kind, number: int) -> Proxy:
    """Proxy `number` of a kind; its rows and their order are the same for all kinds."""
    return self._trained(kind, number)

  def _train(self, kind: Kind, number: int) -> Proxy:
    training = self.training(kind)
    weight_MN = np.zeros((1, training.rows), np.float32)
    order = prng.numpy_stream(self._config.seed, 'validation', 'proxy', number).permutation(training.rows)
    weight_MN[0, order[: round(self._config.proxies.subset_share * training.rows)]] = 1
    states = training.train(f'proxy {number}', weight_MN, STOPS)
    return Proxy(training, tuple(jax.tree.map(lambda x: x[0], s) for s in states))

  def _make_training(self, kind: Kind) -> ScannedTraining:
    proxies, epochs = self._config.proxies, kind.length * self._config.validation.epochs
    model = scaled(proxies.model, kind.width)
    return ScannedTraining(model, proxies.train, self._vocab_size, self._tokens_NL, epochs, self._config.seed)


def scaled(model: ConfigDict, width: float) -> ConfigDict:
  """The model's config at `width` times the width, with the same number of heads."""
  model = ConfigDict(model.to_dict())
  model.width, model.mlp_width = round(model.width * width), round(model.mlp_width * width)
  return model

"""Output functions and token probabilities of the proxies, against the model one example at a time."""

import threading

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.attribution.extractor import ProxyOutputs
from dsdm_jax.core import prng
from dsdm_jax.lm import outputs
from dsdm_jax.training.step import trainer

VOCAB, LENGTH = 32, 10


class InMemory:
  """A pool of rows in memory."""

  def __init__(self, tokens_NL):
    self._tokens_NL, self.num_rows, self.threads = tokens_NL, len(tokens_NL), set()

  def weights(self, rows):
    return np.broadcast_to(np.arange(LENGTH) > 0, (len(rows), LENGTH)).astype(np.float32)

  def tokens(self, rows):
    self.threads.add(threading.current_thread())
    return self._tokens_NL[rows]


@pytest.fixture
def proxies(one_device):
  config = base.get_config()
  config.proxies.model.update({'width': 16, 'mlp_width': 32, 'layers': 1, 'heads': 2})
  compiled = trainer(config.proxies.model, config.proxies.train, VOCAB, LENGTH, one_device)
  state = compiled.init(prng.stream(0, 'init'))
  model = nnx.merge(compiled.graphdef, state.params, state.rest)
  return ProxyOutputs(compiled, outputs.margin, batch_size=4), state, model


def test_outputs_and_probabilities_one_by_one(proxies):
  passes, state, model = proxies
  rng = np.random.default_rng(0)
  tokens_NL = rng.integers(0, VOCAB, (11, LENGTH)).astype(np.int32)  # not a multiple of the batch
  weights_NL = (rng.random((11, LENGTH)) < 0.5).astype(np.float32)
  weights_NL[:, 5] = 1
  progress = []
  output_T = passes.of_examples(state, tokens_NL, weights_NL)
  pool = InMemory(tokens_NL)
  mean_N = passes.mean_probability(state, pool, progress.append)
  assert threading.main_thread() not in pool.threads, 'rows are read ahead'
  assert sum(progress) == 11 and passes.flop > 0
  for n, tokens_L in enumerate(tokens_NL):
    logits_LV = np.asarray(model(tokens_L[None])[0])
    assert output_T[n] == pytest.approx(float(outputs.margin(logits_LV, tokens_L, weights_NL[n])), rel=1e-4, abs=1e-5)
    p_LV = np.asarray(jax.nn.softmax(logits_LV.astype(np.float64)))
    assert mean_N[n] == pytest.approx(p_LV[np.arange(LENGTH - 1), tokens_L[1:]].mean(), rel=1e-4)
